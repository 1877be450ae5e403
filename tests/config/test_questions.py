"""Questions that contradict one another, and the family of shapes of a ladder."""

import itertools

import pytest

from scaling_ldm import config
from scaling_ldm.config import questions, shapes


def problems(**changes):
    """What is refused; changes are "advise_hours": 3.0."""
    c = config.default().to_dict()
    for name, value in changes.items():
        section, _, field = name.partition("_")
        c[section][field] = value
    try:
        config.resolve(c)
    except config.ConfigError as e:
        return str(e)
    return ""


@pytest.mark.parametrize(
    "asked",
    [
        {"advise_budget": 0.5},
        {"advise_flops": 1e20},
        {"advise_loss": 0.6},
        {"advise_loss": 0.6, "advise_run": "a", "advise_chips": 4},
        {"advise_hours": 3.0, "advise_device": "tpu-v5e", "advise_utilisation": 0.5},
        {"advise_hours": 3.0, "advise_flops_per_second": 1e12, "advise_price": 2.0},
        {"plan_from_laws": "laws.json", "plan_budget": 1e20},
        {"plan_next": 3, "plan_budget": 1e20, "plan_next_of": "L_opt"},
    ],
)
def test_one_question_is_asked(asked):
    assert problems(**asked) == ""


def test_any_two_questions_are_one_too_many():
    for pair in itertools.combinations(("budget", *questions.TRAINING), 2):
        said = problems(**{f"advise_{name}": 1.0 for name in pair})
        named = " and ".join(f"config.advise.{name}" for name in pair)
        assert f"{named} are set; --stages advise answers one question" in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"advise_budget": 0.5, "advise_chips": 8},
            "config.advise.chips = 8 is not read with config.advise.budget, which asks "
            "for a sampler",
        ),
        (
            {"advise_flops": 1e20, "advise_unit": "flops"},
            "config.advise.unit = 'flops' is not read with config.advise.flops",
        ),
        ({"advise_hours": 3.0}, "config.advise.hours needs a speed: one of config.adv"),
        (
            {"advise_flops": 1e20, "advise_price": 2.0},
            "config.advise.price = 2.0 is not read alone: one of config.advise.device",
        ),
        (
            {"advise_loss": 0.5, "advise_run": "a", "advise_device": "l4"},
            "config.advise.device and config.advise.run both say how fast",
        ),
        (
            {"advise_flops": 1.0, "advise_run": "a", "advise_dtype": "float32"},
            "config.advise.dtype = 'float32' is not read without config.advise.device",
        ),
        ({"plan_from_laws": "a"}, "config.plan.from_laws needs config.plan.budget"),
        ({"plan_next": 2}, "config.plan.next needs config.plan.budget"),
        ({"plan_budget": 1e20}, "config.plan.budget = 1e+20 is not read without"),
        (
            {"plan_from_laws": "a", "plan_budget": 1.0, "plan_next": 1},
            "set one, not both",
        ),
        (
            {"plan_from_laws": "a", "plan_budget": 1.0, "plan_next_of": "L_opt"},
            "config.plan.next_of = 'L_opt' is not read without config.plan.next",
        ),
        (
            {
                "plan_from_laws": "a",
                "plan_budget": 1.0,
                "plan_steps": 5,
                "plan_budgets_flops": (),
            },
            "config.plan.steps = 5 with config.plan.from_laws",
        ),
        (
            {
                "plan_from_laws": "a",
                "plan_budget": 1.0,
                "plan_axes": (("train.seed", (0, 1)),),
                "plan_axes_only": (("train.seed", (("budgets", (1e18,)),)),),
            },
            "config.plan.axes_only with config.plan.from_laws",
        ),
        (
            {
                "plan_next": 1,
                "plan_budget": 1.0,
                "plan_steps": 5,
                "plan_budgets_flops": (),
            },
            "config.plan.next = 1 proposes single runs of budgets",
        ),
        ({"report_published": ("abra",)}, "did you mean abra2026?"),
    ],
)
def test_a_question_that_contradicts_itself_is_refused(asked, said):
    assert said in problems(**asked)


def test_no_question_is_no_problem_until_the_stage_asks():
    assert questions.asked(config.AdviseConfig()) == []
    assert problems(advise_device="l4") == ""  # of an experiment file


def ladder(sizes, **model):
    c = config.default().to_dict()
    c["plan"]["sizes"] = sizes
    c["model"] |= model
    return config.resolve(c)


@pytest.mark.parametrize(
    ("sizes", "model", "family"),
    [
        # A fixed ratio of width and depth.
        (((128, 2), (192, 3), (256, 4)), {}, [(64, 1), (128, 2), (192, 3), (256, 4)]),
        # One depth; a step of width that the heads divide.
        (
            ((16, 2), (24, 2), (64, 2)),
            {"head_dim": 0, "heads": 2},
            [(4, 2), (8, 2), (12, 2), (16, 2)],
        ),
        # A depth that is a power of the width: 2, 2 sqrt(2), 4.
        (
            ((128, 2), (256, 3), (512, 4)),
            {"head_dim": 32},
            [(32, 1), (64, 1), (96, 2), (128, 2), (160, 2), (192, 2), (224, 3)],
        ),
        (((64, 4),), {}, [(64, 4), (128, 4)]),
        (
            ((96, 4), (160, 4)),
            {"architecture": "unet", "head_dim": 0, "heads": 8},
            [(32, 4), (64, 4), (96, 4), (128, 4), (160, 4)],
        ),
    ],
)
def test_a_family_goes_on_as_its_ladder_does(sizes, model, family):
    e = ladder(sizes, **model)
    assert [*itertools.islice(shapes.family(e), len(family))] == family
    assert {*sizes} <= {*itertools.islice(shapes.family(e), 200)}
    assert all(shapes.can_be_built(e, shape) for shape in family)
