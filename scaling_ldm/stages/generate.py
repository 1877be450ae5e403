"""The generate stage: draws pictures with a trained model and records their cost.

    samples/shards/00000.npy   uint8 [generate.batch_size, height, width, 3], in order
    samples/images.npy   the first SHOWN of them
    samples/grid.png     the same in one picture, with their captions
    samples/real.npy     the held-out pictures of these captions, in the same order
    samples/real.png     the same in one picture
    samples/images.tar   all of them as PNG with their captions (WebDataset)
    samples/record.json   the SampleRecord, written last

Grids and tar hold lossless WebP instead of PNG if generate.format says so. A stage that
was stopped continues with the first missing shard. There are no real pictures of
captions of one's own.
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
from scaling_ldm.config import axes
from scaling_ldm.training import inference, mesh, progress
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import exports, runs, sample_files, sample_grid, samples

SHOWN = 256  # pictures in images.npy
LARGEST_WEBP = 16383  # pixels of a side
_FORMS = ("grid", "images", "real")  # files that are made from the shards


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> records.SampleRecord | None:
    """Draws with config.generate.weights, config.generate.run or the best run.

    Of a run, the first average is used. Captions are those of the held-out split, or
    config.generate.captions, repeated in order. Nothing is drawn if all pictures are
    there already.

    Returns:
      The record, or None if no weights are given and no run is finished.
    """
    if experiment.model.architecture == "autoencoder_kl":
        progress.say("no samples: an autoencoder generates nothing by itself")
        return None
    model = samples.model_to_sample(experiment, workdir, specs)
    if model is None:
        progress.say("no finished run to sample from")
        return None
    known = _record_of_these_pictures(experiment, workdir, model)
    if known is not None and _grid_path(workdir, experiment.generate.format).exists():
        whole = sum(map(len, samples.read_images(workdir))) == known.images
        changed = sample_files.changed(workdir)
        if whole and not changed:
            progress.say(f"samples of {model.run_id} are there already")
            return known
        if not whole:
            progress.say(
                f"samples of {model.run_id} are not all there: what is missing is drawn"
            )
        if changed:
            progress.say(
                f"{', '.join(changed)} in {workdir / 'samples'}: gone, or not as "
                "written; made again of the shards"
            )
        if samples.record_path(workdir).name in changed:
            known = None
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        return _sample(experiment, workdir, model, device_mesh, known)


def _record_of_these_pictures(
    experiment: config.Experiment, workdir: pathlib.Path, model: TrainedModel
) -> records.SampleRecord | None:
    """The record in the workdir, if it is of the same model and settings."""
    record = samples.read_record(workdir)
    if record is None:
        return None
    wanted = samples.record_fields(experiment, model)
    same = {name: getattr(record, name) for name in wanted} == wanted
    of = samples.origin(experiment, model)
    return record if same and samples.are_of(workdir, of) else None


def _grid_path(workdir: pathlib.Path, form: str) -> pathlib.Path:
    return workdir / "samples" / f"grid.{form}"


def check(experiment: config.Experiment, trains: bool = False) -> None:
    """Refuses, before anything is trained, what could not be sampled afterwards.

    Args:
      trains: whether the study trains first; given weights need no training.

    Raises:
      config.ConfigError: the sampler cannot use this spacing with this schedule and
        prediction; config.generate.weights are of another network, or are given in a
        study that trains; or no run will be the best one (see `runs.no_best_run`).
    """
    cfg, objectives = experiment.generate, axes.objectives(experiment)
    if cfg.weights and trains:
        raise config.ConfigError(
            "config.generate.weights are drawn from without training: add --stages "
            "generate,evaluate"
        )
    if cfg.weights:
        exports.read_model(experiment, cfg.weights)
        objectives = [experiment]
    elif not cfg.run and not axes.measured_alike(axes.combinations(experiment.plan)):
        raise runs.no_best_run()
    for one in objectives:
        try:
            inference.sampling_plan(one, cfg)
        except ValueError as e:
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
    """Draws the missing shards, then writes tar, array, grid and record.

    Args:
      known: the record of these pictures, if there is one.
    """
    cfg, folder = experiment.generate, workdir / "samples"
    each, of = min(cfg.batch_size, cfg.images), samples.origin(experiment, model)
    sampler = inference.PictureSampler(
        experiment, workdir, model, device_mesh, each, cfg.captions
    )
    if mesh.is_primary():
        settings = samples.record_fields(experiment, model) | {"each": each}
        if not cfg.captions:  # so that the settings of older versions stay equal
            del settings["own_captions"]
        _remove_other_pictures(folder, settings, of)
    mesh.barrier("samples")
    shards = samples.shard_folder(workdir)
    paths = [shards / f"{n:05d}.npy" for n in range(-(-cfg.images // each))]
    rows = [np.arange(cfg.images)[n * each :][:each] for n in range(len(paths))]
    for _ in samples.read_images(workdir):
        pass  # reading them has compared their checksums
    missing = [n for n, path in enumerate(paths) if not path.exists()]
    mesh.barrier("samples-missing")  # no process writes before all have looked
    begin = time.perf_counter()
    shown = progress.Progress(
        "generate", cfg.images, "pictures", experiment.train.show_every_seconds
    )
    done = cfg.images - sum(len(rows[n]) for n in missing)
    shown.begin()
    for n in missing:
        images = sampler.images(rows[n], cfg)
        if mesh.is_primary():
            samples.write_images(paths[n], images, of)
        done += len(images)
        shown.show(done)
    seconds = time.perf_counter() - begin
    mesh.barrier("samples-drawn")
    captions = sampler.captions(np.arange(cfg.images))
    shown_rows = np.arange(min(SHOWN, cfg.images))
    real = None if cfg.captions else sampler.real_images(shown_rows)
    cost = sampler.cost(cfg)
    record = records.SampleRecord(
        **samples.record_fields(experiment, model),
        nfe=cost.nfe,
        flops=(cost.flops + cost.decoder_flops) * cfg.images,
        seconds=known.seconds if known and len(missing) < len(paths) else seconds,
        weights=model.weights or "unknown",
        captions=tuple(captions[:SHOWN]),
        images_file="samples/images.npy",
        labels=tuple(sampler.labels(shown_rows)),
        real_file="" if real is None else "samples/real.npy",
    )
    if mesh.is_primary():
        made = _finish(folder, paths, captions, record.titles(), real, cfg.format)
        path = samples.record_path(workdir)
        records.write_text(path, records.dumps(record))
        sample_files.add_files(workdir, of, [*made, path.name])
    mesh.barrier("samples-written")
    return record


def _remove_other_pictures(
    folder: pathlib.Path, settings: dict[str, Any], of: str
) -> None:
    """Removes the files of pictures of other settings or weights, and says so.

    Then it writes the settings to settings.json, by which the next call decides.
    """
    path = folder / "settings.json"
    before = _settings_in(path)
    alike = samples.are_of(folder.parent, of)
    if before == settings and alike:
        return
    differing = _differing(before, settings) or ["of another study or other weights"]
    shards = list(folder.glob("shards/*.npy"))
    if shards:
        progress.say(
            f"generate  removes {len(shards)} finished "
            f"{'shard' if len(shards) == 1 else 'shards'} of other pictures "
            f"({'; '.join(differing)})"
        )
    forms = [path for name in _FORMS for path in folder.glob(f"{name}.*")]
    for old in (*forms, *shards, *folder.glob("*.json")):
        old.unlink()
    records.write_text(path, records.dumps(settings) + "\n")


def _settings_in(path: pathlib.Path) -> dict[str, Any] | None:
    """The settings in a settings.json; None if it is missing or damaged."""
    try:
        return dict(records.read(path))
    except (FileNotFoundError, records.Damaged, TypeError):
        return None


def _differing(before: dict[str, Any] | None, settings: dict[str, Any]) -> list[str]:
    """The settings that differ from those that pictures were drawn with, for people."""
    if before is None:
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
    titles: Sequence[str],
    real: np.ndarray | None,
    form: str,
) -> list[str]:
    """Writes tar, arrays and grids from the shards; returns the names of the files.

    The grid is written last: where it exists, the others are complete.

    Args:
      captions: of every picture.
      titles: what stands under the first ones.
      real: held-out pictures of the first captions, if there are any.
    """
    for name in ("grid", "real"):
        for other in config.PICTURE_FORMATS:
            (folder / f"{name}.{other}").unlink(missing_ok=True)
    first: list[np.ndarray] = []

    def archive(file: Any) -> None:
        index = 0
        with tarfile.open(fileobj=file, mode="w") as tar:
            for path in paths:
                with path.open("rb") as held:
                    images = np.load(held, allow_pickle=False)
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
                # Otherwise tarfile keeps the header of every picture in memory.
                tar.members.clear()  # pyrefly: ignore[missing-attribute]  # not in stubs

    records.write_file(folder / "images.tar", archive)
    made = ["images.tar"]
    if real is not None:
        made += _show(folder, ("real", "real"), real, titles, form)
    return made + _show(folder, ("images", "grid"), np.concatenate(first), titles, form)


def _show(
    folder: pathlib.Path,
    names: tuple[str, str],
    images: np.ndarray,
    titles: Sequence[str],
    form: str,
) -> list[str]:
    """Writes an array of pictures, and all of them in one picture.

    Args:
      names: of the two files, without their endings.

    Returns:
      The names of the two files.
    """
    array, picture = f"{names[0]}.npy", f"{names[1]}.{form}"
    records.write_file(
        folder / array, lambda file: np.save(file, images, allow_pickle=False)
    )
    if form == "webp":  # as many as fit into the largest picture of this format
        largest = max(sample_grid.cell(*images.shape[1:3]))
        images = images[: (LARGEST_WEBP // largest) ** 2]
    whole = encoded(sample_grid.draw(images, titles[: len(images)]), form)
    records.write_file(folder / picture, lambda file: file.write(whole))
    return [array, picture]


def encoded(image: np.ndarray, form: str) -> bytes:
    """uint8 [height, width, 3] -> the bytes of a file that gives the same pixels."""
    buffer = io.BytesIO()
    lossless = {"lossless": True} if form == "webp" else {}
    Image.fromarray(image).save(buffer, format=form.upper(), **lossless)
    return buffer.getvalue()
