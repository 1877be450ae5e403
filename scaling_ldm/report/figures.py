"""The figures of the page, drawn from a `Study` without any global plotting state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from scaling_ldm.laws.converted import ConvertedStudy
from scaling_ldm.laws.published import PublishedLaw
from scaling_ldm.records import (
    FitResult,
    HeldOut,
    Interval,
    OffsetLaw,
    Parabola,
    PowerLaw,
    Refusal,
    RunSpec,
)
from scaling_ldm.report import format as fmt
from scaling_ldm.report import (
    frontier_figures,
    learning_figures,
    published_laws,
    quality_figures,
    rate_figures,
    training_quality,
)
from scaling_ldm.report.plotting import (
    INK,
    LAW,
    LEGEND,
    MUTED,
    OTHER,
    PAPER,
    STYLE,
    Plot,
    log_ticks,
    render,
    shade,
)
from scaling_ldm.report.study import QUANTITIES, Images, Study, smooth

# Legend entries by their first word, in the order in which they are read.
_ORDER = ("fit:", "minimum", "held-out", "predicted", "slope", "published:")
_UNITS = {"N_opt": ", parameters", "D_opt": ", tokens", "L_opt": ""}
# Looks: of a vertex, the minimum of a budget, a prediction, the words at a picture.
_BAR: dict[str, Any] = {"fmt": "o", "zorder": 4}
_VERTEX = _BAR | {"fmt": "D", "markersize": 5.5, "markerfacecolor": PAPER, "zorder": 5}
_VERTEX |= {"markeredgewidth": 1.4, "elinewidth": 1.4, "capsize": 2.5}
_POINT: dict[str, Any] = {"color": INK, "markersize": 4.6}
_MINIMUM = _BAR | _POINT
_MINIMUM |= {"markeredgewidth": 1.3, "elinewidth": 1.1, "capsize": 2.0}
_PREDICTED = _BAR | {"fmt": "_", "color": LAW, "markersize": 8, "capsize": 3.0}
_PREDICTED |= {"markeredgewidth": 1.8, "elinewidth": 1.3}
_WORDS: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 5.5}
_WORDS |= {"parse_math": False}


def draw(
    study: Study,
    published: Mapping[str, PublishedLaw],
    overlaid: Sequence[ConvertedStudy] = (),
) -> list[Plot]:
    """Every figure the study has the data for, in the order of the page.

    Args:
      study: what was read.
      published: by quantity, the law whose slope is drawn beside the fitted one.
      overlaid: published laws that are drawn themselves.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        pictures = []
        for part in study.parts():
            pictures += _of_group(part, published, overlaid)
        pictures += rate_figures.draw(study)
        if study.frontier is not None:
            pictures += frontier_figures.draw(study.frontier)
        pictures += [
            quality_figures.quality(found, fmt.spoken(study.size))
            for found in training_quality.comparisons(study)
        ]
        if study.images is not None and study.samples is not None:
            pictures.append(samples(study.images, study.samples.captions))
    return pictures


def _of_group(
    study: Study,
    published: Mapping[str, PublishedLaw],
    overlaid: Sequence[ConvertedStudy],
) -> list[Plot]:
    """The figures of one group of runs."""
    pictures = []
    for part in () if study.by_steps else study.by_metric():
        if any(part.points(b) for b in part.budgets()):
            pictures.append(isoflop(part))
        # Without a minimum there is nothing to draw.
        if part.fit and any(isinstance(p, Parabola) for p in part.fit.parabolas):
            pictures += [
                law(part, part.fit, q, published.get(q), overlaid) for q in QUANTITIES
            ]
    if any(run.run_id in study.curves for run in study.runs):
        pictures.append(training(study))
    if learning_figures.runs_with_curves(study):
        pictures.append(learning_figures.learning(study))
    return pictures


def _finished(figure: Figure, name: str, caption: str, study: Study) -> Plot:
    """The figure of a group, and of a metric if there are several, under its title."""
    if study.title:
        figure.suptitle(study.title, fontsize=9.0)
        caption = f"{study.title}. {caption}"
    return render(figure, name + study.suffix, caption)


