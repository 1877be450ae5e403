"""Figures of quality against the cost of sampling.

They are figures 8, 9 and 11 of paper A (Mei et al. 2024, arXiv 2404.01367v2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from scaling_ldm.frontier import pareto_optimal
from scaling_ldm.records import BestGuidance, Choice, Front, Frontier
from scaling_ldm.report.format import spoken, tick
from scaling_ldm.report.plotting import (
    INK,
    PAPER,
    Plot,
    line_entries,
    log_ticks,
    render,
    shade,
)

COST = "relative_cost_steps"  # the paper's, of every figure here
LOG_FROM = 4.0  # times the lowest value, from which the axis is logarithmic
_RING: dict[str, Any] = {"color": INK, "linestyle": "--", "marker": "o"}
_RING |= {"markersize": 5.5, "markerfacecolor": "none"}


def draw(frontier: Frontier) -> list[Plot]:
    """The three figures, in the order of the page; needs the style to be set."""
    return [values(frontier), best_size(frontier), best_guidance(frontier)]


def sizes(frontier: Frontier) -> dict[str, str]:
    """Label of each model, by size; with the run's id where two share a label."""
    params = {c.model: (c.params, c.model, c.label) for c in frontier.cells}
    labels = [label for _, _, label in params.values()]
    return {
        model: label if labels.count(label) == 1 else f"{label} ({model})"
        for _, model, label in sorted(params.values())
    }


def samplers(frontier: Frontier) -> list[str]:
    """Samplers with a front of the paper's cost, in the order of the table."""
    return [f.sampler for f in frontier.fronts if f.cost == COST]


def _cost_words(frontier: Frontier) -> str:
    return (
        " Cost: steps × the cost of one evaluation, in evaluations of "
        f"{frontier.reference}."
    )


def values(frontier: Frontier) -> Plot:
    """Value against cost: a line per size, a panel per sampler, the Pareto set."""
    names = [s for s in samplers(frontier) if s] or [""]
    figure, grid, panels = _panels(len(names))
    models = sizes(frontier)
    heights: list[float] = []
    for axes, name in zip(panels, names, strict=True):
        for i, model in enumerate(models):
            found = [c for c in _choices(frontier, name) if c.model == model]
            found.sort(key=lambda c: c.cost)
            if not found:
                continue
            x, y = np.array([(c.cost, c.expected) for c in found]).T
            colour = shade(i, len(models))
            axes.plot(x, y, "o-", color=colour, markersize=3.2, linewidth=1.2, zorder=3)
            heights += y.tolist()
            ends = [(i.low, i.high) for c in found if (i := c.interval) is not None]
            if len(ends) == len(found):
                low, high = np.array(ends).T
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
                heights += [*low, *high]
        _front(axes, _choices(frontier, name))
        axes.set_title(name)
        axes.set_xscale("log")
    low, high = min(heights), max(heights)
    first = panels[0]
    if low > 0 and high / low > LOG_FROM:
        first.set_yscale("log")
        first.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
        log_ticks(first.yaxis, *first.get_ylim(), tick, most=7)
    _finish(figure, grid, panels, "sampling cost", spoken(frontier.metric))
    entries = line_entries(list(models.values()), 3.2)
    entries.append(Line2D([], [], linewidth=1.0, label="Pareto set", **_RING))
    _legend(figure, entries)
    caption = (
        f"{spoken(frontier.metric)} against the cost of sampling, a line per size, at "
        "the best guidance of each step count. "
    )
    if any(b.choice.interval for b in frontier.best):
        caption += (
            f"Bands: {100 * frontier.level:.0f}% bootstrap intervals; values are "
            "corrected for the luck of the best of several guidances. "
        )
    caption += "Rings: settings that nothing cheaper reaches."
    caption += _cost_words(frontier)
    return render(figure, "frontier", caption)


def _choices(frontier: Frontier, sampler: str) -> list[Choice]:
    """Each setting of a sampler at its best guidance; "": of all samplers."""
    return [b.choice for b in frontier.best if sampler in ("", b.choice.sampler)]


def _front(axes: Axes, drawn: Sequence[Choice]) -> None:
    """Rings around the points of the lines that are in the Pareto set."""
    found = pareto_optimal(drawn)
    x, y = np.array([(c.cost, c.expected) for c in found]).T
    axes.plot(x, y, linewidth=0.9, markeredgewidth=1.0, zorder=4, **_RING)


