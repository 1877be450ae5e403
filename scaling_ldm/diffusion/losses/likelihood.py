"""Units, random keys and ends of a schedule for the bounds and likelihoods; jax only.

"Bits per dim" is -log2 p divided by the number of values of one sample. For pictures of
L levels, p is a probability and the number is a code length, between 0 and about
log2(L). For continuous data and for latents, p is a density. Then the number may be
negative, and it changes by log2(c) when the data are multiplied by c. It compares
models of the same latents only, and never with bits per dim of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.losses.denoise import batch_sharding
from scaling_ldm.diffusion.samplers.diffusion_model import DiffusionModel
from scaling_ldm.diffusion.shapes import ValueB

Network = Callable[[jax.Array, jax.Array, Any], jax.Array]

LOGSNR_LIMIT = 20.0  # replaces an infinite logsnr at an end of a schedule


def check_network(network: Network, schedule: noise.Schedule, prediction: str) -> None:
    """Refuses the result of `samplers.denoiser` under another prediction or schedule.

    Such a result takes the schedule's t and gives x0, whatever its network predicts.

    Raises:
      ValueError: another prediction or schedule is stated.
    """
    if not isinstance(network, DiffusionModel):
        return
    if prediction != "x0":
        raise ValueError(
            "the result of samplers.denoiser estimates x0: give prediction='x0', not "
            f"{prediction!r}"
        )
    if network.schedule != schedule:
        raise ValueError(
            f"the network's schedule is {network.schedule}, not {schedule}"
        )


def bits_per_dim(nats_B: jax.Array, x: jax.Array) -> jax.Array:
    """Nats of a whole sample of x [B, ...] as bits per value."""
    return nats_B / (math.log(2) * count_values(x))


def count_values(x: jax.Array) -> int:
    """Values in one sample of x [B, ...]."""
    return math.prod(x.shape[1:])


def floating(x: jax.Array) -> jax.Array:
    """x as float32, or wider if it is."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def sum_values(x: jax.Array) -> ValueB:
    """The sum over all axes but the first, [B]."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def mean_values(x: jax.Array) -> ValueB:
    """The mean over all axes but the first, [B]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def time_of_all(t: Any, x: jax.Array) -> ValueB:
    """One time for all samples of x, [B], sharded as they are."""
    return jnp.full(x.shape[:1], t, x.dtype, device=batch_sharding(x, ndim=1))


