"""The evaluate stage: trained models -> evaluations.jsonl, and rows of the table.

Numbers that are there already are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import config, records
from scaling_ldm.evaluation import (
    extractors,
    floor,
    likelihoods,
    measures,
    numbers,
    protocol,
    reference,
)
from scaling_ldm.evaluation.extractors import Extractor
from scaling_ldm.evaluation.feature_store import StoredFeatures
from scaling_ldm.metrics import Estimate, tfgan
from scaling_ldm.records import joined
from scaling_ldm.training import inference, mesh, progress, time_left
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import runs, samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelToMeasure:
    """Weights to measure.

    model: the weights.
    drawn: whether the generate stage has drawn their pictures.
    """

    model: TrainedModel
    drawn: bool


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> list[records.Evaluation]:
    """Measures the pictures of the generate stage, and of other checkpoints if asked.

    Held-out data of every finished run is measured first, if that is asked for.

    Returns:
      The evaluations of pictures, without the floors of distances.

    Raises:
      ConfigError: as `check`.
    """
    if experiment.evaluate.held_out:
        likelihoods.measure(
            experiment,
            workdir,
            [
                (spec, runs.run_files(workdir, spec.run_id).measurements, model)
                for spec in runs.finished(workdir, specs)
                for point in spec.points()
                for model in [
                    runs.trained_model(
                        experiment, workdir, spec, point.steps, experiment.fit.weights
                    )
                ]
            ],
        )
    if experiment.evaluate.network == "none":
        return []
    _check_settings(experiment)
    models = list(_models(experiment, workdir, specs))
    if not models:
        progress.say("no finished run to evaluate")
        return []
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        return _Evaluator(experiment, workdir, specs, device_mesh).run(models)


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is trained, what could not be measured afterwards.

    Raises:
      ConfigError: the network's weights, the reference or the backend's packages are
        missing or wrong; there are too few pictures for a metric; or a metric needs
        features of real pictures, and the reference holds only statistics.
    """
    cfg = experiment.evaluate
    if cfg.network == "none":
        return
    _check_settings(experiment)
    identity = extractors.identity(cfg, extractors.load(cfg))
    if cfg.reference:
        reference.from_file(cfg.reference, identity)


