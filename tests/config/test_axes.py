"""The axes of a study: their forms, what is refused, and what runs are called."""

import json

import pytest
from processes import run_main

from scaling_ldm import config, records
from scaling_ldm.config import axes, run_names

RATES = "optimizer.learning_rate"


def resolved(tiny, given, only=(), **plan_fields):
    c = tiny.copy_and_resolve_references()
    c.plan.axes, c.plan.axes_only = given, only
    for name, value in plan_fields.items():
        c.plan[name] = value
    return config.resolve(c)


def refusal(tiny, *given, **plan_fields):
    with pytest.raises(config.ConfigError) as e:
        resolved(tiny, *given, **plan_fields)
    return str(e.value)


def test_a_mapping_and_pairs_are_the_same(tiny):
    """Of mappings, tuples, and the lists of a JSON file."""
    only = {RATES: {"budgets": (3e8,), "sizes": ((16, 2),)}}
    e = resolved(tiny, {RATES: (1e-3, 2e-3), "train.seed": (0, 1)}, only)
    pairs = ((RATES, (1e-3, 2e-3)), ("train.seed", (0, 1)))
    assert e.plan.axes == pairs
    assert e.plan.axes_only == ((RATES, (("budgets", (3e8,)), ("sizes", ((16, 2),)))),)
    assert resolved(tiny, pairs, e.plan.axes_only) == e
    assert (
        config.resolve(json.loads(json.dumps(config.to_config_dict(e).to_dict()))) == e
    )
    assert hash(e) != hash(resolved(tiny, {RATES: (1e-3, 3e-3)}))


def test_values_get_the_type_of_their_field(tiny):
    e = resolved(tiny, {"optimizer.weight_decay, train.seed": ((0, 1), (1, 2))})
    assert e.plan.axes == (("optimizer.weight_decay,train.seed", ((0.0, 1), (1.0, 2))),)
    assert isinstance(e.plan.axes[0][1][0][0], float)


def test_axes_are_no_part_of_the_recipe(tiny):
    plain, varied = config.resolve(tiny), resolved(tiny, {"train.seed": (0, 1)})
    assert plain.recipe_hash == varied.recipe_hash
    again = config.with_overrides(varied, {"train.seed": plain.train.seed})
    assert again == varied
    other = config.with_overrides(varied, {"train.seed": 1})
    assert (other.train.seed, other.plan) == (1, varied.plan)
    assert other.recipe_hash != plain.recipe_hash


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("plan.sizes", "axes of every study"),
        ("data.seed", "share their pictures"),
        ("data.path", "share their pictures"),
        ("encode.autoencoder", "share their pictures"),
        ("validation.seed", "one validation set"),
        ("mesh.fsdp", "where runs are"),
        ("generate.steps", "stages after training"),
        ("evaluate.seed", "stages after training"),
        ("frontier.images", "stages after training"),
        ("fit.seed", "stages after training"),
        ("name", "names the study"),
        ("question", "belongs to the study"),
        ("model.remat", "not which numbers"),
        ("train.keep_checkpoints", "not which numbers"),
        ("train.sed", "did you mean 'train.seed'"),
        ("train", "there is no field 'train'"),
    ],
)
def test_a_field_that_cannot_vary_is_refused_by_name(tiny, path, why):
    text = refusal(tiny, {path: (1, 2)})
    assert path in text and why in text
    assert "an axis is one of model.*, objective.*, optimizer.*, train.seed" in text


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"train.seed": (0, 0)}, "a value is given twice"),
        ({"train.seed": ("a",)}, "must be int"),
        ({"train.seed": ()}, "must be {name: values}"),
        ({"train.seed": 1}, "must be {name: values}"),
        (("train.seed", (0, 1)), "with a comma behind each"),
        ({RATES: (float("nan"),)}, "must be finite"),
        ({"train.seed,train.batch_size": (1, 2)}, "is not one value for each of"),
        ({"train.seed,train.batch_size": ((1, 2, 3),)}, "is not one value for each of"),
        (
            {"train.seed": (0,), "train.seed,train.batch_size": ((1, 8),)},
            "is given twice",
        ),
        ({"model.architecture": ("autoencoder_kl",)}, "a study of its own"),
    ],
)
def test_an_axis_of_another_form_is_refused(tiny, given, why):
    assert why in refusal(tiny, given)


