"""Quality against training compute: which size is best where, and what crosses.

The numbers of one metric and one protocol are one `Comparison`; numbers of two
protocols never meet. Between its checkpoints a run's curve is linear in ln FLOPs, and
in ln value where values span much: straight as it is drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from scaling_ldm.records import EvalRecord
from scaling_ldm.report.format import count, prefixed, scientific, spoken
from scaling_ldm.report.study import Study

_HIGHER = ("precision", "recall", "inception_score", "clip_score")
_LOG_FROM = 4.0  # times the lowest value, from which values are logarithmic
_GRID = 2001  # points on which curves are compared, besides the checkpoints
_FEW = 6  # checkpoints that are named one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityCurve:
    """One run: its records by training FLOPs, all finite."""

    label: str  # of its size; runs of one size share it
    size: float
    points: tuple[EvalRecord, ...]

    @property
    def flops(self) -> np.ndarray:
        return np.array([r.train_flops for r in self.points])

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
        """Of the sizes, smallest first."""
        return tuple(dict.fromkeys(curve.label for curve in self.curves))

    @property
    def level(self) -> float | None:
        """Of the intervals; None where there are none."""
        levels = [r.level for c in self.curves for r in c.points if r.low < r.high]
        return max(levels, default=None)

    @property
    def less_is_better(self) -> bool:
        return not self.metric.startswith(_HIGHER)

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
    """By metric and protocol; those in which some run has two checkpoints."""
    specs = {run.run_id: run for run in study.runs}
    own = [r for r in _of_checkpoints(study) if r.run_id in specs]
    labels = _labels(study, {r.run_id for r in own})
    groups: dict[tuple[str, str], dict[str, list[EvalRecord]]] = {}
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
                points=tuple(sorted(points, key=lambda r: r.train_flops)),
            )
            for run_id, points in group.items()
        ]
        curves.sort(key=lambda c: (c.size, c.label, c.points[0].train_flops))
        found.append(
            Comparison(metric=metric, protocol_hash=protocol_hash, curves=tuple(curves))
        )
    return found


def _of_checkpoints(study: Study) -> list[EvalRecord]:
    """Those of this study's runs; a folder's weights have a checksum, wherever from."""
    return [r for r in study.evaluations if not r.checksum]


def unmeasured(study: Study, found: Sequence[Comparison]) -> tuple[str, ...]:
    """What kept checkpoints of finished runs have no number yet; nothing: all have.

    Args:
      found: what is compared. Where that is nothing yet, and the experiment wants every
        checkpoint, each metric and protocol with a number is looked at.
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
    said: dict[str, list[str]] = {}
    for metric, protocol in groups:
        missing = [at for at in kept if at not in measured[metric, protocol]]
        if missing:
            text = f"{len(kept) - len(missing)} of {len(kept)} kept checkpoints are "
            text += f"measured; missing: {_listed(missing)}."
            said.setdefault(text, []).append(f"{spoken(metric)} (protocol {protocol})")
    if len(said) == 1 and sum(map(len, said.values())) == len(groups):
        return tuple(said)
    return tuple(f"By {', '.join(of)} {text}" for text, of in said.items())


def _listed(checkpoints: Sequence[tuple[str, int]]) -> str:
    """The few by run and step, the many by their number."""
    runs = {
        run_id: [step for _, step in group]
        for run_id, group in itertools.groupby(checkpoints, key=lambda at: at[0])
    }
    if len(checkpoints) > _FEW:
        of = "one run" if len(runs) == 1 else f"{len(runs)} runs"
        return f"{len(checkpoints)}, of {of}"
    return "; ".join(
        f"{run_id} at step{'s' * (len(steps) > 1)} {', '.join(map(count, steps))}"
        for run_id, steps in runs.items()
    )


def _labels(study: Study, runs: set[str]) -> dict[str, str]:
    """The size of each run; with width and depth where two sizes look the same."""
    specs = [run for run in study.runs if run.run_id in runs]
    shown = {run.run_id: prefixed(getattr(run, study.size)) for run in specs}
    shapes: dict[str, set[tuple[int, int]]] = {}
    for run in specs:
        shapes.setdefault(shown[run.run_id], set()).add((run.width, run.depth))
    return {
        run.run_id: shown[run.run_id]
        if len(shapes[shown[run.run_id]]) == 1
        else f"{shown[run.run_id]} ({run.width} × {run.depth})"
        for run in specs
    }


def name(found: Comparison) -> str:
    """Of its figure: a word, another for each metric and protocol."""
    return re.sub(r"\W+", "_", f"quality_{found.metric}_{found.protocol_hash}")


def caption(found: Comparison) -> str:
    """What the figure shows, and how it was measured."""
    first = found.curves[0].points[0]
    words = f"{spoken(found.metric)} against training compute, a line per run, a "
    words += "colour per size, a point per checkpoint."
    words = words[0].upper() + words[1:]
    if found.level is None:
        words += " No intervals are known."
    else:
        words += f" Bands: {100 * found.level:.0f}% intervals."
    how = [f"{count(first.images)} pictures"]
    given = first.protocol
    if "sampler" in given and "steps" in given and "guidance" in given:
        how.append(
            f"{given['sampler']}, {given['steps']} steps, guidance "
            f"{given['guidance']:g}"
        )
    return f"{words} {'; '.join(how)}; protocol {found.protocol_hash}."


