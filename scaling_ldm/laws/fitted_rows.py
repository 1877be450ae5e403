"""Which rows of the table a fit takes: one for each end of a run, of one protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from scaling_ldm.records import Measurement, TrainRecord
from scaling_ldm.records import results as ends
from scaling_ldm.records.measurements import in_words


@dataclasses.dataclass(frozen=True)
class FittedRows:
    """The rows of one metric and one kind of weights at the ends of runs.

    They have several protocols if `protocol` is None.
    """

    rows: tuple[Measurement, ...]  # of `protocol`; without one, of every protocol
    protocol: str | None  # None: there is no row, or no one protocol of all
    measured: Mapping[str, int]  # protocol -> how many ends have it
    wanted: int  # how many ends there are
    unfinished: tuple[str, ...]  # a line for each run that is not finished
    missing: tuple[str, ...]  # a line for each end without a row of `protocol`


def choose(
    records: Iterable[TrainRecord],
    rows: Iterable[Measurement],
    metric: str,
    weights: str,
    asked: Sequence[str] = (),
) -> FittedRows:
    """The rows that a fit of these runs takes.

    Args:
      records: of the runs; those that are not finished are excluded by name.
      rows: of these runs and any others, of any step.
      metric: of the table.
      weights: "raw" or the name of an average.
      asked: the first characters of the hashes of protocols.
    """
    over = {record.run_id: record for record in records}
    unfinished, missing = [], []
    for record in over.values():
        if record.status != "finished":
            detail = f" ({record.detail})" if record.detail else ""
            unfinished.append(f"{record.run_id}: {record.status}{detail}")
    every = [r for r in rows if ends.is_result(r, over.get(r.run_id))]
    wanted = {(r.run_id, r.step): r.budget_flops for r in every}
    for record in over.values():
        if record.status == "finished":
            wanted[record.run_id, record.steps] = record.budget_flops
    found = ends.of(every, metric, weights)
    protocol, measured = ends.shared_protocol(found, wanted, asked)
    lines = tuple(sorted(unfinished))
    if protocol is None and measured:
        return FittedRows(tuple(found), None, measured, len(wanted), lines, ())
    by_point = {(r.run_id, r.step): r for r in found if r.protocol_hash == protocol}
    what = in_words(metric, weights)
    for run_id, step in wanted.keys() - by_point.keys():
        at = f"step {step} ({wanted[run_id, step]:.6g} FLOPs)"
        at = "its last step" if step == over[run_id].steps else at
        missing.append(f"{run_id}: no {what} at {at}")
    chosen, absent = tuple(by_point.values()), tuple(sorted(missing))
    return FittedRows(chosen, protocol, measured, len(wanted), lines, absent)
