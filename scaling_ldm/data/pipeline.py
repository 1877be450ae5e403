"""From sources to an iterator of batches, through grain; everything is numpy.

A batch is known by its number alone: batch b holds positions b * B to b * B + B - 1 of
the stream, and a process computes only its own rows of it. So the stream is the same
for every number of processes. The state of the iterator is one number, and any number
of processes can continue from it.
"""

from __future__ import annotations

import functools
from typing import Protocol, SupportsIndex, runtime_checkable

import grain
import numpy as np

Rows = dict[str, np.ndarray]
Batches = grain.DatasetIterator


@runtime_checkable
class Source(Protocol):
    """Random access to an endless stream of pictures with captions.

    shape: (H, W, C) of a picture.
    classes: number of labels; 0 if rows have no "label".
    uncond: the empty condition of one picture, for caption dropout and guidance.
    rows(positions): "x" float32 [n, H, W, C] in [-1, 1] (or latents), "text" int32
      [n, S] (or features [n, S, E], as records store them), "mask" bool [n, S], and
      "label" int32 [n] if there are classes; of a mix also "part" int32 [n], the number
      of the part in config.data.mix. A pure function of the positions.
    captions(positions): the captions of the same pictures.
    """

    shape: tuple[int, int, int]
    classes: int
    uncond: Rows

    def rows(self, positions: np.ndarray) -> Rows: ...

    def captions(self, positions: np.ndarray) -> list[str]: ...


class _Batches:
    """A grain data source whose record b is batch b.

    Neighbouring batches are made together, about BLOCK rows at once. That is several
    times faster for small batches and does not change what is in them.
    """

    BLOCK = 512

    def __init__(self, source: Source, batch_size: int, rows: np.ndarray) -> None:
        self._source = source
        self._offsets = rows
        self._batch_size = batch_size
        self._together = max(self.BLOCK // len(self._offsets), 1)
        self._block = functools.lru_cache(maxsize=2)(self._make)

    def _make(self, block: int) -> Rows:
        first = block * self._together
        numbers = np.arange(first, first + self._together, dtype=np.int64)
        positions = numbers[:, None] * self._batch_size + self._offsets
        return self._source.rows(positions.reshape(-1))

    def __len__(self) -> int:
        return 2**40  # grain needs an end; no run gets there

    def __getitem__(self, index: SupportsIndex) -> Rows:
        block, place = divmod(int(index), self._together)
        rows = len(self._offsets)
        part = slice(place * rows, (place + 1) * rows)
        return {name: value[part] for name, value in self._block(block).items()}

    def __repr__(self) -> str:
        return f"batches of {self._batch_size} from {type(self._source).__name__}"


def batches(
    source: Source, *, batch_size: int, rows: np.ndarray, prefetch: int
) -> grain.DatasetIterator:
    """The training stream of this process.

    Args:
      batch_size: pictures in a global batch.
      rows: int64 [n]; the rows of each global batch that this process feeds.
      prefetch: batches that one thread makes ahead; with 0 none are made ahead.
    """
    dataset = grain.MapDataset.source(_Batches(source, batch_size, rows))
    options = grain.ReadOptions(
        num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch
    )
    return iter(dataset.to_iter_dataset(options))


def stack(iterator: Batches, count: int, rows: int) -> Rows:
    """The next `count` batches along a new leading axis of length `rows`.

    Rows beyond `count` are zero, because a compiled loop takes one shape.
    """
    stacked: Rows = {}
    for i in range(count):
        for name, value in next(iterator).items():
            if name not in stacked:
                stacked[name] = np.zeros((rows, *value.shape), value.dtype)
            stacked[name][i] = value
    return stacked
