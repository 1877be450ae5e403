"""Reads, checks and describes the split of stored records."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.data import encoded, shards, split
from scaling_ldm.data.sources import parts

FILE = "split.json"  # in the workdir, for the report


def read_summary(folder: str) -> dict[str, Any]:
    """`Split.summary` of records that are begun or finished; {} if a hash decides.

    Raises:
      ConfigError: there are no records.
    """
    identity = shards.Store(folder).read_json(shards.IDENTITY, "source", "set")
    if identity is None:
        raise config.ConfigError(f"no records in {folder}: add encode to --stages")
    return identity.get("split", {})


def read_split(folder: str) -> split.Split | None:
    """Which pictures are held out of a folder of records that is begun or finished.

    Returns:
      None if the hash of each caption decides, or the source itself.

    Raises:
      ConfigError: there are no records.
      Damaged: a file has changed since it was written.
    """
    if not (summary := read_summary(folder)):
        return None
    where = f"{folder}/{shards.SPLIT}"
    if (found := shards.Store(folder).read_json(shards.SPLIT)) is None:
        raise records.Damaged(f"{where} is missing")
    return split.from_json(found, summary, where)


def line(experiment: config.Experiment, folder: str) -> str:
    """Which pictures of finished records are held out, in words.

    Raises:
      ConfigError: there are fewer than config.data.validation_minimum.
    """
    manifest = encoded.read_manifest(folder, experiment)
    count, least = manifest["validation"], experiment.data.validation_minimum
    of = f"{count:,} of {manifest['records']:,} pictures are held out"
    if experiment.data.source in config.ENDLESS:
        return of
    summary = manifest["identity"].get("split", {})
    if count < least:
        raise config.ConfigError(
            f"{of}, fewer than config.data.validation_minimum = {least:,}; encode more "
            "pictures or another config.data.validation_fraction into another folder, "
            f"or accept it with --config.data.validation_minimum={count}"
        )
    return split.in_words(summary) if summary else f"{of}, {split.in_words({})}"


def lines(experiment: config.Experiment, workdir: pathlib.Path) -> list[str]:
    """What is held out of training, a line for each part: the split, or its rule.

    There is no line for icons that are painted while training: their split is fixed.
    """
    found = []
    if not experiment.encoded:
        return found
    for name, (part, folder) in parts(experiment, workdir).items():
        of = f"{name}: " if name else ""
        if part.data.source in config.ENDLESS:
            continue
        try:
            summary = read_summary(folder)
        except (config.ConfigError, OSError):  # not encoded yet, or not from here
            found.append(of + split.rule_in_words(part.data))
        else:
            found.append(of + split.in_words(summary))
    return found


def write(
    workdir: pathlib.Path, told: Mapping[str, str], training: Mapping[str, int]
) -> None:
    """Writes FILE, of each part: what is held out, and how many are trained on.

    The same is left alone.
    """
    held = {"held_out": dict(told), "training_pictures": dict(training)}
    text = json.dumps(records.stamped(held), indent=1) + "\n"
    path = workdir / FILE
    if not path.exists() or path.read_bytes() != text.encode():
        records.write_text(path, text)
