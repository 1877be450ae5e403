"""Local copies of remote shards: fetched as they are needed, within a number of bytes.

The copies are in $XDG_CACHE_HOME/scaling_ldm/shards, named by their checksums. So
processes of one host, and folders with the same shards, share them. So do all hosts
with this folder on one file system. A copy appears when it is complete and its bytes
have been compared with its checksum. Before a fetch, the copies that were used longest
ago are removed until there is room. A copy that is being read has a shared lock, and is
never removed. One that will be read soon counts as used whenever `keep` says so.

NFS gives an exclusive lock only on a file that is open for writing, and a shared one
only on a file that is open for reading.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from scaling_ldm import config, records
from scaling_ldm.data import seals, shards, storage
from scaling_ldm.records.errors import CacheFull

FOLDER = "shards"  # in the user's cache
_MARK = re.compile(r"\.room-(\d+)-[0-9a-f]+")
_DATA = ".data"  # added to the name of a mark: the bytes that have come
_PAUSE, _LOOKS = 0.1, 3  # seconds between looks for room; looks until it is full

Fetch = Callable[[str, pathlib.Path], None]


class ShardCache:
    """Copies of the shards of one folder, in a cache that others share.

    Args:
      fetch: (name of a shard, local path to write); copies a remote shard.
      most: bytes of all copies together.
      remote: the folder, for messages.
    """

    def __init__(self, fetch: Fetch, most: int, remote: str) -> None:
        self._fetch, self._most, self._remote = fetch, most, remote
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
          CacheFull: there is no room, and no fetch that would end and give some.
          Damaged: the remote bytes are not those of the summary, in two fetches.
          ConfigError: the cache is on a file system without locks.
        """
        target = self._target(summary)
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
                    with held, self._alone(f".{target.name}.lock"):
                        if _is_at(held, target):  # no other process has replaced it
                            target.unlink()
                    continue
                self._sound.add(target)
            _use(held.fileno())
            if _is_at(held, target):
                return target, held
            held.close()  # somebody has removed it
            self._sound.discard(target)

    def prepare(self, number: int, summary: Mapping[str, Any]) -> None:
        """Fetches a shard that will be needed soon, as `hold`."""
        self.hold(number, summary)[1].close()

    def keep(self, summary: Mapping[str, Any]) -> None:
        """Says that a copy, if it is there, will be read: others go before it."""
        with contextlib.suppress(FileNotFoundError):
            _use(self._target(summary))

    def _target(self, summary: Mapping[str, Any]) -> pathlib.Path:
        return self._folder / f"{summary['checksum']}{shards.SUFFIX}"

    def _held(self, target: pathlib.Path) -> BinaryIO | None:
        """The file with a shared lock; None if it is not there."""
        try:
            file = open(target, "rb")
        except FileNotFoundError:
            return None
        _lock(file, fcntl.LOCK_SH)
        if _is_at(file, target):
            return file
        file.close()  # it was removed before it was locked
        return None

    def _copy(
        self, number: int, summary: Mapping[str, Any], target: pathlib.Path
    ) -> None:
        name = shards.shard_name(number)
        with self._room(summary["bytes"]) as partial:
            with records.unfinished(partial), records.writing(target):
                self._fetch(name, partial)
                try:
                    seals.check_shard(partial, summary)
                except records.Damaged:  # perhaps the connection ended early
                    partial.unlink()
                    self._fetch(name, partial)
                    seals.check_shard(partial, summary, f"{self._remote}/{name}")
                _use(partial)
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
        file, looks = None, 0
        while file is None:
            try:
                file = self._marked(mark, wanted)
            except CacheFull:  # a thread that has just fetched may hold a copy
                looks += 1
                if looks == _LOOKS:
                    raise
            if file is None:
                time.sleep(_PAUSE)
        try:
            yield mark.with_name(f"{mark.name}{_DATA}")
        finally:
            mark.unlink(missing_ok=True)
            file.close()

    def _marked(self, mark: pathlib.Path, wanted: int) -> BinaryIO | None:
        """The locked mark of some room; None if others' fetches have to end first."""
        with self._alone(".lock"):
            if not self._make_room(wanted):
                return None
            file = open(mark, "wb")
            _lock(file, fcntl.LOCK_EX)
            return file

    def _make_room(self, wanted: int) -> bool:
        """Removes the copies that were used longest ago until there is room.

        Returns:
          False if there is none until a fetch that is under way has ended.

        Raises:
          CacheFull: there is none, and nothing is being fetched.
        """
        reserved = self._reserved()
        copies, taken = [], reserved
        for path in self._folder.glob(f"*{shards.SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                copies.append((found.st_mtime_ns, path, found.st_size))
                taken += found.st_size
        for _, path, size in sorted(copies):
            if taken + wanted <= self._most:
                return True
            if _remove(path):
                taken -= size
        if taken + wanted > self._most and not reserved:
            raise CacheFull(
                f"{self._folder}: {taken:,} bytes of shards are being read, and "
                f"{wanted:,} more are needed; config.data.cache_gigabytes allows "
                f"{self._most:,}: raise it, or lower config.data.shuffle_window"
            )
        return taken + wanted <= self._most

    def _reserved(self) -> int:
        """Bytes that others are fetching; what killed processes left is removed."""
        total = 0
        for path in self._folder.glob(".room-*"):
            if (mark := _MARK.fullmatch(path.name)) is None:
                continue
            with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
                try:
                    _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            _lock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                break
            file.close()  # the last one to be here has removed it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            file.close()


def _use(copy: pathlib.Path | int) -> None:
    """Says that a copy, by its path or open file, is used now.

    The time is this process's: a file system's own clock has ticks of milliseconds.
    """
    now = time.time_ns()
    os.utime(copy, ns=(now, now))


def _remove(path: pathlib.Path) -> bool:
    """Removes a copy unless it is being read; whether it is gone."""
    try:
        with open(path, "r+b") as file:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _lock(file: BinaryIO, how: int) -> None:
    """Locks an open file.

    Raises:
      BlockingIOError: another has the lock, and `how` says not to wait.
      ConfigError: the file system cannot lock it.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as e:
        raise config.ConfigError(
            f"{pathlib.Path(file.name).parent}: files cannot be locked there "
            f"({e.strerror}), and local copies of remote shards need it: set "
            "XDG_CACHE_HOME to a folder of a local disk"
        ) from e


def _is_at(file: BinaryIO, path: pathlib.Path) -> bool:
    """Whether an open file is still the one at a path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
