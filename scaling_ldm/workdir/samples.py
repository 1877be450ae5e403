"""The pictures of the generate stage: whose they are, and where they lie."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scaling_ldm import config, records
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import exports, runs


def shard_folder(workdir: pathlib.Path) -> pathlib.Path:
    """The folder of a study's generated pictures, in files that sort in their order."""
    return workdir / "samples" / "shards"


def read_images(workdir: pathlib.Path) -> Iterator[np.ndarray]:
    """The pictures of a finished generate stage, uint8 [n, height, width, 3] a file.

    Raises:
      records.Damaged: a file that is cut off.
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
    """Whose pictures generate draws: of config.generate.weights, or of a finished run.

    Returns:
      None where neither is there.

    Raises:
      ConfigError: the folder holds no weights that the experiment's network reads, or
        config.generate.run is not runs.
    """
    if experiment.generate.weights:
        return exports.read_model(experiment, experiment.generate.weights)
    spec = runs.run_to_sample(experiment, workdir, specs)
    return None if spec is None else runs.trained_model(experiment, workdir, spec)


def record_fields(experiment: config.Experiment, of: TrainedModel) -> dict[str, Any]:
    """The fields of the SampleRecord that a model's pictures would have."""
    cfg = experiment.generate
    return {
        "run_id": of.run_id,
        "checksum": of.checksum,
        "images": cfg.images,
        "sampler": cfg.sampler,
        "spacing": cfg.spacing,
        "steps": cfg.steps,
        "guidance": cfg.guidance,
        "seed": cfg.seed,
    }
