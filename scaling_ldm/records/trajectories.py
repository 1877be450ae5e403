"""Joins planned runs of one size where `plan.reuse` says so.

Nested: a trajectory is the run of the largest budget. The smaller budgets are steps of
it at which it is measured. That stands for separate runs only if these would have taken
the same steps: everything that the plan says of a run must be the same.

Decay: each budget has a run of its own, whose rate falls at its end. Up to there, a
smaller budget has the steps of the largest one, the trunk. So it leaves the trunk at
that step (Haegele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from scaling_ldm.records import results, table
from scaling_ldm.records.measurements import LOSS
from scaling_ldm.records.runs import RunSpec, TrainRecord

# What a point of a trajectory has from the whole run.
_OF_THE_RUN = ("run_id", "hours")


def joined(rows: Iterable[RunSpec]) -> tuple[list[RunSpec], list[str]]:
    """One row for each size and combination of axes, in the order of their budgets.

    Args:
      rows: of separate runs, budgets ascending.

    Returns:
      The rows, and a line for each reason why some of them do not nest.
    """
    same: dict[str, list[RunSpec]] = {}
    for row in rows:
        key = f"{row.width} x {row.depth} {sorted(row.overrides.items())}"
        same.setdefault(key, []).append(row)
    whole, problems = [], []
    for separate in same.values():
        longest = separate[-1]
        smaller = tuple(row.budget_flops for row in separate[:-1])
        whole.append(dataclasses.replace(longest, smaller_budgets=smaller))
        problems += _problems(whole[-1], separate)
    order = {row.run_id: number for number, row in enumerate(rows)}
    return sorted(whole, key=lambda row: order[row.run_id]), problems


def _problems(whole: RunSpec, separate: Sequence[RunSpec]) -> list[str]:
    """Why the points of a trajectory are not these separate runs."""
    points, found = whole.points(), []
    for a, b in zip(points, points[1:], strict=False):
        if a.steps == b.steps:
            found.append(
                f"{whole.run_id}: {a.budget_flops:.6g} and {b.budget_flops:.6g} FLOPs "
                f"are both step {a.steps} of one trajectory; leave out one of these "
                "budgets, lower train.batch_size, or set plan.reuse = 'separate'"
            )
    names = [f.name for f in dataclasses.fields(RunSpec) if f.name not in _OF_THE_RUN]
    for point, row in zip(points[:-1], separate, strict=False):
        found += _differences(row, point, names, "not the beginning")
    return found


def _differences(
    row: RunSpec, longer: RunSpec, names: Sequence[str], what: str
) -> list[str]:
    """A line for each field in which a row differs, so that it is not `what` of it."""
    return [
        f"{row.run_id}: its {name} is {getattr(row, name)!r}, and that of the longer "
        f"run {longer.run_id} is {getattr(longer, name)!r}, so it is {what} of it; set "
        "plan.reuse = 'separate'"
        for name in names
        if getattr(row, name) != getattr(longer, name)
    ]


# What a branch may have otherwise than its trunk: what follows from its length.
_OF_LENGTH = (
    *("run_id", "budget_flops", "planned_flops", "steps", "images", "image_tokens"),
    *("text_tokens", "tokens", "hours"),
)


def branched(
    rows: Sequence[RunSpec], stable: Mapping[str, int]
) -> tuple[list[RunSpec], list[str]]:
    """The rows, trunks first, with what the others share with these.

    Args:
      rows: of separate runs, budgets ascending.
      stable: run_id -> its steps before the rate falls.

    Returns:
      The rows, and a line for each reason why one is no branch of its trunk.
    """
    same: dict[str, list[RunSpec]] = {}
    for row in rows:
        key = f"{row.width} x {row.depth} {sorted(row.overrides.items())}"
        same.setdefault(key, []).append(row)
    trunks, found, problems = [], {}, []
    names = [f.name for f in dataclasses.fields(RunSpec) if f.name not in _OF_LENGTH]
    for separate in same.values():
        *shorter, trunk = separate
        leaves = {stable[row.run_id] for row in shorter} - {0}
        trunks.append(dataclasses.replace(trunk, branch_steps=tuple(sorted(leaves))))
        for row in shorter:
            problems += _differences(row, trunk, names, "no branch")
            if shared := stable[row.run_id]:
                given = {"trunk": trunk.run_id, "trunk_steps": trunk.steps}
                row = dataclasses.replace(row, **given, shared_steps=shared)
            found[row.run_id] = row
    ids = {trunk.run_id for trunk in trunks}
    order = {row.run_id: number for number, row in enumerate(rows)}
    trunks.sort(key=lambda row: order[row.run_id])
    return [*trunks, *(found[r.run_id] for r in rows if r.run_id not in ids)], problems


def unmeasured(path: pathlib.Path, record: TrainRecord, spec: RunSpec) -> list[RunSpec]:
    """The smaller budgets of a trajectory that it reached, but has no loss of.

    Args:
      path: the run's measurements. Without smaller budgets it is not read.
    """
    if not spec.smaller_budgets:
        return []
    rows = table.read_rows(path)[0] if path.is_file() else []
    measured = {row.step for row in rows if row.metric == LOSS} | {spec.steps}
    return [p for p in results.reached(record, spec) if p.steps not in measured]
