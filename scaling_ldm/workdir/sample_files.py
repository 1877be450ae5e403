"""checksums.json of generated pictures: whose they are, and the bytes of their files.

    of       a digest of the study and of the weights that drew the pictures
    shards   name -> checksum of the files of pictures; each is there before its file
    files    name -> checksum of the files that are made of them, once all are written

The report reads it too, so no jax is imported. Version 0.1.0 wrote no such file.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

from scaling_ldm import records
from scaling_ldm.records.objects import ObjectPath

NAME = "checksums.json"


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What the file holds; None if there is none.

    Raises:
      Damaged: it is not what was written.
    """
    path = workdir / "samples" / NAME
    held = records.read_json(path, "of", "shards") if path.exists() else None
    for key in ("shards", "files"):
        if held is not None and not isinstance(held.get(key, {}), dict):
            raise records.Damaged(f"{path}: its entry {key} is not a list of checksums")
    return held


def add_shard(workdir: pathlib.Path, of: str, name: str, digest: str) -> None:
    """Adds the checksum of a shard; what was made of the others is out of date."""
    held = read(workdir) or {"shards": {}}
    _write(workdir, of, held["shards"] | {name: digest}, {})


def add_files(workdir: pathlib.Path, of: str, names: Iterable[str]) -> None:
    """Adds the checksums of the files that are made of the shards."""
    held = read(workdir) or {"shards": {}}
    folder = workdir / "samples"
    _write(
        workdir, of, held["shards"], {name: _digest(folder / name) for name in names}
    )


def _write(
    workdir: pathlib.Path, of: str, shards: dict[str, str], files: dict[str, str]
) -> None:
    content = {"of": of, "shards": shards, "files": files}
    records.write_json(workdir / "samples" / NAME, content)


def changed(workdir: pathlib.Path, *names: str) -> list[str]:
    """Names of files made of the shards that are gone, or not as they were written.

    Args:
      names: look at these files alone.

    Raises:
      Damaged: as `read`.
    """
    folder, files = workdir / "samples", (read(workdir) or {}).get("files", {})
    return [
        name
        for name, digest in files.items()
        if not names or name in names
        if not (folder / name).is_file() or _digest(folder / name) != digest
    ]


def _digest(path: pathlib.Path) -> str:
    """As `data.shards.file_digest`."""
    if isinstance(path, ObjectPath):
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.blake2b(digest_size=16)
        ).hexdigest()
