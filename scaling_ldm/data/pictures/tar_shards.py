"""WebDataset shards: tar files whose neighbouring members of one key are a sample.

    shard-00000.tar: 000001.jpg 000001.txt 000002.jpg 000002.json 000002.cls ...

The key is the member's path up to the first dot of its last part. A sample has a
picture (.jpg, .png, .webp, ...), a caption (.txt, .caption, or .json with such an
entry) and perhaps a label (.cls). Other members are ignored.

The headers of every shard are read once, and the places of the members are stored in a
cache. Then a sample is one read of a part of a file, local or remote. For a remote
shard the first pass reads about the whole shard.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import pathlib
import tarfile
import zipfile
from typing import Any

import numpy as np

from scaling_ldm import config
from scaling_ldm.data import storage
from scaling_ldm.data.pictures import columns, record

_VERSION = 1  # of the cached index; another number reads the headers again
_PICTURE, _TEXT, _JSON, _LABEL = range(4)  # parts of a sample
_PARTS = {suffix: _PICTURE for suffix in record.SUFFIXES} | {
    ".txt": _TEXT,
    ".caption": _TEXT,
    ".json": _JSON,
    ".cls": _LABEL,
}
_TROUBLES = (
    "",
    "it has no picture",
    "it has no caption: neither .txt, .caption nor .json",
    "a part of it is a link or a sparse file",
    "it has two pictures, captions or labels",
)
_NO_PICTURE, _NO_CAPTION, _NO_FILE, _TWICE = range(1, 5)
_GAP = 1 << 20  # unneeded bytes that are read to get a sample in one request


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Index:
    """The samples of a shard.

    Attributes:
      keys: bytes [n].
      spans: int64 [n, 4, 2], (offset, size) of each part; size -1 if it has none.
      trouble: uint8 [n], an index into _TROUBLES.
    """

    keys: np.ndarray
    spans: np.ndarray
    trouble: np.ndarray


class TarShards:
    """Samples of WebDataset shards, in the order of the shards' names.

    Args:
      path: folder, shard, pattern ("shard-{00000..00099}.tar", "*.tar") or URL.
      caption: entry of the .json parts; "" for one with a usual name.
      cache: local folder of the indices; "" for the user's cache.

    Raises:
      ConfigError: no shards, compressed shards, or shards that are cut off or no tar
        files.
    """

    def __init__(self, path: str, caption: str = "", cache: str = "") -> None:
        self._folder = storage.find(path, (".tar", ".tar.gz", ".tgz"))
        self._shards = list(self._folder.files)
        packed = [n for n in self._shards if n.lower().endswith((".gz", ".tgz"))]
        if packed:
            raise config.ConfigError(
                f"{path}: {len(packed)} compressed shards ({packed[0]}, ...) cannot be "
                "read at random; unpack them with gunzip (pictures hardly shrink)"
            )
        self._caption = caption
        folder = storage.cache_folder(cache) / "tar"
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda n: self._cached(n, folder), self._shards))
        broken = [item for item in found if isinstance(item, str)]
        if broken:
            lines = "\n  ".join(broken[:20])
            raise config.ConfigError(
                f"{path}: {len(broken)} of {len(found)} shards are broken; copy them "
                f"again or leave them out:\n  {lines}"
            )
        self._indices = [item for item in found if not isinstance(item, str)]
        counts = [len(index.keys) for index in self._indices]
        if not sum(counts):
            raise config.ConfigError(f"{path}: there is no sample in its shards")
        self._starts = [0, *itertools.accumulate(counts)]
        # The name and size of every member; the size of a shard is rounded up.
        files = [
            (
                name,
                hashlib.sha256(index.keys.tobytes() + index.spans.tobytes()).digest(),
            )
            for name, index in zip(self._shards, self._indices, strict=True)
        ]
        entry = f"the entry {caption!r}" if caption else "an entry"
        self.captions_from = (
            f"the .txt or .caption part of a sample, or {entry} of .json"
        )
        self.identity = record.listing_digest("webdataset", files, caption)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> record.Picture:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        shard, table = self._shards[number], self._indices[number]
        row = index - self._starts[number]
        key = table.keys[row].decode("utf-8", "replace")
        name = f"{shard}:{key}"
        if trouble := int(table.trouble[row]):
            raise record.BadRecord(name, _TROUBLES[trouble])
        spans = table.spans[row].copy()
        if spans[_TEXT, 1] >= 0:
            spans[_JSON] = 0, -1  # a text file takes precedence
        parts = self._parts(shard, spans)
        if _TEXT in parts:
            caption = parts[_TEXT]
        else:
            caption = self._entry(parts[_JSON], name)
        label = parts.get(_LABEL)
        return record.Picture(
            image=record.decode(parts[_PICTURE], name),
            caption=record.clean_caption(caption, name),
            name=name,
            label=None if label is None else columns.whole(label, name),
        )

    def _parts(self, shard: str, spans: np.ndarray) -> dict[int, bytes]:
        """The bytes of each part that is there."""
        there = spans[spans[:, 1] >= 0]
        first, last = int(there[:, 0].min()), int(there.sum(1).max())
        near = last - first <= int(there[:, 1].sum()) + _GAP
        data = self._folder.read(shard, first, last - first) if near else b""
        parts = {}
        for part in np.flatnonzero(spans[:, 1] >= 0).tolist():
            at, size = spans[part].tolist()
            if near:
                parts[part] = data[at - first : at - first + size]
            else:
                parts[part] = self._folder.read(shard, at, size)
        return parts

    def _entry(self, data: bytes, name: str) -> object:
        try:
            entries = json.loads(data)
        except ValueError as e:  # no JSON, or not UTF-8
            raise record.BadRecord(name, f"its .json cannot be read: {e}") from e
        if not isinstance(entries, dict):
            raise record.BadRecord(name, "its .json is no object")
        try:
            key = columns.choose(
                entries, self._caption, columns.CAPTION, "caption", ".json"
            )
        except config.ConfigError as e:
            raise record.BadRecord(name, str(e)) from e
        return columns.first(entries[key])

    def _cached(self, shard: str, folder: pathlib.Path) -> _Index | str:
        """The index of a shard, or what is wrong with it."""
        file = self._folder.files[shard]
        place = self._folder.location(shard)
        told = f"{_VERSION} {place} {file.size} {file.stamp}"
        target = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.npz"
        try:
            with (
                open(target, "rb") as opened,
                np.load(opened, allow_pickle=False) as stored,
            ):
                return _Index(**stored)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
            pass  # not there yet, or damaged: read the headers
        try:
            with self._folder.open(shard) as opened:
                index = _read_headers(opened)
        except tarfile.TarError as e:
            return f"{shard}: {e}"
        with storage.atomic(target) as partial, partial.open("wb") as out:
            np.savez(out, **vars(index))
        return index


def _read_headers(file: Any) -> _Index:
    """One pass over the headers of a shard; TarError if it is broken."""
    keys, spans, trouble = [], [], []
    previous = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            # It would keep them all.
            tar.members.clear()  # pyrefly: ignore[missing-attribute]  # not in stubs
            folder, slash, last = member.name.rpartition("/")
            stem, dot, ending = last.partition(".")
            part = _PARTS.get(dot + ending.lower())
            if member.isdir() or not stem:
                continue
            key = folder + slash + stem
            if key != previous:
                previous = key
                keys.append(key.encode("utf-8", "surrogateescape"))
                spans.append([[0, -1] for _ in range(4)])
                trouble.append(0)
            if part is None:
                continue
            if not member.isreg() or member.issparse():
                trouble[-1] = _NO_FILE
            elif spans[-1][part][1] >= 0:
                trouble[-1] = _TWICE
            spans[-1][part] = [member.offset_data, member.size]
        # tarfile stops without an error at a header that it cannot read.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header where one should be, byte {tar.offset}")
    rows = np.array(spans, np.int64).reshape(-1, 4, 2)
    marks = np.array(trouble, np.uint8)
    there = rows[:, :, 1] >= 0
    marks[(marks == 0) & ~there[:, _PICTURE]] = _NO_PICTURE
    marks[(marks == 0) & ~there[:, [_TEXT, _JSON]].any(1)] = _NO_CAPTION
    return _Index(keys=np.array(keys, np.bytes_), spans=rows, trouble=marks)
