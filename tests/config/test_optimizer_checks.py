"""Averages, schedules and warm-ups: what is accepted, and what a refusal says."""

import pathlib
import re

import pytest

from scaling_ldm import config


def resolve(**changes):
    c = config.default()
    c.optimizer.update(changes)
    return config.resolve(c).optimizer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"averages": ("emma",)}, "'emma' is neither 'ema' nor a name like 'power_0.0"),
        ({"averages": ("power_0.10",)}, "'power_0.10' is neither"),  # it is power_0.1
        ({"averages": ("power_",)}, "'power_' is neither"),
        ({"averages": ("0.1",)}, "'0.1' is neither"),
        ({"averages": ("raw",)}, "'raw' is neither"),
        ({"averages": ("power_0.3",)}, "0.3 must lie between 0 and 0.2887"),
        ({"averages": ("power_-0.1",)}, "-0.1 must lie between 0"),
        ({"averages": ("power_nan",)}, "nan must lie between 0"),
        ({"averages": ("ema", "power_0.1", "ema")}, "has duplicates"),
        ({"averages": ()}, "must be a non-empty tuple"),
        ({"averages": (0.1,)}, "averages must be str"),
        ({"averages": ("power_0.1",), "ema_decay": 0.5}, "does not name 'ema'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"schedule": "wsd", "decay_shape": "sqrt"}, "known: linear, 1-sqrt"),
        ({"schedule": "wsd", "decay_fraction": 0.0}, "must lie in [0.001, 1.0]"),
        (
            {"schedule": "wsd", "decay_fraction": 0.99},
            "warmup_fraction = 0.02 and config.optimizer.decay_fraction = 0.99: their",
        ),
        ({"warmup_steps": 10}, "has warmup_fraction = 0.02 and warmup_steps = 10: one"),
        (
            {"warmup_fraction": 0.0, "warmup_steps": 1, "warmup_samples": 2},
            "has warmup_steps = 1 and warmup_samples = 2: one of them says how long",
        ),
    ],
)
def test_refusals_say_what_is_wrong(changes, said):
    with pytest.raises(config.ConfigError) as refused:
        resolve(**changes)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 2


def test_what_goes_together_is_accepted():
    names = ("power_0.05", "power_0.1", "ema", "power_0.123456")
    assert resolve(averages=names).averages == names
    assert resolve(warmup_fraction=0.0).warmup_steps == 0
    assert resolve(warmup_fraction=0.0, warmup_samples=7).warmup_samples == 7
    assert resolve(schedule="wsd", decay_fraction=0.98).decay_fraction == 0.98


def test_the_default_keeps_two_widths_and_is_what_the_documents_say():
    """Two are needed to make other widths; the first one is used by the stages."""
    averages = ("power_0.1", "power_0.05")
    assert resolve().averages == config.OptimizerConfig().averages == averages
    docs = pathlib.Path(__file__).parents[2] / "docs"
    stated = re.search(
        r"the default is `(\(.*?\))`", (docs / "experiments.md").read_text()
    )
    assert stated[1] == str(averages).replace("'", '"')
    row = f"| `averages` | `tuple[str, ...]` | `{averages}` |"
    assert row in (docs / "config.md").read_text()


def test_a_name_holds_the_width():
    assert config.power_average(0.05) == "power_0.05"
    for width in (0.05, 0.1, 0.123456, 1e-5):
        assert config.sigma_rel_of(config.power_average(width)) == width
    for name in ("ema", "raw", "0.1", "power_0.10", "power_.1", "power_x"):
        assert config.sigma_rel_of(name) is None


def test_weights_that_no_run_keeps_are_not_fitted(tiny):
    c = tiny.copy_and_resolve_references()
    c.fit.weights = "emma"
    with pytest.raises(config.ConfigError, match="fit.weights = 'emma': the runs have"):
        config.resolve(c)
    c.fit.weights = "raw"
    config.resolve(c)
    c.fit.weights = "power_0.1"
    c.plan.axes = {"optimizer.averages": (("ema",), ("power_0.1",))}
    config.resolve(c)
