"""A network, and what is needed to read its predictions; jax only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion import prediction as prediction_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Denoise:
    """What `denoiser` makes; see there.

    Calling it estimates x0: denoise(x [B, ...], t scalar or [B], cond) -> [B, ...].
    """

    network: Callable[..., jax.Array]
    schedule: noise.Schedule
    prediction: str
    params: Any = None
    time: Callable[[Any], Any] | None = None

    def __call__(self, x: jax.Array, t: Any, cond: Any = None) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        t = jnp.broadcast_to(jnp.asarray(t, wide), x.shape[:1])
        time = t if self.time is None else self.time(t)
        given = () if self.params is None else (self.params,)
        return prediction_lib.convert(
            self.network(*given, x, time, cond),
            x,
            self.schedule.alpha(t),
            self.schedule.sigma(t),
            source=self.prediction,
            to="x0",
        )


def denoiser(
    network: Callable[..., jax.Array],
    schedule: noise.Schedule,
    *,
    prediction: str,
    params: Any = None,
    time: Callable[[Any], Any] | None = None,
) -> Denoise:
    """Says what a network predicts, and on which schedule.

    Args:
      network: (x [B, ...] float32, t [B] float32, cond) -> prediction, the shape of x;
        or (params, x, t, cond) if params are given. Samplers compile once per network
        object: define it once, and pass weights as params rather than in a closure.
      schedule: of scaling_ldm.noise.
      prediction: "epsilon", "x0", "v", "flow" or "score".
      params: any tree of arrays, split over devices or not.
      time: from the schedule's t to what the network is given, if that differs (this
        library's denoisers: `schedule.unit_time`); numbers and arrays.

    Raises:
      ValueError: an unknown prediction, a schedule that is none.
    """
    prediction_lib.kind(prediction)
    if not isinstance(schedule, noise.Schedule):
        raise ValueError(
            "schedule must be one of scaling_ldm.noise, as noise.scaled_linear(); got "
            f"{schedule!r}"
        )
    return Denoise(network, schedule, prediction, params, time)
