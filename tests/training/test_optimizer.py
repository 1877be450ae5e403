"""Learning rates: each schedule against its formula, and the three ways to warm up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import config
from scaling_ldm.training import optimizer

PEAK, STEPS = 3e-3, 200
BASE = config.OptimizerConfig(learning_rate=PEAK, warmup_fraction=0.05)
SCHEDULES = {
    "constant": {},
    "cosine": {"schedule": "cosine"},
    "wsd": {"schedule": "wsd", "decay_fraction": 0.25},
    "wsd 1-sqrt": {"schedule": "wsd", "decay_fraction": 0.3, "decay_shape": "1-sqrt"},
}


def wanted(name, cfg, steps):
    """The rate of every step of a run, written out."""
    warmup = round(cfg.warmup_fraction * steps)
    s = np.arange(steps + 1, dtype=np.float64)
    rise = np.minimum(1, (s + 1) / max(warmup, 1))
    if name == "constant":
        return PEAK * rise
    if name == "cosine":
        done = np.clip((s - warmup) / (steps - warmup), 0, 1)
        return PEAK * rise * (1 + np.cos(np.pi * done)) / 2
    fall = round(cfg.decay_fraction * steps)
    done = np.clip((s - (steps - fall)) / fall, 0, 1)
    return PEAK * rise * (1 - (np.sqrt(done) if "sqrt" in name else done))


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedule_is_its_formula_and_is_compiled_once(name):
    cfg = dataclasses.replace(BASE, **SCHEDULES[name])
    rate = jax.jit(lambda step, numbers: optimizer.scheduled_rate(cfg, step, numbers))
    for steps in (STEPS, 41, 10):
        warmup = optimizer.warmup_steps(cfg, steps, 8)
        numbers = optimizer.schedule_numbers(cfg, PEAK, warmup, steps)
        got = [rate(jnp.int32(s), numbers) for s in range(steps + 1)]
        assert_allclose(got, wanted(name, cfg, steps), rtol=1e-4, atol=1e-9)
        if name != "constant":
            assert got[steps] == pytest.approx(0, abs=1e-9)  # the step after the last
            assert got[steps - 1] > 0
    assert rate._cache_size() == 1


def test_the_default_is_computed_as_in_0_1_0():
    cfg = config.OptimizerConfig()
    numbers = optimizer.schedule_numbers(cfg, PEAK, 7, STEPS)
    assert set(numbers) == {"peak", "warmup"}
    jaxpr = jax.make_jaxpr(lambda s, n: optimizer.scheduled_rate(cfg, s, n))
    before = jax.make_jaxpr(
        lambda s, n: (
            n["peak"] * jnp.minimum(1.0, (s + 1.0) / jnp.maximum(n["warmup"], 1.0))
        )
    )
    assert str(jaxpr(jnp.int32(3), numbers)) == str(before(jnp.int32(3), numbers))


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"warmup_fraction": 0.05}, 10),
        ({"warmup_fraction": 0.0}, 0),
        ({"warmup_fraction": 0.0, "warmup_steps": 30}, 30),
        ({"warmup_fraction": 0.0, "warmup_samples": 100}, 12),  # of 8 pictures each
        ({"warmup_fraction": 1.0}, STEPS),
        ({"warmup_fraction": 0.0, "warmup_steps": STEPS}, STEPS),
    ],
)
def test_a_warm_up_is_stated_in_three_ways(given, steps):
    cfg = dataclasses.replace(BASE, **given)
    assert optimizer.warmup_steps(cfg, STEPS, batch_size=8) == steps


def test_a_warm_up_longer_than_the_run_is_refused():
    cfg = dataclasses.replace(BASE, warmup_fraction=0.0, warmup_steps=STEPS + 1)
    with pytest.raises(config.ConfigError, match="warm-up of 201 steps in a run of 20"):
        optimizer.warmup_steps(cfg, STEPS, 8)
    cfg = dataclasses.replace(cfg, warmup_steps=180, schedule="wsd")
    with pytest.raises(config.ConfigError, match="180 steps and a decay of 40 in a"):
        optimizer.warmup_steps(cfg, STEPS, 8)
    cfg = dataclasses.replace(BASE, schedule="wsd", decay_fraction=0.95)
    for steps in range(10, 60):  # both shares are rounded
        warmup = optimizer.warmup_steps(cfg, steps, 8)
        numbers = optimizer.schedule_numbers(cfg, PEAK, warmup, steps)
        assert warmup <= numbers["decay_start"]


def test_a_first_moment_in_bfloat16_is_that_of_float32_to_its_digits():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=100), jnp.float32)}
    slopes = rng.normal(size=(5, 100)).astype(np.float32)

    def moments(dtype):
        cfg = dataclasses.replace(BASE, clip_norm=1e6, first_moment_dtype=dtype)
        adamw = optimizer.adamw(cfg)
        state = adamw.init(params)
        for slope in slopes:
            direction, state = adamw.update({"w": slope}, state, params)
        return direction["w"], state[1].mu["w"], state[1].nu["w"]

    wide, narrow = moments("float32"), moments("bfloat16")
    assert [a.dtype for a in wide] == [jnp.float32] * 3
    assert [a.dtype for a in narrow] == [jnp.float32, jnp.bfloat16, jnp.float32]
    assert_array_equal(narrow[2], wide[2])
    scale = np.abs(wide[1]).max()
    assert_allclose(np.asarray(narrow[1], np.float32), wide[1], atol=2**-6 * scale)
    assert np.any(np.asarray(narrow[1], np.float32) != wide[1])


def test_other_types_of_the_first_moment_are_refused(tiny):
    c = tiny.copy_and_resolve_references()
    c.optimizer.first_moment_dtype = "float16"
    with pytest.raises(config.ConfigError, match="moment_dtype = 'float16'; known"):
        config.resolve(c)
