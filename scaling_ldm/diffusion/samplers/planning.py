"""Plans every evaluation of a sampler, and counts its cost, before it runs.

A plan holds every evaluation and coefficient. It is made on the host, kept for the next
call with the same settings, and passed to the compiled loop as data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import flops
from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.samplers import compiled_loop, solvers, time_grid
from scaling_ldm.diffusion.samplers.diffusion_model import DiffusionModel
from scaling_ldm.diffusion.samplers.guidance import Guidance
from scaling_ldm.diffusion.samplers.solver_table import SolverTable
from scaling_ldm.diffusion.samplers.solvers import Solver
from scaling_ldm.diffusion.samplers.time_grid import TimeGrid


@dataclasses.dataclass(frozen=True, eq=False)
class SourceImage:
    """An image that sampling starts from, keeps in part, or takes back to noise.

    Attributes:
      image: [B, ...], in the space of x0. `plan` and `cost` do not read it, so it may
        be None there.
      strength: 0 ... 1, the share of the steps that is run. The image is noised to the
        level where these steps begin. At 1 almost nothing of the image is left.
      mask: [B, ...], or an array that can be broadcast to it. The image is kept where
        mask is 0; samples are drawn where it is 1.
      invert: follow the deterministic ODE from the image to its noise (ddim, euler).

    Raises:
      ValueError: a strength outside (0, 1]; an inversion with a mask.
    """

    image: Any
    strength: float = 1.0
    mask: Any = None
    invert: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {self.strength}")
        if self.invert and self.mask is not None:
            raise ValueError(
                "an inversion begins at its image: leave out mask and initial noise"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingPlan:
    """Every evaluation of a run, before it runs; what `plan` makes.

    Attributes:
      grid: the points that the run visits.
      table: the update after each evaluation.
      evaluations: of the network, for each sample and row: 2 where guided, else 1.
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
        """Whether at least one row is evaluated without guidance."""
        return 1 in self.evaluations

    @functools.cached_property
    def start_std(self) -> float:
        """Standard deviation of x at the noisy end of the grid.

        It is prior_std at t_noise. On a grid that begins with less noise it is smaller,
        in proportion to the standard deviation of x for data of unit variance.
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
    denoise: DiffusionModel,
    *,
    sampler: str | Solver = "dpm++2m",
    steps: int = 20,
    grid: TimeGrid | str | Sequence[float] | np.ndarray | None = None,
    guidance: Any = None,
    image: SourceImage | None = None,
    **options: Any,
) -> SamplingPlan:
    """The plan that `sample` follows when it is given the same arguments.

    Raises:
      ValueError: as `sample`.
    """
    if image is not None and not isinstance(image, SourceImage):
        raise ValueError(f"image must be a samplers.SourceImage, got {type(image)}")
    strength, invert = (1.0, False) if image is None else (image.strength, image.invert)
    names = tuple(sorted(options))
    solver = solvers.find(sampler, names)
    if grid is not None and not isinstance(grid, TimeGrid | str):
        grid = time_grid.from_times(denoise.schedule, grid)
    if isinstance(grid, TimeGrid):
        if grid.schedule != denoise.schedule:
            raise ValueError("the grid is of another schedule than the network's")
        grid = _cut(grid, strength, invert)
    else:
        if grid is None and not isinstance(denoise.schedule, noise.RectifiedFlow):
            own = solvers.SPACING_OF
            grid = own.get(sampler) if isinstance(sampler, str) else None
        grid = _named(denoise.schedule, steps, grid, strength, invert)
    return _build(
        solver,
        grid,
        tuple((name, options[name]) for name in names),
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
    return _cut(time_grid.grid(schedule, steps, spacing), strength, invert)


@functools.lru_cache(maxsize=256)
def _build(
    solver: Solver,
    grid: TimeGrid,
    options: tuple[tuple[str, Any], ...],
    kind: str,
    time: Callable[[Any], Any] | None,
    guided: bool,
    interval: tuple[float, float] | None,
) -> SamplingPlan:
    table = solver(grid, **dict(options))
    covers = Guidance(scale=1.0, interval=interval).covers
    packed = compiled_loop.pack(table, kind=kind, time=time or float, covers=covers)
    each = tuple(2 if guided and covers(row.at.t) else 1 for row in table.rows)
    return SamplingPlan(grid, table, each, packed)


def cost(
    denoise: DiffusionModel,
    shape: tuple[int, ...],
    *,
    cond: Any = None,
    uncond: Any = None,
    decode: Callable[[jax.Array], Any] | None = None,
    **settings: Any,
) -> flops.FlopCount:
    """FLOPs of a whole `sample` of this shape: every evaluation, and the decoder.

    Nothing is computed: arrays may be jax.ShapeDtypeStruct. Matrix products and
    convolutions are counted, 2 x MAC (see scaling_ldm.flops).

    Args:
      shape: [B, ...].
      decode: from x to a picture, counted once.
      settings: arguments of `plan`.
    """
    todo = plan(denoise, **settings)
    twice = sum(each == 2 for each in todo.evaluations)
    once = len(todo.evaluations) - twice
    given = () if denoise.params is None else (denoise.params,)

    def whole(given: Any, x: jax.Array, t: jax.Array, cond: Any, uncond: Any) -> Any:
        def evaluate(condition: Any) -> Callable[[Any, jax.Array], jax.Array]:
            def body(_: Any, x: jax.Array) -> jax.Array:
                out = denoise.network(*given, x, t, condition)
                # A learned variance is a second half of the channels: leave it out.
                return out[..., : x.shape[-1]].astype(x.dtype)

            return body

        x = jax.lax.fori_loop(0, once + twice, evaluate(cond), x)
        if twice:
            x = jax.lax.fori_loop(0, twice, evaluate(uncond), x)
        return x if decode is None else decode(x)

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    t = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    return flops.count(whole, given, x, t, cond, uncond)