@pytest.mark.parametrize(
    ("only", "why"),
    [
        ({RATES: {"budgets": (3e8,)}}, "no axis of this name"),
        ({"train.seed": {"budgets": (4e8,)}}, "is not in config.plan.budgets_flops"),
        ({"train.seed": {"sizes": ((8, 1),)}}, "is not in config.plan.sizes"),
        ({"train.seed": {"depths": (1,)}}, "neither 'budgets' nor 'sizes'"),
        ({"train.seed": (3e8,)}, 'must be {"budgets"'),
    ],
)
def test_a_restriction_that_restricts_nothing_is_refused(tiny, only, why):
    assert why in refusal(tiny, {"train.seed": (0, 1)}, only)


def test_budgets_cannot_restrict_a_study_without_them(tiny):
    only = {"train.seed": {"budgets": (3e8,)}}
    text = refusal(tiny, {"train.seed": (0, 1)}, only, steps=20, budgets_flops=())
    assert "is not in config.plan.budgets_flops = ()" in text


def test_the_width_of_stored_features_cannot_vary(tiny):
    c = tiny.copy_and_resolve_references()
    c.encode.text_encoder, c.encode.pictures = "owner/name", 64
    c.plan.axes = {"model.text_width": (8, 16)}
    with pytest.raises(config.ConfigError, match="features of one width"):
        config.resolve(c)
    c.encode.text_encoder, c.encode.pictures = "vocabulary", 0
    config.resolve(c)


def test_combinations_are_every_tuple_of_values(tiny):
    plan = resolved(
        tiny,
        {f"{RATES},train.batch_size": ((1e-3, 8), (2e-3, 16)), "train.seed": (0, 1)},
    ).plan
    rows = [tuple(o.values()) for o in axes.combinations(plan)]
    assert rows == [(1e-3, 8, 0), (1e-3, 8, 1), (2e-3, 16, 0), (2e-3, 16, 1)]
    assert axes.combinations(config.resolve(tiny).plan) == [{}]


def test_a_restricted_axis_has_its_first_value_elsewhere(tiny):
    sizes, budgets = ((16, 2), (16, 1)), (3e8, 6e8)
    plan = resolved(
        tiny,
        {"train.seed": (3, 4)},
        {"train.seed": {"budgets": (6e8,), "sizes": ((16, 1),)}},
        sizes=sizes,
        budgets_flops=budgets,
    ).plan
    found = {
        (budget, size): [
            seed
            for seed in (3, 4)
            if axes.allows(plan, {"train.seed": seed}, budget, size)
        ]
        for budget in budgets
        for size in sizes
    }
    assert found.pop((6e8, (16, 1))) == [3, 4]
    assert all(seeds == [3] for seeds in found.values()) and len(found) == 3


def test_groups_are_of_what_varies_but_the_seed(tiny):
    plan = resolved(
        tiny,
        {
            "train.seed": (0, 1),
            RATES: (1e-3, 2e-3),
            "optimizer.b1": (0.9,),
            "model.architecture": ("in_context", "cross_attention"),
        },
    ).plan
    groups = [run_names.group_of(plan, o) for o in axes.combinations(plan)]
    assert groups[:4] == groups[4:]  # of the two seeds
    assert groups[:2] == [
        "learning_rate 1e-3, in_context",
        "learning_rate 1e-3, cross_attention",
    ]
    assert len(set(groups)) == 4
    only_seeds = resolved(tiny, {"train.seed": (0, 1)}).plan
    assert {
        run_names.group_of(only_seeds, o) for o in axes.combinations(only_seeds)
    } == {""}


def test_losses_are_comparable_unless_the_objective_differs():
    def alike(path, *values):
        return axes.measured_alike([{path: value} for value in values])

    assert alike("objective.weighting", "uniform", "p2")
    assert alike("model.norm", "layer", "rms")
    assert alike("objective.prediction", "v", "v")
    assert not alike("objective.prediction", "v", "flow")
    assert not alike("objective.time_shift", 1.0, 2.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2e-3, "2e-3"),
        (1.5e-4, "1.5e-4"),
        (0.15, "0.15"),
        (1.0, "1"),
        (-0.5, "-0.5"),
        (-2e-5, "-2e-5"),
        (0.0, "0"),
        (123456.0, "1.23456e5"),
        (3, "3"),
        (True, "True"),
        ("rms", "rms"),
        ((1, 2.5), "1+2.5"),
    ],
)
def test_values_are_short_and_exact(value, text):
    assert run_names.value_text(value) == text
    if isinstance(value, float):
        assert float(text) == value


