"""A validation loss that only the weights can change; pure functions of arrays.

Sample i always has the same picture, the same noise (from its own key) and the same
time: the i-th of a fixed permutation of the midpoints of n equal strata of t's law, so
that n times cover the law evenly (on a table of steps, the whole steps they fall in).
So two sizes, batch sizes, device counts or restarts differ by arithmetic rounding
alone, and the variance over t, the largest part of a diffusion loss's, is gone.

The error is that of the network's own prediction, unweighted. A weighting says where
training spends its effort; were it part of the measure, two weightings could not be
compared, and the measure would follow the knob. Losses of different kinds of
prediction, schedules or laws of t are different quantities all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from scaling_ldm.diffusion.objectives import denoise
from scaling_ldm.models.shapes import LatentBHWC, TimeB


def stratified_times(
    samples: int, objective: denoise.DiffusionObjective, *, seed: int
) -> np.ndarray:
    """Times of all samples, float32 [samples]: one per stratum, in a fixed order."""
    quantile = (np.random.default_rng(seed).permutation(samples) + 0.5) / samples
    return objective.times(special.ndtri(quantile)).astype(np.float32)


def per_example_loss(
    apply: Callable[..., jax.Array],
    params: Any,
    x0_BHWC: LatentBHWC,
    cond: denoise.Batch,
    t_B: TimeB,
    index_B: jax.Array,
    key: jax.Array,
    *,
    objective: denoise.DiffusionObjective,
) -> jax.Array:
    """Unweighted squared error of each sample, [B]; `index` selects its noise."""

    def noise(index: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, index), x0_BHWC.shape[1:])

    eps = jax.vmap(noise)(index_B)
    x0 = x0_BHWC.astype(jnp.float32)
    return denoise.per_example_loss(apply, params, x0, eps, t_B, cond, objective)
