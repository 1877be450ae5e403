"""Fetches the remote shards of the windows that are read now and next.

Shards of a local folder need nothing of this, nor do records in no windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaling_ldm import config
from scaling_ldm.data import row_order, shard_files
from scaling_ldm.data.shard_table import ShardTable


class Windows:
    """Tells the files of a folder which of its shards are needed, by positions.

    Args:
      folder: for messages.
      cache_bytes: of the local copies.
      continues: whether the windows that follow will be read, too.
    """

    def __init__(
        self,
        order: row_order.WindowOrder,
        files: shard_files.ShardFiles,
        table: ShardTable,
        *,
        folder: str,
        cache_bytes: int,
        continues: bool,
    ) -> None:
        self._order, self._files, self._bytes = order, files, table.nbytes
        self._folder, self._most, self._continues = folder, cache_bytes, continues
        self._room_is_checked = False

    def ahead(self, positions: np.ndarray) -> None:
        """Says that these positions are read now.

        Raises:
          ConfigError: the cache is smaller than what they need. It is checked once.
        """
        now = self._order.windows(positions)
        if not self._room_is_checked:
            self._check_room(now)
            self._room_is_checked = True
        current = self._shards(now)
        self._files.ahead(current, current | self._shards(self._next(now)))

    def _next(self, windows: Sequence[row_order.Window]) -> list[row_order.Window]:
        if not self._continues:
            return []
        return [self._order.following(window) for window in windows]

    def _shards(self, windows: Sequence[row_order.Window]) -> set[int]:
        return {n for window in windows for n in self._order.shards_of(window)}

    def _check_room(self, windows: Sequence[row_order.Window]) -> None:
        # Two windows of each lane. At their border, some rows are of the one before.
        last = [*{lane: (epoch, lane, n) for epoch, lane, n in windows}.values()]
        wanted = self._shards([*last, *self._next(last)])
        nbytes = int(self._bytes[sorted(wanted)].sum())
        if nbytes > self._most:
            raise config.ConfigError(
                f"{self._folder}: the windows that this process reads now and next "
                f"have {len(wanted):,} shards of {nbytes:,} bytes together, and the "
                f"local cache holds {self._most:,}. Each batch would fetch shards that "
                "it had before: raise config.data.cache_gigabytes, or lower "
                "config.data.shuffle_window"
            )
