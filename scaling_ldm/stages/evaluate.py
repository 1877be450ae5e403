"""Trained models -> EvalRecords in evaluations.jsonl; what is there already is kept."""

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
from scaling_ldm.evaluation import extractors, measures, protocol, reference
from scaling_ldm.evaluation.extractors import Extractor
from scaling_ldm.evaluation.feature_store import Kept
from scaling_ldm.metrics import tfgan
from scaling_ldm.training import inference, mesh, progress
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import runs, samples

FILE = "evaluations.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """Weights to measure."""

    model: TrainedModel
    drawn: bool  # whether the generate stage has drawn their pictures


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> list[records.EvalRecord]:
    """Measures the pictures of the generate stage, and of other checkpoints if asked.

    Raises:
      ConfigError: as `check`.
    """
    if experiment.evaluate.network == "none":
        return []
    _check_settings(experiment)
    subjects = list(_subjects(experiment, workdir, specs))
    if not subjects:
        progress.say("no finished run to evaluate")
        return []
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        return _Stage(experiment, workdir, device_mesh).run(subjects)


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is trained, what could not be measured afterwards.

    Raises:
      ConfigError: the network's weights, the reference or the backend's packages are
        not there or not what they should be, there are too few pictures for a metric,
        or one needs more of the real pictures than the reference holds.
    """
    cfg = experiment.evaluate
    if cfg.network == "none":
        return
    _check_settings(experiment)
    identity = extractors.identity(cfg, extractors.judge(cfg))
    if cfg.reference:
        reference.given(cfg.reference, identity)


def _check_settings(experiment: config.Experiment) -> None:
    """What `check` refuses without reading weights."""
    cfg = experiment.evaluate
    if cfg.reference and not pathlib.Path(cfg.reference).expanduser().is_file():
        raise config.ConfigError(
            f"config.evaluate.reference = {cfg.reference!r}: no such file"
        )
    for metric in cfg.metrics:
        least = measures.LEAST[metric]
        if experiment.generate.images < least:
            raise config.ConfigError(
                f"config.generate.images = {experiment.generate.images}: {metric} "
                f"needs at least {least}"
            )
        if cfg.reference and metric in measures.OF_REAL_FEATURES:
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


