"""Figures of quality against training compute.

They are figure 3 of paper A (Mei et al. 2024, arXiv 2404.01367v2).
"""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from scaling_ldm.report.format import flops_tick, spoken, tick
from scaling_ldm.report.plotting import Plot, line_entries, log_ticks, render, shade
from scaling_ldm.report.training_quality import Comparison, caption, name


def quality(found: Comparison, size: str) -> Plot:
    """Value against training FLOPs: a line per run, a colour per size.

    Args:
      found: the curves of one metric and protocol.
      size: what counts as N, as words.
    """
    labels = found.labels
    figure = Figure(figsize=(6.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for curve in found.curves:
        colour = shade(labels.index(curve.label), len(labels))
        x, y, low, high = curve.flops, *map(curve.of, ("value", "low", "high"))
        axes.plot(x, y, "o-", color=colour, markersize=3.4, linewidth=1.3, zorder=3)
        if len(x) > 1:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        elif low[0] < high[0]:
            axes.vlines(x, low, high, color=colour, linewidth=1.1)
    axes.set_xscale("log")
    if found.logarithmic:
        axes.set_yscale("log")
        every = [r for c in found.curves for r in c.points]
        lowest = min(r.value for r in every)
        # Otherwise one wide interval near zero would take most of the axis.
        bottom = max(min(r.low for r in every), lowest / 2)
        top = max(r.high for r in every)
        ratio = (top / bottom) ** 0.05
        axes.set_ylim(bottom / ratio, top * ratio)
        log_ticks(axes.yaxis, *axes.get_ylim(), tick, most=7)
    log_ticks(axes.xaxis, *axes.get_xlim(), flops_tick, most=6)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel(spoken(found.metric))
    entries = line_entries(labels, 3.4)
    columns = math.ceil(len(entries) / math.ceil(len(entries) / 6))
    figure.legend(
        handles=entries,
        title=f"N, {size}",
        title_fontsize=8.0,
        loc="outside lower center",
        ncols=columns,
    )
    return render(figure, name(found), caption(found))
