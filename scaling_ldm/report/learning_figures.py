"""Learning curves: the held-out loss through training, a panel for each budget."""

from __future__ import annotations

import itertools
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from scaling_ldm.records import Measurement, RunSpec, results
from scaling_ldm.records.measurements import LOSS
from scaling_ldm.report import format as fmt
from scaling_ldm.report.plotting import (
    LEGEND,
    MUTED,
    Plot,
    line_entries,
    log_ticks,
    render,
    shade,
)
from scaling_ldm.report.study import Study

_MARKER = 2.6
# A marker per seed; those of more seeds begin anew.
_MARKERS = {"o": "circles", "s": "squares", "^": "triangles", "D": "diamonds"}
_LOG_FROM = 2.0  # times the lowest loss; below it the axis is linear


def runs_with_curves(study: Study) -> list[RunSpec]:
    """The runs whose held-out loss was measured at more than one step."""
    return [run for run in study.runs if len(_points(study, run)) > 1]


def missing(study: Study) -> str:
    """A sentence where finished runs have no learning curve; "": some run has one."""
    if runs_with_curves(study) or not study.finished():
        return ""
    return ". ".join(
        filter(
            None,
            (
                study.title,
                "There are no learning curves: no run was measured before its end. "
                "Measurements before the end may take 2% of the FLOPs of a run, and a "
                "short run has none that is as cheap (config.validation.marks).",
            ),
        )
    )


def _points(study: Study, run: RunSpec) -> list[Measurement]:
    """The finite losses of a run by step, of the weights that are fitted.

    Where losses are not fitted: of the run's first average. Losses by several protocols
    would be no curve: then there is none.
    """
    meant = study.weights
    if study.metric != LOSS:
        meant = results.weights_meant(LOSS, "", study.averages(run))
    rows = results.of(study.rows.get(run.run_id, ()), LOSS, meant)
    if len({row.protocol_hash for row in rows}) > 1:
        return []
    finite = [row for row in rows if math.isfinite(row.value)]
    return sorted(finite, key=lambda row: row.step)


def learning(study: Study) -> Plot:
    """Held-out loss against training FLOPs: a line per run, a colour per size.

    Args:
      study: of one group, some run of which has more than one loss.
    """
    runs = runs_with_curves(study)
    panels = [[r for r in runs if r.budget_flops == b] for b in study.budgets()]
    panels = [runs] if study.by_steps else [panel for panel in panels if panel]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (max(3.1 * columns, 5.0) + 0.2, 2.8 * lines + 0.2)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    low, high = math.inf, -math.inf
    shades = _shades(study)
    for axes, panel in zip(grid.flat, panels, strict=False):
        shown = {
            getattr(run, study.size): shades[run.width, run.depth] for run in panel
        }
        for run in panel:
            y = _curve(axes, study, run, shown[getattr(run, study.size)])
            low, high = min(low, y.min()), max(high, y.max())
        labels = {fmt.prefixed(n): shown[n] for n in sorted(shown)}
        entries = line_entries([*labels], _MARKER, [*labels.values()])
        axes.legend(handles=entries, title="N", title_fontsize=6.5, **LEGEND)
        axes.set_xscale("log")
        left, right = axes.get_xlim()
        log_ticks(axes.xaxis, left, right, fmt.flops_tick, most=4)
        if not study.by_steps:
            axes.set_title(f"C = {fmt.scientific(panel[0].budget_flops)} FLOPs")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("training FLOPs")
    _height(grid[0, 0], low, high)
    for row in grid:
        row[0].set_ylabel("validation loss")
    if study.title:
        figure.suptitle(study.title, fontsize=9.0)
    return render(figure, "learning" + study.suffix, _caption(study, runs))


def _shades(study: Study) -> dict[tuple[int, int], str]:
    """The colour of each width and depth of the study, the same in every panel."""
    sizes = sorted({getattr(run, study.size) for run in study.runs})
    return {
        (run.width, run.depth): shade(sizes.index(getattr(run, study.size)), len(sizes))
        for run in study.runs
    }


def _height(axes: Axes, low: float, high: float) -> None:
    """Scales the loss, with room for the legends; logarithmic over a wide range."""
    if low > 0 and high > _LOG_FROM * low:
        bottom, top = low / (high / low) ** 0.05, high * (high / low) ** 0.3
        axes.set_yscale("log")
        log_ticks(axes.yaxis, bottom, high * 1.05, fmt.tick, most=7)
    else:
        span = (high - low) or abs(high) or 1.0
        bottom, top = low - 0.05 * span, high + 0.3 * span
    axes.set_ylim(bottom, top)


def _curve(axes: Axes, study: Study, run: RunSpec, colour: str) -> np.ndarray:
    """Draws the losses of a run, and returns them; of a failed run they are grey."""
    points = _points(study, run)
    x, y = np.array([(row.flops, row.value) for row in points]).T
    record = study.records.get(run.run_id)
    failed = record is not None and record.status != "finished"
    axes.plot(
        x,
        y,
        ":" if failed else "-",
        marker=_markers(study)[run.seed],
        color=MUTED if failed else colour,
        markersize=_MARKER,
        linewidth=1.1,
    )
    return y


def _markers(study: Study) -> dict[int, str]:
    """Seed -> its marker."""
    seeds = sorted({run.seed for run in study.runs})
    return dict(zip(seeds, itertools.cycle(_MARKERS), strict=False))


def _caption(study: Study, runs: list[RunSpec]) -> str:
    weights = {row.weights for run in runs for row in _points(study, run)}
    said = fmt.measure(LOSS, weights.pop() if len(weights) == 1 else "")
    caption = (
        f"Learning curves: {said}, against training FLOPs, a line per run, a colour "
        "per size, a point per measurement. Runs that were measured only at their end "
        "are not shown."
    )
    markers = _markers(study)
    if len(markers) > 1:
        named = ", ".join(f"{_MARKERS[m]} {seed}" for seed, m in markers.items())
        caption += f" Seeds: {named}."
    failed = [study.records.get(run.run_id) for run in runs]
    if any(record and record.status != "finished" for record in failed):
        caption += " Grey and dotted: runs that failed."
    return ". ".join(filter(None, (study.title, caption)))