def sentences(found: Comparison) -> tuple[str, ...]:
    """Which size is best at which compute, and where the curves cross."""
    lines = [c for c in found.curves if len(c.points) > 1]
    labels = [label for label in found.labels if any(c.label == label for c in lines)]
    if len(labels) < 2:
        return (f"Only {labels[0]} was measured at more than one checkpoint.",)
    x = _grid(lines)
    sizes = [_of_size(found, [c for c in lines if c.label == n], x) for n in labels]
    pairs = [
        _pair(labels[i], labels[i + 1], x, sizes[i], sizes[i + 1])
        for i in range(len(labels) - 1)
    ]
    said = [line for line in (_best(found, labels, x, sizes), *pairs) if line]
    if found.level is None:
        said.append("No intervals are known: any of this may be chance.")
    return tuple(said)


def _grid(lines: Sequence[QualityCurve]) -> np.ndarray:
    every = np.concatenate([c.flops for c in lines])
    return np.union1d(np.geomspace(every.min(), every.max(), _GRID), every)


Band = tuple[np.ndarray, np.ndarray, np.ndarray]  # value, low, high: [x]


def _of_size(found: Comparison, lines: Sequence[QualityCurve], x: np.ndarray) -> Band:
    """The best run of a size at each x, so that less is better; nan: not measured."""
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


def _best(
    found: Comparison, labels: Sequence[str], x: np.ndarray, sizes: Sequence[Band]
) -> str:
    """The stretches of compute and the best size in each, if there is one."""
    values, low, high = np.array(sizes).transpose(1, 0, 2)  # [size, x]: less is better
    known = np.isfinite(values)
    if not (known.sum(0) > 1).any():
        return "No two sizes were measured at the same compute."
    best = np.where(known, values, np.inf).argmin(0)
    of_best = np.arange(len(x))
    overlap = known & (low <= high[best, of_best]) & (low[best, of_best] <= high)
    told = (overlap.sum(0) == 1) | (found.level is None)  # its own interval alone
    alone = known.sum(0) == 1
    at = np.flatnonzero(known.any(0))
    runs = [
        (state, list(members))
        for state, members in itertools.groupby(
            at, key=lambda i: (best[i] if told[i] else -1, bool(alone[i]))
        )
    ]
    parts = []
    for n, ((size, single), members) in enumerate(runs):
        last = members[-1]
        end, why = float(x[last]), ""
        if n + 1 < len(runs) and size >= 0 and not single:
            (after, _), then = runs[n + 1][0], runs[n + 1][1][0]
            if not known[size, then]:
                why = " (not measured beyond)"
            elif after not in (-1, size) and then == last + 1 and known[after, last]:
                end = _root(x, values[size] - values[after], last, then)
        if size < 0:
            what = "no size is told apart"
        else:
            what = f"only {labels[size]} is measured" if single else labels[size]
        parts.append(f"{what} to {scientific(end)}{why}")
    return (
        f"By {spoken(found.metric)} the best size at the same compute, from "
        f"{scientific(x[at[0]])}: {', then '.join(parts)} FLOPs."
    )


def _pair(small: str, large: str, x: np.ndarray, a: Band, b: Band) -> str:
    """Where the curves of two neighbouring sizes cross, or that they do not."""
    d = b[0] - a[0]  # below 0: the larger is better
    both = np.flatnonzero(np.isfinite(d))
    if not len(both):
        return f"{small} and {large} share no compute."
    overlap = (a[1] <= b[2]) & (b[1] <= a[2])
    where = f"from {scientific(x[both[0]])} to {scientific(x[both[-1]])} FLOPs"
    if overlap[both].all():
        return (
            f"{small} and {large} cannot be told apart: their intervals overlap "
            f"throughout, {where}."
        )
    signed = both[d[both] != 0]
    turns = [
        (i, j) for i, j in itertools.pairwise(signed) if np.sign(d[i]) != np.sign(d[j])
    ]
    if not turns:
        better = large if d[signed[0]] < 0 else small
        return (
            f"{small} and {large} do not cross: {better} is better {where}"
            f"{_doubt(overlap[both])}."
        )
    if len(turns) > 1:
        first, last = (_root(x, d, *turn) for turn in (turns[0], turns[-1]))
        return (
            f"{small} and {large} cross {len(turns)} times from {scientific(first)} to "
            f"{scientific(last)} FLOPs{_doubt(overlap[both])}."
        )
    ((i, j),) = turns
    better = large if d[j] < 0 else small
    where = f"at {scientific(_root(x, d, i, j))}"
    if not np.isfinite(d[i:j]).all():  # one of them was not measured in between
        where = f"between {scientific(x[i])} and {scientific(x[j])}"
    words = f"{small} and {large} cross {where} FLOPs"
    if overlap[i] or overlap[j]:
        low, high = _around(overlap, i if overlap[i] else j)
        words += (
            f" (intervals overlap from {scientific(x[low])} to {scientific(x[high])})"
        )
    return f"{words}, from where {better} is better."


def _doubt(overlap: np.ndarray) -> str:
    return " (intervals overlap in part)" if overlap.any() else ""


def _around(true: np.ndarray, i: int) -> tuple[int, int]:
    """First and last index of the stretch of `true` that holds i."""
    low = high = i
    while low > 0 and true[low - 1]:
        low -= 1
    while high < len(true) - 1 and true[high + 1]:
        high += 1
    return low, high


def _root(x: np.ndarray, d: np.ndarray, i: int, j: int) -> float:
    """Where d, linear in ln x from i to j, is zero."""
    share = d[i] / (d[i] - d[j])
    return float(x[i] * (x[j] / x[i]) ** share)
