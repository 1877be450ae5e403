"""Finds the samples of a tar file in one pass over its headers.

A member belongs to the sample of its name without the last ending: `a/img_v1.0001.png`
and `a/img_v1.0001.txt` are the sample `a/img_v1.0001`. The parts of a sample need not
be neighbours. After the end mark of an archive, a further archive may follow, as
`cat a.tar b.tar` makes it. It is read too.

WebDataset takes the name up to the first dot. So a member with two dots may be a
further part of a sample instead: `17.mask.png` beside `17.jpg` and `17.txt`. It is, if
a sample of its own would lack a picture or a caption and the other does not; see
`_further`.
"""

from __future__ import annotations

import dataclasses
import tarfile
from typing import Any

import numpy as np

from scaling_ldm.data.pictures import record, unread

PICTURE, TEXT, JSON, LABEL = range(4)  # parts of a sample
_PARTS = {suffix: PICTURE for suffix in record.SUFFIXES} | {
    ".txt": TEXT,
    ".caption": TEXT,
    ".json": JSON,
    ".cls": LABEL,
}
TROUBLES = (
    "",
    "it has no picture",
    "it has no caption: neither .txt, .caption nor .json",
    "a part of it is a link or a sparse file",
    "it has two pictures, captions or labels",
    "its parts are not neighbours, and another sample has its name: sort the tar by "
    "name (tar --sort=name) and give each sample a name of its own",
    "it is an archive or a pickle, which is not read: unpack it",
    "it has a label and no caption; where labels are all there is, use a folder for "
    "each class, with image_folder",
)
_NO_PICTURE, _NO_CAPTION, _NO_FILE, _TWICE, _SCATTERED, _PACKED, _LABEL = range(1, 8)
_RARE = 4  # a fifth span while the headers are read: a picture of an ending not COMMON
_PIECE = 1 << 20  # bytes that are read at once in search of another archive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """The samples of a shard.

    Attributes:
      keys: bytes [n].
      spans: int64 [n, 4, 2], (offset, size) of each part; size -1 if it has none.
      trouble: uint8 [n], an index into TROUBLES.
      further: int64 [], pictures that are further parts of samples, and not read.
    """

    keys: np.ndarray
    spans: np.ndarray
    trouble: np.ndarray
    further: np.ndarray


@dataclasses.dataclass(kw_only=True, slots=True)
class _TarSample:
    key: str
    spans: list[list[int]]
    known: bool = False  # whether it has any part that is read
    packed: bool = False  # whether it has an archive or a pickle
    trouble: int = 0
    runs: int = 0  # of neighbouring members

    def has(self, *parts: int) -> bool:
        return any(self.spans[part][1] >= 0 for part in parts)

    @property
    def whole(self) -> bool:
        return self.has(PICTURE, _RARE) and self.has(TEXT, JSON)


class _TarSamples:
    """Members one after another -> samples."""

    def __init__(self) -> None:
        self._all: list[_TarSample] = []
        self._open: dict[str, _TarSample] = {}  # the last of each key in this archive
        self._previous = self._last = ""  # keys: but for further parts, and of all

    def next_archive(self) -> None:
        """Parts of one sample are never in two archives."""
        self._open.clear()
        self._previous = self._last = ""

    def add(self, member: tarfile.TarInfo) -> None:
        folder, slash, last = member.name.rpartition("/")
        stem, dot, ending = last.rpartition(".")
        part = _PARTS.get(dot + ending.lower())
        if part is None:
            stem = last.partition(".")[0]
        if member.isdir() or not stem:
            return
        if part == PICTURE and dot + ending.lower() not in record.COMMON:
            part = _RARE
        sample = self._sample(folder + slash + stem, part)
        if part is None:
            sample.packed |= last.lower().endswith((*unread.ARCHIVES, *unread.PICKLES))
            return
        sample.known = True
        if not member.isreg() or member.issparse():
            sample.trouble = _NO_FILE
        elif sample.spans[part][1] >= 0 and part != _RARE:
            sample.trouble = _TWICE
        sample.spans[part] = [member.offset_data, member.size]

    def _sample(self, key: str, part: int | None) -> _TarSample:
        """The sample that a member with this part belongs to, perhaps a new one."""
        neighbours = key in (self._previous, self._last)
        found = self._open.get(key)
        taken = found is not None and part is not None and found.has(part)
        # Every picture has a record of its own, so that each bad one is counted.
        if found is None or taken and (part in (PICTURE, _RARE) or not neighbours):
            new = _TarSample(key=key, spans=[[0, -1] for _ in range(5)])
            if found is not None and neighbours:
                found.trouble = new.trouble = _TWICE
            found = self._open[key] = new
            self._all.append(found)
        found.runs += not neighbours
        self._last = key
        if not key.startswith(f"{self._previous}.") or not self._previous:
            self._previous = key
        return found

    def index(self) -> Index:
        """What has been found."""
        by_key: dict[str, list[_TarSample]] = {}
        for sample in self._all:
            by_key.setdefault(sample.key, []).append(sample)
        for alike in by_key.values():
            if len(alike) > 1 and any(sample.runs > 1 for sample in alike):
                for sample in alike:
                    sample.trouble = _SCATTERED
        above = {shorter for sample in self._all for shorter in _shorter(sample.key)}
        kept, further = [], 0
        for sample in self._all:
            if not sample.known and sample.key in above:
                continue  # `a.b.npy` of the sample `a.b`
            if _further(sample, by_key):
                further += sample.has(PICTURE, _RARE)
                continue
            kept.append(sample)
            if not sample.has(PICTURE):
                sample.spans[PICTURE] = sample.spans[_RARE]
            elif sample.has(_RARE):
                further += 1
            if not sample.trouble and not sample.whole:
                if sample.has(PICTURE):
                    sample.trouble = _LABEL if sample.has(LABEL) else _NO_CAPTION
                else:
                    sample.trouble = _PACKED if sample.packed else _NO_PICTURE
        keys = [sample.key.encode("utf-8", "surrogateescape") for sample in kept]
        rows = np.array([sample.spans[:_RARE] for sample in kept], np.int64)
        return Index(
            keys=np.array(keys, np.bytes_),
            spans=rows.reshape(-1, 4, 2),
            trouble=np.array([sample.trouble for sample in kept], np.uint8),
            further=np.array(further, np.int64),
        )


def _shorter(key: str) -> list[str]:
    """ "x/a.b", "x/a" of "x/a.b.c"."""
    folder, slash, last = key.rpartition("/")
    words = last.split(".")
    return [folder + slash + ".".join(words[:n]) for n in range(len(words) - 1, 0, -1)]


def _further(sample: _TarSample, by_key: dict[str, list[_TarSample]]) -> bool:
    """Whether this is a further part of a sample with a shorter name."""
    if sample.whole:
        return False
    others = [one for key in _shorter(sample.key) for one in by_key.get(key, ())]
    if not sample.has(PICTURE, _RARE):
        return any(one.has(PICTURE, _RARE) for one in others)
    return any(one.whole for one in others)


def read_headers(file: Any) -> Index:
    """One pass over the headers of a shard.

    Args:
      file: opened for reading bytes, seekable.

    Raises:
      TarError: it is broken, has no end mark, or bytes that are not an archive follow
        its end.
    """
    samples = _TarSamples()
    end = _read_archive(file, samples)
    while (start := _behind_zeros(file, end)) is not None:
        samples.next_archive()
        file.seek(start)
        try:
            end = _read_archive(file, samples)
        except tarfile.ReadError as e:
            raise tarfile.ReadError(
                f"the bytes after the end mark of an archive, from byte {start}, are "
                f"not an archive: {e}"
            ) from e
    return samples.index()


def _read_archive(file: Any, samples: _TarSamples) -> int:
    """Adds the members of the archive that begins here; the offset of its end mark."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        at = -1
        while member := tar.next():
            # tarfile would keep all members in memory.
            tar.members.clear()  # pyrefly: ignore[missing-attribute]  # not in stubs
            if tar.offset <= at:
                raise tarfile.ReadError(f"a member of negative size, byte {tar.offset}")
            at = tar.offset
            samples.add(member)
        # tarfile stops without an error at a header that it cannot read.
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block:
            raise tarfile.ReadError(
                f"it ends at byte {tar.offset} without the end mark of a tar, so it "
                "may be cut off; if it is whole, truncate -s +1024 adds the mark"
            )
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"no header where one should be, byte {tar.offset}")
        return tar.offset


def _behind_zeros(file: Any, at: int) -> int | None:
    """The offset of the first block that is not zero; None if there is none."""
    file.seek(at)
    zeros = 0
    while piece := file.read(_PIECE):
        if rest := piece.lstrip(b"\0"):
            zeros += len(piece) - len(rest)
            return at + zeros - zeros % tarfile.BLOCKSIZE
        zeros += len(piece)
    return None
