"""A trained model -> pictures of held-out captions, and what they cost.

    samples/shards/00000.npy   uint8 [generate.batch_size, height, width, 3], in order
    samples/images.npy, grid.png   the first of them; the grid without captions
    samples/images.tar   all of them as PNG with their captions (WebDataset)
    samples/record.json   the SampleRecord, written last

Stopped anywhere, the stage goes on at the first shard that is missing.
"""

from __future__ import annotations

import io
import os
import pathlib
import tarfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from scaling_ldm import config, exported, finished, mesh, meters, records, sampling

SHOWN = 256  # pictures in images.npy
ACROSS = 16  # at most, in the grid


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> records.SampleRecord | None:
    """Samples config.generate.weights, or the run of the lowest validation loss.

    Of a run, its EMA weights. Captions are those of held-out names. Nothing happens
    when the pictures are there already.

    Returns:
      The record, or None when no weights are given and no run is finished.
    """
    if experiment.model.architecture == "autoencoder_kl":
        meters.say("no samples: an autoencoder generates nothing by itself")
        return None
    model = sampling.model(experiment, workdir, specs)
    if model is None:
        meters.say("no finished run to sample from")
        return None
    folder = workdir / "samples"
    if (folder / "record.json").exists():
        known = records.loads((folder / "record.json").read_text())
        wanted = sampling.settings(experiment, model)
        if {name: getattr(known, name) for name in wanted} == wanted:
            meters.say(f"samples of {model.run_id} are there already")
            return known
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        return _sample(experiment, workdir, model, device_mesh)


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is trained, what could not be sampled afterwards.

    Raises:
      config.ConfigError: the sampler cannot use this grid with this schedule and
        prediction, or config.generate.weights are not the network's.
    """
    if experiment.generate.weights:
        exported.read(experiment, experiment.generate.weights)
    try:
        sampling.plan(experiment, experiment.generate)
    except ValueError as e:
        cfg = experiment.generate
        raise config.ConfigError(
            f"config.generate cannot sample with sampler {cfg.sampler!r}, spacing "
            f"{cfg.spacing!r} and steps = {cfg.steps}: {e}"
        ) from e


def _sample(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    model: finished.Model,
    device_mesh: jax.sharding.Mesh,
) -> records.SampleRecord:
    cfg, folder = experiment.generate, workdir / "samples"
    each = min(cfg.batch_size, cfg.images)
    drawing = sampling.Sampling(experiment, workdir, model, device_mesh, each)
    if mesh.is_primary():
        _claim(folder, sampling.settings(experiment, model) | {"each": each})
    mesh.barrier("samples")
    starts = range(0, cfg.images, each)
    shards = sampling.shards(workdir)
    paths = [shards / f"{n:05d}.npy" for n in range(len(starts))]
    missing = [n for n, path in enumerate(paths) if not path.exists()]
    mesh.barrier("samples-missing")  # nobody writes before everybody has looked
    begin, shown = time.perf_counter(), time.perf_counter()
    for done, number in enumerate(missing):
        rows = np.arange(starts[number], min(starts[number] + each, cfg.images))
        images = drawing.images(rows, cfg)
        if mesh.is_primary():
            _write(paths[number], lambda f, x=images: np.save(f, x, allow_pickle=False))
        now = time.perf_counter()
        if now - shown > experiment.train.show_every_seconds or done == 0:
            left = (now - begin) / (done + 1) * (len(missing) - done - 1)
            meters.say(
                f"generate  {rows[-1] + 1:,} of {cfg.images:,} pictures  "
                f"left {meters.duration(left)}"
            )
            shown = now
    seconds = time.perf_counter() - begin
    mesh.barrier("samples-drawn")
    captions = drawing.captions(np.arange(cfg.images))
    cost = drawing.cost(cfg)
    record = records.SampleRecord(
        **sampling.settings(experiment, model),
        nfe=cost.nfe,
        flops=(cost.flops + cost.decoder_flops) * cfg.images,
        seconds=seconds,
        weights="ema" if model.ema else "unknown",
        captions=tuple(captions[:SHOWN]),
        images_file="samples/images.npy",
    )
    if mesh.is_primary():
        _finish(folder, paths, captions)
        records.write_text(folder / "record.json", records.dumps(record))
    mesh.barrier("samples-written")
    return record


def _claim(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Removes what pictures of other settings left behind."""
    path = folder / "settings.json"
    text = records.dumps(settings) + "\n"
    if path.exists() and path.read_text() == text:
        return
    for old in (*folder.glob("shards/*.npy"), *folder.glob("*.json")):
        old.unlink()
    records.write_text(path, text)


def _finish(
    folder: pathlib.Path, paths: Sequence[pathlib.Path], captions: Sequence[str]
) -> None:
    first: list[np.ndarray] = []

    def archive(file: Any) -> None:
        index = 0
        with tarfile.open(fileobj=file, mode="w") as tar:
            for path in paths:
                images = np.load(path, allow_pickle=False)
                if index < SHOWN:
                    first.append(images[: SHOWN - index])
                for image in images:
                    for suffix, data in (
                        ("png", _png(image)),
                        ("txt", captions[index].encode()),
                    ):
                        member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    index += 1

    _write(folder / "images.tar", archive)
    images = np.concatenate(first)
    _write(
        folder / "images.npy", lambda file: np.save(file, images, allow_pickle=False)
    )
    _write(folder / "grid.png", lambda file: file.write(_png(grid(images))))


def grid(images: np.ndarray) -> np.ndarray:
    """uint8 [n, height, width, 3] -> one picture, row by row, white where none is."""
    n, height, width, channels = images.shape
    across = min(ACROSS, int(np.ceil(n**0.5)))
    down = -(-n // across)
    whole = np.full((down * across, height, width, channels), 255, np.uint8)
    whole[:n] = images
    whole = whole.reshape(down, across, height, width, channels)
    return whole.swapaxes(1, 2).reshape(down * height, across * width, channels)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _write(path: pathlib.Path, fill: Any) -> None:
    """A whole file or none: temporary file, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            fill(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