def _subjects(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> Iterator[Subject]:
    first = samples.model_to_sample(experiment, workdir, specs)
    if first is None:
        return
    yield Subject(model=first, drawn=True)
    if experiment.evaluate.through_training:
        for spec in specs:
            if runs.best(workdir, [spec]) is not None:
                for step in runs.checkpoint_steps(workdir, spec):
                    model = runs.trained_model(experiment, workdir, spec, step)
                    if _identity(model) != _identity(first):
                        yield Subject(model=model, drawn=False)


def _identity(model: TrainedModel) -> tuple[str, str, int]:
    return model.run_id, model.checksum, model.step


class _Stage:
    """One call of the stage; numbers that are in its file already are kept."""

    def __init__(
        self,
        experiment: config.Experiment,
        workdir: pathlib.Path,
        device_mesh: jax.sharding.Mesh,
    ) -> None:
        self._experiment, self._workdir = experiment, workdir
        self._mesh, self._folder = device_mesh, workdir / "evaluate"
        self._extract = Extractor(experiment.evaluate, device_mesh)
        self._real = reference.statistics(
            experiment, self._folder, self._extract, reference.side(experiment)
        )
        self._parts = protocol.measuring(experiment, self._extract, self._real)
        self._parts |= protocol.sampled(experiment.generate)
        path = workdir / FILE
        self._known = {
            (r.run_id, r.checksum, r.step, r.metric, r.protocol_hash): r
            for r in (records.read_jsonl(path) if path.exists() else [])
        }

    def run(self, subjects: Sequence[Subject]) -> list[records.EvalRecord]:
        found: list[records.EvalRecord] = []
        spent: list[float] = []  # seconds, of the subjects that were drawn here
        for number, subject in enumerate(subjects, 1):
            model, wanted = subject.model, self._wanted(subject.model)
            keys = [self._key(model, name, of) for name, of in wanted.items()]
            for key in keys:
                if key in self._known:
                    progress.say(f"  {line(self._known[key])}")
            if not all(key in self._known for key in keys):
                left = len(subjects) - number + 1
                time_left = (
                    f"  left {progress.format_duration(left * sum(spent) / len(spent))}"
                    if spent
                    else ""
                )
                progress.say(
                    f"evaluate  {number} of {len(subjects)}: {model.run_id} at step "
                    f"{model.step:,}{time_left}"
                )
                begin = time.perf_counter()
                self._measure(subject, wanted)
                if not subject.drawn:
                    spent.append(time.perf_counter() - begin)
            found += [self._known[key] for key in keys]
        return found

    def _wanted(self, model: TrainedModel) -> dict[str, dict[str, Any]]:
        """The numbers to find, each with its protocol."""
        cfg = self._experiment.evaluate
        return {
            name: self._parts
            | {
                "metric": name,
                "backend": measures.backend(cfg, metric),
                "ema": model.ema,
            }
            for metric in cfg.metrics
            for name in measures.names(metric, cfg.network)
        }

    def _key(self, model: TrainedModel, name: str, of: dict[str, Any]) -> Any:
        return *_identity(model), name, protocol.digest(of)

    def _measure(self, subject: Subject, wanted: dict[str, dict[str, Any]]) -> None:
        """Finds what is missing; every metric is written when it is there."""
        cfg, how = self._experiment.evaluate, self._experiment.generate
        model = subject.model
        drawing = inference.PictureSampler(
            self._experiment, self._workdir, model, self._mesh, how.batch_size
        )
        cost = drawing.cost(how)
        features = self._features(subject, drawing).all()
        words = None
        if "clip_score" in cfg.metrics:
            words = self._extract.captions(drawing.captions(np.arange(how.images)))
        seen = measures.Generated(
            features=features.features, logits=features.logits, words=words
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
                self._known[keys[name]] = records.EvalRecord(
                    run_id=model.run_id,
                    checksum=model.checksum,
                    step=model.step,
                    train_flops=model.train_flops,
                    metric=name,
                    value=value.value,
                    low=value.low,
                    high=value.high,
                    level=value.level,
                    doubt=value.doubt,
                    images=len(seen.features),
                    nfe=cost.nfe,
                    flops=cost.flops + cost.decoder_flops,
                    protocol=wanted[name],
                    protocol_hash=protocol.digest(wanted[name]),
                )
                progress.say(f"  {line(self._known[keys[name]])}")
            if mesh.is_primary():
                records.write_jsonl(self._workdir / FILE, self._known.values())

    def _features(self, subject: Subject, drawing: inference.PictureSampler) -> Kept:
        """Of the pictures that the subject's protocol asks for."""
        how, model = self._experiment.generate, subject.model
        kept = Kept(
            self._folder,
            {
                **dict(
                    zip(("run_id", "checksum", "step"), _identity(model), strict=True)
                ),
                "ema": model.ema,
                "sampled": protocol.sampled(how),
                "network": self._extract.identity,
            },
        )
        if subject.drawn and not kept.complete:
            _check_pictures(self._experiment, self._workdir, model)
        kept.fill(
            self._extract,
            functools.partial(_saved, self._workdir)
            if subject.drawn
            else functools.partial(_drawn, drawing, how),
            progress.Progress(
                "evaluate",
                how.images,
                "pictures",
                self._experiment.train.show_every_seconds,
            ),
        )
        if kept.images != how.images:
            raise records.Damaged(
                f"{self._folder / 'features'} holds {kept.images:,} of {how.images:,} "
                f"pictures of {model.run_id}"
            )
        return kept


def line(record: records.EvalRecord) -> str:
    """A record for a reader's eyes."""
    r = record
    interval = "(no interval)"
    if r.low < r.high:
        interval = f"({r.low:.4g} to {r.high:.4g} at {100 * r.level:g}%)"
    doubt = f"\n    in doubt: {r.doubt}" if r.doubt else ""
    return (
        f"{r.run_id}  step {r.step:,}  {r.metric} {r.value:.4g} {interval}  "
        f"{r.images:,} pictures  protocol {r.protocol_hash}{doubt}"
    )


def _saved(workdir: pathlib.Path, start: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pictures of the generate stage from one on, and the position behind them."""
    after = 0
    for images in samples.read_images(workdir):
        before, after = after, after + len(images)
        if after > start:
            yield images[max(start - before, 0) :], after


def _drawn(
    drawing: inference.PictureSampler, how: config.GenerateConfig, start: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The same, drawn now."""
    for first in range(start, how.images, how.batch_size):
        after = min(first + how.batch_size, how.images)
        yield drawing.images(np.arange(first, after), how), after


def _check_pictures(
    experiment: config.Experiment, workdir: pathlib.Path, model: TrainedModel
) -> None:
    """Raises ConfigError unless the generate stage drew this model's pictures so."""
    path = workdir / "samples" / "record.json"
    held = records.loads(path.read_text()) if path.exists() else None
    images = sum(len(part) for part in samples.read_images(workdir))
    differing = [
        f"{name} = {getattr(held, name)!r} there, {value!r} wanted"
        for name, value in samples.record_fields(experiment, model).items()
        if held is not None and getattr(held, name) != value
    ]
    if held is not None and not differing and images != held.images:
        differing = [f"{images:,} of {held.images:,} pictures in samples/shards"]
    if held is None or differing:
        raise config.ConfigError(
            f"{path.parent} does not hold the pictures to evaluate "
            f"({'; '.join(differing) or 'none are finished'}): add generate to --stages"
        )
