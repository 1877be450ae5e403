"""Loss against learning rate: a curve per size, a panel per budget and batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from scaling_ldm.records import BestRate, RateFit
from scaling_ldm.report import format as fmt
from scaling_ldm.report import rate_tables
from scaling_ldm.report.plotting import (
    PAPER,
    Plot,
    line_entries,
    log_ticks,
    render,
    shade,
)
from scaling_ldm.report.study import Study

_MARKER = 3.2
# A panel shows the three best rates of all of its cells, and this share more than those
# of a usual one.
_MORE = 0.5
_VERTEX: dict[str, Any] = {"fmt": "D", "markersize": 4.8, "markerfacecolor": PAPER}
_VERTEX |= {"markeredgewidth": 1.3, "elinewidth": 1.3, "capsize": 2.5, "zorder": 5}


def draw(study: Study) -> list[Plot]:
    """A figure for each fit of learning rates that has runs."""
    return [
        rates(study, fit, name)
        for name, _, fit in rate_tables.named(study)
        if len(fit.runs) > 1
    ]


def rates(study: Study, fit: RateFit, name: str) -> Plot:
    """Loss against rate with the parabolas, their minima and the intervals of these.

    Args:
      study: the whole, whose plan says the budget of a size and length.
      fit: with at least two runs.
      name: of the figure.
    """
    cells = _cells(fit)
    panels = _panels(study, fit, list(cells))
    sizes = sorted({n for n, _, _ in cells})
    colours = {n: shade(i, len(sizes)) for i, n in enumerate(sizes)}
    best = {(b.params, b.tokens, b.batch_size): b for b in rate_tables.found(fit)}
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (max(3.1 * columns, 5.0) + 0.2, 3.0 * lines + 0.8)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.06))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    every = np.array([run[3] for run in fit.runs])
    outside = 0
    for axes, (title, members) in zip(grid.flat, panels, strict=False):
        top = height(axes, [cells[cell] for cell in members])
        for cell in members:
            outside += curve(axes, cells[cell], best.get(cell), colours[cell[0]], top)
        axes.set_title(title)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    grid[0, 0].set_xscale("log")
    left, right = every.min() / 1.15, every.max() * 1.15
    grid[0, 0].set_xlim(left, right)
    log_ticks(grid[0, 0].xaxis, left, right, fmt.flops_tick, most=4)
    for axes in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("learning rate")
        axes.xaxis.set_tick_params(labelbottom=True)
    measure = fmt.measure(fit.metric, fit.weights)
    for row in grid:
        row[0].set_ylabel(measure)
    entries = line_entries(
        [fmt.prefixed(n) for n in sizes], _MARKER, [*colours.values()]
    )
    title = f"N, {fmt.spoken(fit.size)}"
    legend = {"ncols": min(len(sizes), 3 * columns), "title_fontsize": 8.0}
    figure.legend(handles=entries, loc="outside lower center", title=title, **legend)
    if fit.group:
        figure.suptitle(fit.group, fontsize=9.0)
    return render(figure, name, _caption(fit, measure, outside))


Cell = tuple[float, float, float]  # parameters, tokens, batch size


def _cells(fit: RateFit) -> dict[Cell, np.ndarray]:
    """By cell, the (rate, loss) of its runs, by rate."""
    found: dict[Cell, list[tuple[float, float]]] = {}
    for n, d, b, rate, loss in sorted(fit.runs):
        found.setdefault((n, d, b), []).append((rate, loss))
    return {cell: np.array(runs) for cell, runs in found.items()}


def _panels(
    study: Study, fit: RateFit, cells: Sequence[Cell]
) -> list[tuple[str, list[Cell]]]:
    """Title and cells of each panel: those of one budget and batch size."""
    budgets = {} if study.by_steps else dict(_budgets(study, fit.size))
    batches = {cell[2] for cell in cells}
    found: dict[tuple[float, float], list[Cell]] = {}
    for cell in cells:
        found.setdefault((budgets.get(cell, 0.0), cell[2]), []).append(cell)
    panels = []
    for (budget, batch), members in sorted(found.items()):
        said = [f"C = {fmt.scientific(budget)} FLOPs"] if budget else []
        said += [f"batch {fmt.plain(batch)}"] if len(batches) > 1 else []
        panels.append((", ".join(said), members))
    return panels


def _budgets(study: Study, size: str) -> Iterator[tuple[Cell, float]]:
    for run in study.separate():
        cell = float(getattr(run, size)), float(run.tokens), float(run.batch_size)
        yield cell, run.budget_flops


def curve(
    axes: Axes, runs: np.ndarray, best: BestRate | None, colour: str, top: float
) -> int:
    """Runs of one cell, and its parabola; without a best rate they are hollow.

    Returns:
      How many runs have a loss above `top`; they are triangles there.
    """
    rate, loss = runs.T
    fill = colour if best else PAPER
    above = ~(loss <= top)
    look = {"color": colour, "markersize": _MARKER, "markerfacecolor": fill}
    axes.plot(rate[~above], loss[~above], "o", **look)
    axes.plot(rate[above], np.full(above.sum(), top), "^", **look)
    distinct = np.unique(rate)
    means = np.array([loss[rate == r].mean() for r in distinct])
    shown = np.where(means <= top, means, math.nan)
    axes.plot(distinct, shown, ":", color=colour, linewidth=0.9)
    if best is not None:
        near = distinct[np.argsort(np.abs(np.log(distinct / best.rate)))[:3]]
        i = best.rate_interval
        ends = (near.min(), near.max(), i.low, i.high)
        x = np.geomspace(min(ends), max(ends), 60)
        y = best.loss + best.curvature * np.log(x / best.rate) ** 2
        axes.plot(x[y <= top], y[y <= top], color=colour, linewidth=1.3)
        bars = [[max(0.0, best.rate - i.low)], [max(0.0, i.high - best.rate)]]
        axes.errorbar([best.rate], [best.loss], xerr=bars, color=colour, **_VERTEX)
    return int(above.sum())


def height(axes: Axes, runs: Sequence[np.ndarray]) -> float:
    """Scales the loss to what tells the best rates; returns the largest that is shown.

    Args:
      runs: of each cell, (rate, loss).
    """
    third = []
    for rate, loss in (cell.T for cell in runs):
        seeds = sorted((loss[rate == r] for r in np.unique(rate)), key=np.mean)
        third.append(float(seeds[min(2, len(seeds) - 1)].max()))
    every = np.concatenate([cell[:, 1] for cell in runs])
    low = float(every.min())
    top = low + (1 + _MORE) * max(float(np.median(third)) - low, 1e-12)
    top = max(top, max(third))
    top = min(top, float(every.max()))
    margin = 0.06 * ((top - low) or abs(top) or 1.0)
    axes.set_ylim(low - margin, top + margin)
    return top


def _caption(fit: RateFit, measure: str, outside: int) -> str:
    several = any(not isinstance(b, BestRate) for b in fit.best)
    caption = (
        f"{measure[:1].upper()}{measure[1:]} at the end of every run against its "
        "learning rate, a colour per size. Lines: parabolas in the logarithm of the "
        "rate, through the best rates. Diamonds: best rates, with their intervals."
    )
    if several:
        caption += " Hollow points: sizes whose best rate was refused."
    if outside:
        caption += f" Triangles: {outside} runs whose loss is higher than the figure."
    return ". ".join(filter(None, (fit.group, caption)))
