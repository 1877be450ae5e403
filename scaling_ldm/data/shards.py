"""Shards of encoded pictures: the bytes of a record, and the files of a folder.

A folder of records holds
    split.json                  which pictures are held out, written first
    identity.json               what the records are made of
    shard-00000.array_record    records of consecutive pictures
    shard-00000.json            counts, sums and the checksum of that shard, written
                                after it: with this file a shard is complete
    shards.npz                  counts and checksums of all shards, and which records
                                are held out; see `shard_table`
    manifest.json               everything that training reads first, written last

A record is a header, an array (moments or pixels), text features of the tokens without
padding (if there is a text encoder), the caption, and the name of the picture. Numbers
are little-endian. The header begins with the CRC-32 of all that follows it.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pathlib
import posixpath
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec
import ml_dtypes  # noqa: F401  teaches numpy bfloat16
import numpy as np
from array_record.python import array_record_module

from scaling_ldm import config, records
from scaling_ldm.data.vocabulary import words
from scaling_ldm.records import backends, store_errors

IDENTITY, SPLIT, MANIFEST = "identity.json", "split.json", "manifest.json"
# What to do about a file of records that is damaged, and about one that is missing.
MADE_AGAIN = (
    f"put a copy back; or remove it and {MANIFEST} beside it, and --stages encode "
    "makes it again"
)
MADE_ANEW = f"put a copy back; or remove {MANIFEST}, and --stages encode makes it again"
VERSION = 1
SUFFIX = ".array_record"
_HEADER = struct.Struct("<IIIIHBi")  # checksum, three lengths, tokens, flags, label
_CHECKED = 4  # the checksum covers the bytes after these
_NO_LABEL = -1
_PARTIAL = ".partial"
# Records that are compressed one by one can be read one by one.
_WRITE = "group_size:1"
_PLAIN = f"{_WRITE},uncompressed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What the records of a folder have in common.

    Attributes:
      shape: of the array: [h, w, 2 Z] moments, or [H, W, 3] pixels.
      dtype: of the array: "uint8" for pixels.
      text_width: E of the text features; 0 if the text is only the caption.
      text_dtype: of the text features.
    """

    shape: tuple[int, int, int]
    dtype: str
    text_width: int = 0
    text_dtype: str = "float16"

    @property
    def nbytes(self) -> int:
        """Bytes of a record's array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One encoded picture. features: [tokens, E], or None."""

    x: np.ndarray
    features: np.ndarray | None
    caption: str
    name: str
    label: int | None
    held_out: bool


def pack(record: Record) -> bytes:
    """A record as bytes."""
    features = b"" if record.features is None else record.features.tobytes()
    tokens = 0 if record.features is None else len(record.features)
    caption, name = record.caption.encode(), record.name.encode()
    label = _NO_LABEL if record.label is None else record.label
    header = _HEADER.pack(
        0, len(features), len(caption), len(name), tokens, record.held_out, label
    )
    rest = header[_CHECKED:] + record.x.tobytes() + features + caption + name
    return struct.pack("<I", zlib.crc32(rest)) + rest


def unpack(data: bytes, layout: Layout, where: str) -> Record:
    """The inverse of `pack`.

    Raises:
      Damaged: the bytes are not those that `pack` gave.
    """
    if len(data) < _HEADER.size:
        raise records.Damaged(f"{where} is cut short: {len(data)} bytes")
    checksum, *sizes, tokens, held_out, label = _HEADER.unpack_from(data)
    if zlib.crc32(memoryview(data)[_CHECKED:]) != checksum:
        raise records.Damaged(f"{where} has changed: its checksum differs")
    dtype, text_dtype = np.dtype(layout.dtype), np.dtype(layout.text_dtype)
    values = layout.shape[0] * layout.shape[1] * layout.shape[2]
    ends = np.cumsum([_HEADER.size, values * dtype.itemsize, *sizes]).tolist()
    wanted = tokens * layout.text_width * text_dtype.itemsize
    if ends[-1] != len(data) or sizes[0] != wanted:
        raise records.Damaged(f"{where} does not have the layout of the manifest")
    features = None
    if layout.text_width:
        flat = np.frombuffer(data, text_dtype, tokens * layout.text_width, ends[1])
        features = flat.reshape(tokens, layout.text_width)
    x = np.frombuffer(data, dtype, values, ends[0])
    return Record(
        x=x.reshape(layout.shape),
        features=features,
        caption=data[ends[2] : ends[3]].decode(),
        name=data[ends[3] : ends[4]].decode(),
        label=None if label == _NO_LABEL else label,
        held_out=bool(held_out),
    )


