"""Quality against training compute: where sizes cross, and which is better after that.

The numbers of one metric and one protocol are one `Comparison`. Numbers of two
protocols are never compared. Between its checkpoints a run's curve is linear in ln
FLOPs. If the values span a wide range, it is linear in ln value too, as it is drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from scaling_ldm.records import Evaluation
from scaling_ldm.records.measurements import HIGHER_IS_BETTER, is_floor
from scaling_ldm.report import format as fmt
from scaling_ldm.report.study import Study
from scaling_ldm.report.table import Column, Row, Table, cell, text

_LOG_FROM = 4.0  # times the lowest value, from which values are logarithmic
_GRID = 2001  # points on which curves are compared, besides the checkpoints
_FEW = 6  # checkpoints that are named one by one

Grid = Float[np.ndarray, "x"]  # training FLOPs
Band = tuple[Grid, Grid, Grid]  # value, low and high at each x


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityCurve:
    """One run: its records by training FLOPs, all finite."""

    label: str  # of its size; runs of one size share it
    size: float
    points: tuple[Evaluation, ...]

    @property
    def flops(self) -> np.ndarray:
        return np.array([_spent(r) for r in self.points])

    def of(self, field: str) -> np.ndarray:
        """value, low or high of each point."""
        return np.array([getattr(r, field) for r in self.points])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every curve of one metric and protocol, by size."""

    metric: str
    protocol_hash: str
    curves: tuple[QualityCurve, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the sizes, smallest first."""
        return tuple(dict.fromkeys(curve.label for curve in self.curves))

    @property
    def level(self) -> float | None:
        """The level of the intervals; None if there are none."""
        levels = [r.level for c in self.curves for r in c.points if r.low < r.high]
        return max(levels, default=None)

    @property
    def less_is_better(self) -> bool:
        return not self.metric.startswith(HIGHER_IS_BETTER)

    @property
    def logarithmic(self) -> bool:
        """Whether values are drawn, and meet, on a logarithmic axis."""
        every = [r for c in self.curves for r in c.points]
        values = [r.value for r in every]
        return (
            self.less_is_better
            and min(min(r.low, r.value) for r in every) > 0
            and max(values) > _LOG_FROM * min(values)
        )


def comparisons(study: Study) -> list[Comparison]:
    """One for each metric and protocol in which some run has two checkpoints."""
    specs = {run.run_id: run for run in study.runs}
    own = [r for r in _of_checkpoints(study) if r.run_id in specs]
    labels = _labels(study, {r.run_id for r in own})
    groups: dict[tuple[str, str], dict[str, list[Evaluation]]] = {}
    for r in own:
        if all(map(math.isfinite, (r.value, r.low, r.high))):
            group = groups.setdefault((r.metric, r.protocol_hash), {})
            group.setdefault(r.run_id, []).append(r)
    found = []
    for (metric, protocol_hash), group in sorted(groups.items()):
        if max(len(points) for points in group.values()) < 2:
            continue
        curves = [
            QualityCurve(
                label=labels[run_id],
                size=float(getattr(specs[run_id], study.size)),
                points=tuple(sorted(points, key=_spent)),
            )
            for run_id, points in group.items()
        ]
        curves.sort(key=lambda c: (c.size, c.label, _spent(c.points[0])))
        found.append(
            Comparison(metric=metric, protocol_hash=protocol_hash, curves=tuple(curves))
        )
    return found


def _spent(record: Evaluation) -> float:
    """The training FLOPs of a run's checkpoint.

    Raises:
      ValueError: they are not known. Only weights from a folder may lack them.
    """
    if record.train_flops is None:
        raise ValueError(f"{record.run_id}, step {record.step}: no training FLOPs")
    return record.train_flops


def _of_checkpoints(study: Study) -> list[Evaluation]:
    """The evaluations of the runs' own checkpoints, without floors of distances.

    An evaluation with a checksum is of exported weights in a folder. It is left out,
    even if these weights come from a run of this study.
    """
    found = [r for r in study.evaluations if not r.checksum]
    return [r for r in found if not is_floor(r.metric)]


def unmeasured(study: Study, found: Sequence[Comparison]) -> tuple[str, ...]:
    """Which kept checkpoints of finished runs have no number yet, a line per metric.

    Args:
      study: what was read.
      found: what is compared. This may be nothing yet. Then, where the experiment wants
        every checkpoint, each metric and protocol with a number is looked at.
    """
    kept = [
        (run.run_id, step)
        for run in study.runs
        for step in study.checkpoints.get(run.run_id, ())
    ]
    measured: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for r in _of_checkpoints(study):
        measured.setdefault((r.metric, r.protocol_hash), set()).add((r.run_id, r.step))
    groups = [(c.metric, c.protocol_hash) for c in found]
    if not groups and study.config.get("evaluate", {}).get("through_training"):
        groups = sorted(measured)
    lines = []
    for metric, protocol in groups:
        missing = [at for at in kept if at not in measured[metric, protocol]]
        if missing:
            lines.append(
                f"{len(kept) - len(missing)} of {len(kept)} kept checkpoints are "
                f"measured by {fmt.spoken(metric)} (protocol {protocol}); missing: "
                f"{_listed(missing)}."
            )
    return tuple(lines)


def _listed(checkpoints: Sequence[tuple[str, int]]) -> str:
    """Few checkpoints are named by run and step; many are only counted."""
    runs = {
        run_id: [step for _, step in group]
        for run_id, group in itertools.groupby(checkpoints, key=lambda at: at[0])
    }
    if len(checkpoints) > _FEW:
        of = "one run" if len(runs) == 1 else f"{len(runs)} runs"
        return f"{len(checkpoints)}, of {of}"
    return "; ".join(
        f"{run_id} at step{'s' * (len(steps) > 1)} {', '.join(map(fmt.count, steps))}"
        for run_id, steps in runs.items()
    )


def _labels(study: Study, runs: set[str]) -> dict[str, str]:
    """The size of each run and its group, if there are several.

    Where two sizes look the same, their width and depth are added.
    """
    specs = [run for run in study.runs if run.run_id in runs]
    size = {run.run_id: fmt.prefixed(getattr(run, study.size)) for run in specs}
    shapes = {(size[run.run_id], run.width, run.depth) for run in specs}
    alike = [shown for shown, _, _ in shapes]
    return {
        run.run_id: size[run.run_id]
        + (f" ({run.width} × {run.depth})" if alike.count(size[run.run_id]) > 1 else "")
        + (f", {run.group}" if run.group else "")
        for run in specs
    }


def name(found: Comparison) -> str:
    """The figure's name: one word, different for each metric and protocol."""
    return re.sub(r"\W+", "_", f"quality_{found.metric}_{found.protocol_hash}")


def caption(found: Comparison) -> str:
    """What the figure shows, and how it was measured."""
    first = found.curves[0].points[0]
    given = first.protocol
    how = f"{fmt.count(first.images)} pictures"
    if {"sampler", "steps", "guidance"} <= given.keys():
        how += f"; {given['sampler']}, {given['steps']} steps, guidance "
        how += f"{given['guidance']:g}"
    words = fmt.spoken(found.metric)
    level = "No intervals are known."
    if found.level is not None:
        level = f"Bands: {100 * found.level:.0f}% intervals."
    return (
        f"{words[0].upper()}{words[1:]} against training compute, a line per run, a "
        f"colour per size, a point per checkpoint. {level} {how}; protocol "
        f"{found.protocol_hash}."
    )


def pairs(found: Comparison) -> Table:
    """Where the curves of each two sizes cross, and where they cannot be told apart."""
    lines = [c for c in found.curves if len(c.points) > 1]
    labels = [label for label in found.labels if any(c.label == label for c in lines)]
    every = np.concatenate([c.flops for c in lines])
    x = np.union1d(np.geomspace(every.min(), every.max(), _GRID), every)
    bands = {n: _of_size(found, [c for c in lines if c.label == n], x) for n in labels}
    rows = [
        {"smaller": a, "larger": b} | _crossing(x, a, bands[a], b, bands[b])
        for a, b in itertools.combinations(labels, 2)
    ]
    columns = (
        text("smaller", "smaller"),
        text("larger", "larger"),
        Column("compared over, FLOPs", lambda r: _between(r, "flops")),
        cell("crossings", "crossings", fmt.count),
        Column("at, FLOPs", lambda r: _between(r, "at")),
        text("better, after the last", "better"),
        text("intervals overlap", "overlap"),
        Column("around the crossing, FLOPs", lambda r: _between(r, "overlap")),
    )
    caption = (
        f"By {fmt.spoken(found.metric)}, each two sizes at the same compute. Several "
        "crossings: the range is from the first to the last. One crossing with a "
        "range: it lies between the two ends, where not both sizes were measured."
    )
    if found.level is None:
        caption += " No intervals are known: any of this may be chance."
    return Table(f"{name(found)}_pairs", caption, rows, columns)


def _between(row: Row, key: str) -> str:
    ends = [row[f"{key}_low"], row[f"{key}_high"]]
    return " to ".join(map(fmt.scientific, dict.fromkeys(ends)))


def _of_size(found: Comparison, lines: Sequence[QualityCurve], x: Grid) -> Band:
    """The best run of a size at each x; nan where none was measured.

    Values are made such that less is better, and are logarithms if the figure's are.
    """
    bands = []
    for c in lines:
        three = []
        for field in ("value", "low", "high"):
            y = np.log(c.of(field)) if found.logarithmic else c.of(field)
            y = y if found.less_is_better else -y
            at = np.log(c.flops)
            three.append(np.interp(np.log(x), at, y, left=np.nan, right=np.nan))
        bands.append([three[0], np.minimum(*three[1:]), np.maximum(*three[1:])])
    stacked = np.array(bands)  # [run, 3, x]
    best = np.where(np.isnan(stacked[:, 0]), np.inf, stacked[:, 0]).argmin(0)
    value, low, high = np.take_along_axis(stacked, best[None, None], 0)[0]
    return value, low, high


def _crossing(x: Grid, small: str, a: Band, large: str, b: Band) -> dict[str, Any]:
    """How often and where the curves of two sizes cross; which is better in the end."""
    row: dict[str, Any] = dict.fromkeys(
        "flops_low flops_high crossings at_low at_high better overlap overlap_low "
        "overlap_high".split()
    )
    d = b[0] - a[0]  # below 0: the larger is better
    both = np.flatnonzero(np.isfinite(d))
    if not len(both):
        return row | {"overlap": "no common compute"}
    row |= {"flops_low": float(x[both[0]]), "flops_high": float(x[both[-1]])}
    overlap = (a[1] <= b[2]) & (b[1] <= a[2])
    if overlap[both].all():
        return row | {"overlap": "throughout"}
    row["overlap"] = "in part" if overlap[both].any() else ""
    signed = both[d[both] != 0].tolist()
    turns = [
        (i, j) for i, j in itertools.pairwise(signed) if np.sign(d[i]) != np.sign(d[j])
    ]
    row |= {"crossings": len(turns), "better": large if d[signed[-1]] < 0 else small}
    if not turns:
        return row
    ends = [_root(x, d, *turn) for turn in (turns[0], turns[-1])]
    if len(turns) == 1:
        i, j = turns[0]
        if not np.isfinite(d[i:j]).all():  # one of them was not measured in between
            ends = [float(x[i]), float(x[j])]
        if overlap[i] or overlap[j]:
            around = _around(overlap, i if overlap[i] else j)
            row |= zip(("overlap_low", "overlap_high"), x[around].tolist(), strict=True)
    return row | {"at_low": ends[0], "at_high": ends[1]}


def _around(true: np.ndarray, i: int) -> list[int]:
    """First and last index of the stretch of `true` that holds i."""
    false = np.flatnonzero(~true)
    before, after = false[false < i], false[false > i]
    first = before[-1] + 1 if len(before) else 0
    return [int(first), int(after[0]) - 1 if len(after) else len(true) - 1]


def _root(x: Grid, d: Grid, i: int, j: int) -> float:
    """Where d, linear in ln x from i to j, is zero."""
    share = d[i] / (d[i] - d[j])
    return float(x[i] * (x[j] / x[i]) ** share)
