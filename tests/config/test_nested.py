"""Which settings nest budgets, and what a refusal says."""

import pytest

from scaling_ldm import config

NESTED = {"plan.reuse": "nested", "optimizer.warmup_fraction": 0.0}


def resolve(**changes):
    c = config.default()
    c.update_from_flattened_dict(NESTED | changes)
    return config.resolve(c)


def test_a_constant_rate_nests_whatever_says_how_long_its_warm_up_is():
    assert resolve().plan.reuse == "nested"
    assert resolve(**{"optimizer.warmup_steps": 5}).optimizer.warmup_steps == 5
    assert resolve(**{"optimizer.warmup_samples": 5}).optimizer.warmup_samples == 5
    # Averages depend on the steps so far, not on the steps to come.
    averages = ("ema", "power_0.1")
    assert resolve(**{"optimizer.averages": averages}).plan.reuse == "nested"
    assert config.Experiment().plan.reuse == "separate"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer.schedule": "cosine"}, "schedule = 'cosine': the rate falls"),
        ({"optimizer.schedule": "wsd"}, "schedule = 'wsd': the rate falls"),
        ({"optimizer.warmup_fraction": 0.01}, "warmup_fraction = 0.01: the warm-up"),
        (
            {"plan.budgets_flops": (), "plan.steps": 200},
            "plan.steps = 200: runs of the same steps",
        ),
        ({"plan.reuse": "nest"}, "'nest'; known: separate, nested, decay (did you"),
        ({"plan.reuse": "decay"}, "schedule = 'constant': a branch is the decay of"),
    ],
)
def test_what_makes_nesting_wrong_is_refused(changes, said):
    with pytest.raises(config.ConfigError) as refused:
        resolve(**changes)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 2
    if "plan.reuse" not in changes:
        assert resolve(**changes, **{"plan.reuse": "separate"})


def test_decay_branches_need_wsd_and_what_nesting_needs_beside_the_schedule():
    decay = {"plan.reuse": "decay", "optimizer.schedule": "wsd"}
    assert resolve(**decay).plan.reuse == "decay"
    for changes, said in (
        ({"optimizer.warmup_fraction": 0.01}, "warmup_fraction = 0.01: the warm-up"),
        ({"plan.budgets_flops": (), "plan.steps": 200}, "runs of the same steps"),
        ({"optimizer.schedule": "cosine"}, "schedule = 'cosine': a branch is the dec"),
    ):
        with pytest.raises(config.ConfigError, match=said):
            resolve(**(decay | changes))


def test_an_axis_may_not_vary_what_nesting_needs(monkeypatch):
    from scaling_ldm.stages import plan

    axes = {"optimizer.schedule": ("constant", "cosine")}
    with pytest.raises(config.ConfigError, match="schedule = 'cosine': the rate falls"):
        plan.plan(resolve(**{"plan.axes": (tuple(axes.items()))}))


def test_the_recipe_of_a_run_does_not_depend_on_it():
    nested, separate = resolve(), resolve(**{"plan.reuse": "separate"})
    assert nested.recipe_hash == separate.recipe_hash
