"""Reads a working directory into a `Study`. Nothing here draws or writes."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ldm import records
from scaling_ldm.records import (
    Attempt,
    Evaluation,
    FitResult,
    Measurement,
    RateFit,
    RunSpec,
    SampleRecord,
    TrainRecord,
    rows_of,
    table,
)
from scaling_ldm.records.joined import read_evaluations, read_frontier
from scaling_ldm.report.study import CURVE_FIELDS, Curve, Images, Study
from scaling_ldm.workdir import sample_files
from scaling_ldm.workdir.runs import checkpoint_steps, run_files


def read(workdir: pathlib.Path) -> Study:
    """Reads `workdir`; a missing or unreadable part becomes a note, not an error.

    Raises:
      FileNotFoundError: there is no plan (`runs.jsonl`), so nothing to report.
    """
    plan = workdir / "runs.jsonl"
    runs = records.read_plan(workdir) if plan.is_file() else []
    runs = [run for run in runs if isinstance(run, RunSpec)]
    if not runs:
        raise FileNotFoundError(
            f"{plan}: {'holds no run' if plan.is_file() else 'no such file'}, so there "
            "is nothing to report. Plan and train first: python -m scaling_ldm.main "
            f"--config experiments/NAME.py --workdir {workdir}"
        )
    runs.sort(key=lambda run: (run.budget_flops, run.params, run.run_id))
    reader = _Reader(workdir)
    experiment = reader.part("experiment.json", records.read_experiment) or {}
    trained: dict[str, TrainRecord] = {}
    kept: dict[str, tuple[int, ...]] = {}
    curves: dict[str, Curve] = {}
    attempts: dict[str, tuple[Attempt, ...]] = {}
    for run in runs:
        files = run_files(workdir, run.run_id)
        record = reader.part(files.record, _record, TrainRecord)
        if record is not None:
            trained[run.run_id] = record
            if record.status == "finished":
                kept[run.run_id] = tuple(checkpoint_steps(workdir, run))
        curve = reader.part(files.metrics, reader.curve)
        if curve is not None and len(curve):
            curves[run.run_id] = curve
        if found := reader.part(files.attempts, records.read_attempts, run.run_id):
            attempts[run.run_id] = tuple(found)
    evaluations = tuple(reader.study("evaluations.jsonl", read_evaluations) or ())
    samples = reader.sample("samples/record.json", _record, SampleRecord)
    drawn, real = (samples.images_file, samples.real_file) if samples else ("", "")
    laws = reader.part("laws.json", _laws) or ()
    split = reader.part("split.json", records.read_json) or {}
    return Study(
        name=str(experiment.get("name", runs[0].study)),
        question=str(experiment.get("question", "")),
        config=_without_types(experiment.get("config", {})),
        config_hash=str(
            experiment.get("config_hash")
            or experiment.get("recipe_hash")
            or runs[0].recipe_hash
        ),
        runs=tuple(runs),
        records=trained,
        curves=curves,
        rows=reader.rows(runs, experiment.get("config", {}), evaluations),
        fits=tuple(found for found in laws if isinstance(found, FitResult)),
        rates=tuple(found for found in laws if isinstance(found, RateFit)),
        frontier=reader.study("frontier.json", read_frontier),
        evaluations=evaluations,
        checkpoints=kept,
        samples=samples,
        images=reader.images(drawn),
        real=reader.images(real),
        environment=reader.part("environment.json", _environment) or {},
        held_out=split.get("held_out", {}),
        training_pictures=split.get("training_pictures", {}),
        notes=tuple(reader.notes),
        attempts=attempts,
    )


class _Reader:
    """Reads the files of a working directory; what cannot be read becomes a note."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self.workdir, self.notes = workdir, []

    def part(
        self, path: str | pathlib.Path, read: Callable[..., Any], *given: Any
    ) -> Any:
        """`read(path, *given)`; None where there is no such file, or it is damaged.

        A text is a path in the working directory.
        """
        path = self.workdir / path if isinstance(path, str) else path
        if not path.is_file():
            return None
        try:
            return read(path, *given)
        except (ValueError, TypeError, OSError, EOFError) as e:
            said = str(e).removeprefix(str(path)).lstrip(": ")
            self.notes.append(f"{self._name(path)} could not be read: {said}")
            return None

    def images(self, name: str) -> Images | None:
        """The pictures of a file; "": there is none. A missing file is a note."""
        if name and not (self.workdir / name).is_file():
            self.notes.append(f"{name} could not be read: no such file")
            return None
        return self.sample(name, _images) if name else None

    def sample(self, name: str, *read: Any) -> Any:
        """As `part`, of a file of the stage generate: None if it was changed."""
        only = name.removeprefix("samples/")
        if self.part(
            f"samples/{sample_files.NAME}",
            lambda path: sample_files.changed(path.parents[1], only),
        ):
            self.notes.append(
                f"{name} is not as it was written: the stage generate makes it again"
            )
            return None
        return self.part(name, *read)

    def study(self, name: str, read: Callable[[pathlib.Path], Any]) -> Any:
        """`read(workdir)`, of the file and its rows of the table; as `part`."""
        return self.part(name, lambda path: read(path.parent))

    def _name(self, path: pathlib.Path) -> str:
        return path.relative_to(self.workdir).as_posix()

    def rows(
        self,
        runs: Sequence[RunSpec],
        experiment: Mapping[str, Any],
        evaluations: Sequence[Evaluation],
    ) -> dict[str, tuple[Measurement, ...]]:
        """The rows of the table by run; those of a file that is damaged are none."""
        found = {}
        for run in runs:
            folder = run_files(self.workdir, run.run_id).folder
            own = [
                (rows_of.evaluation(run, record), pathlib.Path("evaluations.jsonl"))
                for record in evaluations
                if record.run_id == run.run_id and not record.checksum
            ]
            try:
                rows = table.rows_of_run(folder, run, experiment)
                own += [(row, pathlib.Path(self._name(folder))) for row in rows]
                found[run.run_id] = tuple(table.united(own))
            except (ValueError, TypeError, KeyError, OSError) as e:
                said = f"{self._name(folder)}/record.json could not be read"
                if not any(note.startswith(said) for note in self.notes):
                    self.notes.append(f"measurements of {run.run_id} are not used: {e}")
        return found

    def curve(self, path: pathlib.Path) -> np.ndarray:
        """The logged steps; a step logged again after a restart counts once, the last.

        A line that cannot be read is counted in a note.
        """
        rows, bad = {}, 0
        for line in path.read_bytes().splitlines():
            try:
                value = records.json_object(line, path, *CURVE_FIELDS)
                row = tuple(float(value[k]) for k in CURVE_FIELDS)
            except (ValueError, TypeError):
                bad += 1
                continue
            rows[row[0]] = row
        if bad:
            lines = f"{bad} unreadable line{'s' * (bad > 1)}"
            self.notes.append(f"{self._name(path)}: {lines} passed over")
        return np.array([rows[step] for step in sorted(rows)])


def _without_types(tree: Any) -> Any:
    """A record as plain JSON without its class names, which a reader need not see."""
    if isinstance(tree, Mapping):
        return {k: _without_types(v) for k, v in tree.items() if k != "record"}
    if isinstance(tree, list):
        return [_without_types(v) for v in tree]
    return tree


def _environment(path: pathlib.Path) -> dict[str, Any]:
    return records.unstamped(records.read_json(path), path)


def _record(path: pathlib.Path, kind: type) -> Any:
    return records.read(path, kind)


def _laws(path: pathlib.Path) -> tuple[FitResult | RateFit, ...]:
    """A line of each fit; an older file has one group."""
    found = records.read_jsonl(path)
    if not found or not all(isinstance(one, (FitResult, RateFit)) for one in found):
        raise ValueError("it holds no FitResult")
    return tuple(found)


def _images(path: pathlib.Path) -> Images:
    with path.open("rb") as file:
        images = np.load(file, allow_pickle=False)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{images.dtype} {list(images.shape)}; expected uint8 [n, height, width, 3]"
        )
    return images
