"""Reads a working directory into one value, `Study`; nothing here draws or writes."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scaling_ldm import records
from scaling_ldm.records import (
    EvalRecord,
    FitResult,
    Frontier,
    Parabola,
    Refusal,
    RunSpec,
    SampleRecord,
    TrainRecord,
)
from scaling_ldm.workdir import runs as runs_lib

QUANTITIES = ("N_opt", "D_opt", "L_opt")
CURVE_FIELDS = ("step", "loss", "flops", "seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """All that a working directory says, with what could not be read in `notes`."""

    name: str
    question: str
    config: Mapping[str, Any]
    config_hash: str
    runs: tuple[RunSpec, ...]  # by budget, then size
    records: Mapping[str, TrainRecord]  # by run_id; planned runs only
    curves: Mapping[str, np.ndarray]  # by run_id: [logged steps, CURVE_FIELDS]
    fit: FitResult | None
    frontier: Frontier | None
    evaluations: tuple[EvalRecord, ...]
    checkpoints: Mapping[str, tuple[int, ...]]  # by run_id: steps of finished runs
    samples: SampleRecord | None
    images: np.ndarray | None  # uint8 [n, height, width, 3]
    environment: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def by_steps(self) -> bool:
        """Whether sizes were trained for the same steps: no budgets, so no laws."""
        return bool(self.config.get("plan", {}).get("steps"))

    @property
    def size(self) -> str:
        """The TrainRecord field that counts as N."""
        return self.fit.size if self.fit else "params_without_embeddings"

    @property
    def metric(self) -> str:
        """The TrainRecord field that counts as L."""
        return self.fit.metric if self.fit else "validation_loss_ema"

    def budgets(self) -> list[float]:
        """The planned budgets, ascending."""
        return sorted({run.budget_flops for run in self.runs})

    def points(self, budget: float) -> list[tuple[float, float, float]]:
        """(N, D, L) of the finished runs of one budget, by N; finite losses only."""
        found = []
        for run in self.runs:
            record = self.records.get(run.run_id)
            if run.budget_flops != budget or record is None:
                continue
            loss = getattr(record, self.metric)
            if record.status == "finished" and math.isfinite(loss):
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
            if math.isclose(p.budget_flops, budget, rel_tol=1e-5)
        }


def read(workdir: pathlib.Path) -> Study:
    """Reads `workdir`; a missing or unreadable part becomes a note, not an error.

    Raises:
      FileNotFoundError: there is no plan (`runs.jsonl`), so nothing to report.
    """
    plan = workdir / "runs.jsonl"
    runs = records.read_jsonl(plan) if plan.is_file() else []
    runs = [run for run in runs if isinstance(run, RunSpec)]
    if not runs:
        raise FileNotFoundError(
            f"{plan}: {'holds no run' if plan.is_file() else 'no such file'}, so there "
            "is nothing to report. Plan and train first: python -m scaling_ldm.main "
            f"--config experiments/NAME.py --workdir {workdir}"
        )
    runs.sort(key=lambda run: (run.budget_flops, run.params, run.run_id))
    notes: list[str] = []
    experiment = _json(workdir, "experiment.json", notes) or {}
    trained: dict[str, TrainRecord] = {}
    kept: dict[str, tuple[int, ...]] = {}
    curves: dict[str, np.ndarray] = {}
    for run in runs:
        folder = f"runs/{run.run_id}"
        record = _record(workdir, f"{folder}/record.json", TrainRecord, notes)
        if record is not None:
            trained[run.run_id] = record
            if record.status == "finished":
                kept[run.run_id] = tuple(runs_lib.checkpoint_steps(workdir, run))
        if (curve := _curve(workdir, f"{folder}/metrics.jsonl", notes)) is not None:
            curves[run.run_id] = curve
    samples = _record(workdir, "samples/record.json", SampleRecord, notes)
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
        fit=_record(workdir, "laws.json", FitResult, notes),
        frontier=_record(workdir, "frontier.json", Frontier, notes),
        evaluations=_evaluations(workdir, notes),
        checkpoints=kept,
        samples=samples,
        images=_images(workdir, samples, notes) if samples else None,
        environment=_json(workdir, "environment.json", notes) or {},
        notes=tuple(notes),
    )


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


def _json(workdir: pathlib.Path, name: str, notes: list[str]) -> dict | None:
    path = workdir / name
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        notes.append(f"{name} could not be read: {e}")
        return None
    if not isinstance(value, dict):
        notes.append(f"{name} could not be read: not a JSON object")
        return None
    return value


def _record(workdir: pathlib.Path, name: str, kind: type, notes: list[str]) -> Any:
    path = workdir / name
    if not path.is_file():
        return None
    try:
        value = records.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as e:
        notes.append(f"{name} could not be read: {e}")
        return None
    if not isinstance(value, kind):
        notes.append(f"{name} could not be read: it holds no {kind.__name__}")
        return None
    return value


def _evaluations(workdir: pathlib.Path, notes: list[str]) -> tuple[EvalRecord, ...]:
    path = workdir / "evaluations.jsonl"
    if not path.is_file():
        return ()
    try:
        found = records.read_jsonl(path)
    except records.Damaged as e:
        notes.append(f"evaluations.jsonl could not be read: {e}")
        return ()
    return tuple(r for r in found if isinstance(r, EvalRecord))


def _curve(workdir: pathlib.Path, name: str, notes: list[str]) -> np.ndarray | None:
    """The logged steps; a step logged again after a restart counts once, the last."""
    path = workdir / name
    if not path.is_file():
        return None
    rows, bad = {}, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
            row = tuple(float(value[k]) for k in CURVE_FIELDS)
        except (ValueError, TypeError, KeyError):
            bad += 1
            continue
        rows[row[0]] = row
    if bad:
        notes.append(f"{name}: {bad} unreadable line{'s' * (bad > 1)} passed over")
    return np.array([rows[step] for step in sorted(rows)]) if rows else None


def _images(
    workdir: pathlib.Path, record: SampleRecord, notes: list[str]
) -> np.ndarray | None:
    name = record.images_file
    try:
        images = np.load(workdir / name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        reason = "no such file" if isinstance(e, FileNotFoundError) else e
        notes.append(f"the sampled images ({name}) could not be read: {reason}")
        return None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        notes.append(
            f"the sampled images ({name}) are {images.dtype} {list(images.shape)}; "
            "expected uint8 [n, height, width, 3]"
        )
        return None
    return images
