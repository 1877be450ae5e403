"""All that a report says of a working directory, as one value. `reading` makes it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from scaling_ldm.records import (
    Attempt,
    Evaluation,
    FitResult,
    Frontier,
    Measurement,
    Parabola,
    RateFit,
    Refusal,
    RunSpec,
    SampleRecord,
    TrainRecord,
    results,
    table,
)
from scaling_ldm.records.measurements import LOSS
from scaling_ldm.report import format as fmt

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
    real: Images | None  # held-out pictures of the same captions
    environment: Mapping[str, Any]
    held_out: Mapping[str, str]  # by part of a mix: what is not trained on, in words
    training_pictures: Mapping[str, int]  # by part, if it has a number of them
    notes: tuple[str, ...]
    # By run_id, of runs that a process has worked at: its processes in order.
    attempts: Mapping[str, tuple[Attempt, ...]] = dataclasses.field(
        default_factory=dict
    )
    rates: tuple[RateFit, ...] = ()  # of each group of runs that differ in their rate
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
        measured = self.at_points(metric, weights)
        ends = {run.run_id: (run.run_id, run.steps) for run in self.runs}
        return {i: measured[end] for i, end in ends.items() if end in measured}

    def at_points(self, metric: str, weights: str = "") -> dict[results.Point, float]:
        """`at_end` by run_id and step, with the smaller budgets of trajectories."""
        rows = []
        for run in self.runs:
            meant = results.weights_meant(metric, weights, self.averages(run))
            own = results.at_points(self.rows.get(run.run_id, ()), [run])
            record = self.records.get(run.run_id)
            own = [row for row in own if results.is_result(row, record)]
            rows += results.of(own, metric, meant)
        fit, fitted = self.fit, (metric, weights)
        protocol = ""
        if fit and fitted == (fit.metric, fit.weights):
            protocol = fit.protocol_hash
        if not protocol:  # of each point its one protocol, whichever that is
            by_point = {(row.run_id, row.step): row for row in rows}
            several = {p for r in rows if r is not by_point[p := (r.run_id, r.step)]}
            return {p: r.value for p, r in by_point.items() if p not in several}
        return {
            (r.run_id, r.step): r.value for r in rows if r.protocol_hash == protocol
        }

    @property
    def reused(self) -> bool:
        """Whether runs share their training with others (plan.reuse)."""
        return any(run.smaller_budgets or run.trunk for run in self.runs)

    def separate(self) -> list[RunSpec]:
        """The runs, and of trajectories the separate runs that they stand for."""
        return [point for run in self.runs for point in run.points()]

    def reached(self, run: RunSpec) -> list[RunSpec]:
        """Those of `separate` that a run has reached; none before it is over."""
        return results.reached(self.records.get(run.run_id), run)

    def budgets(self) -> list[float]:
        """The planned budgets, ascending."""
        return sorted({run.budget_flops for run in self.separate()})

    def points(self, budget: float) -> list[tuple[float, float, float]]:
        """(N, D, L) of the finished runs of one budget, by N; finite losses only."""
        measured, found = self.at_points(self.metric, self.weights), []
        for run in self.separate():
            loss = measured.get((run.run_id, run.steps), math.nan)
            if run.budget_flops == budget and math.isfinite(loss):
                found.append((float(getattr(run, self.size)), run.tokens, loss))
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
