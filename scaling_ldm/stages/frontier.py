"""The best run of each size x sampler x steps x guidance -> cells, their frontier.

    frontier/cells/<id>.json   a records.Cell each: a cell that is there is not redone
    frontier.json   a records.Frontier: all of them and what they say

For each run, sampler and number of steps the guidance of the lowest distance is found
first (paper A, section 3.3.1); the features of its pictures are then resampled. The
other guidances of a setting are taken to scatter as much, relative to their values.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import config, frontier, records
from scaling_ldm.evaluation import measures, protocol, reference
from scaling_ldm.evaluation.extractors import Extractor
from scaling_ldm.metrics import frechet
from scaling_ldm.training import inference, mesh, progress
from scaling_ldm.workdir import runs as runs_lib


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> records.Frontier | None:
    """Measures the cells that are missing; None where config.frontier.images is 0."""
    if not experiment.frontier.images:
        return None
    runs = _best_of_sizes(workdir, specs)
    if not runs:
        progress.say("no finished run for a frontier")
        return None
    if 0 < experiment.evaluate.bootstrap < frontier.MIN_REPLICATES:
        progress.say(
            f"config.evaluate.bootstrap = {experiment.evaluate.bootstrap}: below "
            f"{frontier.MIN_REPLICATES} there will be no intervals"
        )
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        cells = _Grid(experiment, workdir, runs, device_mesh).run()
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
        records.write_text(workdir / "frontier.json", records.dumps(found) + "\n")
    for sentence in found.sentences:
        progress.say(sentence)
    mesh.barrier("frontier")
    return found


def _best_of_sizes(
    workdir: pathlib.Path, specs: Sequence[records.RunSpec]
) -> list[records.RunSpec]:
    """Of each size the finished run of the lowest validation loss."""
    sizes: dict[tuple[int, int], list[records.RunSpec]] = {}
    for spec in specs:
        sizes.setdefault((spec.width, spec.depth), []).append(spec)
    found = [runs_lib.best(workdir, group) for group in sizes.values()]
    return [spec for spec in found if spec is not None]


def _device() -> str:
    """What the seconds were measured on."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        return f"{len(os.sched_getaffinity(0))}-core CPU"
    return f"{jax.device_count()} x {first.device_kind}"


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is trained, a cell without pictures or a distance.

    Raises:
      ConfigError: a sampler cannot use its grid with this schedule and prediction, or
        there are too few pictures.
    """
    images, least = experiment.frontier.images, measures.LEAST["fd"]
    if not images:
        return
    if images < least:
        raise config.ConfigError(
            f"config.frontier.images = {images}: fd needs at least {least}; 0 makes no "
            "frontier"
        )
    for how in _settings(experiment):
        try:
            inference.sampling_plan(experiment, how)
        except ValueError as e:
            raise config.ConfigError(
                f"config.frontier cannot sample with sampler {how.sampler!r} and steps "
                f"= {how.steps}: {e}"
            ) from e


def _settings(experiment: config.Experiment) -> list[config.GenerateConfig]:
    """One for each cell of a run."""
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


def _spread(cell: records.Cell, best: records.Cell) -> records.Cell:
    """The cell with replicates: of the best guidance's relative spread if without.

    Resampling every cell would take longer than drawing them.
    """
    if cell.replicates or not best.replicates:
        return cell
    scaled = tuple(cell.value * x / best.value for x in best.replicates)
    return dataclasses.replace(cell, replicates=scaled)


class _Shelf:
    """Cells on disk, each under the digest of all that its value depends on.

    Args:
      parts: of the protocol, all but the sampler's.
    """

    def __init__(self, folder: pathlib.Path, parts: dict[str, Any]) -> None:
        self._folder, self._parts = folder, parts

    def protocol(self, how: config.GenerateConfig) -> dict[str, Any]:
        return self._parts | protocol.sampled(how)

    def read(
        self, spec: records.RunSpec, how: config.GenerateConfig
    ) -> records.Cell | None:
        path = self._path(spec, how)
        return records.loads(path.read_text()) if path.exists() else None

    def write(
        self, spec: records.RunSpec, how: config.GenerateConfig, cell: records.Cell
    ) -> None:
        if mesh.is_primary():
            records.write_text(self._path(spec, how), records.dumps(cell))

    def _path(self, spec: records.RunSpec, how: config.GenerateConfig) -> pathlib.Path:
        of = [spec.run_id, spec.recipe_hash, self.protocol(how)]
        return self._folder / f"{records.digest(of)}.json"


class _Grid:
    """One call of the stage."""

    def __init__(
        self,
        experiment: config.Experiment,
        workdir: pathlib.Path,
        runs: Sequence[records.RunSpec],
        device_mesh: jax.sharding.Mesh,
    ) -> None:
        cfg = experiment.evaluate
        self._experiment, self._workdir, self._runs = experiment, workdir, runs
        self._mesh = device_mesh
        self._extract = Extractor(cfg, device_mesh)
        side = reference.side(experiment)
        real = reference.statistics(
            experiment, workdir / "evaluate", self._extract, side
        )
        self._reference = frechet.Reference.of(real.moments)
        (self._metric,) = measures.names("fd", cfg.network)
        parts = protocol.measuring(experiment, self._extract, real)
        own = {"metric": self._metric, "backend": "numpy"}
        self._shelf = _Shelf(workdir / "frontier" / "cells", parts | own)
        self._of_largest: float | None = None

    def run(self) -> list[records.Cell]:
        settings = _settings(self._experiment)
        total = len(self._runs) * len(settings)
        found: list[records.Cell] = []
        begin, shown, fresh = time.perf_counter(), 0.0, 0
        largest = max(self._runs, key=lambda spec: spec.params_without_embeddings)
        for spec in self._runs:
            drawing = self._drawing(spec)
            self._relative_to(largest)
            for _, group in itertools.groupby(
                settings, key=lambda how: (how.sampler, how.steps)
            ):
                cells, drawn = self._group(spec, list(group), drawing)
                found += cells
                fresh += drawn
                now = time.perf_counter()
                if now - shown > self._experiment.train.show_every_seconds:
                    shown = now
                    each = (now - begin) / max(fresh, 1)
                    left = progress.format_duration(each * (total - len(found)))
                    b = min(cells, key=lambda cell: cell.value)
                    progress.say(
                        f"frontier  {len(found):,} of {total:,} cells  {b.model}  "
                        f"{b.sampler} {b.steps}: best guidance {b.guidance:g}, "
                        f"{self._metric} {b.value:.4g}  left {left}"
                    )
        return found

    def _group(
        self,
        spec: records.RunSpec,
        settings: Sequence[config.GenerateConfig],
        drawing: inference.PictureSampler,
    ) -> tuple[list[records.Cell], int]:
        """The cells of one sampler and number of steps; how many were drawn now."""
        cells, fresh = [], 0
        best, of_best = 0, None  # features of one cell at a time
        for i, how in enumerate(settings):
            cell, features = self._shelf.read(spec, how), None
            if cell is None:
                cell, features = self._cell(spec, how, drawing)
                fresh += 1
            cells.append(cell)
            if i == 0 or cell.value < cells[best].value:
                best, of_best = i, features
        how, cell = settings[best], cells[best]
        if self._experiment.evaluate.bootstrap and not cell.replicates:
            if of_best is None:
                of_best, _ = self._features(how, drawing)
            cell = cells[best] = self._resampled(cell, of_best)
            self._shelf.write(spec, how, cell)
        return [_spread(each, cell) for each in cells], fresh

    def _drawing(self, spec: records.RunSpec) -> inference.PictureSampler:
        generate = self._experiment.generate
        most = min(generate.batch_size, self._experiment.frontier.images)
        model = runs_lib.trained_model(self._experiment, self._workdir, spec)
        return inference.PictureSampler(
            self._experiment, self._workdir, model, self._mesh, most
        )

    def _relative_to(self, largest: records.RunSpec) -> float:
        """FLOPs of one evaluation of the largest run's network."""
        if self._of_largest is None:
            self._of_largest = self._evaluation(self._drawing(largest))
        return self._of_largest

    def _evaluation(self, drawing: inference.PictureSampler) -> float:
        cost = drawing.cost(self._experiment.generate)
        return cost.flops / cost.nfe

    def _features(
        self, how: config.GenerateConfig, drawing: inference.PictureSampler
    ) -> tuple[np.ndarray, float]:
        """Features of the cell's pictures, and seconds a picture took to draw."""
        images, seconds = drawing.timed(np.arange(how.images), how)
        return self._extract(images).features, seconds

    def _cell(
        self,
        spec: records.RunSpec,
        how: config.GenerateConfig,
        drawing: inference.PictureSampler,
    ) -> tuple[records.Cell, np.ndarray]:
        features, seconds = self._features(how, drawing)
        cost = drawing.cost(how)
        evaluation = cost.flops / cost.nfe
        cell = records.Cell(
            model=spec.run_id,
            label=f"{spec.width} x {spec.depth}",
            params=spec.params_without_embeddings,
            relative_cost=evaluation / self._of_largest,
            sampler=how.sampler,
            steps=how.steps,
            guidance=how.guidance,
            nfe=cost.nfe,
            flops=cost.flops,
            decoder_flops=cost.decoder_flops,
            seconds=seconds,
            metric=self._metric,
            value=frechet.distance_from_features(features, self._reference),
            replicates=(),
            protocol=protocol.digest(
                self._shelf.protocol(how), without=protocol.SAMPLING
            ),
            images=how.images,
            memory_bytes=drawing.memory(how),
        )
        self._shelf.write(spec, how, cell)
        return cell, features

    def _resampled(self, cell: records.Cell, features: np.ndarray) -> records.Cell:
        """The cell with replicates, moved to lie around its value."""
        cfg = self._experiment.evaluate
        draws = frechet.bootstrap(
            features, self._reference, replicates=cfg.bootstrap, seed=cfg.seed
        )
        around = cell.value + draws - np.mean(draws)
        return dataclasses.replace(cell, replicates=tuple(float(x) for x in around))
