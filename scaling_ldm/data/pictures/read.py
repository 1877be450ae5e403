"""Reads records in several threads and gives them in order; uses grain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np

from scaling_ldm.data.pictures.record import BadRecord, Picture, Pictures


class _PreparedPictures:
    """A grain data source: record i is (indices[i], the picture or BadRecord there)."""

    def __init__(
        self,
        pictures: Pictures,
        indices: Sequence[int] | np.ndarray,
        prepare: Callable[[Picture], Any],
    ) -> None:
        self._pictures, self._indices, self._prepare = pictures, indices, prepare

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> tuple[int, Any]:
        number = int(self._indices[int(index)])
        try:
            return number, self._prepare(self._pictures.read(number))
        except BadRecord as bad:
            return number, bad

    def __repr__(self) -> str:
        return f"{len(self)} records of {type(self._pictures).__name__}"


def read_ahead(
    pictures: Pictures,
    indices: Sequence[int] | np.ndarray,
    workers: int = 2,
    prepare: Callable[[Picture], Any] = lambda picture: picture,
) -> Iterator[tuple[int, Any]]:
    """(index, picture or BadRecord) for each index, in the order given.

    Decoding releases the interpreter lock, so threads use several cores. A remote store
    needs more threads than there are cores. At most 4 * workers records are in memory.

    Args:
      workers: number of threads; with 0 nothing is read ahead.
      prepare: applied to each picture in the threads, for example to `fit` it.

    Raises:
      The error of the store (see `Pictures.read`), when the turn of its record comes.
    """
    if not len(indices):
        return
    source = _PreparedPictures(pictures, indices, prepare)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * workers)
    yield from grain.MapDataset.source(source).to_iter_dataset(options)
