"""Which record each position of the stream has: every epoch has its own order.

`WholeOrder` shuffles all records of a split together, so the records of a batch are in
as many shards as it has rows. `WindowOrder` is for sets that are too large for this: a
batch opens few shards, and a host of many reads few of them.

In a `WindowOrder`, an epoch is a random permutation of the shards, one behind another.
This sequence of records is cut into LANES equal lanes. A lane is cut into windows of as
many records as `window` shards have on average, and each window is permuted. Positions
take RUN records of the first lane, RUN of the next one, and so on. So the rows of a
batch of LANES * RUN = 1024 on one of 64 hosts come from one lane, and therefore from at
most window + 1 shards. With fewer hosts, or other batches, a host has several lanes.
What is left when a lane is no multiple of RUN comes at the end of the epoch, in windows
too. Every record comes once an epoch.

Both are pure functions of (seed, position): the number of hosts and the size of a batch
change nothing, and any position can be continued from.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from scaling_ldm.data import hashing

LANES, RUN = 64, 16
_ORDER, _SHARDS, _WINDOW = 101, 103, 104  # streams of the hash; 102 is the noise

Places = Int64[np.ndarray, "n"]
Window = tuple[int, int, int]  # epoch, lane (LANES: the rest), number


def shards_of_batch(window: int) -> int:
    """The most shards that one window of every lane, and of the rest, has."""
    return (LANES + 1) * (window + 1)


@runtime_checkable
class Order(Protocol):
    """places(positions): int64 [n]; the number of each record in its split."""

    def places(self, positions: Places) -> Places: ...


class WholeOrder:
    """One permutation of all records for each epoch."""

    def __init__(self, seed: int, records: int) -> None:
        self._seed, self._records = seed, records

    def places(self, positions: Places) -> Places:
        epoch, slot = np.divmod(positions, self._records)
        keys = hashing.draw(self._seed, _ORDER, epoch.astype(np.uint64))
        return hashing.permute(slot, keys, self._records)


class WindowOrder:
    """A permutation of the shards for each epoch, and of the records in each window.

    Args:
      starts: of the split; see `shard_table.Side`.
      window: shards.
    """

    def __init__(self, seed: int, starts: np.ndarray, window: int) -> None:
        self._seed, self._starts = seed, starts
        self._records = int(starts[-1])
        some = int(np.count_nonzero(np.diff(starts)))
        # Records of a window, rounded up.
        self.size = max(window * -(-self._records // max(some, 1)), 1)
        # Records of a lane.
        self._lane = self._records // (LANES * RUN) * RUN
        self._epoch = functools.lru_cache(maxsize=4)(self._order_of_shards)

    def places(self, positions: Places) -> Places:
        epochs, lanes, within = self._split(positions)
        number = within // self.size
        first, size = self._bounds(lanes, number)
        keys = self._keys(epochs, lanes, number)
        offset = np.empty_like(positions)
        for one in np.unique(size).tolist():  # few: only the last window is shorter
            these = size == one
            slots = (within - number * self.size)[these]
            offset[these] = hashing.permute(slots, keys[these], one)
        found = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            these = epochs == epoch
            found[these] = self._of_sequence(epoch, (first + offset)[these])
        return found

    def windows(self, positions: Places) -> list[Window]:
        """The windows that these positions have records of, ascending."""
        epochs, lanes, within = self._split(positions)
        found = np.stack([epochs, lanes, within // self.size], axis=1)
        return [tuple(one) for one in np.unique(found, axis=0).tolist()]

    def following(self, window: Window) -> Window:
        """The window that is read after this one, by the same rows of the batches."""
        epoch, lane, number = window
        length = self._length(lane)
        if (number + 1) * self.size < length:
            return epoch, lane, number + 1
        return epoch + 1, lane, 0

    def shards_of(self, window: Window) -> Sequence[int]:
        """The shards that the records of a window are in, in no order."""
        epoch, lane, number = window
        first, size = self._bounds(np.array([lane]), np.array([number]))
        order, ends = self._epoch(epoch)
        a, b = np.searchsorted(ends, [first[0], first[0] + size[0] - 1], side="right")
        there = order[a : b + 1]
        return there[np.diff(self._starts)[there] > 0].tolist()

    def _split(self, positions: Places) -> tuple[Places, Places, Places]:
        """Epoch, lane, and place in the lane of each position."""
        epoch, slot = np.divmod(positions, self._records)
        turn, rest = np.divmod(slot, LANES * RUN)
        lane, place = rest // RUN, turn * RUN + rest % RUN
        core = self._lane * LANES
        tail = slot >= core
        lane, place = np.where(tail, LANES, lane), np.where(tail, slot - core, place)
        return epoch, lane, place

    def _length(self, lane: int) -> int:
        return self._records - LANES * self._lane if lane == LANES else self._lane

    def _bounds(self, lanes: Places, numbers: Places) -> tuple[Places, Places]:
        """Place of a window's first record in the sequence, and how many it has."""
        length = np.where(
            lanes == LANES, self._records - LANES * self._lane, self._lane
        )
        begin = numbers * self.size
        return lanes * self._lane + begin, np.minimum(self.size, length - begin)

    def _keys(self, epochs: Places, lanes: Places, numbers: Places) -> np.ndarray:
        bits = hashing.draw(self._seed, _WINDOW, epochs.astype(np.uint64))
        for value in (lanes, numbers):
            bits = hashing.mix(bits ^ hashing.mix(value.astype(np.uint64)))
        return bits

    def _order_of_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and where each ends in the sequence."""
        count = len(self._starts) - 1
        (key,) = hashing.draw(self._seed, _SHARDS, np.array([epoch], np.uint64))
        keys = np.full(count, key, np.uint64)
        order = hashing.permute(np.arange(count), keys, count)
        return order, np.cumsum(np.diff(self._starts)[order])

    def _of_sequence(self, epoch: int, places: Places) -> Places:
        """Numbers in the split of records at some places of an epoch's sequence."""
        order, ends = self._epoch(epoch)
        turn = np.searchsorted(ends, places, side="right")
        shard = order[turn]
        counts = self._starts[shard + 1] - self._starts[shard]
        return self._starts[shard] + places - (ends[turn] - counts)
