"""A trained model -> pictures of held-out captions, and what they cost.

    samples/shards/00000.npy   uint8 [generate.batch_size, height, width, 3], in order
    samples/images.npy   the first of them
    samples/grid.png     the same in one picture, without captions
    samples/images.tar   all of them as PNG with their captions (WebDataset)
    samples/record.json   the SampleRecord, written last

Grid and tar hold lossless WebP instead of PNG where generate.format says so. Stopped
anywhere, the stage goes on at the first shard that is missing.
"""

from __future__ import annotations

import io
import pathlib
import tarfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from scaling_ldm import config, records
from scaling_ldm.training import inference, mesh
from scaling_ldm.training import progress as progress_lib
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import exports, samples

SHOWN = 256  # pictures in images.npy
ACROSS = 16  # at most, in the grid
LARGEST_WEBP = 16383  # pixels, of a side


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> records.SampleRecord | None:
    """Samples config.generate.weights, or the run of the lowest validation loss.

    Of a run, its EMA weights. Captions are those of held-out names. Nothing happens
    when all the pictures are there already.

    Returns:
      The record, or None when no weights are given and no run is finished.
    """
    if experiment.model.architecture == "autoencoder_kl":
        progress_lib.say("no samples: an autoencoder generates nothing by itself")
        return None
    model = samples.model_to_sample(experiment, workdir, specs)
    if model is None:
        progress_lib.say("no finished run to sample from")
        return None
    known = _known(experiment, workdir, model)
    if known is not None and _grid_path(workdir, experiment.generate.format).exists():
        if sum(map(len, samples.read_images(workdir))) == known.images:
            progress_lib.say(f"samples of {model.run_id} are there already")
            return known
        progress_lib.say(
            f"samples of {model.run_id} are not all there: what is missing is drawn"
        )
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        return _sample(experiment, workdir, model, device_mesh, known)


def _known(
    experiment: config.Experiment, workdir: pathlib.Path, model: TrainedModel
) -> records.SampleRecord | None:
    """The record of these very pictures, if they are there."""
    path = workdir / "samples" / "record.json"
    if not path.exists():
        return None
    known = records.loads(path.read_text())
    wanted = samples.record_fields(experiment, model)
    same = {name: getattr(known, name) for name in wanted} == wanted
    return known if same else None


def _grid_path(workdir: pathlib.Path, form: str) -> pathlib.Path:
    return workdir / "samples" / f"grid.{form}"


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is trained, what could not be sampled afterwards.

    Raises:
      config.ConfigError: the sampler cannot use this grid with this schedule and
        prediction, or config.generate.weights are not the network's.
    """
    if experiment.generate.weights:
        exports.read_model(experiment, experiment.generate.weights)
    try:
        inference.sampling_plan(experiment, experiment.generate)
    except ValueError as e:
        cfg = experiment.generate
        raise config.ConfigError(
            f"config.generate cannot sample with sampler {cfg.sampler!r}, spacing "
            f"{cfg.spacing!r} and steps = {cfg.steps}: {e}"
        ) from e


def _sample(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    model: TrainedModel,
    device_mesh: jax.sharding.Mesh,
    known: records.SampleRecord | None,
) -> records.SampleRecord:
    """Draws what is missing, then writes every form.

    Args:
      known: the record of these pictures in the other format: nothing is drawn then.
    """
    cfg, folder = experiment.generate, workdir / "samples"
    each = min(cfg.batch_size, cfg.images)
    drawing = inference.PictureSampler(experiment, workdir, model, device_mesh, each)
    if mesh.is_primary():
        _claim(folder, samples.record_fields(experiment, model) | {"each": each})
    mesh.barrier("samples")
    shards = samples.shard_folder(workdir)
    paths = [shards / f"{n:05d}.npy" for n in range(-(-cfg.images // each))]
    rows = [np.arange(cfg.images)[n * each :][:each] for n in range(len(paths))]
    missing = [n for n, path in enumerate(paths) if not path.exists()]
    mesh.barrier("samples-missing")  # nobody writes before everybody has looked
    begin = time.perf_counter()
    progress = progress_lib.Progress(
        "generate", cfg.images, "pictures", experiment.train.show_every_seconds
    )
    done = cfg.images - sum(len(rows[n]) for n in missing)
    progress.begin(done)
    for n in missing:
        images = drawing.images(rows[n], cfg)
        if mesh.is_primary():
            records.write_file(
                paths[n], lambda f, x=images: np.save(f, x, allow_pickle=False)
            )
        done += len(images)
        progress.show(done)
    seconds = time.perf_counter() - begin
    mesh.barrier("samples-drawn")
    captions = drawing.captions(np.arange(cfg.images))
    cost = drawing.cost(cfg)
    record = records.SampleRecord(
        **samples.record_fields(experiment, model),
        nfe=cost.nfe,
        flops=(cost.flops + cost.decoder_flops) * cfg.images,
        seconds=known.seconds if known and len(missing) < len(paths) else seconds,
        weights="ema" if model.ema else "unknown",
        captions=tuple(captions[:SHOWN]),
        images_file="samples/images.npy",
    )
    if mesh.is_primary():
        _finish(folder, paths, captions, cfg.format)
        records.write_text(folder / "record.json", records.dumps(record))
    mesh.barrier("samples-written")
    return record


def _claim(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Removes what pictures of other settings left behind, and says so."""
    path = folder / "settings.json"
    text = records.dumps(settings) + "\n"
    held = path.read_text() if path.exists() else ""
    if held == text:
        return
    shards = list(folder.glob("shards/*.npy"))
    if shards:
        progress_lib.say(
            f"generate  removes {len(shards)} finished "
            f"{'shard' if len(shards) == 1 else 'shards'} of other pictures "
            f"({'; '.join(_differing(held, settings))})"
        )
    forms = (*folder.glob("grid.*"), *folder.glob("images.*"))
    for old in (*forms, *shards, *folder.glob("*.json")):
        old.unlink()
    records.write_text(path, text)


