"""The weights that a study starts from, as its directory records them; needs no jax.

    init.json   the identity of the weights that training starts from, where they were,
                and the FLOPs that had been spent on them

The weights themselves are in the checkpoints. So a study continues without the source.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from scaling_ldm import config, records

_FIELDS = ("init_from", "checksum", "pretraining_flops")


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """init_from, checksum and pretraining_flops (None: unknown); None without a file.

    Raises:
      ConfigError: the file is damaged.
      NewerVersion: a newer version of the library wrote it.
    """
    path = workdir / "init.json"
    try:
        return records.read_json(path, *_FIELDS) if path.exists() else None
    except records.Damaged as e:
        raise config.ConfigError(f"{path} is damaged ({e}): put a copy back") from e


def write(
    workdir: pathlib.Path, init_from: str, checksum: str, flops: float | None
) -> None:
    """Writes the file."""
    content = dict(zip(_FIELDS, (init_from, checksum, flops), strict=True))
    records.write_json(workdir / "init.json", content)


def with_checksum(
    experiment: config.Experiment, checksum: str, where: object
) -> config.Experiment:
    """The experiment with the identity of the weights that it starts from.

    Args:
      where: the place of the weights, for a message.

    Raises:
      ConfigError: it asks for other weights.
    """
    wanted = experiment.train.init_checksum
    if wanted not in ("", checksum):
        raise config.ConfigError(
            f"config.train.init_checksum = {wanted!r}, but the checksum of the weights "
            f"in {where} is {checksum}"
        )
    changed = dataclasses.replace(experiment.train, init_checksum=checksum)
    return dataclasses.replace(experiment, train=changed)


def recorded(
    experiment: config.Experiment, workdir: pathlib.Path
) -> config.Experiment | None:
    """The experiment with the identity of its weights, as its directory records it.

    Weights are identified by their name or, if it is given, by train.init_checksum.

    Returns:
      None if the directory records none, or other weights.

    Raises:
      ConfigError: the same name, but another train.init_checksum.
    """
    held, cfg = read(workdir), experiment.train
    if held is None or (
        held["init_from"] != cfg.init_from and held["checksum"] != cfg.init_checksum
    ):
        return None
    return with_checksum(experiment, held["checksum"], cfg.init_from)
