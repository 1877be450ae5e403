"""The pictures of the generate stage: whose weights they are of, and their files."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scaling_ldm import config, records
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import exports, runs


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


def read_images(workdir: pathlib.Path) -> Iterator[np.ndarray]:
    """The generated pictures, uint8 [n, height, width, 3] for each file.

    Raises:
      records.Damaged: a file is cut off.
    """
    for path in sorted(shard_folder(workdir).glob("*.npy")):
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as e:
            raise records.Damaged(f"{path} holds no pictures: {e}") from e
        yield images


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
        "images": cfg.images,
        "sampler": cfg.sampler,
        "spacing": cfg.spacing,
        "steps": cfg.steps,
        "guidance": cfg.guidance,
        "seed": cfg.seed,
    }