def _differing(held: str, settings: dict[str, Any]) -> list[str]:
    """What pictures are of other settings in, as a reader knows it."""
    try:
        before = dict(records.loads(held))
    except (ValueError, TypeError):  # an empty or damaged file
        return ["of unknown settings"]
    names = {"run_id": "run", "checksum": "SHA-256 of weights", "each": "in a shard"}
    return [
        f"{names.get(name, name)}: {before.get(name)!r} there, {value!r} now"
        for name, value in settings.items()
        if before.get(name) != value
    ]


def _finish(
    folder: pathlib.Path,
    paths: Sequence[pathlib.Path],
    captions: Sequence[str],
    form: str,
) -> None:
    """Writes tar, array and grid from the shards; the grid last: it vouches for all."""
    for other in config.PICTURE_FORMATS:
        _grid_path(folder.parent, other).unlink(missing_ok=True)
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
                        (form, encoded(image, form)),
                        ("txt", captions[index].encode()),
                    ):
                        member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    index += 1
                tar.members.clear()  # else it keeps a header of every picture

    records.write_file(folder / "images.tar", archive)
    images = np.concatenate(first)
    records.write_file(
        folder / "images.npy", lambda file: np.save(file, images, allow_pickle=False)
    )
    if form == "webp":  # as many as the format has room for
        images = images[: (LARGEST_WEBP // max(images.shape[1:3])) ** 2]
    whole = encoded(grid(images), form)
    records.write_file(_grid_path(folder.parent, form), lambda file: file.write(whole))


def grid(images: np.ndarray) -> np.ndarray:
    """uint8 [n, height, width, 3] -> one picture, row by row, white where none is."""
    n, height, width, channels = images.shape
    across = min(ACROSS, int(np.ceil(n**0.5)))
    down = -(-n // across)
    whole = np.full((down * across, height, width, channels), 255, np.uint8)
    whole[:n] = images
    whole = whole.reshape(down, across, height, width, channels)
    return whole.swapaxes(1, 2).reshape(down * height, across * width, channels)


def encoded(image: np.ndarray, form: str) -> bytes:
    """uint8 [height, width, 3] -> the bytes of a file that gives the same pixels."""
    buffer = io.BytesIO()
    lossless = {"lossless": True} if form == "webp" else {}
    Image.fromarray(image).save(buffer, format=form.upper(), **lossless)
    return buffer.getvalue()
