"""Reads and writes evaluations and the frontier together with their rows of the table.

    evaluations.jsonl     how numbers about models were measured; the numbers are rows
    frontier.json         a records.Frontier; the values of its cells are rows

A record without its row counts as not measured. Training a run again removes the rows
of its last step. May import: the standard library.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence

from scaling_ldm.records import files, places, rows_of, table
from scaling_ldm.records.errors import Damaged
from scaling_ldm.records.frontier import Cell, Frontier, MeasuredCell
from scaling_ldm.records.measurements import Measurement, of_cell
from scaling_ldm.records.runs import EvalRecord, Evaluation, RunSpec

EVALUATIONS, FRONTIER = "evaluations.jsonl", "frontier.json"


def read_evaluations(workdir: str | os.PathLike[str]) -> list[Evaluation]:
    """What `evaluate` has measured in a working directory, with the numbers.

    An evaluation whose number is not in the table is left out.

    Raises:
      Damaged: a file holds something else.
      NewerVersion: a newer version of the library wrote it.
    """
    workdir = places.place(workdir)
    path = workdir / EVALUATIONS
    held = files.read_jsonl(path, EvalRecord) if path.is_file() else []
    bare = {r.run_id for r in held if type(r) is EvalRecord}
    rows = {
        (r.run_id, r.step, r.metric, r.weights, r.protocol_hash): r
        for folder in [workdir / "evaluate", *(workdir / "runs" / i for i in bare)]
        for r in _rows(folder / table.FILE)
    }
    found = []
    for record in held:
        if isinstance(record, Evaluation):
            found.append(record)
        elif isinstance(record, EvalRecord):
            weights = rows_of.weights_of(record)
            place = record.run_id, record.step, record.metric, weights
            if row := rows.get((*place, record.protocol_hash)):
                found.append(_evaluation(record, row))
    return found


def write_evaluations(
    workdir: pathlib.Path,
    found: Iterable[Evaluation],
    new: Iterable[Evaluation],
    specs: Sequence[RunSpec],
    study: str,
) -> None:
    """Writes the rows of new evaluations, and the records of all.

    Args:
      found: all of them; those that an older version wrote become rows, too.
      specs: the plan. Rows of weights that it lacks go to evaluate/measurements.jsonl.
    """
    path, by_id = workdir / EVALUATIONS, {spec.run_id: spec for spec in specs}
    held = files.read_jsonl(path, EvalRecord) if path.is_file() else []
    older = [record for record in held if isinstance(record, Evaluation)]
    rows: dict[pathlib.Path, list[Measurement]] = {}
    for record in (*older, *new):
        spec = None if record.checksum else by_id.get(record.run_id)
        folder = workdir / "runs" / spec.run_id if spec else workdir / "evaluate"
        row = rows_of.evaluation(spec, record) if spec else _of_no_run(study, record)
        rows.setdefault(folder / table.FILE, []).append(row)
    for where, of_file in rows.items():
        table.put_rows(where, list({table.key(row): row for row in of_file}.values()))
    files.write_jsonl(path, [_without_number(record) for record in found])


def read_frontier(workdir: str | os.PathLike[str]) -> Frontier:
    """The frontier of a working directory, its cells with their values.

    Raises:
      FileNotFoundError: there is none.
      Damaged: the file holds something else, or the value of a cell is not in the
        table.
      NewerVersion: a newer version of the library wrote it.
    """
    workdir = places.place(workdir)
    path = workdir / FRONTIER
    found = files.read(path, Frontier)
    bare = {cell.model for cell in found.cells if not isinstance(cell, MeasuredCell)}
    values = cell_values(
        row
        for run_id in sorted(bare)
        for row in _rows(workdir / "runs" / run_id / table.FILE)
    )
    cells = []
    for cell in found.cells:
        if not isinstance(cell, MeasuredCell):
            if (row := values.get(place_of_cell(cell))) is None:
                raise Damaged(
                    f"{path}: the value of {cell.model}, {cell.sampler}, {cell.steps} "
                    f"steps, guidance {cell.guidance:g} is not in the run's "
                    f"{table.FILE}: run the stage frontier again"
                )
            cell = with_value(cell, row.value)
        cells.append(cell)
    return dataclasses.replace(found, cells=tuple(cells))


def write_frontier(workdir: pathlib.Path, found: Frontier) -> None:
    """Writes a frontier; the values of its cells must be in the table."""
    bare = dataclasses.replace(found, cells=tuple(map(without_value, found.cells)))
    files.write_text(workdir / FRONTIER, files.dumps(bare) + "\n")


def place_of_cell(cell: Cell) -> tuple[str, str, str]:
    """Run, metric and protocol of a cell's row."""
    return cell.model, of_cell(cell.metric), rows_of.protocol_of_cell(cell)


def cell_values(
    rows: Iterable[Measurement],
) -> dict[tuple[str, str, str], Measurement]:
    """Rows of cells (and others of their runs) by `place_of_cell`.

    Cells are measured at the end of a run. Rows of earlier steps are left out.
    """
    found: dict[tuple[str, str, str], Measurement] = {}
    for row in sorted(rows, key=lambda row: row.step):
        found[row.run_id, row.metric, row.protocol_hash] = row
    return found


def with_value(cell: Cell, value: float) -> MeasuredCell:
    """The cell with its value from the table."""
    return MeasuredCell(**_fields(cell), value=value)


def without_value(cell: Cell) -> Cell:
    """The cell as frontier.json holds it."""
    held = _fields(cell)
    held.pop("value", None)
    return Cell(**held)


def _rows(path: pathlib.Path) -> list[Measurement]:
    return table.read_rows(path)[0] if path.is_file() else []


def _fields(record: Cell | EvalRecord) -> dict:
    """The fields of a record by name; those inside them stay as they are."""
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def _evaluation(record: EvalRecord, row: Measurement) -> Evaluation:
    number = {name: getattr(row, name) for name in ("value", "low", "high", "level")}
    return Evaluation(**_fields(record), **number)


def _without_number(record: Evaluation) -> EvalRecord:
    names = [f.name for f in dataclasses.fields(EvalRecord)]
    return EvalRecord(**{name: getattr(record, name) for name in names})


def _of_no_run(study: str, record: Evaluation) -> Measurement:
    """The row of weights that are no run of the plan; unknown fields are 0."""
    return Measurement(
        study=study,
        run_id=record.run_id,
        group="",
        seed=0,
        budget_flops=0.0,
        params=0,
        params_without_embeddings=0,
        step=record.step,
        flops=record.train_flops or 0.0,
        images=0,
        tokens=0,
        metric=record.metric,
        value=record.value,
        low=record.low,
        high=record.high,
        level=record.level,
        weights=rows_of.weights_of(record),
        protocol_hash=record.protocol_hash,
    )
