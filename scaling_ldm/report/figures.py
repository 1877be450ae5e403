"""The figures of the page, drawn from a `Study` without any global plotting state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling_ldm.laws.published import PublishedLaw
from scaling_ldm.records import HeldOut, Interval, Parabola, PowerLaw, Refusal
from scaling_ldm.report import frontier_figures, quality_figures, training_quality
from scaling_ldm.report.format import (
    SYMBOLS,
    flops_tick,
    prefixed,
    scientific,
    spoken,
    tick,
    who,
)
from scaling_ldm.report.plotting import (
    INK,
    LAW,
    MUTED,
    OTHER,
    PAPER,
    STYLE,
    Plot,
    log_ticks,
    render,
    shade,
)
from scaling_ldm.report.study import QUANTITIES, Study, smooth

# Legend entries by their first word, in the order in which they are read.
_ORDER = ("fit:", "minimum", "held-out", "predicted", "slope")


def draw(study: Study, published: Mapping[str, PublishedLaw]) -> list[Plot]:
    """Every figure the study has the data for, in the order of the page.

    Args:
      study: what was read.
      published: by quantity, the law whose slope is drawn beside the fitted one.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        pictures = []
        if not study.by_steps and any(study.points(b) for b in study.budgets()):
            pictures.append(isoflop(study))
        if not study.by_steps and study.fit is not None:
            pictures += [law(study, q, published.get(q)) for q in QUANTITIES]
        if study.curves:
            pictures.append(training(study))
        if study.frontier is not None:
            pictures += frontier_figures.draw(study.frontier)
        pictures += [
            quality_figures.quality(found, spoken(study.size))
            for found in training_quality.comparisons(study)
        ]
        if study.images is not None and study.samples is not None:
            pictures.append(samples(study))
    return pictures


def isoflop(study: Study) -> Plot:
    """Loss against size, a curve and a vertex per budget."""
    figure = Figure(figsize=(6.6, 4.9), layout="constrained")
    axes = figure.add_subplot()
    budgets, minima = study.budgets(), study.minima()
    for i, budget in enumerate(budgets):
        points = study.points(budget)
        if not points:
            continue
        n = np.array([p[0] for p in points])
        y = np.array([p[2] for p in points])
        found = minima.get(budget)
        colour, label = shade(i, len(budgets)), scientific(budget)
        if isinstance(found, Refusal):
            colour, label = MUTED, f"{label}, refused: {found.reason}"
        axes.plot(n, y, "o", color=colour, markersize=3.8, label=label, zorder=3)
        if not isinstance(found, Parabola):
            axes.plot(n, y, ":", color=colour, linewidth=0.9)
            continue
        ends = (n.min(), n.max(), found.n_opt)
        x = np.geomspace(min(ends), max(ends), 100)
        curve = found.curvature * np.log(x / found.n_opt) ** 2 + found.l_opt
        axes.plot(x, curve, color=colour, linewidth=1.3)
        _cross(axes, found.n_opt, found.l_opt, found, colour)
    axes.set_xscale("log")
    log_ticks(axes.xaxis, *axes.get_xlim(), tick, most=8)
    axes.set_xlabel(f"N, {spoken(study.size)}")
    axes.set_ylabel(f"L, {spoken(study.metric)}")
    longest = max(
        (len(words) for words in axes.get_legend_handles_labels()[1]), default=0
    )
    figure.legend(
        loc="outside lower center",
        ncols=3 if longest <= 30 else 1 if longest > 48 else 2,  # what the width holds
        title="budget C, FLOPs",
        title_fontsize=8.0,
    )
    shown = isinstance(next(iter(minima.values()), None), (Parabola, Refusal))
    caption = "Loss of every finished run against its size, a colour per budget. "
    caption += (
        "Lines: parabolas in ln N. Diamonds: their minima, with the intervals of N "
        "and L. Grey and dotted: budgets whose minimum was refused."
        if shown
        else "No fit has been made yet."
    )
    return render(figure, "isoflop", caption)


