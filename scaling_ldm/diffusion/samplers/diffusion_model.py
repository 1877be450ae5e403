"""A network together with all that is needed to sample from it; jax only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.prediction import convert, kind
from scaling_ldm.diffusion.samplers.x0_transforms import X0Transform
from scaling_ldm.diffusion.shapes import SamplesB


@runtime_checkable
class TimedNetwork(Protocol):
    """A network that states its range of t, such as a `denoisers.Denoiser`.

    apply(params, x, t, cond) -> prediction.
    time_range: the network's t at the data and at the noise, between which it grows as
      `schedule.unit_time` does from 0 to 1.
    """

    @property
    def apply(self) -> Callable[..., Any]: ...

    @property
    def time_range(self) -> tuple[float, float]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionModel:
    """What `denoiser` makes; the attributes are its arguments.

    A call estimates x0: denoise(x [B, ...], t scalar or [B], cond) -> [B, ...]. Its t
    is the schedule's; `time` maps it to the network's, and None leaves it as it is.
    """

    network: Any
    schedule: noise.Schedule
    prediction: str
    params: Any = dataclasses.field(default=None, repr=False)
    time: Callable[[Any], Any] | None = None
    x0_transform: X0Transform | None = None

    def __call__(
        self, x: SamplesB | np.ndarray, t: ArrayLike, cond: Any = None
    ) -> SamplesB:
        x = jnp.asarray(x)
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
    network: TimedNetwork | Callable[..., Any] | None,
    schedule: noise.Schedule,
    *,
    prediction: str,
    params: Any = None,
    time: str | Callable[[Any], Any] | None = None,
    x0_transform: X0Transform | None = None,
) -> DiffusionModel:
    """States what a network predicts, on which schedule, and which time it takes.

    Args:
      network: a denoiser of this library, which states its own range of t; or a
        function (x [B, ...] float32, t [B] float32, cond) -> prediction, the shape of
        x. With params it is (params, x, t, cond). Samplers compile once per network
        object: define it once, and pass weights as params, not in a closure. None is
        enough for `plan`, which evaluates nothing.
      schedule: of scaling_ldm.noise.
      prediction: "epsilon", "x0", "v", "flow" or "score".
      params: any tree of arrays, sharded or not. A denoiser needs them.
      time: the t that a function is given. It must be stated, because it cannot be
        inferred: "schedule", the schedule's own t (0 to 999 on Stable Diffusion's
        table); "unit", `schedule.unit_time(t)`, which this library's networks take (0
        to 1 on a table); or a function from the schedule's t, of numbers and arrays.
      x0_transform: applied to every estimate of x0: `clip`, `dynamic_threshold` or
        another function of an array. It is compiled into the sampler.

    Raises:
      ValueError: an unknown prediction or time; a function without a time; a denoiser
        with one, or without params; a schedule that is not a noise.Schedule.
    """
    kind(prediction)
    if not isinstance(schedule, noise.Schedule):
        raise ValueError(
            "schedule must be one of scaling_ldm.noise, as noise.scaled_linear(); got "
            f"{schedule!r}"
        )
    if isinstance(network, TimedNetwork):
        if time is not None:
            raise ValueError(
                f"time = {time!r}: a denoiser states its own range of t; leave time out"
            )
        if params is None:
            raise ValueError("a denoiser needs params, such as those of its init(key)")
        own = _ranged(schedule, *network.time_range)
        return DiffusionModel(
            network.apply, schedule, prediction, params, own, x0_transform
        )
    said = None if network is None else _stated(schedule, time)
    return DiffusionModel(network, schedule, prediction, params, said, x0_transform)


def _stated(schedule: noise.Schedule, time: Any) -> Callable[[Any], Any] | None:
    """The map to the t of a function; None: it takes the schedule's t."""
    if callable(time):
        return time
    if time == "schedule":
        return None
    if time == "unit":
        return schedule.unit_time
    raise ValueError(
        f"time = {time!r}: state what the network takes as t. 'schedule': the "
        f"schedule's, here {schedule.t_data:g} to {schedule.t_noise:g}. 'unit': "
        "schedule.unit_time(t), as this library's networks. Or give a function of t"
    )


@dataclasses.dataclass(frozen=True)
class _Stretched:
    """Maps the schedule's time to low ... high; equal maps share a plan."""

    schedule: noise.Schedule
    low: float
    high: float

    def __call__(self, t: Any) -> Any:
        return self.low + (self.high - self.low) * self.schedule.unit_time(t)


def _ranged(schedule: noise.Schedule, low: float, high: float) -> Callable[[Any], Any]:
    if (low, high) == (0.0, 1.0):
        return schedule.unit_time
    return _Stretched(schedule, low, high)