def shard_name(number: int) -> str:
    """The name of a file of records; its summary has the same stem."""
    return f"shard-{number:05d}{SUFFIX}"


def summary_name(number: int) -> str:
    """The name of the file that makes a shard complete."""
    return f"shard-{number:05d}.json"


class Store:
    """The folder of the records: local, or a URL that fsspec knows ("gs://...").

    A file appears when it is complete. Where a URL's store fails, it is an OSError, as
    `store_errors.asking` says it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._far = "://" in folder and not folder.startswith("file://")
        local = os.path.abspath(os.path.expanduser(folder.removeprefix("file://")))
        try:
            given = backends.options(folder.partition("://")[0]) if self._far else {}
            self._fs, self._base = fsspec.core.url_to_fs(
                folder if self._far else local, **given
            )
        except ImportError as e:
            raise backends.not_installed(folder, e) from e
        except Exception as e:  # no backend, or credentials that are wrong
            raise config.ConfigError(
                f"{folder} cannot be opened: {type(e).__name__}: {e}"
            ) from e

    @property
    def local(self) -> pathlib.Path | None:
        """The folder; None if it is a URL."""
        return None if self._far else pathlib.Path(self._base)

    def _path(self, name: str) -> str:
        return posixpath.join(self._base, name)

    def _asking(self, name: str, doing: str = "read") -> Any:
        """Around what a store is asked; on a disk, errors are what they are."""
        if not self._far:
            return contextlib.nullcontext()
        return store_errors.asking(posixpath.join(self.folder, name), doing)

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if there is none."""
        try:
            with self._asking(name):
                return self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None

    def read_json(self, name: str, *keys: str) -> Any:
        """A file's value; None if there is none.

        Args:
          keys: that it must have.

        Raises:
          Damaged: it is not a JSON object, or lacks one of the keys.
        """
        if (data := self.read(name)) is None:
            return None
        path = self._path(name)
        if name == IDENTITY:  # it has a version of its own
            return records.json_object(data, path, *keys, stamped=False)
        return records.unstamped(records.json_object(data, path, *keys), path)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a file's value, with the version of its schema."""
        stamped = value if name == IDENTITY else records.stamped(value)
        text = json.dumps(stamped, indent=1) + "\n"
        if self._far:
            with self._asking(name, "write"):
                self._fs.pipe_file(self._path(name), text.encode())
        else:
            records.write_text(self._path(name), text)

    def names(self) -> set[str]:
        """Every file in the folder."""
        try:
            with self._asking(""):
                found = self._fs.ls(self._base, detail=False)
        except FileNotFoundError:
            return set()
        return {posixpath.basename(path) for path in found}

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._asking(name, "remove"):
            self._fs.rm_file(self._path(name))

    @contextlib.contextmanager
    def replace(self, name: str) -> Iterator[pathlib.Path]:
        """A local path to write; it becomes the file `name` if no error is raised."""
        if self._far:
            with tempfile.TemporaryDirectory() as folder:
                partial = pathlib.Path(folder) / name
                yield partial
                partial.stat()  # if it is not there, no bucket is missing
                with self._asking(name, "write"):
                    self._fs.put_file(str(partial), self._path(name))
            return
        target = pathlib.Path(self._path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        # Another job may be writing the same; the lock ends with this process.
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=f".{name}.", suffix=_PARTIAL, delete=False
        ) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            partial = pathlib.Path(file.name)
            with records.unfinished(partial), records.writing(target):
                yield partial
                os.fsync(file.fileno())
                partial.chmod(0o666 & ~_umask())
                os.replace(partial, target)

    def path_of(self, name: str) -> pathlib.Path:
        """The local path of a file of a local folder.

        Raises:
          Damaged: the file is not there.
        """
        path = pathlib.Path(self._path(name))
        if not path.exists():
            raise records.Damaged(f"{path} is missing")
        return path

    def copy(self, name: str, target: pathlib.Path) -> None:
        """Copies a file to a local path.

        Raises:
          Damaged: the file is not there.
        """
        try:
            with self._asking(name):
                self._fs.get_file(self._path(name), str(target))
        except FileNotFoundError as e:
            raise records.Damaged(f"{self._path(name)} is missing") from e

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of bytes."""
        with self.replace(name) as path:
            path.write_bytes(content)


def _sweep(target: pathlib.Path) -> None:
    """Removes partial files of killed processes, which are the unlocked ones."""
    for left in target.parent.glob(f".{target.name}.*{_PARTIAL}"):
        # NFS gives this lock only on a file that is open for writing.
        with contextlib.suppress(OSError), open(left, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _umask() -> int:
    """The permissions that new files do not get. Reading them needs setting them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class Writer:
    """Writes one shard and its summary.

    Args:
      count_words: whether to count the words of training captions, for a vocabulary.
      compressed: whether the file is compressed. Moments and features that are not are
        7 to 9% larger, and are read in 40% of the CPU time.

    Attributes:
      bytes: size of the records so far, before compression.
    """

    def __init__(
        self, path: pathlib.Path, count_words: bool, compressed: bool = True
    ) -> None:
        self.bytes = 0
        self._path, self._count_words = path, count_words
        self._file = array_record_module.ArrayRecordWriter(
            str(path), _WRITE if compressed else _PLAIN
        )
        self._held_out: list[bool] = []
        self._labels: list[int] = []
        self._words: collections.Counter[str] = collections.Counter()
        self._sums: Any = 0.0
        self._squares: Any = 0.0

    def add(self, record: Record, mean: np.ndarray, variance: np.ndarray) -> None:
        """Appends a record.

        Args:
          mean, variance: float32 [h, w, C], of the values that a denoiser will read.
        """
        data = pack(record)
        self._file.write(data)
        self.bytes += len(data)
        self._held_out.append(record.held_out)
        if record.label is not None:
            self._labels.append(record.label)
        if not record.held_out:
            mean = mean.astype(np.float64)
            self._sums += mean.sum((0, 1))
            self._squares += (mean**2 + variance).sum((0, 1))
            if self._count_words:
                self._words.update(words(record.caption))

    def finish(self, bad: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Closes the file; returns the summary of the shard, for JSON."""
        self.close()
        bits = np.packbits(np.array(self._held_out, bool)).tobytes()
        return {
            "records": len(self._held_out),
            "train": self._held_out.count(False),
            "held_out": base64.b64encode(bits).decode(),
            "bytes": self._path.stat().st_size,
            "checksum": file_digest(self._path),
            "labels": len(self._labels),
            "largest_label": max(self._labels, default=-1),
            "sums": np.atleast_1d(self._sums).tolist(),
            "squares": np.atleast_1d(self._squares).tolist(),
            "words": dict(sorted(self._words.items())),
            "bad": [list(one) for one in bad],
        }

    def close(self) -> None:
        """Closes the file, whether it is complete or not."""
        if self._file.is_open():
            self._file.close()


def file_digest(path: pathlib.Path) -> str:
    """32 hexadecimal digits of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.blake2b(digest_size=16)
        ).hexdigest()


def digest_of(data: bytes) -> str:
    """What `file_digest` gives for a file of these bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
