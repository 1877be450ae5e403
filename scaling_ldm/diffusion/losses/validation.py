"""A validation loss that only the weights can change; pure functions of arrays.

Sample i always has the same picture, the same noise (from its own key) and the same
time. Its time is the i-th of a fixed permutation of the midpoints of n equal strata of
the distribution of t. So n times cover the distribution evenly (on a table of steps,
the whole steps that they fall in). Two batch sizes, device counts or restarts then
differ by rounding alone. Two sizes of network are compared without the variance over t,
which is the largest part of the variance of a diffusion loss.

The error is that of the network's own prediction, unweighted. If the weighting were a
part of the measure, two weightings could not be compared. Losses of different kinds of
prediction, schedules or distributions of t are different quantities all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from scaling_ldm.diffusion.losses import denoise
from scaling_ldm.diffusion.shapes import ValueB
from scaling_ldm.models.shapes import IndexB, LatentBHWC, TimeB


def stratified_times(
    samples: int, objective: denoise.DiffusionObjective, *, seed: int
) -> np.ndarray:
    """Times of all samples, float32 [samples], one per stratum, in a fixed order.

    seed: of the order.
    """
    quantile = (_order(samples, seed) + 0.5) / samples
    return objective.times(special.ndtri(quantile)).astype(np.float32)


def bins_of_times(samples: int, bins: int, *, seed: int) -> np.ndarray:
    """The bin of each sample's time, int [samples], from 0 at the data upwards.

    The bins are equally likely parts of the distribution of t. They are told by the
    number of the sample's stratum, not by its time: on a table of steps, two bins may
    share a time. If `bins` does not divide `samples`, they differ by one sample.

    seed: that of `stratified_times`.
    """
    return _order(samples, seed) * bins // samples


def _order(samples: int, seed: int) -> np.ndarray:
    """The number of each sample's stratum, ascending in t."""
    return np.random.default_rng(seed).permutation(samples)


def per_example_loss(
    apply: Callable[..., Any],
    params: Any,
    x0_BHWC: LatentBHWC,
    cond: denoise.Batch,
    t_B: TimeB,
    index_B: IndexB,
    key: jax.Array,
    *,
    objective: denoise.DiffusionObjective,
) -> ValueB:
    """Unweighted mean squared error of each sample, float32 [B].

    Args:
      apply, params, x0_BHWC, cond, objective: as for `denoise.per_example_loss`.
      t_B: the samples' times, from `stratified_times`.
      index_B: the number of each sample in the validation set.
      key: the noise of a sample is drawn from this key and its number alone.
    """

    def noise(index: Any) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, index), x0_BHWC.shape[1:])

    eps = jax.vmap(noise)(index_B)
    x0, t = jnp.asarray(x0_BHWC, jnp.float32), jnp.asarray(t_B)
    return denoise.per_example_loss(apply, params, x0, eps, t, cond, objective)