def check_checkpoints(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> None:
    """Refuses to measure checkpoints of given weights, which have none.

    Raises:
      ConfigError: no run is finished either, so there are no checkpoints to measure.
    """
    cfg, weights = experiment.evaluate, experiment.generate.weights
    if cfg.through_training and weights and runs.best(workdir, specs) is None:
        raise config.ConfigError(
            "config.evaluate.through_training = True with config.generate.weights = "
            f"{weights!r}: a folder of weights has no checkpoints, and no run of "
            f"{workdir} is finished; leave one of them out"
        )


def _check_settings(experiment: config.Experiment) -> None:
    """The part of `check` that reads no weights."""
    cfg = experiment.evaluate
    if cfg.reference and not pathlib.Path(cfg.reference).expanduser().is_file():
        raise config.ConfigError(
            f"config.evaluate.reference = {cfg.reference!r}: no such file"
        )
    for metric in cfg.metrics:
        least = measures.METRICS[metric].minimum_images
        if experiment.generate.images < least:
            raise config.ConfigError(
                f"config.generate.images = {experiment.generate.images}: {metric} "
                f"needs at least {least}"
            )
        if cfg.reference and measures.METRICS[metric].needs_real_features:
            raise config.ConfigError(
                f"config.evaluate.reference = {cfg.reference!r} holds statistics "
                f"alone: {metric} needs real pictures' features; leave it empty"
            )
    if "fd_infinity" in cfg.metrics and cfg.bootstrap < 2:
        raise config.ConfigError(
            f"config.evaluate.bootstrap = {cfg.bootstrap}: fd_infinity needs at least 2"
        )
    if "tfgan" in {measures.backend(cfg, metric) for metric in cfg.metrics}:
        try:
            tfgan.find()
        except ImportError as e:
            raise config.ConfigError(f"config.evaluate.backend = 'tfgan': {e}") from e


def _models(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> Iterator[ModelToMeasure]:
    """The model of the generate stage, then other checkpoints if they are asked for."""
    first = samples.model_to_sample(experiment, workdir, specs)
    if first is None:
        return
    yield ModelToMeasure(model=first, drawn=True)
    if experiment.evaluate.through_training:
        for spec in runs.finished(workdir, specs):
            for step in runs.checkpoint_steps(workdir, spec):
                model = runs.trained_model(experiment, workdir, spec, step)
                if _identity(model) != _identity(first):
                    yield ModelToMeasure(model=model, drawn=False)


def _identity(model: TrainedModel) -> tuple[str, str, int]:
    return model.run_id, model.checksum, model.step


class _Evaluator:
    """Measures models; numbers that are in evaluations.jsonl already are kept."""

    def __init__(
        self,
        experiment: config.Experiment,
        workdir: pathlib.Path,
        specs: Sequence[records.RunSpec],
        device_mesh: jax.sharding.Mesh,
    ) -> None:
        self._experiment, self._workdir, self._specs = experiment, workdir, specs
        self._mesh, self._folder = device_mesh, workdir / "evaluate"
        self._extract = Extractor(experiment.evaluate, device_mesh)
        self._real = reference.statistics(
            experiment, workdir, self._extract, reference.picture_size(experiment)
        )
        self._parts = protocol.measurement_parts(
            experiment, self._extract.identity, self._real.digest, self._real.images
        )
        self._parts |= protocol.sampling_parts(experiment.generate)
        self._known = {
            (r.run_id, r.checksum, r.step, r.metric, r.protocol_hash): r
            for r in records.read_evaluations(workdir)
        }

    def run(self, models: Sequence[ModelToMeasure]) -> list[records.Evaluation]:
        """The records of all models, old and new."""
        found: list[records.Evaluation] = []
        spent: list[float] = []  # seconds for each model whose pictures are drawn here
        for number, entry in enumerate(models, 1):
            model, wanted = entry.model, self._wanted(entry.model)
            keys = [self._key(model, name, parts) for name, parts in wanted.items()]
            for key in keys:
                if key in self._known:
                    progress.say(f"  {numbers.line(self._known[key])}")
            if not all(key in self._known for key in keys):
                basis = spent[1:]  # the first one compiled what all use
                seconds = None
                if basis:
                    seconds = (len(models) - number + 1) * sum(basis) / len(basis)
                progress.say(
                    f"evaluate  {number} of {len(models)}: {model.run_id} at step "
                    f"{model.step:,}{time_left.left(seconds)}"
                )
                begin = time.perf_counter()
                self._measure(entry, wanted)
                if not entry.drawn:
                    spent.append(time.perf_counter() - begin)
            self._measure_floors(model)
            found += [self._known[key] for key in keys]
        return found

    def _measure_floors(self, model: TrainedModel) -> None:
        """Measures the reference values of a model's Frechet distance: see `floor`."""
        cfg, new = self._experiment.evaluate, []
        for name in floor.names(cfg, self._real):
            parts = self._protocol_of(model, name, "numpy")
            key = self._key(model, name, parts)
            if key not in self._known:
                value, images = self._floors[name]
                self._known[key] = numbers.record(model, name, value, parts, images)
                new.append(self._known[key])
                progress.say(f"  {numbers.line(new[-1])}")
        if new:
            self._write(new)

    @functools.cached_property
    def _floors(self) -> dict[str, tuple[Estimate, int]]:
        return floor.measure(self._experiment, self._folder, self._extract, self._real)

    def _write(self, new: Sequence[records.Evaluation]) -> None:
        if mesh.is_primary():
            joined.write_evaluations(
                self._workdir,
                self._known.values(),
                new,
                self._specs,
                self._experiment.name,
            )

    def _wanted(self, model: TrainedModel) -> dict[str, dict[str, Any]]:
        """The name of each number to find -> the parts of its protocol."""
        cfg = self._experiment.evaluate
        return {
            name: self._protocol_of(model, name, measures.backend(cfg, metric))
            for metric in cfg.metrics
            for name in measures.names(metric, cfg.network)
        }

    def _protocol_of(
        self, model: TrainedModel, name: str, backend: str
    ) -> dict[str, Any]:
        own = {"metric": name, "backend": backend}
        return self._parts | own | {"ema": protocol.weights_part(model.weights)}

    def _key(self, model: TrainedModel, name: str, parts: dict[str, Any]) -> Any:
        return *_identity(model), name, protocol.digest(parts)

    def _measure(
        self, entry: ModelToMeasure, wanted: dict[str, dict[str, Any]]
    ) -> None:
        """Measures what is missing; each metric is written as soon as it is known."""
        cfg, sampling = self._experiment.evaluate, self._experiment.generate
        model = entry.model
        sampler = inference.PictureSampler(
            self._experiment, self._workdir, model, self._mesh, sampling.batch_size
        )
        cost = sampler.cost(sampling)
        features = self._features(entry, sampler).load()
        caption_vectors = None
        if "clip_score" in cfg.metrics:
            captions = sampler.captions(np.arange(sampling.images))
            caption_vectors = self._extract.captions(captions)
        seen = measures.Generated(
            features=np.asarray(features.features),
            logits=None if features.logits is None else np.asarray(features.logits),
            captions=caption_vectors,
        )
        for metric in cfg.metrics:
            keys = {
                name: self._key(model, name, wanted[name])
                for name in measures.names(metric, cfg.network)
            }
            if all(key in self._known for key in keys.values()):
                continue
            resamples = progress.Progress(
                f"evaluate  {metric}",
                cfg.bootstrap,
                "resamples",
                self._experiment.train.show_every_seconds,
                at_once=False,
            )
            found = measures.measure(cfg, metric, seen, self._real, resamples.show)
            for name, value in found.items():
                images, flops = len(seen.features), cost.flops + cost.decoder_flops
                self._known[keys[name]] = numbers.record(
                    model, name, value, wanted[name], images, cost.nfe, flops
                )
                progress.say(f"  {numbers.line(self._known[keys[name]])}")
            self._write([self._known[key] for key in keys.values()])

    def _features(
        self, entry: ModelToMeasure, sampler: inference.PictureSampler
    ) -> StoredFeatures:
        """The features of a model's pictures; those that are missing are extracted."""
        sampling, model = self._experiment.generate, entry.model
        kept = StoredFeatures(
            self._folder,
            {
                **dict(
                    zip(("run_id", "checksum", "step"), _identity(model), strict=True)
                ),
                "ema": protocol.weights_part(model.weights),
                "sampled": protocol.sampling_parts(sampling),
                "network": self._extract.identity,
            },
        )
        if entry.drawn and not kept.complete:
            _check_pictures(self._experiment, self._workdir, model)
        kept.extract_missing(
            self._extract,
            functools.partial(_saved, self._workdir)
            if entry.drawn
            else functools.partial(_drawn, sampler, sampling),
            progress.Progress(
                "evaluate",
                sampling.images,
                "pictures",
                self._experiment.train.show_every_seconds,
            ),
        )
        if kept.images != sampling.images:
            raise records.Damaged(
                f"{self._folder / 'features'} holds {kept.images:,} of "
                f"{sampling.images:,} pictures of {model.run_id}"
            )
        return kept


def _saved(workdir: pathlib.Path, start: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pictures of the generate stage from position `start`, and the position after."""
    after = 0
    for images in samples.read_images(workdir, check=False):
        before, after = after, after + len(images)
        if after > start:
            yield images[max(start - before, 0) :], after


def _drawn(
    sampler: inference.PictureSampler, sampling: config.GenerateConfig, start: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The same as `_saved`, but drawn now."""
    for first in range(start, sampling.images, sampling.batch_size):
        after = min(first + sampling.batch_size, sampling.images)
        yield sampler.images(np.arange(first, after), sampling), after


def _check_pictures(
    experiment: config.Experiment, workdir: pathlib.Path, model: TrainedModel
) -> None:
    """Raises ConfigError unless the generate stage drew the pictures to measure."""
    held = samples.read_record(workdir)
    images = sum(len(part) for part in samples.read_images(workdir))
    differing = [
        f"{name} = {getattr(held, name)!r} there, {value!r} wanted"
        for name, value in samples.record_fields(experiment, model).items()
        if held is not None and getattr(held, name) != value
    ]
    if not samples.are_of(workdir, samples.origin(experiment, model)):
        differing.append("they are of another study or other weights")
    if held is not None and not differing and images != held.images:
        differing = [f"{images:,} of {held.images:,} pictures in samples/shards"]
    if held is None or differing:
        raise config.ConfigError(
            f"{workdir / 'samples'} does not hold the pictures to evaluate "
            f"({'; '.join(differing) or 'none are finished'}): add generate to --stages"
        )
