"""Reads a working directory into one value, `Study`. Nothing here draws or writes."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from scaling_ldm import records
from scaling_ldm.records import (
    Evaluation,
    FitResult,
    Frontier,
    Measurement,
    Parabola,
    Refusal,
    RunSpec,
    SampleRecord,
    TrainRecord,
    results,
    rows_of,
    table,
)
from scaling_ldm.records.joined import read_evaluations, read_frontier
from scaling_ldm.records.measurements import LOSS
from scaling_ldm.report import format as fmt
from scaling_ldm.workdir.runs import checkpoint_steps, run_files

QUANTITIES = ("N_opt", "D_opt", "L_opt")
CURVE_FIELDS = ("step", "loss", "flops", "seconds")

Curve = Float[np.ndarray, "steps 4"]  # CURVE_FIELDS of each logged step
Images = UInt8[np.ndarray, "images height width 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """All that a working directory holds; `notes` says what could not be read."""

    name: str
    question: str
    config: Mapping[str, Any]
    config_hash: str
    runs: tuple[RunSpec, ...]  # by budget, then size
    records: Mapping[str, TrainRecord]  # by run_id; planned runs only
    curves: Mapping[str, Curve]  # by run_id
    rows: Mapping[str, tuple[Measurement, ...]]  # by run_id; planned runs only
    fits: tuple[FitResult, ...]  # of each group and metric
    frontier: Frontier | None
    evaluations: tuple[Evaluation, ...]
    checkpoints: Mapping[str, tuple[int, ...]]  # by run_id: steps of finished runs
    samples: SampleRecord | None
    images: Images | None
    environment: Mapping[str, Any]
    held_out: Mapping[str, str]  # by part of a mix: what is not trained on, in words
    training_pictures: Mapping[str, int]  # by part, if it has a number of them
    notes: tuple[str, ...]
    group: str = ""  # of `parts`: the one group of its runs
    title: str = ""  # of `parts` and `by_metric`: which of several this one is
    suffix: str = ""  # of both: ends the names of its figures and tables

    @property
    def fit(self) -> FitResult | None:
        """The laws of the first group and metric; None if there are none."""
        return next(iter(self.fits), None)

    def parts(self) -> list[Study]:
        """The study of each group; the study itself if it has one."""
        groups = list(dict.fromkeys(run.group for run in self.runs))
        if len(groups) < 2:
            return [self]
        found: dict[str, Study] = {}
        for group in groups:
            suffix = _another("_" + _word(group), found)
            found[suffix] = dataclasses.replace(
                self,
                runs=tuple(run for run in self.runs if run.group == group),
                fits=tuple(fit for fit in self.fits if fit.group == group),
                group=group,
                title=group,
                suffix=suffix,
            )
        return list(found.values())

    def by_metric(self) -> list[Study]:
        """A part with each one of its fits; the part itself if it has one or none."""
        if len(self.fits) < 2:
            return [self]
        found: dict[str, Study] = {}
        for fit in self.fits:
            words = fmt.measure(fit.metric, fit.weights)
            suffix = self.suffix
            if found:  # the first one has the names that a single one has
                suffix = _another(f"{suffix}_{_word(fit.metric)}", found)
            title = ", ".join(filter(None, (self.title, words)))
            found[suffix] = dataclasses.replace(
                self, fits=(fit,), title=title, suffix=suffix
            )
        return list(found.values())

    @property
    def varied(self) -> bool:
        """Whether runs differ in more than their size and budget."""
        return any(run.overrides for run in self.runs)

    @property
    def by_steps(self) -> bool:
        """Whether sizes were trained for the same steps: no budgets, so no laws."""
        return bool(self.config.get("plan", {}).get("steps"))

    @property
    def size(self) -> str:
        """The field of a run that counts as N."""
        return self.fit.size if self.fit else "params_without_embeddings"

    @property
    def metric(self) -> str:
        """The metric of the table that counts as L."""
        return self.fit.metric if self.fit else LOSS

    def averages(self, run: RunSpec) -> Sequence[str]:
        """The averages that a run keeps, the first one first."""
        return table.averages_of(self.config, run.overrides)

    @property
    def weights(self) -> str:
        """The weights whose numbers count as L: "raw" or an average's name."""
        if self.fit and self.fit.weights:
            return self.fit.weights
        kept = self.averages(self.runs[0])
        return results.weights_meant(self.metric, "", kept)

    @property
    def measure(self) -> str:
        """What counts as L, as words: "validation loss, average ema"."""
        return fmt.measure(self.metric, self.weights)

    def finished(self) -> list[RunSpec]:
        """The runs that are finished."""
        found = [(run, self.records.get(run.run_id)) for run in self.runs]
        return [run for run, record in found if record and record.status == "finished"]

    def at_end(self, metric: str, weights: str = "") -> dict[str, float]:
        """By run_id, a metric of finished runs at their last planned step.

        Args:
          weights: "raw", an average's name, or "": the first average of each run.
        """
        runs, rows = self.finished(), []
        for run in runs:
            meant = results.weights_meant(metric, weights, self.averages(run))
            own = results.at_end(self.rows.get(run.run_id, ()), [run])
            rows += results.of(own, metric, meant)
        fit, fitted = self.fit, (metric, weights)
        protocol = ""
        if fit and fitted == (fit.metric, fit.weights):
            protocol = fit.protocol_hash
        if not protocol:  # of each run its one protocol, whichever that is
            by_run = {row.run_id: row for row in rows}
            several = {r.run_id for r in rows if r is not by_run[r.run_id]}
            return {i: r.value for i, r in by_run.items() if i not in several}
        return {r.run_id: r.value for r in rows if r.protocol_hash == protocol}

    def budgets(self) -> list[float]:
        """The planned budgets, ascending."""
        return sorted({run.budget_flops for run in self.runs})

    def points(self, budget: float) -> list[tuple[float, float, float]]:
        """(N, D, L) of the finished runs of one budget, by N; finite losses only."""
        measured, found = self.at_end(self.metric, self.weights), []
        for run in self.runs:
            loss = measured.get(run.run_id, math.nan)
            if run.budget_flops == budget and math.isfinite(loss):
                record = self.records[run.run_id]
                found.append((float(getattr(record, self.size)), record.tokens, loss))
        return sorted(found)

    def minima(self) -> dict[float, Parabola | Refusal]:
        """The parabola of each planned budget, or why there is none.

        Budgets are equal to six digits: a refusal of an older file has no more.
        """
        found = self.fit.parabolas if self.fit else ()
        return {
            budget: p
            for budget in self.budgets()
            for p in found
            if p.budget_flops is not None
            and math.isclose(p.budget_flops, budget, rel_tol=1e-5)
        }


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
    evaluations = tuple(reader.study("evaluations.jsonl", read_evaluations) or ())
    samples = reader.part("samples/record.json", _record, SampleRecord)
    images = reader.part(samples.images_file, _images) if samples else None
    if samples and not (workdir / samples.images_file).is_file():
        reader.notes.append(f"{samples.images_file} could not be read: no such file")
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
        fits=reader.part("laws.json", _fits) or (),
        frontier=reader.study("frontier.json", read_frontier),
        evaluations=evaluations,
        checkpoints=kept,
        samples=samples,
        images=images,
        environment=reader.part("environment.json", _environment) or {},
        held_out=split.get("held_out", {}),
        training_pictures=split.get("training_pictures", {}),
        notes=tuple(reader.notes),
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


def _word(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"\W+", "_", text)


def _another(suffix: str, others: Iterable[str]) -> str:
    """A suffix that differs from the others in more than their last underscores."""
    alike = sum(other.strip("_") == suffix.strip("_") for other in others)
    return suffix + "_" * alike


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b.c", leaf) pairs of a nested mapping, in its order."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def smooth(loss: np.ndarray, keep: float = 0.9) -> np.ndarray:
    """Exponential moving average, divided by its total weight so it starts unbiased."""
    average, weight = 0.0, 0.0
    out = np.empty(len(loss))
    for i, value in enumerate(loss):
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out[i] = average / weight
    return out


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


def _fits(path: pathlib.Path) -> tuple[FitResult, ...]:
    """A line of each group; an older file has one group."""
    if not (fits := records.read_jsonl(path, FitResult)):
        raise ValueError("it holds no FitResult")
    return tuple(fits)


def _images(path: pathlib.Path) -> Images:
    images = np.load(path, allow_pickle=False)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{images.dtype} {list(images.shape)}; expected uint8 [n, height, width, 3]"
        )
    return images
