"""Both laws of a comparison, and the ratio of the two with its band."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling_ldm.records import ComparedLaw, CrossingBudget, LawComparison
from scaling_ldm.report import format as fmt
from scaling_ldm.report.plotting import (
    INK,
    LAW,
    MUTED,
    OTHER,
    STYLE,
    Plot,
    log_ticks,
    render,
)

_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": LAW, "marker": "o", "ms": 4.5},
    {"color": OTHER, "marker": "s", "ms": 7.0, "markerfacecolor": "none"},
)
_UNITS = {"N_opt": ", parameters", "L_opt": ""}


def draw(found: LawComparison, name: str) -> Plot | None:
    """The figure of one comparison; None: it has no law.

    Args:
      name: of the figure.
    """
    laws = [law for law in found.laws.values() if isinstance(law, ComparedLaw)]
    if not laws:
        return None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        size = (3.3 * len(laws) + 0.4, 5.4)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(2, len(laws), squeeze=False, sharex="col")
        for (above, below), law in zip(grid.T, laws, strict=True):
            _both(above, found, law)
            _ratio(below, found, law)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        return render(figure, name, _caption(found))


def _caption(found: LawComparison) -> str:
    level = next(
        law.difference_interval.level
        for law in found.laws.values()
        if isinstance(law, ComparedLaw)
    )
    said = (
        "Above: the minima of both at the budgets that both have, with lines through "
        f"them. Below: {found.second} over {found.first} at each budget, the line "
        f"through it, and a {100 * level:.0f}% band that holds over all budgets "
        "together. Where the band leaves out 1, a difference is shown."
    )
    if isinstance(found.crossing, CrossingBudget):
        said += " Grey and upright: the budget of equal losses, with its interval."
    return said


def _both(axes: Axes, found: LawComparison, law: ComparedLaw) -> None:
    """The minima of both sides and their lines."""
    budgets, *sides = np.array(law.minima).T
    fine = np.geomspace(budgets.min(), budgets.max(), 60)
    for i, (values, look) in enumerate(zip(sides, _LOOKS, strict=True)):
        name = (found.first, found.second)[i]
        line = law.at_middle[i] * (fine / found.middle) ** law.exponents[i]
        axes.plot(fine, line, color=look["color"], linewidth=1.4)
        axes.plot(budgets, values, linestyle="none", label=name, **look)
    _log_axis(axes, np.concatenate(sides))
    unit = _UNITS.get(law.quantity, f", {found.data}")
    axes.set_ylabel(f"{fmt.SYMBOLS[law.quantity]} at the minimum{unit}")


def _ratio(axes: Axes, found: LawComparison, law: ComparedLaw) -> None:
    """The second over the first with its band; of the loss also the crossing."""
    budgets, first, second = np.array(law.minima).T
    x, line, low, high = np.array(law.band).T
    axes.fill_between(x, low, high, color=INK, alpha=0.12, linewidth=0)
    axes.plot(x, line, color=INK, linewidth=1.4)
    axes.plot(budgets, second / first, "D", color=INK, markersize=4)
    axes.axhline(1.0, color=MUTED, linewidth=1.0, linestyle="--")
    crossing = found.crossing
    if law.quantity == "L_opt" and isinstance(crossing, CrossingBudget):
        i, ends = crossing.interval, axes.get_xlim()
        axes.axvspan(i.low, i.high, color=MUTED, alpha=0.22, linewidth=0)
        axes.axvline(crossing.budget_flops, color=MUTED, linewidth=1.2)
        axes.set_xlim(*ends)
    axes.set_xscale("log")
    left, right = budgets.min() / 1.3, budgets.max() * 1.3
    axes.set_xlim(left, right)
    log_ticks(axes.xaxis, left, right, fmt.flops_tick, most=3)
    _log_axis(axes, np.concatenate([low, high, second / first, [1.0]]))
    axes.set_xlabel("C, FLOPs")
    axes.set_ylabel(f"ratio of {fmt.SYMBOLS[law.quantity]}, second / first")


def _log_axis(axes: Axes, values: np.ndarray) -> None:
    low, high = values.min(), values.max()
    more = max((high / low) ** 0.08, 1.0005)
    axes.set_yscale("log")
    axes.set_ylim(low / more, high * more)
    show = fmt.tick if high / low > 1.05 else (lambda value: f"{value:.5g}")
    log_ticks(axes.yaxis, low / more, high * more, show, most=5)