def test_ids_say_what_differs_from_the_experiment(tiny):
    e = config.resolve(tiny)

    def named(**_):
        return run_names.run_id(e, "3.000e08", "16x2", _["overrides"])

    assert named(overrides={}) == "3.000e08-16x2"
    same = {"train.seed": e.train.seed, RATES: e.optimizer.learning_rate}
    assert named(overrides=same) == "3.000e08-16x2"
    both = {"train.seed": 1, RATES: 2e-3}
    assert named(overrides=both) == "3.000e08-16x2-lr2e-3-seed1"
    assert named(overrides=dict(reversed(both.items()))) == named(overrides=both)
    more = both | {"model.architecture": "mmdit", "model.norm": "rms"}
    assert named(overrides=more) == "3.000e08-16x2-mmdit-norm_rms-lr2e-3-seed1"


def test_long_and_strange_ids_stay_file_names(tiny):
    e = config.resolve(tiny)
    every = {
        f"optimizer.{name}": 0.123456789012345
        for name in ("b1", "b2", "eps", "clip_norm")
    }
    many = every | {"objective.time_location": 0.123, "model.norm": "a/b c"}
    other = many | {"model.norm": "a/b d"}
    ids = [run_names.run_id(e, "3.000e08", "16x2", o) for o in (many, other)]
    assert len(set(ids)) == 2
    for found in ids:
        assert len(found) <= run_names.LONGEST_ID
        assert not set(found) & set("/ ")
    # A value as in the experiment is no part of them either.
    own = many | {"optimizer.weight_decay": e.optimizer.weight_decay}
    assert run_names.run_id(e, "3.000e08", "16x2", own) == ids[0]
    # Two names that would become one are still two.
    pair = [
        run_names.run_id(e, "3.000e08", "16x2", {"model.norm": name})
        for name in ("a/b", "a b", "a_b")
    ]
    assert len(set(pair)) == 3


def test_budgets_get_more_digits_only_where_they_are_needed():
    found = run_names.budget_texts((1.0004e9, 1e9, 1.23456e17, 1.00041e9))
    assert found == {
        1e9: "1.000e09",
        1.0004e9: "1.0004e09",
        1.00041e9: "1.00041e09",
        1.23456e17: "1.235e17",
    }
    found = run_names.budget_texts((1.60001e9, 1.60002e9))
    assert found == {1.60001e9: "1.600e09", 1.60002e9: "1.60002e09"}
    near = 1e9 * (1 + 2**-50)
    assert len(set(run_names.budget_texts((1e9, near)).values())) == 2


def test_the_plan_of_another_version_is_refused(tiny):
    e = config.resolve(tiny)
    for path in ("optimizer.gone", "gone.field", "name"):
        with pytest.raises(config.ConfigError, match="plan it again"):
            config.with_overrides(e, {path: 1})


def test_axes_from_the_command_line(tmp_path):
    """In pairs; the plan has a column for each."""
    flags = (
        "--config=experiments/tiny.py",
        f"--workdir={tmp_path / 'w'}",
        "--stages=plan",
        "--config.plan.sizes=((16, 1),)",
        "--config.plan.budgets_flops=(1.6e9,)",
        '--config.plan.axes=(("train.seed", (0, 1)), ("model.norm", ("layer", "rms")))',
    )
    out, _ = run_main(*flags)
    assert "train.seed" in out and "model.norm" in out
    rows = records.read_jsonl(tmp_path / "w" / "runs.jsonl")
    assert [row.run_id for row in rows] == [
        "1.600e09-16x1",
        "1.600e09-16x1-norm_rms",
        "1.600e09-16x1-seed1",
        "1.600e09-16x1-norm_rms-seed1",
    ]
    assert [row.group for row in rows] == ["norm layer", "norm rms"] * 2
    assert [row.seed for row in rows] == [0, 0, 1, 1]
