"""The frontier stage: quality against sampling cost of the best run of each size.

    frontier/cells/<id>.json   a records.Cell each: one sampler, steps and guidance
    runs/<run_id>/measurements.jsonl   the values of the cells
    frontier.json   a records.Frontier: all cells, fronts, crossings

For each run, sampler and number of steps, the guidance with the lowest distance is
found first (paper A, section 3.3.1). Only the features of its pictures are resampled.
The other guidances of a setting are assumed to have the same relative spread.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import config, frontier, records
from scaling_ldm.config import axes
from scaling_ldm.evaluation import measures, protocol, reference
from scaling_ldm.evaluation.extractors import Extractor
from scaling_ldm.metrics import frechet
from scaling_ldm.records import joined, rows_of, table
from scaling_ldm.training import inference, mesh, progress, time_left
from scaling_ldm.workdir import runs


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> records.Frontier | None:
    """Measures the cells that are missing; None where config.frontier.images is 0."""
    if not experiment.frontier.images:
        return None
    best_runs = _best_of_sizes(workdir, specs)
    if not best_runs:
        progress.say("no finished run for a frontier")
        return None
    if 0 < experiment.evaluate.bootstrap < frontier.MIN_REPLICATES:
        progress.say(
            f"config.evaluate.bootstrap = {experiment.evaluate.bootstrap}: below "
            f"{frontier.MIN_REPLICATES} there will be no intervals"
        )
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        cells = _CellMeasurer(experiment, workdir, best_runs, device_mesh).run()
    largest = max(cells, key=lambda cell: cell.params)
    found = frontier.build(
        cells,
        reference=largest.label,
        device=_device(),
        bootstrap=experiment.fit.bootstrap,
        level=experiment.evaluate.confidence,
        seed=experiment.evaluate.seed,
    )
    if mesh.is_primary():
        joined.write_frontier(workdir, found)
    for sentence in found.sentences:
        progress.say(sentence)
    mesh.barrier("frontier")
    return found


def _best_of_sizes(
    workdir: pathlib.Path, specs: Sequence[records.RunSpec]
) -> list[records.RunSpec]:
    """For each group and size, the finished run with the lowest validation loss."""
    sizes: dict[tuple[str, int, int], list[records.RunSpec]] = {}
    for spec in specs:
        sizes.setdefault((spec.group, spec.width, spec.depth), []).append(spec)
    read = table.experiment_of(workdir)  # once for all groups
    found = [runs.best(workdir, group, read) for group in sizes.values()]
    return [spec for spec in found if spec is not None]


def _device() -> str:
    """The device that seconds are measured on."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        return f"{len(os.sched_getaffinity(0))}-core CPU"
    return f"{jax.device_count()} x {first.device_kind}"


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is trained, a cell that could not be measured.

    Raises:
      ConfigError: a sampler cannot use its spacing with this schedule and prediction,
        or there are too few pictures for a distance.
    """
    images, least = experiment.frontier.images, measures.METRICS["fd"].minimum_images
    if not images:
        return
    if images < least:
        raise config.ConfigError(
            f"config.frontier.images = {images}: fd needs at least {least}; 0 makes no "
            "frontier"
        )
    for one, sampling in itertools.product(
        axes.objectives(experiment), _cell_settings(experiment)
    ):
        try:
            inference.sampling_plan(one, sampling)
        except ValueError as e:
            raise config.ConfigError(
                f"config.frontier cannot sample with sampler {sampling.sampler!r} and "
                f"steps = {sampling.steps}: {e}"
            ) from e


def _cell_settings(experiment: config.Experiment) -> list[config.GenerateConfig]:
    """The sampling settings of every cell of a run."""
    cfg = experiment.frontier
    return [
        dataclasses.replace(
            experiment.generate,
            images=cfg.images,
            sampler=sampler,
            spacing="auto",
            steps=steps,
            guidance=guidance,
        )
        for sampler, steps, guidance in itertools.product(
            cfg.samplers, cfg.steps, cfg.guidances
        )
    ]


def _spread(
    cell: records.MeasuredCell, best: records.MeasuredCell
) -> records.MeasuredCell:
    """The cell with deviations; if it has none, with the relative ones of `best`.

    Resampling every cell would take longer than drawing the pictures.
    """
    if cell.deviations or not best.deviations:
        return cell
    scaled = tuple(cell.value * x / best.value for x in best.deviations)
    return dataclasses.replace(cell, deviations=scaled)


class _CellFiles:
    """Cells on disk; a file's name is the digest of all that its value depends on.

    Args:
      parts: of the protocol, without those of the sampler.
      weights: run -> the name of its weights that are sampled.
      level: of the intervals in the table.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        parts: dict[str, Any],
        weights: Callable[[records.RunSpec], str],
        level: float,
    ) -> None:
        self._folder, self._parts = workdir / "frontier" / "cells", parts
        self._workdir, self._weights, self._level = workdir, weights, level
        self._values: dict[str, dict[Any, float]] = {}  # by run: of each place

    def protocol(self, sampling: config.GenerateConfig) -> dict[str, Any]:
        return self._parts | protocol.sampling_parts(sampling)

    def read(
        self, spec: records.RunSpec, sampling: config.GenerateConfig
    ) -> records.MeasuredCell | None:
        """The cell with its value; None if it must be measured."""
        path = self._path(spec, sampling)
        if not path.exists():
            return None
        cell = records.read(path, records.Cell)
        wanted = spec.run_id, sampling.sampler, sampling.steps, sampling.guidance
        held = cell.model, cell.sampler, cell.steps, cell.guidance
        if held != wanted:
            raise records.Damaged(f"{path} is the cell {held}, not {wanted}")
        if isinstance(cell, records.MeasuredCell):  # an older version's
            self.write(spec, sampling, cell)
            return cell
        value = self._values_of(spec).get(joined.place_of_cell(cell))
        return None if value is None else joined.with_value(cell, value)

    def write(
        self,
        spec: records.RunSpec,
        sampling: config.GenerateConfig,
        cell: records.MeasuredCell,
    ) -> None:
        """Writes the value into the table, then the file of the cell."""
        self._values_of(spec)[joined.place_of_cell(cell)] = cell.value
        if not mesh.is_primary():
            return
        row = rows_of.cell(spec, cell, cell.value, self._weights(spec), self._level)
        table.put_rows(runs.run_files(self._workdir, spec.run_id).measurements, [row])
        bare = joined.without_value(cell)
        records.write_text(self._path(spec, sampling), records.dumps(bare))

    def _values_of(self, spec: records.RunSpec) -> dict[Any, float]:
        """The values of a run's cells in the table; read once."""
        if spec.run_id not in self._values:
            path = runs.run_files(self._workdir, spec.run_id).measurements
            rows = table.read_rows(path)[0] if path.is_file() else []
            found = joined.cell_values(r for r in rows if r.step == spec.steps)
            self._values[spec.run_id] = {k: row.value for k, row in found.items()}
        return self._values[spec.run_id]

    def _path(
        self, spec: records.RunSpec, sampling: config.GenerateConfig
    ) -> pathlib.Path:
        of = [spec.run_id, spec.recipe_hash, self.protocol(sampling)]
        return self._folder / f"{records.digest(of)}.json"


