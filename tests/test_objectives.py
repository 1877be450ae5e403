"""The objective, the validation loss and the Euler sampler against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import special, stats

from scaling_ldm import samplers
from scaling_ldm.objectives import denoise, validation

SIGMA = 0.5  # of Gaussian data, per pixel


def optimal(params, x, t, cond):
    """E[eps - x0 | x_t] when x0 ~ N(0, SIGMA^2): linear in x_t."""
    del params, cond
    t = t[:, None, None, None]
    variance = (1 - t) ** 2 * SIGMA**2 + t**2
    return x * (t - (1 - t) * SIGMA**2) / variance


def optimal_error(t):
    """Var[eps - x0 | x_t] of the same: the least mean squared error at t."""
    return SIGMA**2 / ((1 - t) ** 2 * SIGMA**2 + t**2)


def data(n, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(SIGMA * rng.normal(size=(n, 8, 8, 2)), jnp.float32)


def test_interpolation_ends_at_data_and_noise():
    x, eps = data(2), data(2, seed=1)
    assert_allclose(denoise.interpolate(x, eps, jnp.zeros(2)), x)
    assert_allclose(denoise.interpolate(x, eps, jnp.ones(2)), eps)


def test_training_loss_of_the_optimal_denoiser_is_the_conditional_variance():
    loss = jax.jit(
        lambda key: denoise.rectified_flow(
            optimal,
            None,
            {"x": data(512)},
            {},
            key,
            time_location=0.3,
            time_scale=0.7,
            caption_dropout=0.1,
        )
    )
    got = np.mean([loss(jax.random.key(i)) for i in range(40)])
    t = special.expit(0.3 + 0.7 * stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000))
    assert_allclose(got, optimal_error(t).mean(), rtol=5e-3)


def test_times_follow_the_logit_normal_law():
    normal = jax.random.normal(jax.random.key(0), (20_000,))
    t = np.asarray(denoise.logit_normal(normal, -0.5, 1.5))
    assert stats.kstest((special.logit(t) + 0.5) / 1.5, "norm").pvalue > 1e-3


def test_captions_are_dropped_at_the_stated_rate():
    seen = []

    def spy(params, x, t, cond):
        seen.append(cond)
        return x

    n = 4000
    batch = {
        "x": jnp.zeros((n, 1, 1, 1)),
        "text": jnp.full((n, 3), 7),
        "mask": jnp.ones((n, 3), bool),
    }
    null = {"text": jnp.array([2, 0, 0]), "mask": jnp.array([True, False, False])}
    denoise.rectified_flow(
        spy,
        None,
        batch,
        null,
        jax.random.key(0),
        time_location=0.0,
        time_scale=1.0,
        caption_dropout=0.25,
    )
    dropped = np.asarray(seen[0]["text"][:, 0] == 2)
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)
    assert (np.asarray(seen[0]["text"])[dropped] == [2, 0, 0]).all()
    assert (np.asarray(seen[0]["mask"])[dropped] == [True, False, False]).all()
    assert (np.asarray(seen[0]["text"])[~dropped] == 7).all()


def test_strata_are_covered_once_in_a_fixed_order():
    t = validation.stratified_times(64, location=0.2, scale=0.8, seed=3)
    quantile = special.ndtr((special.logit(t.astype(np.float64)) - 0.2) / 0.8)
    assert_allclose(np.sort(quantile), (np.arange(64) + 0.5) / 64, rtol=1e-4)
    again = validation.stratified_times(64, location=0.2, scale=0.8, seed=3)
    assert (t == again).all()
    other = validation.stratified_times(64, location=0.2, scale=0.8, seed=4)
    assert (t != other).any()


def test_validation_errors_do_not_depend_on_the_batch():
    x, key = data(12), jax.random.key(5)
    t = jnp.asarray(validation.stratified_times(12, location=0.0, scale=1.0, seed=0))
    index = jnp.arange(12)

    def errors(rows):
        return validation.errors(optimal, None, x[rows], {}, t[rows], index[rows], key)

    whole = errors(slice(0, 12))
    parts = np.concatenate([errors(slice(0, 5)), errors(slice(5, 12))])
    assert_allclose(parts, whole, rtol=1e-6)
    shuffled = errors(np.array([7, 2, 11]))
    assert_allclose(shuffled, whole[np.array([7, 2, 11])], rtol=1e-6)


def test_stratification_takes_the_variance_over_t_away():
    """The validation loss of the optimal denoiser, against its closed form."""
    n = 2048
    t = validation.stratified_times(n, location=0.0, scale=1.0, seed=0)
    got = validation.errors(
        optimal, None, data(n), {}, jnp.asarray(t), jnp.arange(n), jax.random.key(0)
    )
    assert_allclose(np.mean(got), optimal_error(t).mean(), rtol=2e-2)


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_evaluates_once_a_step_on_the_uniform_grid(steps):
    seen = []

    def velocity(x, t):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return jnp.ones_like(x)

    out = samplers.euler(velocity, jnp.zeros((2, 1, 1, 1)), steps=steps)
    jax.effects_barrier()
    assert_allclose(sorted(seen, reverse=True), 1 - np.arange(steps) / steps, rtol=1e-6)
    assert_allclose(out, -1.0, rtol=1e-6)


def test_euler_converges_with_order_one_to_the_gaussian_flow():
    """The flow of Gaussian data maps noise to data: x_0 = SIGMA x_1."""
    noise = data(4) / SIGMA

    def error(steps):
        out = samplers.euler(lambda x, t: optimal(None, x, t, None), noise, steps=steps)
        return float(jnp.abs(out - SIGMA * noise).max())

    errors = [error(steps) for steps in (32, 64, 128)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert_allclose(orders, 1.0, atol=0.1)


def test_euler_refuses_no_steps():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        samplers.euler(lambda x, t: x, jnp.zeros((1, 1, 1, 1)), steps=0)
