"""What the bounds and the exact likelihood share: units, keys, ends; jax only.

"Bits per dim" is -log2 p divided by the number of values of one sample. For pictures of
L levels p is a probability and the number is a code length, between 0 and about
log2(L). For continuous data and for latents p is a density: the number may be negative,
it moves by log2(c) when the data are multiplied by c, and it compares models of the
same latents only, never with bits per dim of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.objectives.denoise import batch_sharding

Network = Callable[[jax.Array, jax.Array, Any], jax.Array]

LOGSNR_LIMIT = 20.0  # stands for the ends of a schedule whose logsnr is infinite there


def bits_per_dim(nats_B: jax.Array, x: jax.Array) -> jax.Array:
    """Nats of a whole sample of x [B, ...] as bits per value."""
    return nats_B / (math.log(2) * values(x))


def values(x: jax.Array) -> int:
    """Values in one sample of x [B, ...]."""
    return math.prod(x.shape[1:])


def floating(x: jax.Array) -> jax.Array:
    """x as float32, or wider if it is."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def total(x: jax.Array) -> jax.Array:
    """The sum over all axes but the first, [B]."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def mean(x: jax.Array) -> jax.Array:
    """The mean over all axes but the first, [B]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def full(t: Any, x: jax.Array) -> jax.Array:
    """One time for all samples of x: [B], sharded as they are."""
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
        raise ValueError(f"{key.shape} keys for {x.shape[0]} samples: give 1 or all")
    return key


def fold_in(key_B: jax.Array, number: Any) -> jax.Array:
    """The same number folded into every key."""
    return jax.vmap(jax.random.fold_in, (0, None))(key_B, number)


def prediction_alone(said: jax.Array, x: jax.Array) -> jax.Array:
    """What a network said without the channels of a learned variance, if it has them.

    Raises:
      ValueError: neither the shape of x nor twice its channels.
    """
    channels = x.shape[-1]
    if said.shape[:-1] != x.shape[:-1] or said.shape[-1] not in (
        channels,
        2 * channels,
    ):
        raise ValueError(f"the network was given {x.shape} and said {said.shape}")
    return said[..., :channels]


def normal(key_B: jax.Array, x: jax.Array) -> jax.Array:
    """Standard normal noise of the shape of x, each sample from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(key_B)


def spacing(levels: int) -> float:
    """Distance of `levels` values evenly spaced from -1 to 1, both included.

    256 levels k -> 2 k / 255 - 1 are 2 / 255 apart. Of values that were scaled as
    k -> k / 128 - 1 the distance is 1 / 128.
    """
    return 2 / (levels - 1)


def dequantise(x: jax.Array, key: jax.Array, *, spacing: float) -> jax.Array:
    """Levels that are `spacing` apart, plus uniform noise that fills the gaps.

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
