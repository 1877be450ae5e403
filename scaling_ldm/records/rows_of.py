"""Makes the rows of the table from evaluations and from cells of the frontier."""

from __future__ import annotations

from collections.abc import Sequence

from scaling_ldm.records import files
from scaling_ldm.records.frontier import Cell
from scaling_ldm.records.measurements import (
    EMA,
    NO_INTERVAL,
    RAW,
    Measurement,
    measurement,
    of_cell,
)
from scaling_ldm.records.runs import EvalRecord, Evaluation, RunSpec


def weights_of(record: EvalRecord) -> str:
    """The name of the weights that were evaluated."""
    held = record.protocol.get("ema")  # True: the first average of version 0.1.0
    names = {True: EMA, False: RAW, None: "unknown"}
    return held if isinstance(held, str) else names[held]


def evaluation(spec: RunSpec, record: Evaluation) -> Measurement:
    """The row of an evaluation of a run's own checkpoint."""
    return measurement(
        spec,
        step=record.step,
        metric=record.metric,
        value=record.value,
        low=record.low,
        high=record.high,
        level=record.level,
        weights=weights_of(record),
        protocol_hash=record.protocol_hash,
    )


def protocol_of_cell(cell: Cell) -> str:
    """The protocol of a cell's row: how it was measured, and how it samples."""
    of = [cell.protocol, cell.sampler, cell.steps, cell.guidance]
    return files.digest(of)


def cell(
    spec: RunSpec,
    found: Cell,
    value: float,
    weights: str,
    level: float,
) -> Measurement:
    """The row of a cell; its step is the last one of the run.

    Args:
      level: of the basic bootstrap interval, [value - upper quantile of the deviations,
        value - lower quantile]; without deviations there is no interval.
    """
    low = high = None
    if found.deviations:
        a = (1 - level) / 2
        high, low = (value - _quantile(found.deviations, q) for q in (a, 1 - a))
    return measurement(
        spec,
        step=spec.steps,
        metric=of_cell(found.metric),
        value=value,
        low=low,
        high=high,
        level=level if found.deviations else NO_INTERVAL,
        weights=weights,
        protocol_hash=protocol_of_cell(found),
    )


def _quantile(values: Sequence[float], share: float) -> float:
    """A quantile, interpolated linearly between the two nearest values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    first = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    rest = ordered[first:][:2]
    return rest[0] + (rest[-1] - rest[0]) * (place - first)
