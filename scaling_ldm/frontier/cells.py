"""Cells that may be compared, what they cost, and the choice of the best; numpy only.

Noise. `deviations` are those of the metric over resampled images. Their mean need not
be zero, because a Frechet distance grows when images repeat. So their mean is
subtracted, and they are added to the measured value. A draw takes one deviation for
each cell, independently of the other cells and of their order. (The errors of cells
that are sampled from the same noise are correlated. So their differences are more
certain than the draws show.)

Choice. The lowest of many noisy values is partly low by chance. The draws show by how
much, because draws scatter around the measured values as these scatter around the true
values. Let v_i be
the measured values, d_i those of a draw, and s the cell that the draw chooses. Then
e = d_s - v_s is the error of the chosen value in this draw. On average it is below 0.
Let v* be the measured value of the cell chosen from all measured values. The truth of
this cell is expected at

    E = v* - mean(e).

The noise of this cell alone is n = d* - v*, with d* its value in a draw. Let q(p) be
p-quantile of n over all draws. The true value is the measured one minus its noise,
so the largest noise gives the low end. The interval of level 1 - a is

    [E - q(1 - a/2), E - q(a/2)].

Without mean(e), a nominal 90% interval of the best of eight equal cells contains the
true value in only 67% of the cases.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scaling_ldm.records import Cell, Choice, Interval, MeasuredCell
from scaling_ldm.records.measurements import HIGHER_IS_BETTER

# What one image costs. "relative_cost_steps" is paper A's (arXiv 2404.01367, section
# 3.3): the relative cost of one evaluation x steps; guidance and the stages of a step
# are not counted. "flops" counts both, and the decoder. "seconds" is as measured.
COSTS: dict[str, Callable[[Cell], float]] = {
    "relative_cost_steps": lambda cell: cell.relative_cost * cell.steps,
    "flops": lambda cell: cell.flops + cell.decoder_flops,
    "seconds": lambda cell: cell.seconds,
}
Values = Float[np.ndarray, "cells"]
Draws = Float[np.ndarray, "bootstrap cells"]
Indices = Int[np.ndarray, "chosen"]
MIN_REPLICATES = 20  # fewer do not determine the ends of an interval


@dataclasses.dataclass(frozen=True)
class CellTable:
    """Cells that may be compared, with draws of their values."""

    cells: tuple[Cell, ...]
    value: Values
    draws: Draws | None  # None without replicates
    level: float
    notes: tuple[str, ...]

    def cost(self, name: str) -> Values:
        """The cost of each cell."""
        return np.array([cost_of(cell, name) for cell in self.cells])

    def models(self) -> list[str]:
        """Run ids by size."""
        sizes = {cell.model: cell.params for cell in self.cells}
        return sorted(sizes, key=lambda model: (sizes[model], model))

    def samplers(self) -> list[str]:
        return list(dict.fromkeys(cell.sampler for cell in self.cells))

    def where(self, **fields: Any) -> Indices:
        """Indices of the cells with these values of their fields."""
        matches = [
            all(getattr(cell, k) == v for k, v in fields.items()) for cell in self.cells
        ]
        return np.flatnonzero(matches)


def cost_of(cell: Cell, name: str) -> float:
    """The cost of one image with a cell's settings; equal costs are equal numbers.

    Args:
      name: a name of COSTS, which gives the unit.

    Raises:
      ValueError: an unknown name.
    """
    if name not in COSTS:
        raise ValueError(f"unknown cost {name!r}; known: {', '.join(COSTS)}")
    return float(f"{COSTS[name](cell):.12g}")


def name_of(cell: Cell) -> str:
    return (
        f"{cell.label} ({cell.model}), {cell.sampler}, {cell.steps} steps, "
        f"guidance {cell.guidance:g}"
    )


def compare(
    cells: Iterable[Cell],
    *,
    bootstrap: int = 1000,
    level: float = 0.9,
    seed: int = 0,
    allow_protocols: Collection[str] = (),
) -> CellTable:
    """The cells as a table; an error if they must not be compared.

    Args:
      cells: in any order.
      bootstrap: number of draws of the values; intervals and probabilities are shares
        of them.
      level: of every interval.
      seed: of the draws.
      allow_protocols: hashes of protocols that may be compared although they differ.

    Raises:
      ValueError: no usable cell; a cell given twice; several metrics, or one that is
        better if it is higher; several protocols that are not allowed by name; a cost
        that is not positive; a model with two sizes or costs.
    """
    if not 0 < level < 1 or bootstrap < 1:
        raise ValueError(
            f"level must lie in (0, 1) and bootstrap be at least 1, got {level} and "
            f"{bootstrap}"
        )
    cells = measured(cells)
    _check_protocols(cells, allow_protocols)
    _check_identity(cells)
    lost = [cell for cell in cells if not math.isfinite(cell.value)]
    notes = [f"left out: {name_of(c)}: {c.metric} is {c.value}" for c in lost]
    kept = [cell for cell in cells if math.isfinite(cell.value)]
    if not kept:
        raise ValueError(f"no cell with a finite value among {len(cells)}")
    kept.sort(key=lambda c: (c.sampler, c.params, c.model, c.steps, c.guidance))
    protocols = sorted({c.protocol for c in kept})
    if len(protocols) > 1:
        notes.append(f"protocols compared because allowed: {', '.join(protocols)}")
    counts = sorted({c.images for c in kept})
    if len(counts) > 1:
        notes.append(
            f"cells of {counts[0]} to {counts[-1]} images are compared: a Frechet "
            "distance falls with their number"
        )
    bare = [c for c in kept if len(c.deviations) < MIN_REPLICATES]
    if bare:
        notes.append(
            f"no intervals: {len(bare)} of {len(kept)} cells have fewer than "
            f"{MIN_REPLICATES} replicates, first {name_of(bare[0])}"
        )
    return CellTable(
        cells=tuple(kept),
        value=np.array([c.value for c in kept], dtype=np.float64),
        draws=None if bare else _draw(kept, bootstrap, seed),
        level=level,
        notes=tuple(notes),
    )


def measured(cells: Iterable[Cell]) -> list[MeasuredCell]:
    """Cells that have values; ValueError if one has none."""
    found = []
    for cell in cells:
        if not isinstance(cell, MeasuredCell):
            raise ValueError(
                f"no value of {name_of(cell)}: read a frontier with "
                "records.read_frontier, which adds those of the table"
            )
        found.append(cell)
    return found


def _check_protocols(cells: Sequence[Cell], allowed: Collection[str]) -> None:
    if isinstance(allowed, str):
        raise ValueError(f"allow_protocols is a list of hashes, got {allowed!r}")
    first = {cell.protocol: cell for cell in reversed(cells)}
    unlike = [p for p in sorted(first) if p not in allowed]
    if len(first) > 1 and unlike:
        one = unlike[0]
        other = next(p for p in sorted(first) if p != one)
        raise ValueError(
            f"{len(first)} protocols must not be compared: {one!r} of "
            f"{name_of(first[one])} and {other!r} of {name_of(first[other])}. Measure "
            f"again under one, or pass allow_protocols={sorted(first)!r}"
        )


def _check_identity(cells: Sequence[Cell]) -> None:
    metrics = sorted({cell.metric for cell in cells})
    if len(metrics) > 1:
        raise ValueError(f"one metric at a time, got {', '.join(metrics)}")
    if metrics and metrics[0].startswith(HIGHER_IS_BETTER):
        raise ValueError(
            f"{metrics[0]!r} is better if it is higher; lower must be better"
        )
    seen: set[tuple] = set()
    fixed: dict[str, tuple] = {}
    for cell in cells:
        key = (cell.model, cell.sampler, cell.steps, cell.guidance)
        if key in seen:
            raise ValueError(f"given twice: {name_of(cell)}")
        seen.add(key)
        size = (cell.label, cell.params, cell.relative_cost)
        if fixed.setdefault(cell.model, size) != size:
            raise ValueError(
                f"model {cell.model!r} has two (label, params, relative_cost): "
                f"{fixed[cell.model]} and {size}"
            )
        for name in COSTS:
            cost = cost_of(cell, name)
            if not (math.isfinite(cost) and cost > 0):
                raise ValueError(
                    f"{name} must be positive, got {cost} of {name_of(cell)}"
                )
        if not np.isfinite(cell.deviations).all():
            raise ValueError(f"a deviation is not finite: {name_of(cell)}")


def _draw(cells: Sequence[MeasuredCell], draws: int, seed: int) -> Draws:
    """Draws [draws, cells]: the value of a cell plus one of its centred deviations."""
    out = np.empty((draws, len(cells)))
    for i, cell in enumerate(cells):
        key = f"{cell.model}\0{cell.sampler}\0{cell.steps}\0{cell.guidance!r}"
        rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
        moved = np.array(cell.deviations, dtype=np.float64)
        moved += cell.value - moved.mean()
        out[:, i] = moved[rng.integers(len(moved), size=draws)]
    return out


def choose(table: CellTable, among: Indices, cost: Values) -> tuple[int, Choice]:
    """The lowest value among some cells; of equal values the cheapest.

    Args:
      table: the cells.
      among: indices of the candidates, at least one.
      cost: of every cell of the table, in the unit of `Choice.cost`.

    Returns:
      The chosen cell's index, and the choice: see the module's head.
    """
    best = min(
        among, key=lambda i: (table.value[i], cost[i], table.cells[i].guidance, i)
    )
    drawn = None
    if table.draws is not None:
        values = table.draws[:, among]
        at = values.argmin(axis=1)
        drawn = among[at], np.take_along_axis(values, at[:, None], 1)[:, 0]
    return int(best), make_choice(table, int(best), cost, drawn)


def make_choice(
    table: CellTable,
    best: int,
    cost: Values,
    drawn: tuple[np.ndarray, np.ndarray] | None,
) -> Choice:
    """A chosen cell, given the cell that each draw chooses and its value there."""
    cell, value = table.cells[best], float(table.value[best])
    expected, interval, probability = value, None, None
    if table.draws is not None and drawn is not None:
        chosen, values = drawn
        error = values - table.value[chosen]
        a = (1 - table.level) / 2
        expected = value - float(error.mean())
        noise = table.draws[:, best] - value
        high, low = expected - np.quantile(noise, [a, 1 - a])
        interval = Interval(low=float(low), high=float(high), level=table.level)
        probability = float(np.mean(chosen == best))
    same = "model label params sampler steps guidance".split()
    return Choice(
        **{field: getattr(cell, field) for field in same},
        cost=float(cost[best]),
        value=value,
        expected=expected,
        interval=interval,
        probability=probability,
    )
