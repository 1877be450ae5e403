"""Training losses: draw t, corrupt, predict, compare; pure functions of arrays.

Rectified flow (Liu et al. 2022, arXiv 2209.03003; the form of paper B):
    x_t = (1 - t) x0 + t eps,    target = eps - x0,    loss = mean (pred - target)^2
with t = sigmoid(location + scale * normal) (Esser et al. 2024, arXiv 2403.03206,
section 3.1). Paper B names the logit-normal law but not its location and scale; 0 and
1 are this library's assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_ldm.shapes import LatentBHWC, TimeB

Batch = dict[str, jax.Array]


def interpolate(x0_BHWC: LatentBHWC, eps_BHWC: LatentBHWC, t_B: TimeB) -> LatentBHWC:
    """x_t = (1 - t) x0 + t eps."""
    t = t_B[:, None, None, None]
    return (1 - t) * x0_BHWC + t * eps_BHWC


def logit_normal(normal_B: jax.Array, location: float, scale: float) -> TimeB:
    """Times in (0, 1) from standard normal draws."""
    return jax.nn.sigmoid(location + scale * normal_B)


def drop_captions(cond: Batch, null: Batch, drop_B: jax.Array) -> Batch:
    """Replaces the condition of each sample with `drop` by the null condition.

    `null` holds one unbatched array per key of `cond`.
    """
    dropped = {}
    for name, value in cond.items():
        drop = drop_B.reshape(drop_B.shape + (1,) * (value.ndim - 1))
        dropped[name] = jnp.where(drop, null[name][None], value)
    return dropped


def flow_errors(
    apply: Callable[..., jax.Array],
    params: Any,
    x0_BHWC: LatentBHWC,
    eps_BHWC: LatentBHWC,
    t_B: TimeB,
    cond: Batch,
) -> jax.Array:
    """Mean squared error of each sample, [B], float32."""
    x_t = interpolate(x0_BHWC, eps_BHWC, t_B)
    prediction = apply(params, x_t, t_B, cond)
    return jnp.mean((prediction - (eps_BHWC - x0_BHWC)) ** 2, axis=(1, 2, 3))


def rectified_flow(
    apply: Callable[..., jax.Array],
    params: Any,
    batch: Batch,
    null: Batch,
    key: jax.Array,
    *,
    time_location: float,
    time_scale: float,
    caption_dropout: float,
) -> jax.Array:
    """The training loss of one batch, a float32 scalar.

    Args:
      apply: a denoiser's apply.
      batch: "x" [B, H, W, C] and the arrays of the denoiser's conditioning.
      null: the null condition, unbatched arrays.
      key: of this step; noise, t and dropout come from it alone.
    """
    x0 = batch["x"].astype(jnp.float32)
    cond = {name: batch[name] for name in null}
    noise_key, time_key, drop_key = jax.random.split(key, 3)
    per_sample = batch_sharding(x0, ndim=1)
    eps = jax.random.normal(noise_key, x0.shape, out_sharding=batch_sharding(x0))
    normal = jax.random.normal(time_key, x0.shape[:1], out_sharding=per_sample)
    t = logit_normal(normal, time_location, time_scale)
    uniform = jax.random.uniform(drop_key, x0.shape[:1], out_sharding=per_sample)
    cond = drop_captions(cond, null, uniform < caption_dropout)
    return jnp.mean(flow_errors(apply, params, x0, eps, t, cond))


def batch_sharding(x: jax.Array, ndim: int | None = None) -> Any:
    """The sharding of x's batch axis for an array of `ndim` axes; None without mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    sharding = jax.typeof(x).sharding
    rest = (None,) * ((x.ndim if ndim is None else ndim) - 1)
    return sharding.update(spec=jax.sharding.PartitionSpec(sharding.spec[0], *rest))