def best_size(frontier: Frontier) -> Plot:
    """The probability of each size to be the best, against the budget."""
    fronts = [f for f in frontier.fronts if f.cost == COST]
    figure, grid, panels = _panels(len(fronts))
    models = sizes(frontier)
    colours = [shade(i, len(models)) for i in range(len(models))]
    known = all(p.probabilities for f in fronts for p in f.points)
    for axes, front in zip(panels, fronts, strict=True):
        x = np.array([p.budget for p in front.points])
        shares = np.array([_shares(front, model, known) for model in models])
        # Each budget's shares reach halfway to its neighbours.
        edges = np.concatenate([x[:1], np.sqrt(x[1:] * x[:-1]), x[-1:]])
        steps = np.repeat(edges, 2)[1:-1], np.repeat(shares, 2, axis=1)
        axes.stackplot(*steps, colors=colours, linewidth=0)
        axes.set_title(front.sampler or "all samplers")
        axes.set_xscale("log")
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(0, 1)
        axes.grid(False)
    what = "probability of being best" if known else "best size"
    _finish(figure, grid, panels, "budget of sampling cost", what)
    if not known:
        panels[0].set_yticks([])
    pairs = zip(colours, models.values(), strict=True)
    _legend(figure, [Patch(color=colour, label=label) for colour, label in pairs])
    caption = (
        "The probability that each size is the best within a budget, the share of "
        f"{frontier.bootstrap} bootstrap draws."
        if known
        else "The best size within each budget, as measured: without replicates no "
        "probability is known."
    )
    return render(figure, "best_size", caption + _cost_words(frontier))


def _shares(front: Front, model: str, known: bool) -> list[float]:
    """The probability of a size to be the best; where unknown, 1 for the best."""
    if known:
        return [p.probabilities.get(model, 0.0) for p in front.points]
    return [float(p.choice.model == model) for p in front.points]


def best_guidance(frontier: Frontier) -> Plot:
    """The best guidance of each size and step count, a panel per sampler."""
    names = [s for s in samplers(frontier) if s] or [""]
    models = sizes(frontier)
    rows = list(models)
    steps = sorted({b.choice.steps for b in frontier.best})
    grid_of_guidance = sorted({g for b in frontier.best for g in b.tried})
    width = max(1.6, 0.42 * len(steps) + 0.3)
    height = 0.3 * len(rows) + 0.55
    figure, grid, panels = _panels(
        len(names), lambda across, down: (width * across + 0.9, height * down + 0.5)
    )
    for axes, name in zip(panels, names, strict=True):
        for b in frontier.best:
            if name in ("", b.choice.sampler):
                at = steps.index(b.choice.steps), rows.index(b.choice.model)
                _guidance(axes, at, b, grid_of_guidance)
        axes.set_title(name)
        axes.set_xlim(-0.5, len(steps) - 0.5)
        axes.set_ylim(-0.5, len(rows) - 0.5)
        axes.set_xticks(range(len(steps)), [str(s) for s in steps])
        axes.set_yticks(range(len(rows)), [models[m] for m in rows])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for row in grid[:-1]:
        for axes in row:
            axes.xaxis.set_tick_params(labelbottom=False)
    for axes in _bottom(grid, panels):
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("steps")
    doubts = sum(bool(b.edge) for b in frontier.best)
    caption = "The guidance of the lowest value at each size and step count."
    if doubts:
        caption += (
            f" Starred, {doubts} of {len(frontier.best)}: it is an end of what was "
            "tried, so a better one may lie beyond."
        )
    return render(figure, "best_guidance", caption)


def _guidance(
    axes: Axes, at: tuple[int, int], best: BestGuidance, tried: Sequence[float]
) -> None:
    x, y = at
    index = tried.index(best.choice.guidance)
    colour = shade(index, len(tried))
    axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, color=colour, lw=0))
    text = f"{best.choice.guidance:g}{'*' if best.edge else ''}"
    ink = INK if index < 0.37 * len(tried) else PAPER
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=ink)


def _size(columns: int, rows: int) -> tuple[float, float]:
    return {1: 5.0, 2: 6.6}.get(columns, 8.6), 2.6 * rows + 0.8


def _panels(
    count: int, size: Callable[[int, int], tuple[float, float]] = _size
) -> tuple[Figure, np.ndarray, list[Axes]]:
    """A figure with `count` panels, at most three a row; the grid; those in use."""
    columns = 2 if count == 4 else min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=size(columns, rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in list(grid.flat)[count:]:
        axes.set_axis_off()
    return figure, grid, list(grid.flat)[:count]


def _bottom(grid: np.ndarray, panels: Sequence[Axes]) -> list[Axes]:
    """The lowest panel in use of each column."""
    return list(panels)[max(0, len(panels) - grid.shape[1]) :]


def _finish(
    figure: Figure, grid: np.ndarray, panels: list[Axes], x: str, y: str
) -> None:
    """Labels, and ticks on the shared logarithmic axis of costs."""
    log_ticks(panels[0].xaxis, *panels[0].get_xlim(), tick, most=5)
    for axes in _bottom(grid, panels):
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel(x)
    for row in grid:
        row[0].set_ylabel(y)


def _legend(figure: Figure, entries: list) -> None:
    widest = max(len(entry.get_label()) for entry in entries) + 6
    lines = math.ceil(len(entries) / max(1, min(6, 90 // widest)))
    columns = math.ceil(len(entries) / lines)
    figure.legend(handles=entries, loc="outside lower center", ncols=columns)