def _cross(axes: Axes, x: float, y: float, p: Parabola, colour: str) -> None:
    """The vertex with its two intervals."""
    axes.errorbar(
        [x],
        [y],
        xerr=_bars(x, p.n_opt_interval),
        yerr=_bars(y, p.l_opt_interval),
        fmt="D",
        color=colour,
        markersize=5.5,
        markerfacecolor=PAPER,
        markeredgewidth=1.4,
        elinewidth=1.4,
        capsize=2.5,
        zorder=5,
    )


def _bars(value: float, interval: Interval) -> np.ndarray:
    """Distances below and above, as error bars want them; never negative."""
    ends = [[value - interval.low], [interval.high - value]]
    return np.maximum(np.nan_to_num(ends), 0.0)


def law(study: Study, quantity: str, other: PublishedLaw | None) -> Plot:
    """One quantity's minima against budget, its law, band, and the held-out budget."""
    symbol, fitted = SYMBOLS[quantity], study.fit.laws.get(quantity)
    figure = Figure(figsize=(3.7, 4.1), layout="constrained")
    axes = figure.add_subplot()
    minima = [p for p in study.fit.parabolas if isinstance(p, Parabola)]
    held = [
        h
        for h in study.fit.held_out
        if isinstance(h, HeldOut) and h.quantity == quantity
    ]
    apart = {h.budget_flops for h in held}
    key = quantity.lower()
    reach = [p.budget_flops for p in minima] or study.budgets()
    left, right = min(reach) / 1.35, max(reach) * 1.45
    heights = [getattr(p, key) for p in minima]
    if isinstance(fitted, PowerLaw):
        x, low, high = np.array(fitted.band).T
        inside = np.geomspace(left, right, 60)
        low, high = (np.interp(np.log(inside), np.log(x), v) for v in (low, high))
        axes.fill_between(inside, low, high, color=LAW, alpha=0.14, linewidth=0)
        line = np.array([fitted(float(c)) for c in inside])
        label = f"fit: {symbol} ∝ C^{_signed(fitted.exponent)}, prediction band"
        axes.plot(inside, line, color=LAW, linewidth=1.5, label=label)
        heights += [low.min(), high.max()]
    for p in minima:
        value, interval = getattr(p, key), getattr(p, f"{key}_interval")
        heights += [interval.low, interval.high]
        axes.errorbar(
            [p.budget_flops],
            [value],
            yerr=_bars(value, interval),
            fmt="o",
            color=INK,
            markersize=4.6,
            markerfacecolor=PAPER if p.budget_flops in apart else INK,
            markeredgewidth=1.3,
            elinewidth=1.1,
            capsize=2.0,
            zorder=4,
        )
    if minima and len(apart) < len(minima):
        axes.plot([], [], "o", color=INK, markersize=4.6, label="minimum of a budget")
    for h in held:
        axes.plot(
            [],
            [],
            "o",
            color=INK,
            markersize=4.6,
            markerfacecolor=PAPER,
            label="held-out budget, measured",
        )
        axes.errorbar(
            [h.budget_flops * 1.09],
            [h.predicted],
            yerr=_bars(h.predicted, h.predicted_interval),
            fmt="_",
            color=LAW,
            markersize=8,
            markeredgewidth=1.8,
            elinewidth=1.3,
            capsize=3.0,
            zorder=4,
            label="predicted from the smaller ones",
        )
        heights += [h.predicted_interval.low, h.predicted_interval.high]
    if other is not None and minima:
        centre = math.exp(np.mean(np.log([p.budget_flops for p in minima])))
        middle = math.exp(np.mean(np.log([getattr(p, key) for p in minima])))
        slope = other.constants["exponent"]
        ends = np.array([left, right])
        axes.plot(
            ends,
            middle * (ends / centre) ** slope,
            "--",
            color=OTHER,
            linewidth=1.2,
            label=f"slope of {who(other.source)}: {_signed(slope)}, anchored here",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    if heights:
        low, high = min(v for v in heights if v > 0), np.nanmax(heights)
        axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
    log_ticks(axes.xaxis, left, right, flops_tick, most=4)
    log_ticks(axes.yaxis, *axes.get_ylim(), tick, most=5)
    axes.set_xlabel("C, FLOPs")
    unit = {"N_opt": ", parameters", "D_opt": ", tokens", "L_opt": ""}
    axes.set_ylabel(f"{symbol} at the minimum{unit[quantity]}")
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = sorted(entries, key=lambda words: _ORDER.index(words.split()[0]))
    if labels:
        figure.legend(
            [entries[words] for words in labels], labels, loc="outside lower left"
        )
    if isinstance(fitted, PowerLaw):
        caption = f"{symbol} of each budget's minimum, and the power law through it."
    else:
        reason = fitted.reason if fitted is not None else "not in laws.json"
        caption = f"{symbol} of each budget's minimum. No law: {reason}."
    return render(figure, f"law_{symbol}", caption)


def _signed(exponent: float) -> str:
    return f"{exponent:.3f}".replace("-", "\N{MINUS SIGN}")


def training(study: Study) -> Plot:
    """Smoothed training loss: a panel per budget, or one where steps are the same."""
    logged = [r for r in study.runs if r.run_id in study.curves]
    panels = [logged]
    if not study.by_steps:
        budgets = sorted({r.budget_flops for r in logged})
        panels = [[r for r in study.runs if r.budget_flops == b] for b in budgets]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    each = (5.0, 3.4) if study.by_steps else (3.1, 2.6)
    figure = Figure(
        figsize=(each[0] * columns + 0.2, each[1] * rows + 0.2), layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    tops, bottoms = [], []
    for axes, runs in zip(grid.flat, panels, strict=False):
        for i, run in enumerate(runs):
            if (curve := study.curves.get(run.run_id)) is None:
                continue
            curve = curve[np.isfinite(curve[:, 1]) & (curve[:, 2] > 0)]
            if not len(curve):
                continue
            y = smooth(curve[:, 1])
            record = study.records.get(run.run_id)
            failed = record is not None and record.status != "finished"
            axes.plot(
                curve[:, 0] if study.by_steps else curve[:, 2] / run.budget_flops,
                y,
                ":" if failed else "-",
                color=MUTED if failed else shade(i, len(runs)),
                linewidth=1.1,
                label=prefixed(getattr(run, study.size))
                + ("  failed" if failed else ""),
            )
            bottoms.append(y.min())
            tops.append(y[len(y) // 50])
        if study.by_steps:
            axes.set_xlim(0, 1.02 * max(r.steps for r in runs))
        else:
            axes.set_title(f"C = {scientific(runs[0].budget_flops)} FLOPs")
            axes.set_xlim(0, 1.02)
        axes.legend(
            loc="upper right",
            ncols=2,
            fontsize=6.5,
            handlelength=1.2,
            columnspacing=1.0,
            labelspacing=0.25,
            title="N",
            title_fontsize=6.5,
        )
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("step" if study.by_steps else "share of the budget spent")
        axes.xaxis.set_tick_params(labelbottom=True)
    if bottoms:
        low, high = min(bottoms), max(tops)
        grid[0, 0].set_yscale("log")
        grid[0, 0].set_ylim(low / 1.05, high * (high / low) ** 0.35)
        log_ticks(grid[0, 0].yaxis, low / 1.05, high * 1.05, tick, most=8)
    for row in grid:
        row[0].set_ylabel("training loss")
    against = "the step" if study.by_steps else "the share of the budget"
    caption = (
        "Training loss, smoothed by an exponential moving average (0.9) over the "
        f"logged steps, against {against}."
    )
    return render(figure, "training", caption)


def samples(study: Study, most: int = 64) -> Plot:
    """The sampled images with their captions."""
    images = study.images[:most]
    captions = (*study.samples.captions, *[""] * len(images))[: len(images)]
    columns = min(8, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.05 * columns, 1.4 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.01, 0.3 / (1.4 * rows), 0.99, 0.99, 0.1, 0.45)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, words in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        lines = textwrap.wrap(words, 18, max_lines=3, placeholder=" ...")
        wrapped = "\n".join(lines)
        axes.text(
            0.5,
            -0.06,
            wrapped,
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=5.5,
            parse_math=False,
        )
    return render(figure, "samples", "Sampled images and their captions.")
