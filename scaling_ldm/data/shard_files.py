"""Reads records from the shards of a folder, local or remote, with several threads."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import pathlib
import queue
import resource
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from array_record.python import array_record_module

from scaling_ldm import records
from scaling_ldm.data import seals, shard_cache, shards
from scaling_ldm.data.shard_table import ShardTable
from scaling_ldm.records.errors import CacheFull

_READ = "readahead_buffer_size:0,max_parallelism:0"
OPEN_SHARDS = 512  # of a source, where the process may open as many files
_FEWEST = 16  # that a source may hold open, whatever others hold
_AHEAD = 4  # threads that fetch remote shards before they are needed


class ShardFiles:
    """The shards of a folder, each opened when it is first needed.

    All bytes of a shard are compared with its checksum when it is first opened; those
    of a remote shard when it is fetched.

    Args:
      cache_bytes: of the local copies of remote shards.
      threads: that read at once.
      open_shards: held open at once, at most. All sources of a process together hold
        half of the files that it may open (`ulimit -n`).

    Raises:
      Damaged: a shard is missing, or is not what was written. Reading raises it. The
        first read of a local folder looks for all shards, so that a long run does not
        end where it reaches a missing one.
    """

    def __init__(
        self,
        store: shards.Store,
        table: ShardTable,
        layout: shards.Layout,
        cache_bytes: int,
        threads: int,
        open_shards: int = OPEN_SHARDS,
    ) -> None:
        self._store, self._table, self._layout = store, table, layout
        self._cache = None
        if store.local is None:
            self._cache = shard_cache.ShardCache(store.copy, cache_bytes, store.folder)
        self._listed = store.local is None  # a remote folder is not listed
        self._threads, self._open_shards = threads, open_shards
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, _OpenShard] = collections.OrderedDict()
        self._checked: set[int] = set()  # shards whose bytes have been compared
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._wanted: set[int] = set()  # shards that are read now or next
        self._fetching: list[threading.Thread] = []
        with _SOURCES_LOCK:
            _SOURCES.add(self)

    @property
    def is_remote(self) -> bool:
        """Whether shards are read from local copies."""
        return self._cache is not None

    def read(self, numbers: np.ndarray, indices: np.ndarray) -> list[shards.Record]:
        """Records by shard and index in the shard, in the order that is asked for."""
        if not self._listed:
            _check_there(self._store, len(self._table))
            self._listed = True
        found: list[Any] = [None] * len(numbers)
        order = np.lexsort((indices, numbers))
        cuts = np.flatnonzero(np.diff(numbers[order])) + 1

        def read(places: np.ndarray) -> None:
            wanted = indices[places].tolist()
            for place, record in zip(
                places, self._read(int(numbers[places[0]]), wanted), strict=True
            ):
                found[place] = record

        each_of(read, np.split(order, cuts) if len(order) else [], self._threads)
        return found

    def ahead(self, current: set[int], wanted: set[int]) -> None:
        """Says which shards are read now, and which now or next.

        It does nothing for a local folder. Shards that are not read now are closed, so
        that they may leave the cache: before those that are wanted and not read yet.
        All that are wanted are fetched in the background; one that fails is fetched
        again when it is read.
        """
        if self._cache is None:
            return
        with self._lock:
            left = [self._open.pop(n) for n in [*self._open] if n not in current]
            new = sorted(wanted - self._wanted, key=lambda n: n not in current)
            unread = wanted - self._open.keys() if left else set()
            self._wanted = wanted
        for number in sorted(unread, key=lambda n: n in current):
            self._cache.keep(self._table.summary(number))
        for shard in left:
            shard.close()
        for number in new:
            self._asked.put(number)
            if len(self._fetching) < _AHEAD:
                thread = threading.Thread(target=self._fetch_asked, daemon=True)
                self._fetching.append(thread)
                thread.start()

    def close(self) -> None:
        """Closes all shards, so that they may leave the cache. Reading opens them."""
        with self._lock:
            left = [*self._open.values()]
            self._open.clear()
        for shard in left:
            shard.close()

    def _most_open(self) -> int:
        """How many shards may stay open, given what other sources hold open."""
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if allowed == resource.RLIM_INFINITY:
            return self._open_shards
        # A copy of a remote shard is open twice: to be read, and to be held.
        with _SOURCES_LOCK:
            sources = [one for one in _SOURCES if one is not self]
        others = sum(len(one._open) * one._files_each for one in sources)
        left = (allowed // 2 - others) // self._files_each
        return max(min(self._open_shards, left), _FEWEST)

    @property
    def _files_each(self) -> int:
        return 2 if self.is_remote else 1

    def _fetch_asked(self) -> None:
        assert self._cache is not None
        while True:
            number = self._asked.get()
            if number in self._wanted:
                # Each store has exceptions of its own; `read` meets them again.
                with contextlib.suppress(Exception):
                    self._cache.prepare(number, self._table.summary(number))

    def _read(self, number: int, indices: Sequence[int]) -> list[shards.Record]:
        while True:
            shard = self._opened(number)
            with shard.lock:
                if shard.closed:
                    continue
                packed = shard.reader.packed(indices)
            return shard.reader.unpacked(indices, packed)

    def _opened(self, number: int) -> _OpenShard:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        opened = self._open_shard(number)
        with self._lock:
            kept = self._open.setdefault(number, opened)
            left = [opened] if kept is not opened else []  # another thread was first
            most = self._most_open()
            while len(self._open) > most:
                left.append(self._open.popitem(last=False)[1])
        for shard in left:
            shard.close()
        return kept

    def _open_shard(self, number: int) -> _OpenShard:
        summary = self._table.summary(number)
        if self._cache is None:
            path = self._store.path_of(shards.shard_name(number))
            if number not in self._checked:  # another thread may do the same
                seals.check_shard(path, summary)
                self._checked.add(number)
            return _OpenShard(ShardReader(path, summary, self._layout), None)
        while True:
            try:
                path, held = self._cache.hold(number, summary)
            except CacheFull:
                if not self._close_one():
                    raise
            else:
                reader = ShardReader(path, summary, self._layout)
                return _OpenShard(reader, held)

    def _close_one(self) -> bool:
        """Closes the shard that was read longest ago; False if none is open."""
        with self._lock:
            if not self._open:
                return False
            _, shard = self._open.popitem(last=False)
        shard.close()
        return True


_SOURCES: weakref.WeakSet[ShardFiles] = weakref.WeakSet()  # of this process
_SOURCES_LOCK = threading.Lock()


class ShardReader:
    """Random access to the records of one shard; see `seals.check_shard`.

    Raises:
      Damaged: the file cannot be read, or holds another number of records.
    """

    def __init__(
        self, path: pathlib.Path, summary: Mapping[str, Any], layout: shards.Layout
    ) -> None:
        self._path, self._layout = path, layout
        try:
            self._file = array_record_module.ArrayRecordReader(
                str(path), _READ, file_reader_buffer_size=1 << 15
            )
            found = self._file.num_records()
        except (OSError, RuntimeError, ValueError) as e:
            raise records.Damaged(f"{path} cannot be read: {e}") from e
        if found != summary["records"]:
            raise records.Damaged(
                f"{path}: {found} records; wanted {summary['records']}"
            )

    def packed(self, indices: Sequence[int]) -> list[bytes]:
        """Some records as bytes, for one thread at a time.

        Raises:
          Damaged: a record cannot be read; the error names shard and index.
        """
        try:
            return self._file.read(indices)
        except RuntimeError:
            return [self._one(index) for index in indices]

    def unpacked(
        self, indices: Sequence[int], found: Sequence[bytes]
    ) -> list[shards.Record]:
        """What `packed` gave, as records.

        Raises:
          Damaged: a record is not what was written; the error names shard and index.
        """
        return [
            shards.unpack(data, self._layout, f"{self._path}: record {index}")
            for index, data in zip(indices, found, strict=True)
        ]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _one(self, index: int) -> bytes:
        try:
            return self._file.read([index])[0]
        except RuntimeError as e:
            raise records.Damaged(
                f"{self._path}: record {index} cannot be read: {e}"
            ) from e


class _OpenShard:
    """A reader, one thread at a time; its file is held until it is closed."""

    def __init__(self, reader: ShardReader, held: BinaryIO | None) -> None:
        self.reader, self._held = reader, held
        if held is not None:  # it is closed with this object, too
            weakref.finalize(self, held.close)
        self.lock, self.closed = threading.Lock(), False

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.reader.close()
            if self._held is not None:
                self._held.close()


def _check_there(store: shards.Store, count: int) -> None:
    """Looks for shards 0 to count - 1 in one listing of the folder.

    Raises:
      Damaged: some are missing; it names the first one.
    """
    there = store.names()
    missing = [
        name for n in range(count) if (name := shards.shard_name(n)) not in there
    ]
    if missing:
        raise records.Damaged(
            f"{store.folder}/{missing[0]} is missing, one of {len(missing):,} shards "
            f"that are not there, of {count:,}",
            shards.MADE_ANEW,
        )


def each_of(work: Any, parts: Sequence[Any], threads: int) -> None:
    """Calls a function with each part, in several threads; raises its first error."""
    if threads < 2 or len(parts) < 2:
        for part in parts:
            work(part)
        return
    for done in [pool(threads).submit(work, part) for part in parts]:
        done.result()


@functools.cache
def pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """The threads that read records; all sources of a process share them."""
    return concurrent.futures.ThreadPoolExecutor(threads, "records")
