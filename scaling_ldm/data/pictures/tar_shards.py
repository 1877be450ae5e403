"""WebDataset shards: tar files whose members of one name are a sample.

    shard-00000.tar: 000001.jpg 000001.txt 000002.jpg 000002.json 000002.cls ...

A sample has a picture (.jpg, .png, .webp, ...), a caption (.txt, .caption, or .json
with such an entry) and perhaps a label (.cls). Other members are ignored. `tar_index`
says which members are of one sample.

The headers of every shard are read once, and the places of the members are stored in a
cache. Then a sample is one read of a part of a file, local or remote. For a remote
shard the first pass reads about the whole shard.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import hashlib
import itertools
import pathlib
import tarfile

import numpy as np

from scaling_ldm import config
from scaling_ldm.data import storage
from scaling_ldm.data.pictures import columns, record, tar_index
from scaling_ldm.records.errors import NO_ARRAYS

_VERSION = 3  # of the cached index; another number reads the headers again
_GAP = 1 << 20  # unneeded bytes that are read to get a sample in one request


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
        if lost := sorted(self._folder.dangling):
            raise config.ConfigError(
                f"{path}: {len(lost)} shards are links that lead nowhere, or no files "
                f"({lost[0]}, ...); get them, or leave them out"
            )
        packed = [n for n in self._shards if n.lower().endswith((".gz", ".tgz"))]
        if packed:
            raise config.ConfigError(
                f"{path}: {len(packed)} compressed shards ({packed[0]}, ...) do not "
                "allow random access; unpack them with gunzip"
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
        further = sum(int(index.further) for index in self._indices)
        if further:
            self.captions_from += (
                f" ({further:,} more pictures are not read: further parts of samples, "
                "as 17.mask.png beside 17.jpg)"
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
            raise record.BadRecord(name, tar_index.TROUBLES[trouble])
        spans = table.spans[row].copy()
        if spans[tar_index.TEXT, 1] >= 0:
            spans[tar_index.JSON] = 0, -1  # a text file takes precedence
        parts = self._parts(shard, spans)
        if tar_index.TEXT in parts:
            caption = parts[tar_index.TEXT]
        else:
            entries = columns.json_object(parts[tar_index.JSON], name)
            caption = columns.caption_in(entries, self._caption, name)
        label = parts.get(tar_index.LABEL)
        return record.Picture(
            image=record.decode(parts[tar_index.PICTURE], name),
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

    def _cached(self, shard: str, folder: pathlib.Path) -> tar_index.Index | str:
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
                return tar_index.Index(**stored)
        except (*NO_ARRAYS, OSError):
            pass  # not there yet, or damaged: read the headers
        try:
            with self._folder.open(shard) as opened:
                index = tar_index.read_headers(opened)
        except tarfile.TarError as e:
            return f"{shard}: {e}"
        except (ValueError, OverflowError, RecursionError) as e:  # impossible headers
            return f"{shard}: its headers are invalid ({type(e).__name__}: {e})"
        with storage.atomic(target) as partial, partial.open("wb") as out:
            np.savez(out, **vars(index))
        return index