def isoflop(study: Study) -> Plot:
    """Loss against size, a curve and a vertex per budget."""
    figure = Figure(figsize=(6.6, 4.9), layout="constrained")
    axes = figure.add_subplot()
    budgets, minima = study.budgets(), study.minima()
    for i, budget in enumerate(budgets):
        if not (points := study.points(budget)):
            continue
        n, _, y = np.array(points).T
        found = minima.get(budget)
        colour, label = shade(i, len(budgets)), fmt.scientific(budget)
        if isinstance(found, Refusal):
            colour, label = MUTED, f"{label}, refused: {found.reason}"
        axes.plot(n, y, "o", color=colour, markersize=3.8, label=label, zorder=3)
        if not isinstance(found, Parabola):
            axes.plot(n, y, ":", color=colour, linewidth=0.9)
            continue
        ends = (n.min(), n.max(), found.n_opt)
        x = np.geomspace(min(ends), max(ends), 100)
        curve = [found(float(n)) for n in x]
        axes.plot(x, curve, color=colour, linewidth=1.3)
        axes.errorbar(
            [found.n_opt],
            [found.l_opt],
            xerr=_bars(found.n_opt, found.n_opt_interval),
            yerr=_bars(found.l_opt, found.l_opt_interval),
            color=colour,
            **_VERTEX,
        )
    axes.set_xscale("log")
    log_ticks(axes.xaxis, *axes.get_xlim(), fmt.tick, most=8)
    axes.set_xlabel(f"N, {fmt.spoken(study.size)}")
    axes.set_ylabel(f"L, {study.measure}")
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
    columns = 3 if longest <= 30 else 1 if longest > 48 else 2  # what the width holds
    title = {"title": "budget C, FLOPs", "title_fontsize": 8.0}
    figure.legend(loc="outside lower center", ncols=columns, **title)
    caption = "Loss of every finished run against its size, a colour per budget. "
    caption += (
        "Lines: the fitted curves. Diamonds: their minima, with the intervals of N "
        "and L. Grey and dotted: budgets whose minimum was refused."
        if minima
        else "No fit has been made yet."
    )
    return _finished(figure, "isoflop", caption, study)


def _bars(value: float, interval: Interval) -> np.ndarray:
    """Distances below and above, as error bars want them; never negative."""
    ends = [[value - interval.low], [interval.high - value]]
    return np.maximum(np.nan_to_num(ends), 0.0)


def law(
    study: Study,
    fit: FitResult,
    quantity: str,
    other: PublishedLaw | None,
    overlaid: Sequence[ConvertedStudy] = (),
) -> Plot:
    """One quantity's minima against budget, its law, band, and the held-out budget.

    Args:
      study: of one group. The axis spans its budgets where no minimum was found.
      fit: the laws of the group.
      other: the published law whose slope is drawn.
      overlaid: published laws that are drawn themselves.
    """
    symbol, fitted = fmt.SYMBOLS[quantity], fit.laws.get(quantity)
    figure = Figure(figsize=(3.7, 4.1), layout="constrained")
    axes = figure.add_subplot()
    minima = [p for p in fit.parabolas if isinstance(p, Parabola)]
    held = [h for h in fit.held_out if isinstance(h, HeldOut)]
    held = [h for h in held if h.quantity == quantity]
    reach = [p.budget_flops for p in minima] or study.budgets()
    left, right = min(reach) / 1.35, max(reach) * 1.45
    heights = []
    if isinstance(fitted, (PowerLaw, OffsetLaw)):
        heights += _fitted(axes, symbol, fitted, np.geomspace(left, right, 60))
    heights += _minima(axes, quantity, minima, {h.budget_flops for h in held})
    for h in held:
        heights += _held_out(axes, h)
    above = [p for p in minima if getattr(p, quantity.lower()) > 0]
    if other is not None and above:  # a parabola may have its minimum below 0
        _slope(axes, quantity, above, other, np.array([left, right]))
    heights += published_laws.draw(axes, quantity, overlaid, np.array([left, right]))
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    log_ticks(axes.xaxis, left, right, fmt.flops_tick, most=4)
    if heights := [v for v in heights if v > 0]:
        axes.set_yscale("log")
        low, high = min(heights), max(heights)
        axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
        log_ticks(axes.yaxis, *axes.get_ylim(), fmt.tick, most=5)
    axes.set_xlabel("C, FLOPs")
    axes.set_ylabel(f"{symbol} at the minimum{_UNITS[quantity]}")
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = sorted(entries, key=lambda words: _ORDER.index(words.split()[0]))
    if labels:
        handles = [entries[words] for words in labels]
        figure.legend(handles, labels, loc="outside lower left")
    if isinstance(fitted, (PowerLaw, OffsetLaw)):
        offset = " with an offset" * isinstance(fitted, OffsetLaw)
        caption = f"{symbol} of each budget's minimum, and the power law{offset}."
    else:
        reason = fitted.reason if fitted is not None else "not in laws.json"
        caption = f"{symbol} of each budget's minimum. No law: {reason}."
    return _finished(figure, f"law_{symbol}", caption, study)


