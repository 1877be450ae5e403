"""Trained models -> EvalRecords in evaluations.jsonl; what is there already is kept."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import (
    config,
    finished,
    frozen,
    mesh,
    meters,
    records,
    sampling,
)
from scaling_ldm.encoders.features import Features
from scaling_ldm.evaluate import metrics, networks, protocol, reference
from scaling_ldm.evaluate.networks import Extractor
from scaling_ldm.metrics import tfgan

FILE = "evaluations.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """Weights to measure."""

    model: finished.Model
    drawn: bool  # whether the generate stage has drawn their pictures


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> list[records.EvalRecord]:
    """Measures the pictures of the generate stage, and of other checkpoints if asked.

    Raises:
      ConfigError: as `check`, no reference, or a metric that it cannot give.
    """
    cfg = experiment.evaluate
    if cfg.network == "none":
        return []
    check(experiment)
    subjects = list(_subjects(experiment, workdir, specs))
    if not subjects:
        meters.say("no finished run to evaluate")
        return []
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        extract = Extractor(cfg, device_mesh)
        return _measure(experiment, workdir, subjects, extract, device_mesh)


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is trained, what could not be measured afterwards.

    Raises:
      ConfigError: the network's weights, the reference or the backend's packages are
        not there, or there are too few pictures for a metric.
    """
    cfg = experiment.evaluate
    if cfg.network == "none":
        return
    networks.file(cfg)
    if cfg.reference and not pathlib.Path(cfg.reference).expanduser().is_file():
        raise config.ConfigError(
            f"config.evaluate.reference = {cfg.reference!r}: no such file"
        )
    for metric in cfg.metrics:
        least = metrics.LEAST[metric]
        if experiment.generate.images < least:
            raise config.ConfigError(
                f"config.generate.images = {experiment.generate.images}: {metric} "
                f"needs at least {least}"
            )
    if "fd_infinity" in cfg.metrics and cfg.bootstrap < 2:
        raise config.ConfigError(
            f"config.evaluate.bootstrap = {cfg.bootstrap}: fd_infinity needs at least 2"
        )
    if "tfgan" in {metrics.backend(cfg, metric) for metric in cfg.metrics}:
        try:
            tfgan.find()
        except ImportError as e:
            raise config.ConfigError(f"config.evaluate.backend = 'tfgan': {e}") from e


