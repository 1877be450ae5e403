"""A small network, its denoiser and shorthands, for the tests of samplers."""

import functools

import jax
import jax.numpy as jnp
from numpy.testing import assert_allclose

from scaling_ldm.diffusion import noise, samplers

TABLE = noise.scaled_linear()
FLOW = noise.rectified_flow()
SHAPE = (8, 2, 2, 4)
KEY = jax.random.key(0)
TRAJECTORY = samplers.Output(trajectory=True)
INVERTED = samplers.SourceImage(None, invert=True)


def network(params, x, t, cond):
    """Anything nonlinear, in which samples do not meet."""
    shift = jnp.sin(0.01 * t + jnp.mean(x, (1, 2, 3))).reshape(-1, 1, 1, 1)
    return params * jnp.tanh(x + cond) + 0.3 * shift


COND = jnp.linspace(-1, 1, 8).reshape(8, 1, 1, 1)
UNCOND = jnp.full((1, 1, 1), 0.4)
W = jnp.float32(0.6)
DENOISE = samplers.denoiser(network, TABLE, prediction="v", time="schedule", params=W)
sample = functools.partial(samplers.sample, DENOISE, KEY, cond=COND, steps=6)
guided = functools.partial(sample, shape=SHAPE, uncond=UNCOND)


def gaussian(params, x, t, cond):
    """v of the optimal denoiser of N(0.5, 0.6^2), from alpha and sigma at t.

    params: alpha and sigma as functions of t, a jitted schedule in all but name.
    """
    a, s = (f.reshape(-1, 1, 1, 1) for f in params(t))
    centred = (x - a * 0.5) / ((0.6 * a) ** 2 + s**2)
    return a * s * centred - s * (0.5 + a * 0.36 * centred)


@functools.cache
def optimal(schedule):
    return samplers.denoiser(
        lambda x, t, cond: gaussian(
            lambda t: (schedule.alpha(t), schedule.sigma(t)), x, t, cond
        ),
        schedule,
        prediction="v",
        time="schedule",
    )


def same(x, y):
    assert_allclose(x, y, rtol=1e-5, atol=2e-6)