def _fitted(
    axes: Axes, symbol: str, fitted: PowerLaw | OffsetLaw, inside: np.ndarray
) -> tuple[float, float]:
    """The law and its band; returns the lowest and the highest of the band."""
    x, low, high = np.array(fitted.band).T
    low, high = (np.interp(np.log(inside), np.log(x), v) for v in (low, high))
    axes.fill_between(inside, low, high, color=LAW, alpha=0.14, linewidth=0)
    line = np.array([fitted(float(c)) for c in inside])
    power = f"C^{_signed(fitted.exponent)}"
    offset = getattr(fitted, "offset", 0.0)
    left = f"{symbol} − {fmt.loss(offset)}" if offset else symbol
    label = f"fit: {left} ∝ {power}, prediction band"
    axes.plot(inside, line, color=LAW, linewidth=1.5, label=label)
    return float(low.min()), float(high.max())


def _minima(
    axes: Axes, quantity: str, minima: Sequence[Parabola], apart: set[float]
) -> list[float]:
    """The minima of the budgets, hollow for those in `apart`; returns all heights."""
    key, heights = quantity.lower(), []
    for p in minima:
        value, interval = getattr(p, key), getattr(p, f"{key}_interval")
        heights += [value, interval.low, interval.high]
        axes.errorbar(
            [p.budget_flops],
            [value],
            yerr=_bars(value, interval),
            markerfacecolor=PAPER if p.budget_flops in apart else INK,
            **_MINIMUM,
        )
    if minima and len(apart) < len(minima):
        axes.plot([], [], "o", label="minimum of a budget", **_POINT)
    return heights


def _held_out(axes: Axes, h: HeldOut) -> tuple[float, float]:
    """A prediction beside the measured minimum; returns the ends of its interval."""
    label = "held-out budget, measured"
    axes.plot([], [], "o", markerfacecolor=PAPER, label=label, **_POINT)
    axes.errorbar(
        [h.budget_flops * 1.09],
        [h.predicted],
        yerr=_bars(h.predicted, h.predicted_interval),
        label="predicted from the smaller ones",
        **_PREDICTED,
    )
    return h.predicted_interval.low, h.predicted_interval.high


def _slope(
    axes: Axes,
    quantity: str,
    minima: Sequence[Parabola],
    other: PublishedLaw,
    ends: np.ndarray,
) -> None:
    """The slope of a published law, through the middle of the minima."""
    centre = math.exp(np.mean(np.log([p.budget_flops for p in minima])))
    heights = [getattr(p, quantity.lower()) for p in minima]
    middle, slope = math.exp(np.mean(np.log(heights))), other.constants["exponent"]
    if slope is None:
        raise ValueError(f"{other.key}: its exponent is not known")
    label = f"slope of {fmt.who(other.source)}: {_signed(slope)}, anchored here"
    line = middle * (ends / centre) ** slope
    axes.plot(ends, line, "--", color=OTHER, linewidth=1.2, label=label)


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
    width, height = (5.0, 3.4) if study.by_steps else (3.1, 2.6)
    size = (width * columns + 0.2, height * rows + 0.2)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    ends: list[tuple[float, float]] = []
    for axes, runs in zip(grid.flat, panels, strict=False):
        ends += _curves(axes, study, runs)
        if study.by_steps:
            axes.set_xlim(0, 1.02 * max(r.steps for r in runs))
        else:
            axes.set_title(f"C = {fmt.scientific(runs[0].budget_flops)} FLOPs")
            axes.set_xlim(0, 1.02)
        axes.legend(title="N", title_fontsize=6.5, **LEGEND)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("step" if study.by_steps else "share of the budget spent")
        axes.xaxis.set_tick_params(labelbottom=True)
    if ends:
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        grid[0, 0].set_yscale("log")
        grid[0, 0].set_ylim(low / 1.05, high * (high / low) ** 0.35)
        log_ticks(grid[0, 0].yaxis, low / 1.05, high * 1.05, fmt.tick, most=8)
    for row in grid:
        row[0].set_ylabel("training loss")
    against = "the step" if study.by_steps else "the share of the budget"
    caption = (
        "Training loss, smoothed by an exponential moving average (0.9) over the "
        f"logged steps, against {against}."
    )
    return _finished(figure, "training", caption, study)


def _curves(
    axes: Axes, study: Study, runs: Sequence[RunSpec]
) -> list[tuple[float, float]]:
    """The curves of some runs; returns the lowest and an early value of each."""
    ends = []
    seeds = len({run.seed for run in runs}) > 1
    for i, run in enumerate(runs):
        curve = study.curves.get(run.run_id, np.empty((0, 4)))
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
            label=fmt.prefixed(getattr(run, study.size))
            + f", seed {run.seed}" * seeds
            + "  failed" * failed,
        )
        ends.append((y.min(), y[len(y) // 50]))
    return ends


def samples(images: Images, captions: Sequence[str], most: int = 64) -> Plot:
    """The first of the sampled images, with their captions as far as there are any."""
    images = images[:most]
    captions = (*captions, *[""] * len(images))[: len(images)]
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
        axes.text(0.5, -0.06, "\n".join(lines), transform=axes.transAxes, **_WORDS)
    return render(figure, "samples", "Sampled images and their captions.")
