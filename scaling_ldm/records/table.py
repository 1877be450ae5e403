"""The table of measurements: rows of runs, read from working directories and written.

    runs/<run_id>/measurements.jsonl    rows of the run, one a line
    evaluate/measurements.jsonl         rows of weights that are no run of the plan
    runs/<run_id>/record.json           in 0.1.0: losses at the end of the run
    evaluations.jsonl, frontier/cells/  in 0.1.0: numbers about pictures

Rows are appended whole. A process that is killed in the middle of a write leaves a last
line without its end: no reader sees it. May import: the standard library alone, until
`write_parquet` is called.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from scaling_ldm.records import files, places, rows_of, whole_files
from scaling_ldm.records.errors import Damaged, MeasurementConflict
from scaling_ldm.records.frontier import MeasuredCell
from scaling_ldm.records.measurements import (
    EMA,
    LOSS,
    NO_INTERVAL,
    RAW,
    TRAIN_LOSS,
    Measurement,
    loss_protocol,
)
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.records.runs import EvalRecord, Evaluation, RunSpec, TrainRecord

FILE = "measurements.jsonl"
# The losses that a record of 0.1.0 has: its field -> metric and weights.
_AVERAGED = "the first average"
_LOSSES = {
    "validation_loss": (LOSS, RAW),
    "validation_loss_ema": (LOSS, _AVERAGED),
    "train_loss_smoothed": (TRAIN_LOSS, RAW),
}

Key = tuple[str, str, int, str, str, str]


def read_table(*workdirs: str | os.PathLike[str]) -> list[Measurement]:
    """All rows of one or several studies, sorted.

    A run that the plan has is in the plan's group, even if it was trained before the
    groups were made. So it is with the budget that a step stands for. Evaluations of
    weights in a folder belong to no run and are not in the table.

    Raises:
      FileNotFoundError: a folder without a plan.
      Damaged: a file holds something else.
      NewerVersion: a newer version of the library wrote it.
      MeasurementConflict: two rows of one run, step, metric, weights and protocol have
        different values; the message names them.
    """
    return united(
        (row, workdir)
        for workdir in [places.place(w) for w in workdirs]
        for row in _rows_of_study(workdir)
    )


def united(rows: Iterable[tuple[Measurement, pathlib.Path]]) -> list[Measurement]:
    """Rows, each with the folder that it is from, sorted and without repetition.

    Raises:
      MeasurementConflict: as `read_table`.
    """
    found: dict[Key, tuple[Measurement, pathlib.Path]] = {}
    for row, workdir in rows:
        before, where = found.setdefault(key(row), (row, workdir))
        if not _equal(before, row):
            raise MeasurementConflict(
                f"{row.run_id} at step {row.step}: {row.metric} of weights "
                f"{row.weights} (protocol {row.protocol_hash or 'unknown'}) is "
                f"{before.value!r} in {where} and {row.value!r} in {workdir}"
                + _difference(before, row)
                + _remedy(before, where, workdir)
            )
    return sorted((row for row, _ in found.values()), key=_order)


def key(row: Measurement) -> Key:
    """What identifies a row: the table has one row for each key."""
    return (
        row.study,
        row.run_id,
        row.step,
        row.metric,
        row.weights,
        row.protocol_hash,
    )


def _order(row: Measurement) -> tuple[Any, ...]:
    return row.study, row.budget_flops, row.params, *key(row)[1:]


def _equal(a: Measurement, b: Measurement) -> bool:
    """Whether two rows are the same in a file: nan is nan."""
    return files.to_json(a) == files.to_json(b)


def _difference(a: Measurement, b: Measurement) -> str:
    """The other fields in which two rows differ, as text."""
    both = zip(files.to_json(a).items(), files.to_json(b).values(), strict=True)
    differing = [name for (name, x), y in both if x != y and name != "value"]
    return f"; {', '.join(differing)} differ" if differing else ""


def _remedy(row: Measurement, where: pathlib.Path, workdir: pathlib.Path) -> str:
    """What to do about two rows that differ, as text; "": they are of one folder."""
    if where == workdir:
        return ""
    return (
        f"; both say that they are of the study {row.study!r}: give one of two studies "
        "another config.name, or read one folder of one study alone"
    )


def read_plan(workdir: pathlib.Path) -> list[RunSpec]:
    """The rows of a study's plan, `runs.jsonl`.

    Raises:
      Damaged: it holds no run, or two rows have the same run_id and so the same folder.
    """
    path = workdir / "runs.jsonl"
    specs = files.read_jsonl(path, RunSpec)
    if not specs:
        raise Damaged(f"{path} holds no run")
    ids = collections.Counter(spec.run_id for spec in specs)
    twice = [run_id for run_id, rows in ids.items() if rows > 1]
    if twice:
        raise Damaged(
            f"{path}: {len(twice)} runs have two rows, the first is {twice[0]}; "
            "run the stage plan, which writes the file again"
        )
    return specs


def _rows_of_study(workdir: pathlib.Path) -> Iterator[Measurement]:
    plan = workdir / "runs.jsonl"
    if not plan.is_file():
        raise FileNotFoundError(f"{plan}: no such file, so there is no study")
    specs = {spec.run_id: spec for spec in read_plan(workdir)}
    experiment = experiment_of(workdir)
    folders = {path.name for path in (workdir / "runs").glob("*") if path.is_dir()}
    for run_id in sorted(folders):
        rows = rows_of_run(workdir / "runs" / run_id, specs.get(run_id), experiment)
        yield from rows
    path = workdir / "evaluations.jsonl"
    for record in files.read_jsonl(path, EvalRecord) if path.is_file() else ():
        if isinstance(record, Evaluation) and not record.checksum:
            if spec := specs.get(record.run_id):
                yield rows_of.evaluation(spec, record)
    for path in sorted((workdir / "frontier" / "cells").glob("*.json")):
        cell = files.read(path)
        if isinstance(cell, MeasuredCell) and (spec := specs.get(cell.model)):
            kept = averages_of(experiment, spec.overrides)
            level = experiment.get("evaluate", {}).get("confidence", NO_INTERVAL)
            yield rows_of.cell(spec, cell, cell.value, kept[0], level)


def experiment_of(workdir: pathlib.Path) -> Mapping[str, Any]:
    """The fields of the study, as nested dicts; empty without an experiment.json."""
    path = workdir / "experiment.json"
    if not path.is_file():
        return {}
    return files.read_experiment(path)["config"]


def rows_of_run(
    folder: pathlib.Path, spec: RunSpec | None, experiment: Mapping[str, Any]
) -> list[Measurement]:
    """The rows in the folder of one run, as they were written.

    Args:
      spec: of the plan; it decides the group and the budget of the rows. None: the plan
        lacks the run.
      experiment: as `loss_protocol`.

    Raises:
      Damaged: as `read_rows`, or a row is of another run: of another name, or of
        another seed or size than the plan's.
    """
    path = folder / FILE
    rows = read_rows(path)[0] if path.is_file() else []
    for number, row in enumerate(rows, 1):
        if row.run_id != folder.name:
            raise Damaged(f"{path}:{number} is a row of {row.run_id}")
        for name in _OF_PLAN if spec else ():
            theirs, ours = getattr(row, name), getattr(spec, name)
            if theirs != ours:
                raise Damaged(
                    f"{path}:{number} is a row of another run of this name: its {name} "
                    f"is {theirs}, not {ours}"
                )
    rows += _rows_of_record(folder / "record.json", spec, experiment)
    if spec is None:
        return rows
    today = [(spec.group, spec.budget_at(row.step)) for row in rows]
    return [
        row
        if (row.group, row.budget_flops) == (group, budget)
        else dataclasses.replace(row, group=group, budget_flops=budget)
        for row, (group, budget) in zip(rows, today, strict=True)
    ]


def _rows_of_record(
    path: pathlib.Path, spec: RunSpec | None, experiment: Mapping[str, Any]
) -> list[Measurement]:
    """The losses in a record of 0.1.0, as rows; a missing loss gives none."""
    if not path.is_file():
        return []
    record = files.read(path, TrainRecord)
    if record.run_id != path.parent.name:
        raise Damaged(f"{path} is that of {record.run_id}")
    held = files.read_json(path)
    overrides = spec.overrides if spec else {}
    first = averages_of(experiment, overrides)[0]
    try:
        losses = {k: float(held[k]) for k in _LOSSES if held.get(k, "nan") != "nan"}
    except (TypeError, ValueError) as e:
        raise Damaged(f"{path}: a loss in it is no number") from e
    return [
        Measurement(
            **{name: getattr(record, name) for name in _OF_RECORD},
            group=spec.group if spec else "",
            step=record.steps,
            metric=metric,
            value=losses[field],
            low=losses[field],
            high=losses[field],
            level=NO_INTERVAL,
            weights=first if weights == _AVERAGED else weights,
            protocol_hash=loss_protocol_hash(metric, experiment, overrides),
        )
        for field, (metric, weights) in _LOSSES.items()
        if field in losses
    ]


def averages_of(
    experiment: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Sequence[str]:
    """The averages that a run keeps, the first one first; as `loss_protocol`."""
    kept = experiment.get("optimizer", {}).get("averages", (EMA,))
    return overrides.get("optimizer.averages") or kept


# What a row and the plan have in common, beside names and what the plan may reword.
_OF_PLAN = ("seed", "params", "params_without_embeddings")
# What a record and a row have in common.
_OF_RECORD = (
    "study",
    "run_id",
    "seed",
    "budget_flops",
    "params",
    "params_without_embeddings",
    "flops",
    "images",
    "tokens",
)


def loss_protocol_hash(
    metric: str, experiment: Mapping[str, Any], overrides: Mapping[str, Any]
) -> str:
    """The digest of `loss_protocol`."""
    return files.digest(loss_protocol(metric, experiment, overrides))


def read_rows(path: pathlib.Path) -> tuple[list[Measurement], str]:
    """The rows of one file, and the beginning of a line that was cut off ("": none).

    Raises:
      Damaged: a complete line holds no row, with file and line number.
      NewerVersion: a newer version of the library wrote it.
    """
    lines, rest = files.complete_lines(path)
    rows = [
        files.loads_line(line, path, number, Measurement)
        for number, line in enumerate(lines, 1)
    ]
    return rows, rest.decode(errors="replace")


def append_rows(path: pathlib.Path, rows: Iterable[Measurement]) -> None:
    """Appends rows to a file in one write of whole lines, and syncs it to the disk.

    The file must not end in a line that was cut off: see `read_rows`.
    """
    text = "".join(files.dumps(row) + "\n" for row in rows)
    if isinstance(path, ObjectPath):  # the store writes whole objects alone
        held = path.read_bytes() if path.is_file() else b""
        path.write_bytes(held + text.encode())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_files.writing(path), open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def put_rows(path: pathlib.Path, rows: Sequence[Measurement]) -> None:
    """Writes rows into a file; a row there with the same `key` is replaced.

    A last line that was cut off is removed. A reader sees the old file or whole rows.
    """
    held, rest = read_rows(path) if path.is_file() else ([], "")
    new = {key(row) for row in rows}
    kept = [key(row) not in new for row in held]
    if all(kept) and not rest:
        return append_rows(path, rows)
    lines, _ = files.complete_lines(path)
    lines = [line for line, keep in zip(lines, kept, strict=True) if keep]
    lines += [files.dumps(row).encode() for row in rows]
    whole_files.write_file(path, lambda file: file.write(b"\n".join([*lines, b""])))


def drop_rows(path: pathlib.Path, after: int) -> str:
    """Removes the rows of steps beyond `after`, and a last line that was cut off.

    The other lines stay as they are. A missing file stays missing.

    Returns:
      The beginning of the line that was cut off; "" if none was.

    Raises:
      Damaged, NewerVersion: as `read_rows`.
    """
    if not path.is_file():
        return ""
    rows, rest = read_rows(path)
    lines, _ = files.complete_lines(path)
    kept = [line for row, line in zip(rows, lines, strict=True) if row.step <= after]
    if rest or len(kept) < len(rows):
        text = b"".join(line + b"\n" for line in kept)
        whole_files.write_file(path, lambda file: file.write(text))
    return rest


def write_csv(rows: Iterable[Measurement], path: str | os.PathLike[str]) -> None:
    """Writes rows as CSV, a column for each field of `Measurement`.

    Numbers have all their digits; those that are not finite are nan, inf and -inf.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([getattr(row, name) for name in _COLUMNS] for row in rows)
    whole_files.write_text(path, out.getvalue())


def write_parquet(rows: Iterable[Measurement], path: str | os.PathLike[str]) -> None:
    """Writes rows as Parquet, a column for each field of `Measurement`.

    Raises:
      ImportError: pyarrow is not installed; the message says how to install it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ImportError(
            "write_parquet needs pyarrow: pip install 'scaling_ldm[huggingface]', or "
            "use write_csv"
        ) from e
    kinds = {
        "str": pyarrow.string(),
        "int": pyarrow.int64(),
        "float": pyarrow.float64(),
    }
    fields = dataclasses.fields(Measurement)
    rows = list(rows)
    table = pyarrow.table(
        {f.name: [getattr(row, f.name) for row in rows] for f in fields},
        schema=pyarrow.schema([(f.name, kinds[str(f.type)]) for f in fields]),
    )
    whole_files.write_file(path, lambda file: pyarrow.parquet.write_table(table, file))


_COLUMNS = tuple(field.name for field in dataclasses.fields(Measurement))
