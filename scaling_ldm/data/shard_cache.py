"""Local copies of remote shards: fetched as they are needed, within a number of bytes.

The copies are in $XDG_CACHE_HOME/scaling_ldm/shards, named by their checksums. So
processes of one host, and folders with the same shards, share them. A copy appears when
it is complete and its bytes have been compared with its checksum. Before a fetch, the
copies that were used longest ago are removed until there is room. A copy that is being
read has a shared lock, and is never removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from scaling_ldm import config, records
from scaling_ldm.data import seals, shards, storage

FOLDER = "shards"  # in the user's cache
_MARK = re.compile(r"\.room-(\d+)-[0-9a-f]+")
_DATA = ".data"  # added to the name of a mark: the bytes that have come

Fetch = Callable[[str, pathlib.Path], None]


class Full(config.ConfigError):
    """The bytes are all taken by shards that are being read."""


class ShardCache:
    """Copies of the shards of one folder, in a cache that others share.

    Args:
      fetch: (name of a shard, local path to write); copies a remote shard.
      most: bytes of all copies together.
    """

    def __init__(self, fetch: Fetch, most: int) -> None:
        self._fetch, self._most = fetch, most
        self._sound: set[pathlib.Path] = set()  # whose bytes have been compared
        self._folder = storage.cache_folder() / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)

    def hold(
        self, number: int, summary: Mapping[str, Any]
    ) -> tuple[pathlib.Path, BinaryIO]:
        """A shard's copy and a file whose closing says that it is no longer read.

        All bytes are compared once in each process. A copy that was damaged here is
        fetched again.

        Raises:
          Full: there is no room.
          Damaged: the remote bytes are not those of the summary.
        """
        target = self._folder / f"{summary['checksum']}{shards.SUFFIX}"
        while True:
            if (held := self._held(target)) is None:
                with self._alone(f".{target.name}.lock"):
                    if not target.exists():  # no other process has fetched it meanwhile
                        self._copy(number, summary, target)
                continue
            if target not in self._sound:
                try:
                    seals.check_shard(target, summary)
                except records.Damaged:
                    held.close()
                    target.unlink(missing_ok=True)
                    continue
                self._sound.add(target)
            target.touch()
            return target, held

    def prepare(self, number: int, summary: Mapping[str, Any]) -> None:
        """Fetches a shard that will be needed soon, as `hold`."""
        self.hold(number, summary)[1].close()

    def _held(self, target: pathlib.Path) -> BinaryIO | None:
        """The file with a shared lock; None if it is not there."""
        try:
            file = open(target, "rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, target):
            return file
        file.close()  # it was removed before it was locked
        return None

    def _copy(
        self, number: int, summary: Mapping[str, Any], target: pathlib.Path
    ) -> None:
        with self._room(summary["bytes"]) as partial:
            with records.unfinished(partial), records.writing(target):
                self._fetch(shards.shard_name(number), partial)
                seals.check_shard(partial, summary)
                os.replace(partial, target)
        self._sound.add(target)

    @contextlib.contextmanager
    def _room(self, wanted: int) -> Iterator[pathlib.Path]:
        """Room for so many bytes, from which other shards go; yields where to write.

        A locked mark beside that file says how many bytes are coming.
        """
        if wanted > self._most:
            raise config.ConfigError(
                f"one shard has {wanted:,} bytes, and config.data.cache_gigabytes "
                f"allows {self._most:,}"
            )
        mark = self._folder / f".room-{wanted}-{os.urandom(8).hex()}"
        with self._alone(".lock"):
            self._make_room(wanted)
            file = open(mark, "wb")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield mark.with_name(f"{mark.name}{_DATA}")
        finally:
            mark.unlink(missing_ok=True)
            file.close()

    def _make_room(self, wanted: int) -> None:
        """Removes the copies that were used longest ago until there is room."""
        copies, taken = [], self._reserved()
        for path in self._folder.glob(f"*{shards.SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                copies.append((found.st_mtime_ns, path, found.st_size))
                taken += found.st_size
        for _, path, size in sorted(copies):
            if taken + wanted <= self._most:
                return
            if _remove(path):
                taken -= size
        if taken + wanted > self._most:
            raise Full(
                f"{self._folder}: {taken:,} bytes of shards are being read or fetched, "
                f"and {wanted:,} more are needed; config.data.cache_gigabytes allows "
                f"{self._most:,}: raise it, or lower config.data.shuffle_window"
            )

    def _reserved(self) -> int:
        """Bytes that others are fetching; what killed processes left is removed."""
        total = 0
        for path in self._folder.glob(".room-*"):
            if (mark := _MARK.fullmatch(path.name)) is None:
                continue
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    total += int(mark[1])
                else:
                    path.with_name(f"{path.name}{_DATA}").unlink(missing_ok=True)
                    path.unlink()
        return total

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """A context that one thread of one process is in at a time."""
        path = self._folder / name
        while True:
            file = open(path, "ab")
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                break
            file.close()  # the last one to be here has removed it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            file.close()


def _remove(path: pathlib.Path) -> bool:
    """Removes a copy unless it is being read; whether it is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _is_at(file: BinaryIO, path: pathlib.Path) -> bool:
    """Whether an open file is still the one at a path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
