"""A network together with all that is needed to sample from it; jax only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.prediction import convert, kind
from scaling_ldm.diffusion.samplers.x0_transforms import X0Transform
from scaling_ldm.diffusion.shapes import SamplesB


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionModel:
    """What `denoiser` makes; the attributes are its arguments.

    A call estimates x0: denoise(x [B, ...], t scalar or [B], cond) -> [B, ...].
    """

    network: Any
    schedule: noise.Schedule
    prediction: str
    params: Any = None
    time: Callable[[Any], Any] | None = None
    x0_transform: X0Transform | None = None

    def __call__(self, x: SamplesB, t: ArrayLike, cond: Any = None) -> SamplesB:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        t = jnp.broadcast_to(jnp.asarray(t, wide), x.shape[:1])
        time = t if self.time is None else self.time(t)
        given = () if self.params is None else (self.params,)
        x0 = convert(
            self.network(*given, x, time, cond),
            x,
            self.schedule.alpha(t),
            self.schedule.sigma(t),
            source=self.prediction,
            to="x0",
        )
        return x0 if self.x0_transform is None else self.x0_transform(x0)


def denoiser(
    network: Callable[..., Any] | None,
    schedule: noise.Schedule,
    *,
    prediction: str,
    params: Any = None,
    time: Callable[[Any], Any] | None = None,
    x0_transform: X0Transform | None = None,
) -> DiffusionModel:
    """States what a network predicts, and on which schedule.

    Args:
      network: (x [B, ...] float32, t [B] float32, cond) -> prediction, the shape of x.
        With params it is (params, x, t, cond). Samplers compile once per network
        object: define it once, and pass weights as params, not in a closure. None is
        enough for `plan`, which evaluates nothing.
      schedule: of scaling_ldm.noise.
      prediction: "epsilon", "x0", "v", "flow" or "score".
      params: any tree of arrays, sharded or not.
      time: maps the schedule's t to the network's time, if the two differ. This
        library's denoisers need `schedule.unit_time`. It takes numbers and arrays.
      x0_transform: applied to every estimate of x0: `clip`, `dynamic_threshold` or
        another function of an array. It is compiled into the sampler.

    Raises:
      ValueError: an unknown prediction; a schedule that is not a noise.Schedule.
    """
    kind(prediction)
    if not isinstance(schedule, noise.Schedule):
        raise ValueError(
            "schedule must be one of scaling_ldm.noise, as noise.scaled_linear(); got "
            f"{schedule!r}"
        )
    return DiffusionModel(network, schedule, prediction, params, time, x0_transform)
