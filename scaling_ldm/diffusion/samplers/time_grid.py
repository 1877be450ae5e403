"""Where a sampler evaluates: times, and the signal and noise there; numpy only.

A grid has n points at which the network is evaluated, and one more where the last step
ends. Everything is computed on the host in float64 and is data for the compiled loop.

f is the fraction of the schedule, 1 at the noise and 0 at the data; i = 0 ... n - 1:

| spacing | evaluated at | source |
|---|---|---|
| uniform | f = 1 - i / n | |
| linspace | f = 1 - i / (n - 1), whole steps on tables | Lin et al. 2023, table 2 |
| leading | multiples of steps // n, from the data's side | Lin et al. 2023, table 2 |
| trailing | multiples of steps / n, from the noise's side | Lin et al. 2023, table 2 |
| quadratic | f = (1 - i / n)^2 | Song et al. 2020 (DDIM), appendix D.2 |
| logsnr | logsnr evenly spaced | Lu et al. 2022, section 3.3 |
| karras | (sigma / alpha)^(1/rho) evenly spaced | Karras et al. 2022, eq. 5 |
| flow_shifted | f = 1 - i / n, moved towards noise | Esser et al. 2024, eq. 23 |

linspace and leading evaluate at the data's end of the schedule, after one long step in
logsnr. On a rectified flow they are refused, because no noise is left there.
First-order solvers are accurate on them. Solvers that extrapolate from earlier
evaluations are not: use trailing, logsnr or karras with these. flow_shifted is for
rectified flows only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.spelling import did_you_mean

# Replaces an infinite logsnr when points are spaced by logsnr or sigma. Beyond it, the
# image or the noise is smaller than the float32 rounding of the other.
LOGSNR_LIMIT = 16.0


class GridPoint(NamedTuple):
    """A time and the signal and noise there; Python floats."""

    t: float
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the logsnr, in which DPM-Solver is written."""
        with np.errstate(divide="ignore"):
            return float(np.log(self.alpha) - np.log(self.sigma))


@dataclasses.dataclass(frozen=True)
class TimeGrid:
    """n + 1 points; the network is evaluated at the first n.

    Attributes:
      schedule: gives alpha and sigma of a time.
      points: in the order in which they are visited.

    Raises:
      ValueError: fewer than 2 points; noise that neither falls nor rises throughout.
    """

    schedule: noise.Schedule
    points: tuple[GridPoint, ...] = dataclasses.field(repr=False)

    def __repr__(self) -> str:
        first, last = self.points[0], self.points[-1]
        return f"TimeGrid({self.steps} steps, t = {first.t:g} to {last.t:g})"

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise ValueError("a grid needs an evaluation and an end: 2 points at least")
        levels = np.asarray([p.lam for p in self.points])
        up, down = levels[1:] > levels[:-1], levels[1:] < levels[:-1]
        if not (up.all() or down.all()):
            i = int(np.argmin(up if up.sum() > down.sum() else down))
            a, b = self.points[i : i + 2]
            raise ValueError(
                "noise must fall at every step (or rise at every step, to invert), but "
                f"sigma goes from {a.sigma:g} at t = {a.t:g} to {b.sigma:g} at {b.t:g}"
            )

    @property
    def steps(self) -> int:
        """Steps from point to point: the evaluations of a one-stage sampler."""
        return len(self.points) - 1

    @property
    def inverts(self) -> bool:
        """Whether it goes from data to noise."""
        return self.points[-1].lam < self.points[0].lam

    @property
    def pairs(self) -> Iterator[tuple[GridPoint, GridPoint]]:
        """Each step's start and end."""
        return zip(self.points[:-1], self.points[1:], strict=True)

    def last(self, steps: int) -> TimeGrid:
        """The grid of the last `steps` steps, on which image-to-image runs."""
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps must be 1 to {self.steps}, got {steps}")
        return TimeGrid(self.schedule, self.points[-steps - 1 :])

    def reversed(self) -> TimeGrid:
        """The same points in the other order."""
        return TimeGrid(self.schedule, self.points[::-1])


# (schedule, n, low: the time where f = 0, options by keyword) -> times
Spacing = Callable[..., np.ndarray]


def _fractions(
    schedule: noise.Schedule, low: float, fractions: np.ndarray
) -> np.ndarray:
    return low + (schedule.t_noise - low) * fractions


def _uniform(schedule: noise.Schedule, n: int, low: float) -> np.ndarray:
    return _fractions(schedule, low, 1 - np.arange(n) / n)


def _linspace(schedule: noise.Schedule, n: int, low: float) -> np.ndarray:
    if not isinstance(schedule, noise.Discrete):
        return _fractions(schedule, low, np.linspace(1, 0, n))
    # Counted from the data's side: there halves are exact and round to the even step.
    up = np.linspace(low, schedule.t_noise, n).round()
    return up[::-1] if n > 1 else np.asarray([schedule.t_noise])


