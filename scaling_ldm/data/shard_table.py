"""What is known of every shard of a folder, in arrays: counts, checksums, the split.

A set of 600 million records in 150,000 shards takes 80 MB here, of which 75 MB say
which records are held out, one bit each. The table is a file of its own beside the
manifest, which has its digest. Manifests of 0.1.0 hold the same as a list in JSON.
"""

from __future__ import annotations

import base64
import functools
import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from scaling_ldm import records
from scaling_ldm.data import shards

FILE = "shards.npz"
_COLUMNS = ("records", "bytes", "checksums", "held_out")
_TOGETHER = 1000  # shards whose bits are counted at once
_KEPT = 1024  # shards whose records of one split stay listed

Counts = Int64[np.ndarray, "shards"]
Starts = Int64[np.ndarray, "shards_and_one"]
Checksums = UInt8[np.ndarray, "shards 16"]
Packed = UInt8[np.ndarray, "bytes"]
Flags = Bool[np.ndarray, "records"]
Places = Int64[np.ndarray, "n"]


class ShardTable:
    """The shards of a folder.

    Args:
      records: of each shard.
      nbytes: of each shard's file.
      checksums: of each shard's file.
      held_out: which records are held out. Each shard begins with a new byte, and
        within a byte the first record is the highest bit.
    """

    def __init__(
        self,
        records: Counts,
        nbytes: Counts,
        checksums: Checksums,
        held_out: Packed,
    ) -> None:
        self.records, self.nbytes = records, nbytes
        self._checksums, self._held_out = checksums, held_out
        self._first_byte = _starts((records + 7) // 8)

    @classmethod
    def of_summaries(cls, found: Iterable[Mapping[str, Any]]) -> ShardTable:
        """The table of some summaries of shards; see `shards.Writer.finish`."""
        found = list(found)
        packed = [base64.b64decode(one["held_out"]) for one in found]
        checksums = b"".join(bytes.fromhex(one["checksum"]) for one in found)
        return cls(
            np.array([one["records"] for one in found], np.int64),
            np.array([one["bytes"] for one in found], np.int64),
            np.frombuffer(checksums, np.uint8).reshape(len(found), -1),
            np.frombuffer(b"".join(packed), np.uint8),
        )

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.records)

    def summary(self, number: int) -> dict[str, Any]:
        """What a shard has to be, as `seals.check_shard` reads it."""
        return {
            "records": int(self.records[number]),
            "bytes": int(self.nbytes[number]),
            "checksum": self._checksums[number].tobytes().hex(),
        }

    def held_out(self, number: int) -> Flags:
        """Which records of a shard are held out."""
        first, end = self._first_byte[number : number + 2]
        bits = np.unpackbits(self._held_out[first:end], count=int(self.records[number]))
        return bits.astype(bool)

    def held_out_counts(self) -> Counts:
        """How many records of each shard are held out."""
        found = np.zeros(len(self), np.int64)
        some = np.flatnonzero(self.records)  # others have no byte of their own
        for part in np.array_split(some, len(some) // _TOGETHER + 1):
            if len(part):
                first = self._first_byte[part]
                bits = self._held_out[first[0] : self._first_byte[part[-1] + 1]]
                counts = np.bitwise_count(bits)
                found[part] = np.add.reduceat(counts, first - first[0], dtype=np.int64)
        return found

    def to_bytes(self) -> bytes:
        """The content of FILE."""
        file = io.BytesIO()
        columns = self.records, self.nbytes, self._checksums, self._held_out
        arrays: dict[str, Any] = dict(zip(_COLUMNS, columns, strict=True))
        np.savez(file, **arrays)
        return file.getvalue()


class Side:
    """The records of one split, by number: shard after shard, in their order there.

    Attributes:
      counts: records of each shard.
      starts: int64 [shards + 1]; the number of each shard's first record, then how many
        records there are.
    """

    def __init__(self, table: ShardTable, validation: bool) -> None:
        self._table, self._validation = table, validation
        held_out = table.held_out_counts()
        self.counts = held_out if validation else table.records - held_out
        self.starts = _starts(self.counts)
        self._of_shard = functools.lru_cache(maxsize=_KEPT)(self._listed)

    def __len__(self) -> int:
        """Number of records."""
        return int(self.starts[-1])

    def shards(self, places: Places) -> Places:
        """The shard of each record."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def within(self, number: int, places: Places) -> Places:
        """The indices in a shard of some of its records.

        Args:
          places: numbers of the records in this split.
        """
        return self._of_shard(number)[places - self.starts[number]]

    def _listed(self, number: int) -> Places:
        return np.flatnonzero(self._table.held_out(number) == self._validation)


def described(content: bytes, count: int) -> dict[str, Any]:
    """What the manifest says of the table.

    Args:
      content: of FILE.
      count: of the shards.
    """
    return {"count": count, "digest": shards.digest_of(content)}


def read(store: shards.Store, manifest: Mapping[str, Any]) -> ShardTable:
    """The table of a folder of finished records. No shard is touched.

    Raises:
      Damaged: the file is missing, or is not that of the manifest.
    """
    said: Mapping[str, Any] | Sequence[Any] = manifest["shards"]
    if not isinstance(said, Mapping):
        return ShardTable.of_summaries(said)
    where = f"{store.folder}/{FILE}"
    if (content := store.read(FILE)) is None:
        raise records.Damaged(f"{where} is missing", shards.MADE_ANEW)
    if shards.digest_of(content) != said["digest"]:
        raise records.Damaged(
            f"{where} has changed: its digest differs", shards.MADE_AGAIN
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            table = ShardTable(*(found[name] for name in _COLUMNS))
    except (KeyError, ValueError, zipfile.BadZipFile) as e:
        raise records.Damaged(
            f"{where} holds no table of shards: {e!r}", shards.MADE_AGAIN
        ) from e
    if len(table) != said["count"]:
        raise records.Damaged(
            f"{where}: {len(table)} shards; wanted {said['count']}", shards.MADE_AGAIN
        )
    return table


def _starts(counts: Counts) -> Starts:
    """0, then the sums of the first 1, 2, ... counts."""
    found = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=found[1:])
    return found
