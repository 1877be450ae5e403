"""Limits on the estimate of x0: clipping and dynamic thresholding; jax only.

The same arguments give the same function object. Samplers compile once per object, so
a second call with the same limit compiles nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

X0Transform = Callable[[jax.Array], jax.Array]


def clip(limit: float) -> X0Transform:
    """Clips estimates of x0 to [-limit, limit]."""
    return _clip(float(limit))


@functools.lru_cache(maxsize=64)
def _clip(limit: float) -> X0Transform:
    return lambda x0: jnp.clip(x0, -limit, limit)


def dynamic_threshold(
    quantile: float = 0.995, limit: float = 1.0, largest: float = math.inf
) -> X0Transform:
    """Clips the outliers of each sample's estimate of x0; scales it to at most `limit`.

    Saharia et al. 2022, section 2.3: clip to s = max(limit, quantile of |x0|), then
    divide by s / limit.

    Args:
      largest: s is at most this, as with the sample_max_value of diffusers.
    """
    return _dynamic_threshold(float(quantile), float(limit), float(largest))


@functools.lru_cache(maxsize=64)
def _dynamic_threshold(quantile: float, limit: float, largest: float) -> X0Transform:
    def transform(x0: jax.Array) -> jax.Array:
        flat = jnp.abs(x0.reshape(x0.shape[0], -1))
        s = jnp.clip(jnp.quantile(flat, quantile, axis=1), limit, largest)
        s = s.reshape((-1,) + (1,) * (x0.ndim - 1))
        return jnp.clip(x0, -s, s) * (limit / s)

    return transform