def _leading(
    schedule: noise.Schedule, n: int, low: float, offset: int = 0
) -> np.ndarray:
    if isinstance(schedule, noise.Discrete):
        return np.arange(n)[::-1] * (schedule.steps // n) + float(offset)
    return _fractions(schedule, low, 1 - np.arange(1, n + 1) / n)


def _trailing(schedule: noise.Schedule, n: int, low: float) -> np.ndarray:
    if isinstance(schedule, noise.Discrete):
        return np.round(schedule.steps * (1 - np.arange(n) / n)) - 1
    return _uniform(schedule, n, low)


def _quadratic(schedule: noise.Schedule, n: int, low: float) -> np.ndarray:
    return _fractions(schedule, low, (1 - np.arange(n) / n) ** 2)


def _range(schedule: noise.Schedule, low: float) -> tuple[float, float]:
    """logsnr at the noise and at the data, limited to +-LOGSNR_LIMIT."""
    ends = [float(schedule.logsnr(t)) for t in (schedule.t_noise, low)]
    noisy, clean = np.clip(ends, -LOGSNR_LIMIT, LOGSNR_LIMIT)
    return float(noisy), float(clean)


def _from_logsnr(schedule: noise.Schedule, logsnr: np.ndarray) -> np.ndarray:
    times = np.asarray(schedule.time(logsnr))
    times[0] = schedule.t_noise
    return times


def _logsnr(schedule: noise.Schedule, n: int, low: float) -> np.ndarray:
    ends = _range(schedule, low)
    return _from_logsnr(schedule, np.linspace(*ends, n + 1)[:-1])


def _karras(
    schedule: noise.Schedule, n: int, low: float, rho: float = 7.0
) -> np.ndarray:
    ends = np.exp(-0.5 * np.asarray(_range(schedule, low)) / rho)
    ratio = np.linspace(ends[0], ends[1], n) ** rho
    return _from_logsnr(schedule, -2 * np.log(ratio))


def _flow_shifted(
    schedule: noise.Schedule, n: int, low: float, shift: float = 3.0
) -> np.ndarray:
    if not isinstance(schedule, noise.RectifiedFlow):
        raise ValueError("spacing 'flow_shifted' is for noise.rectified_flow() only")
    return np.asarray(noise.shift_time(_uniform(schedule, n, low), shift))


# The functions of the names in config.SPACINGS.
SPACINGS: dict[str, Spacing] = {
    "uniform": _uniform,
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
    "karras": _karras,
    "flow_shifted": _flow_shifted,
}


OPTIONS: dict[str, tuple[str, ...]] = {
    "leading": ("offset",),
    "karras": ("rho",),
    "flow_shifted": ("shift",),
}


def default_spacing(schedule: noise.Schedule) -> str:
    """trailing on tables, because it suits few steps; karras for edm; else uniform."""
    if isinstance(schedule, noise.Discrete):
        return "trailing"
    return "karras" if isinstance(schedule, noise.Edm) else "uniform"


def grid(
    schedule: noise.Schedule,
    steps: int,
    spacing: str | None = None,
    *,
    end: str | float = "data",
    **options: Any,
) -> TimeGrid:
    """The points of a sampler.

    Args:
      schedule: of scaling_ldm.noise.
      steps: n, at least 1.
      spacing: a name of SPACINGS; see the table at the head of this module. None is
        `default_spacing`. Solvers of order 2 and 3 lose accuracy on linspace and
        leading, because of the long last step.
      end: where the last step ends. "data": alpha = 1 and no noise; "schedule": at the
        schedule's least noise; or a time, to which the points are then spaced.
      options: of the spacing: offset (leading, 0; Stable Diffusion's is 1), rho
        (karras, 7), shift (flow_shifted, 3).

    Raises:
      ValueError: an unknown spacing or option, more steps than a table has, points
        whose noise does not fall.
    """
    if not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps must be a whole number, at least 1; got {steps!r}")
    if isinstance(schedule, noise.Discrete) and steps > schedule.steps:
        raise ValueError(f"steps = {steps}, but the schedule has only {schedule.steps}")
    spacing = default_spacing(schedule) if spacing is None else spacing
    if spacing not in SPACINGS:
        known = ", ".join(SPACINGS)
        close = did_you_mean(spacing, SPACINGS)
        raise ValueError(f"spacing {spacing!r} is none of {known}{close}")
    low = schedule.t_data if isinstance(end, str) else float(end)
    unknown = set(options) - set(OPTIONS.get(spacing, ()))
    if unknown:
        raise ValueError(
            f"spacing {spacing!r} has no option {', '.join(sorted(unknown))}; its "
            f"options: {', '.join(OPTIONS.get(spacing, ())) or 'none'}"
        )
    times = SPACINGS[spacing](schedule, steps, low, **options)
    return from_times(schedule, times, end=end)


def from_times(
    schedule: noise.Schedule, times: Any, *, end: str | float = "data"
) -> TimeGrid:
    """The grid that evaluates at given times, most noise first.

    Args:
      times: of the schedule, [n], without the end.
      end: as for `grid`.

    Raises:
      ValueError: times outside the schedule, or not falling.
    """
    times = np.atleast_1d(np.asarray(times, np.float64))
    low, high = schedule.t_data, schedule.t_noise
    if not times.size:
        raise ValueError("a grid needs an evaluation and an end: 2 points at least")
    if times.ndim != 1 or not np.all((times >= low) & (times <= high)):
        raise ValueError(f"times must lie in [{low:g}, {high:g}], got {times}")
    alphas, sigmas = schedule.alpha(times), schedule.sigma(times)
    points = [
        GridPoint(float(t), float(a), float(s))
        for t, a, s in zip(times, alphas, sigmas, strict=True)
    ]
    if isinstance(end, str) and end not in ("data", "schedule"):
        raise ValueError(f"end {end!r} is none of data, schedule, or a time")
    if sigmas[-1] == 0 or times[-1] == (schedule.t_data if end == "schedule" else end):
        raise ValueError(
            f"the last evaluation, t = {times[-1]:g}, is where the grid ends. The end "
            "is added automatically, so leave it out of the times; on a rectified flow "
            "use uniform or trailing, not linspace or leading"
        )
    if end == "data":
        last = GridPoint(schedule.t_data, 1.0, 0.0)
    else:
        t = schedule.t_data if end == "schedule" else float(end)
        last = GridPoint(t, float(schedule.alpha(t)), float(schedule.sigma(t)))
    return TimeGrid(schedule, (*points, last))
