"""Which rows of the table are the results of runs.

They are those of the last planned step. Of a trajectory (plan.reuse) there are others:
each step that stands for a smaller budget is the end of a separate run of that budget.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from scaling_ldm.records.measurements import RAW, TRAIN_LOSS, Measurement
from scaling_ldm.records.runs import RunSpec, TrainRecord

Point = tuple[str, int]  # run_id and step


def weights_meant(metric: str, weights: str, averages: Sequence[str]) -> str:
    """The name of the weights whose rows are used.

    Args:
      weights: a name, or "": the first average. The training loss is of the raw
        weights, so for it "" means these.
      averages: those that the run keeps, the first one first.
    """
    return weights or (RAW if metric == TRAIN_LOSS else averages[0])


def at_end(rows: Iterable[Measurement], specs: Iterable[RunSpec]) -> list[Measurement]:
    """The rows of the last planned step of these runs.

    An evaluation of a finished run's last checkpoint is of this step, too.
    """
    last = {spec.run_id: spec.steps for spec in specs}
    return [row for row in rows if row.step == last.get(row.run_id)]


def at_points(
    rows: Iterable[Measurement], specs: Iterable[RunSpec]
) -> list[Measurement]:
    """`at_end`, and the rows of the steps of trajectories that stand for a budget."""
    ends = {(spec.run_id, point.steps) for spec in specs for point in spec.points()}
    return [row for row in rows if (row.run_id, row.step) in ends]


def reached(record: TrainRecord | None, spec: RunSpec) -> list[RunSpec]:
    """Which of `spec.points()` a run has reached; none before it has a record.

    A trajectory whose loss became non-finite has the points before that step: separate
    runs of these budgets would have finished.
    """
    if record is None:
        return []
    finished = record.status == "finished"
    return [p for p in spec.points() if finished or p.steps < record.steps]


def is_result(row: Measurement, record: TrainRecord | None) -> bool:
    """Whether a row is of the end of its run, or of a smaller budget that it reached.

    Args:
      record: of the run; None: it has none.
    """
    if record is None:
        return False
    finished = record.status == "finished"
    if row.budget_flops < record.budget_flops:  # only rows of trajectories are
        return finished or row.step < record.steps
    return finished and row.step == record.steps


def of(rows: Iterable[Measurement], metric: str, weights: str) -> list[Measurement]:
    """The rows of one metric and one kind of weights, of whatever protocol."""
    return [row for row in rows if (row.metric, row.weights) == (metric, weights)]


def shared_protocol(
    rows: Iterable[Measurement], points: Collection[Point], asked: Collection[str] = ()
) -> tuple[str | None, dict[str, int]]:
    """The one protocol by which points may be compared, and how many points each has.

    It is the one that is asked for, the only protocol, or else the only one that all of
    the points have. None: there is no row, or no such protocol.

    Args:
      rows: of one metric and one kind of weights.
      points: all that are compared: the ends of runs, and budgets of trajectories.
      asked: beginnings of hashes. Those that no protocol of the rows has do not count.
    """
    measured: dict[str, set[Point]] = {}
    for row in rows:
        if (row.run_id, row.step) in points:
            found = measured.setdefault(row.protocol_hash, set())
            found.add((row.run_id, row.step))
    whole = [name for name, found in measured.items() if found >= set(points)]
    candidates = whole if len(measured) > 1 else list(measured)
    counts = {name: len(found) for name, found in sorted(measured.items())}
    if chosen := [name for name in measured if name.startswith(tuple(asked))]:
        candidates = chosen
    return candidates[0] if len(candidates) == 1 else None, counts


def why_none_is_shared(
    measured: Mapping[str, int], runs: int, protocols: Mapping[str, Mapping[str, Any]]
) -> str:
    """A message: why no protocol can be chosen, how they differ, and what to set.

    Args:
      measured: hash -> how many of the runs have it; a trajectory counts as the runs
        that it stands for.
      runs: how many there are.
      protocols: hash -> parts, of those that are known.
    """
    counts = ", ".join(f"{name} ({n} runs)" for name, n in measured.items())
    whole = sum(n == runs for n in measured.values())
    said = f"no single one has all of {runs} runs: {counts}"
    if whole:
        said = f"{whole} have all of {runs} runs: {counts}"
    known = {name: protocols[name] for name in measured if name in protocols}
    parts = []
    for part in dict.fromkeys(part for held in known.values() for part in held):
        values = {name: held.get(part) for name, held in known.items()}
        if len({repr(value) for value in values.values()}) > 1:
            each = ", ".join(f"{value!r} in {name}" for name, value in values.items())
            parts.append(f"{part}: {each}")
    if parts:
        said += f". They differ in {'; '.join(parts)}"
    return f"{said}. Choose one in config.fit.protocols"
