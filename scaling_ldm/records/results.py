"""Which rows of the table are the results of runs: those of their last planned step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from scaling_ldm.records.measurements import RAW, TRAIN_LOSS, Measurement
from scaling_ldm.records.runs import RunSpec


def weights_meant(metric: str, weights: str, averages: Sequence[str]) -> str:
    """The name of the weights whose rows are meant.

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


def of(rows: Iterable[Measurement], metric: str, weights: str) -> list[Measurement]:
    """The rows of one metric and one kind of weights, of whatever protocol."""
    return [row for row in rows if (row.metric, row.weights) == (metric, weights)]


def shared_protocol(
    rows: Iterable[Measurement], runs: Collection[str]
) -> tuple[str | None, dict[str, int]]:
    """The one protocol by which runs may be compared, and how many runs each has.

    It is the only protocol, or else the only one that all of the runs have. None: there
    is no row, or no such protocol.

    Args:
      rows: of one metric and one kind of weights, at the end of the runs.
      runs: run_id of all that are compared.
    """
    measured: dict[str, set[str]] = {}
    for row in rows:
        if row.run_id in runs:
            measured.setdefault(row.protocol_hash, set()).add(row.run_id)
    whole = [name for name, found in measured.items() if found >= set(runs)]
    candidates = whole if len(measured) > 1 else list(measured)
    counts = {name: len(found) for name, found in sorted(measured.items())}
    return candidates[0] if len(candidates) == 1 else None, counts