class _CellMeasurer:
    """Measures the cells of some runs; cells that are on disk are read."""

    def __init__(
        self,
        experiment: config.Experiment,
        workdir: pathlib.Path,
        specs: Sequence[records.RunSpec],
        device_mesh: jax.sharding.Mesh,
    ) -> None:
        cfg = experiment.evaluate
        self._experiment, self._workdir, self._specs = experiment, workdir, specs
        self._mesh = device_mesh
        self._extract = Extractor(cfg, device_mesh)
        side = reference.picture_size(experiment)
        real = reference.statistics(experiment, workdir, self._extract, side)
        self._reference = frechet.Reference.of(real.moments)
        (self._metric,) = measures.names("fd", cfg.network)
        parts = protocol.measurement_parts(
            experiment, self._extract.identity, real.digest, real.images
        )
        own = {"metric": self._metric, "backend": "numpy"}
        self._files = _CellFiles(
            workdir, parts | own, self._weights, experiment.evaluate.confidence
        )
        self._drawing: tuple[str, inference.PictureSampler] | None = None

    @functools.cached_property
    def _flops_of_largest(self) -> float:
        """FLOPs of one evaluation of the largest run's network."""
        largest = max(self._specs, key=lambda spec: spec.params_without_embeddings)
        cost = self._sampler(largest).cost(self._experiment.generate)
        return cost.flops / cost.nfe

    def _weights(self, spec: records.RunSpec) -> str:
        """The weights of a run that are sampled."""
        own = config.with_overrides(self._experiment, spec.overrides)
        return own.optimizer.averages[0]

    def run(self) -> list[records.MeasuredCell]:
        """The cells of all runs, in the order of the plan."""
        settings = _cell_settings(self._experiment)
        total = len(self._specs) * len(settings)
        found: list[records.MeasuredCell] = []
        pace, shown, fresh = time_left.Pace(), 0.0, 0
        for spec in self._specs:
            for _, group in itertools.groupby(
                settings, key=lambda sampling: (sampling.sampler, sampling.steps)
            ):
                cells, drawn = self._group(spec, list(group))
                found += cells
                fresh += drawn
                cells_per_second = pace.per_second(fresh) if fresh else None
                now = time.perf_counter()
                if now - shown > self._experiment.train.show_every_seconds:
                    shown = now
                    seconds = None
                    if cells_per_second is not None:
                        seconds = (total - len(found)) / cells_per_second
                    b = min(cells, key=lambda cell: cell.value)
                    progress.say(
                        f"frontier  {len(found):,} of {total:,} cells  {b.model}  "
                        f"{b.sampler} {b.steps}: best guidance {b.guidance:g}, "
                        f"{self._metric} {b.value:.4g}{time_left.left(seconds)}"
                    )
        return found

    def _group(
        self,
        spec: records.RunSpec,
        settings: Sequence[config.GenerateConfig],
    ) -> tuple[list[records.MeasuredCell], int]:
        """The cells of one sampler and number of steps; how many were drawn."""
        cells, fresh = [], 0
        best, of_best = 0, None  # only the features of the best cell are kept
        for i, sampling in enumerate(settings):
            cell, features = self._files.read(spec, sampling), None
            if cell is None:
                cell, features = self._cell(spec, sampling, self._sampler(spec))
                fresh += 1
            cells.append(cell)
            if i == 0 or cell.value < cells[best].value:
                best, of_best = i, features
        sampling, cell = settings[best], cells[best]
        if self._experiment.evaluate.bootstrap and not cell.deviations:
            if of_best is None:
                of_best, _ = self._features(sampling, self._sampler(spec))
            cell = cells[best] = self._resampled(cell, of_best)
            self._files.write(spec, sampling, cell)
        return [_spread(each, cell) for each in cells], fresh

    def _sampler(self, spec: records.RunSpec) -> inference.PictureSampler:
        """The sampler of a run; made only when needed: it reads a checkpoint."""
        if self._drawing is not None and self._drawing[0] == spec.run_id:
            return self._drawing[1]
        generate = self._experiment.generate
        most = min(generate.batch_size, self._experiment.frontier.images)
        model = runs.trained_model(self._experiment, self._workdir, spec)
        made = inference.PictureSampler(
            self._experiment, self._workdir, model, self._mesh, most
        )
        self._drawing = spec.run_id, made
        return made

    def _features(
        self, sampling: config.GenerateConfig, sampler: inference.PictureSampler
    ) -> tuple[np.ndarray, float]:
        """Features of the cell's pictures, and the seconds for drawing one picture."""
        images, seconds = sampler.timed(np.arange(sampling.images), sampling)
        return np.asarray(self._extract(images).features), seconds

    def _cell(
        self,
        spec: records.RunSpec,
        sampling: config.GenerateConfig,
        sampler: inference.PictureSampler,
    ) -> tuple[records.MeasuredCell, np.ndarray]:
        features, seconds = self._features(sampling, sampler)
        cost = sampler.cost(sampling)
        evaluation = cost.flops / cost.nfe
        cell = records.MeasuredCell(
            model=spec.run_id,
            label=f"{spec.width} x {spec.depth}" + f", {spec.group}" * bool(spec.group),
            params=spec.params_without_embeddings,
            relative_cost=evaluation / self._flops_of_largest,
            sampler=sampling.sampler,
            steps=sampling.steps,
            guidance=sampling.guidance,
            nfe=cost.nfe,
            flops=cost.flops,
            decoder_flops=cost.decoder_flops,
            seconds=seconds,
            metric=self._metric,
            value=frechet.distance_from_features(features, self._reference),
            deviations=(),
            protocol=protocol.digest(
                self._files.protocol(sampling), without=protocol.SAMPLING
            ),
            images=sampling.images,
            memory_bytes=sampler.memory(sampling),
        )
        self._files.write(spec, sampling, cell)
        return cell, features

    def _resampled(
        self, cell: records.MeasuredCell, features: np.ndarray
    ) -> records.MeasuredCell:
        """The cell with the deviations of bootstrap values from their mean."""
        cfg = self._experiment.evaluate
        draws = frechet.bootstrap(
            features, self._reference, replicates=cfg.bootstrap, seed=cfg.seed
        )
        around = draws - np.mean(draws)
        return dataclasses.replace(cell, deviations=tuple(float(x) for x in around))
