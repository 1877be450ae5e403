"""What a run of a sampler will do, decided before it runs; numpy only.

A plan names every evaluation and coefficient. It is made on the host, kept for the next
call with the same settings, and handed to the compiled loop as data.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.samplers import diffusion, dpm, grids, loop, ode, unipc
from scaling_ldm.diffusion.samplers.denoise import Denoise
from scaling_ldm.diffusion.samplers.grids import TimeGrid
from scaling_ldm.diffusion.samplers.guidance import Guidance
from scaling_ldm.diffusion.samplers.table import SolverTable

Rule = Callable[..., SolverTable]

SAMPLERS: dict[str, Rule] = {
    "ddim": diffusion.ddim,
    "ddpm": diffusion.ddpm,
    "euler": ode.euler,
    "heun": ode.heun,
    "dpm++1": dpm.dpm1,
    "dpm++2m": dpm.dpm2m,
    "dpm++3m": dpm.dpm3m,
    "dpm++2s": dpm.dpm2s,
    "dpm++3s": dpm.dpm3s,
    "sde-dpm++1": dpm.sde_dpm1,
    "sde-dpm++2m": dpm.sde_dpm2m,
    "sde-dpm++3m": dpm.sde_dpm3m,
    "sde-dpm++2s": dpm.sde_dpm2s,
    "unipc1": unipc.unipc1,
    "unipc2": unipc.unipc2,
    "unipc3": unipc.unipc3,
}


# Samplers with a spacing of their own where the user names none. Heun's method runs in
# sigma / alpha, which an even grid in t leaves in leaps at the start.
SPACING_OF = {"heun": "karras"}


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingPlan:
    """What `plan` makes.

    Attributes:
      grid: its points.
      table: what happens at each evaluation.
      evaluations: of the network for each sample and row: 2 where guided, else 1.
    """

    grid: TimeGrid
    table: SolverTable = dataclasses.field(repr=False)
    evaluations: tuple[int, ...] = dataclasses.field(repr=False)
    _packed: np.ndarray = dataclasses.field(repr=False)

    @property
    def nfe(self) -> int:
        """Network evaluations of each sample, guidance included."""
        return sum(self.evaluations)

    @property
    def skips(self) -> bool:
        """Whether some rows, or all, are evaluated without guidance."""
        return 1 in self.evaluations

    @functools.cached_property
    def start_std(self) -> float:
        """Standard deviation of x at the noisy end: exactly prior_std at t_noise.

        On grids that begin with less noise it falls as that of unit-variance data does.
        """
        schedule = self.grid.schedule
        first = self.grid.points[-1 if self.grid.inverts else 0]
        whole = schedule.alpha(schedule.t_noise), schedule.sigma(schedule.t_noise)
        here = math.hypot(first.alpha, first.sigma) / math.hypot(*whole)
        return float(schedule.prior_std * here)

    @functools.cached_property
    def _float32(self) -> np.ndarray:
        return self._packed.astype(np.float32)

    def packed(self, dtype: Any) -> np.ndarray:
        """The table as the loop reads it, [rows padded, columns]."""
        return self._packed if dtype == np.float64 else self._float32


def plan(
    denoise: Denoise,
    *,
    sampler: str | Rule = "dpm++2m",
    steps: int = 20,
    grid: TimeGrid | str | Sequence[float] | None = None,
    guidance: Any = None,
    strength: float = 1.0,
    invert: bool = False,
    **options: Any,
) -> SamplingPlan:
    """The plan that `sample` follows when it is given the same arguments.

    Raises:
      ValueError: as `sample`.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    if grid is not None and not isinstance(grid, TimeGrid | str):
        grid = grids.from_times(denoise.schedule, grid)
    if isinstance(grid, TimeGrid):
        if grid.schedule != denoise.schedule:
            raise ValueError("the grid is of another schedule than the network's")
        grid = _cut(grid, strength, invert)
    else:
        if grid is None and not isinstance(denoise.schedule, noise.RectifiedFlow):
            grid = SPACING_OF.get(sampler) if isinstance(sampler, str) else None
        grid = _named(denoise.schedule, steps, grid, strength, invert)
    return _build(
        _rule(sampler, tuple(sorted(options))),
        grid,
        tuple(sorted(options.items())),
        denoise.prediction,
        denoise.time,
        guidance is not None,
        guidance.interval if isinstance(guidance, Guidance) else None,
    )


def _cut(grid: TimeGrid, strength: float, invert: bool) -> TimeGrid:
    if strength < 1:
        grid = grid.last(max(1, round(grid.steps * strength)))
    return grid.reversed() if invert and not grid.inverts else grid


@functools.lru_cache(maxsize=256)
def _named(
    schedule: noise.Schedule,
    steps: int,
    spacing: str | None,
    strength: float,
    invert: bool,
) -> TimeGrid:
    return _cut(grids.grid(schedule, steps, spacing), strength, invert)


@functools.lru_cache(maxsize=256)
def _build(
    rule: Rule,
    grid: TimeGrid,
    options: tuple[tuple[str, Any], ...],
    kind: str,
    time: Callable[[Any], Any] | None,
    guided: bool,
    interval: tuple[float, float] | None,
) -> SamplingPlan:
    table = rule(grid, **dict(options))
    covers = Guidance(scale=1.0, interval=interval).covers
    packed = loop.pack(table, kind=kind, time=time or float, covers=covers)
    each = tuple(2 if guided and covers(row.at.t) else 1 for row in table.rows)
    return SamplingPlan(grid, table, each, packed)


@functools.lru_cache(maxsize=256)
def _rule(sampler: str | Rule, options: tuple[str, ...]) -> Rule:
    """The function of a name, which must know the options."""
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        close = difflib.get_close_matches(sampler, SAMPLERS, 1)
        raise ValueError(
            f"sampler {sampler!r} is none of {', '.join(SAMPLERS)}"
            + (f". Did you mean {close[0]}?" if close else "")
        )
    rule = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    fixed = rule.keywords if isinstance(rule, functools.partial) else {}
    known = [
        name
        for name, parameter in inspect.signature(rule).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in fixed
    ]
    unknown = [name for name in options if name not in known]
    if unknown:
        arguments = (*known, "guidance", "steps", "grid", "strength", "image", "mask")
        close = difflib.get_close_matches(unknown[0], arguments, 1)
        raise ValueError(
            f"sampler {sampler!r} has no option {', '.join(unknown)}; its options: "
            f"{', '.join(known) or 'none'}"
            + (f". Did you mean {close[0]}?" if close else "")
        )
    return rule
