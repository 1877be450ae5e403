"""The pictures of the generate stage: their files, and the weights that drew them."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scaling_ldm import config, records
from scaling_ldm.data import shards
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import exports, runs, sample_files


def record_path(workdir: pathlib.Path) -> pathlib.Path:
    """The SampleRecord; there once the generate stage is over."""
    return workdir / "samples" / "record.json"


def read_record(workdir: pathlib.Path) -> records.SampleRecord | None:
    """The record of a finished generate stage, or None."""
    path = record_path(workdir)
    return records.read(path, records.SampleRecord) if path.exists() else None


def shard_folder(workdir: pathlib.Path) -> pathlib.Path:
    """The folder of a study's generated pictures; its files sort in their order."""
    return workdir / "samples" / "shards"


def read_images(workdir: pathlib.Path, check: bool = True) -> Iterator[np.ndarray]:
    """The generated pictures, uint8 [n, height, width, 3] for each file.

    Args:
      check: compare all bytes of each file with its checksum.

    Raises:
      records.Damaged: a file is cut off, or not the one that was written.
    """
    checksums = (sample_files.read(workdir) or {}).get("shards", {}) if check else {}
    for path in sorted(shard_folder(workdir).glob("*.npy")):
        data = path.read_bytes() if isinstance(path, ObjectPath) else None
        try:
            images = np.load(
                path if data is None else io.BytesIO(data),
                mmap_mode="r" if data is None else None,
                allow_pickle=False,
            )
            if images.dtype != np.uint8 or images.ndim != 4:
                raise ValueError(f"{images.dtype} of shape {list(images.shape)}")
        except (ValueError, EOFError) as e:
            raise records.Damaged(f"{path} holds no pictures: {e}") from e
        wanted = checksums.get(path.name)
        if wanted is not None and wanted != (
            shards.file_digest(path) if data is None else shards.digest_of(data)
        ):
            raise records.Damaged(
                f"{path} holds other pictures, or is damaged: its checksum is not that "
                f"of {sample_files.NAME}"
            )
        yield images


def write_images(path: pathlib.Path, images: np.ndarray, of: str) -> None:
    """Writes a file of pictures, and before it its checksum.

    Args:
      of: see `origin`.
    """
    workdir = path.parents[2]
    file = io.BytesIO()
    np.save(file, images, allow_pickle=False)
    digest = shards.digest_of(file.getvalue())
    sample_files.add_shard(workdir, of, path.name, digest)
    records.write_file(path, lambda f: f.write(file.getbuffer()))


def origin(experiment: config.Experiment, model: TrainedModel) -> str:
    """A digest of the study and the weights that draw its pictures."""
    own = config.with_overrides(experiment, model.overrides)
    of = [own.recipe_hash, model.run_id, model.checksum, model.step, model.weights]
    return records.digest(of)


def are_of(workdir: pathlib.Path, of: str) -> bool:
    """Whether the pictures have this `origin`; true if their origin is unknown."""
    held = sample_files.read(workdir)
    return held is None or held["of"] == of


def model_to_sample(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> TrainedModel | None:
    """The weights that generate draws with: config.generate.weights, or a run's.

    Returns:
      None if no weights are given and no run is finished.

    Raises:
      ConfigError: the folder holds no weights that the experiment's network reads, or
        config.generate.run is not a finished run.
    """
    if experiment.generate.weights:
        return exports.read_model(experiment, experiment.generate.weights)
    spec = runs.run_to_sample(experiment, workdir, specs)
    return None if spec is None else runs.trained_model(experiment, workdir, spec)


def record_fields(experiment: config.Experiment, model: TrainedModel) -> dict[str, Any]:
    """The fields of a SampleRecord that decide which pictures are drawn."""
    cfg = experiment.generate
    return {
        "run_id": model.run_id,
        "checksum": model.checksum,
        "own_captions": cfg.captions,
        "images": cfg.images,
        "sampler": cfg.sampler,
        "spacing": cfg.spacing,
        "steps": cfg.steps,
        "guidance": cfg.guidance,
        "seed": cfg.seed,
    }