def _subjects(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> Iterator[Subject]:
    first = sampling.model(experiment, workdir, specs)
    if first is None:
        return
    yield Subject(model=first, drawn=True)
    if experiment.evaluate.through_training:
        for spec in specs:
            if finished.best(workdir, [spec]) is not None:
                for step in finished.steps(workdir, spec):
                    model = finished.model(experiment, workdir, spec, step)
                    if _identity(model) != _identity(first):
                        yield Subject(model=model, drawn=False)


def _identity(model: finished.Model) -> tuple[str, str, int]:
    return model.run_id, model.checksum, model.step


def measuring(
    experiment: config.Experiment, extract: Extractor, real: reference.Real
) -> dict[str, Any]:
    """The parts of a protocol that do not depend on a metric or a sampler."""
    cfg = experiment.evaluate
    return {
        **extract.identity,
        "resampling": (
            f"seed {cfg.seed}, {cfg.bootstrap} resamples, {100 * cfg.confidence:g}%"
        ),
        "reference": real.digest,
        "reference_images": real.images,
        "captions": f"held out, {experiment.data.source} {experiment.data.seed}",
        "ema": True,
    }


def sampled(how: config.Generate) -> dict[str, Any]:
    """The parts of a protocol that a sampler decides."""
    named = {name: getattr(how, name) for name in protocol.SAMPLING}
    return {**named, "seed": how.seed, "images": how.images}


def side(experiment: config.Experiment) -> tuple[int, int]:
    """Height and width of the pictures that an experiment's samples become."""
    H, W, _ = experiment.data.shape
    name = experiment.encode.autoencoder
    factor = 1 if name == "none" else frozen.autoencoder_identity(name)["factor"]
    return H * factor, W * factor


def _measure(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    subjects: Sequence[Subject],
    extract: Extractor,
    device_mesh: jax.sharding.Mesh,
) -> list[records.EvalRecord]:
    cfg = experiment.evaluate
    folder, path = workdir / "evaluate", workdir / FILE
    real = reference.statistics(experiment, folder, extract, side(experiment))
    parts = measuring(experiment, extract, real) | sampled(experiment.generate)
    known = {
        (r.run_id, r.checksum, r.step, r.metric, r.protocol_hash): r
        for r in (records.read_jsonl(path) if path.exists() else [])
    }
    found: list[records.EvalRecord] = []
    for number, subject in enumerate(subjects, 1):
        model = subject.model
        wanted = {
            name: parts
            | {
                "metric": name,
                "backend": metrics.backend(cfg, metric),
                "ema": model.ema,
            }
            for metric in cfg.metrics
            for name in metrics.names(metric, cfg.network)
        }
        keys = {
            name: (*_identity(model), name, protocol.digest(of))
            for name, of in wanted.items()
        }
        if not all(key in known for key in keys.values()):
            meters.say(
                f"evaluate  {number} of {len(subjects)}: {model.run_id} at step "
                f"{model.step:,}"
            )
            drawing = sampling.Sampling(
                experiment, workdir, model, device_mesh, experiment.generate.batch_size
            )
            cost = drawing.cost(experiment.generate)
            if subject.drawn:
                _check_pictures(experiment, workdir, model)
                pictures = sampling.saved(workdir)
            else:
                pictures = _drawn(experiment, drawing)
            features = _concatenated([extract(images) for images in pictures])
            words = None
            if "clip_score" in cfg.metrics:
                asked = drawing.captions(np.arange(experiment.generate.images))
                words = extract.captions(asked)
            seen = metrics.Generated(
                features=features.features, logits=features.logits, words=words
            )
            for metric in cfg.metrics:
                if all(keys[n] in known for n in metrics.names(metric, cfg.network)):
                    continue
                for name, value in metrics.measure(cfg, metric, seen, real).items():
                    known[keys[name]] = records.EvalRecord(
                        run_id=model.run_id,
                        checksum=model.checksum,
                        step=model.step,
                        train_flops=model.train_flops,
                        metric=name,
                        value=value.value,
                        low=value.low,
                        high=value.high,
                        level=value.level,
                        images=len(features.features),
                        nfe=cost.nfe,
                        flops=cost.flops + cost.decoder_flops,
                        protocol=wanted[name],
                        protocol_hash=keys[name][-1],
                    )
                if mesh.is_primary():
                    records.write_jsonl(path, known.values())
        for key in keys.values():
            found.append(known[key])
            meters.say(f"  {line(known[key])}")
    return found


def line(record: records.EvalRecord) -> str:
    """A record for a reader's eyes."""
    r = record
    interval = "(no interval)"
    if r.low < r.high:
        interval = f"({r.low:.4g} to {r.high:.4g} at {100 * r.level:g}%)"
    return (
        f"{r.run_id}  step {r.step:,}  {r.metric} {r.value:.4g} {interval}  "
        f"{r.images:,} pictures  protocol {r.protocol_hash}"
    )


def _drawn(
    experiment: config.Experiment, drawing: sampling.Sampling
) -> Iterator[np.ndarray]:
    how = experiment.generate
    for start in range(0, how.images, how.batch_size):
        rows = np.arange(start, min(start + how.batch_size, how.images))
        yield drawing.images(rows, how)


def _concatenated(parts: Sequence[Features]) -> Features:
    """Features of several batches, in order."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _check_pictures(
    experiment: config.Experiment, workdir: pathlib.Path, model: finished.Model
) -> None:
    """Raises ConfigError unless the generate stage drew this model's pictures so."""
    path = workdir / "samples" / "record.json"
    held = records.loads(path.read_text()) if path.exists() else None
    differing = [
        f"{name} = {getattr(held, name)!r} there, {value!r} wanted"
        for name, value in sampling.settings(experiment, model).items()
        if held is not None and getattr(held, name) != value
    ]
    if held is None or differing:
        raise config.ConfigError(
            f"{path.parent} does not hold the pictures to evaluate "
            f"({'; '.join(differing) or 'none are finished'}): add generate to --stages"
        )
