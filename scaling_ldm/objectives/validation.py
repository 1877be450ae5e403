"""A validation loss that only the weights can change; pure functions of arrays.

Sample i always has the same picture, the same noise (from its own key) and the same
time: the i-th of a fixed permutation of the midpoints of n equal strata of t's law. So
two sizes, batch sizes, device counts or restarts differ by arithmetic rounding alone,
and the variance over t, the largest part of a diffusion loss's, is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from scaling_ldm.objectives import denoise
from scaling_ldm.shapes import LatentBHWC, TimeB


def stratified_times(
    samples: int, *, location: float, scale: float, seed: int
) -> np.ndarray:
    """Times of all samples, float32 [samples]: one per stratum, in a fixed order."""
    quantile = (np.random.default_rng(seed).permutation(samples) + 0.5) / samples
    return special.expit(location + scale * special.ndtri(quantile)).astype(np.float32)


def errors(
    apply: Callable[..., jax.Array],
    params: Any,
    x0_BHWC: LatentBHWC,
    cond: denoise.Batch,
    t_B: TimeB,
    index_B: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Squared error of each sample, [B]; `index` selects its noise."""

    def noise(index: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, index), x0_BHWC.shape[1:])

    eps = jax.vmap(noise)(index_B)
    return denoise.flow_errors(
        apply, params, x0_BHWC.astype(jnp.float32), eps, t_B, cond
    )