def sample_keys(key: jax.Array, x: jax.Array) -> jax.Array:
    """A key for each sample of x, [B].

    Args:
      key: one typed key, folded with the position in the batch; or [B] typed keys,
        such as `jax.vmap(functools.partial(jax.random.fold_in, key))(index_B)`, with
        which a picture's result depends on its index alone and not on its batch.

    Raises:
      ValueError: a raw uint32 key, or neither one key nor one for each sample.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must come from jax.random.key, got {key.dtype}")
    if key.ndim == 0:
        index = jax.lax.broadcasted_iota(
            jnp.uint32, x.shape[:1], 0, out_sharding=batch_sharding(x, ndim=1)
        )
        return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    if key.shape != x.shape[:1]:
        raise ValueError(
            f"{key.shape} keys for {x.shape[0]} samples: give one key, or one for each"
        )
    return key


def fold_in(key_B: jax.Array, number: Any) -> jax.Array:
    """Folds the same number into every key."""
    return jax.vmap(jax.random.fold_in, (0, None))(key_B, number)


def without_variance(said: jax.Array, x: jax.Array) -> jax.Array:
    """The network's output without the channels of a learned variance, if it has them.

    Raises:
      ValueError: neither the shape of x nor twice its channels.
    """
    channels = x.shape[-1]
    if said.shape[:-1] != x.shape[:-1] or said.shape[-1] not in (
        channels,
        2 * channels,
    ):
        raise ValueError(f"the network was given {x.shape} and returned {said.shape}")
    return said[..., :channels]


def spacing(levels: int) -> float:
    """The distance of `levels` values evenly spaced from -1 to 1, ends included.

    256 levels scaled as k -> 2 k / 255 - 1 are 2 / 255 apart. If
    scaled as k -> k / 128 - 1, they are 1 / 128 apart.
    """
    return 2 / (levels - 1)


def dequantise(x: jax.Array, key: jax.Array, *, spacing: float) -> jax.Array:
    """Levels that are `spacing` apart, plus uniform noise that fills the gaps between.

    Then -log p(level) <= E[-log p(x)] - D log(spacing) (Theis et al. 2016):
    the density of the result is turned into bits of the level by adding
    `-log2(spacing)` per dim, which is log2(128) = 7 for a spacing of 1 / 128.
    """
    x = floating(x)
    keys = sample_keys(key, x)
    uniform = jax.vmap(
        lambda key: jax.random.uniform(
            key, x.shape[1:], x.dtype, minval=-0.5, maxval=0.5
        )
    )(keys)
    return x + spacing * uniform


def least_noise(schedule: noise.Schedule, t_min: float | None) -> float:
    """t_min, by default t_data, or the time of logsnr 20 if t_data has no noise.

    Raises:
      ValueError: a t_min without noise.
    """
    return _inside(schedule, "t_min", t_min, schedule.t_data)


def most_noise(schedule: noise.Schedule, t_max: float | None) -> float:
    """t_max, by default t_noise, or the time of logsnr -20 if t_noise has no signal.

    Raises:
      ValueError: a t_max without signal.
    """
    return _inside(schedule, "t_max", t_max, schedule.t_noise)


def _inside(
    schedule: noise.Schedule, name: str, t: float | None, default: float
) -> float:
    logsnr = float(schedule.logsnr(default if t is None else t))
    if math.isfinite(logsnr):
        return default if t is None else t
    inside = float(schedule.time(math.copysign(LOGSNR_LIMIT, logsnr)))
    if t is None:
        return inside
    lacks = "noise" if logsnr > 0 else "signal"
    raise ValueError(f"{name} = {t:g} has no {lacks}; {inside:.3g} has a little")


def log_bin(x: jax.Array, mean: jax.Array, std: jax.Array, levels: int) -> jax.Array:
    """The log of the mass of N(mean, std^2) in the bin of each level x.

    Bins reach half a spacing to both sides, and the outer ones to infinity (Ho et al.
    2020, eq. 13). It is exact in the tails, where published code puts a floor of log
    1e-12.
    """
    half = spacing(levels) / 2
    outer = 1 - half
    above = (x + half - mean) / std
    below = (x - half - mean) / std
    above = jnp.where(x > outer, jnp.inf, above)
    below = jnp.where(x < -outer, -jnp.inf, below)
    # By symmetry the bin is moved left of the mean, where log_ndtr is accurate.
    mirror = x > mean
    high = log_ndtr(jnp.where(mirror, -below, above))
    low = log_ndtr(jnp.where(mirror, -above, below))
    return high + jnp.log(-jnp.expm1(jnp.minimum(low - high, -1e-37)))


def prior_bits(bar: float, x0: jax.Array) -> jax.Array:
    """KL(q(x_T | x0) || N(0, I)) in bits per dim, [B]; bar = alpha^2 = 1 - sigma^2."""
    constant = float(-np.log1p(-bar) - bar)
    nats = 0.5 * sum_values(bar * x0**2 + constant)
    return bits_per_dim(nats, x0)


def decoder_nats(
    x0: jax.Array, eps: jax.Array, std: float, levels: int | None
) -> jax.Array:
    """-log p(x0 | z) with p(x0 | z) ~ q(z | x0) and z / alpha = x0 + std eps, [B]."""
    if levels is None:
        nats = 0.5 * np.log(2 * np.pi * np.e * std**2)
        return jnp.full_like(sum_values(x0), nats * count_values(x0))
    grid = jnp.linspace(-1, 1, levels, dtype=x0.dtype)

    def add(so_far: jax.Array, level: jax.Array) -> tuple[jax.Array, None]:
        here = -0.5 * ((x0 - level) / std + eps) ** 2
        return jnp.logaddexp(so_far, here), None

    everything = jax.lax.scan(add, jnp.full_like(x0, -jnp.inf), grid)[0]
    return sum_values(everything + 0.5 * eps**2)
