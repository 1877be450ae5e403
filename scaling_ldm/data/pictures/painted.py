"""The embedded icons as a set of pictures, to try a study without files."""

from __future__ import annotations

import functools

import numpy as np

from scaling_ldm import config
from scaling_ldm.data import icons
from scaling_ldm.data.pictures import record

_BLOCK = 64  # pictures painted together: several times faster than one by one


class Painted:
    """Painted icons at positions 0 .. count - 1, 32 x 32 (see `icons`).

    Args:
      path: must be empty.
      count: number of pictures.
      split: "train" or "validation", which share no base name. With "both", the last
        pictures are those of validation; `held_out` says which.
      validation_fraction: share of the base names; with "both", also of the pictures.
      seed: of the order, the colours and the captions.

    The label of a picture is its foreground colour.
    """

    label_names = tuple(icons.PALETTE)

    def __init__(
        self,
        path: str = "",
        count: int = 1000,
        split: str = "both",
        validation_fraction: float = 0.05,
        seed: int = 0,
    ) -> None:
        if path:
            raise config.ConfigError(
                f"path = {path}: the icons are embedded, no path is taken"
            )
        if split not in (*icons.SPLITS, "both"):
            raise config.ConfigError(
                f"split = {split!r}; known: {', '.join((*icons.SPLITS, 'both'))}"
            )
        if count < 1 or not 0 < validation_fraction < 1:
            raise config.ConfigError(
                f"count = {count} must be at least 1 and validation_fraction = "
                f"{validation_fraction} between 0 and 1"
            )
        self._count = count
        # Positions below this number are in train. Those from it on are in validation,
        # where they count from 0 again.
        self._train = {
            "train": count,
            "validation": 0,
            "both": count - round(count * validation_fraction),
        }[split]
        self._painted = {
            name: icons.PaintedIcons(
                name, seed=seed, validation_fraction=validation_fraction
            )
            for name in icons.SPLITS
        }
        self.identity = record.digest("icons", count, split, validation_fraction, seed)
        self._block = functools.lru_cache(maxsize=8)(self._paint)

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> record.Picture:
        if not 0 <= index < self._count:
            raise IndexError(index)
        held_out = index >= self._train
        split = icons.SPLITS[held_out]
        position = index - self._train if held_out else index
        block, place = divmod(position, _BLOCK)
        images, captions, labels = self._block(split, block)
        return record.Picture(
            image=images[place],
            caption=captions[place],
            name=f"icons:{split}:{position}",
            label=int(labels[place]),
            held_out=held_out,
        )

    def _paint(self, split: str, block: int) -> tuple[np.ndarray, list, np.ndarray]:
        painted = self._painted[split]
        positions = np.arange(block * _BLOCK, (block + 1) * _BLOCK)
        rows = painted.paint(positions)
        images = np.rint((rows["image"] + 1) * 127.5).astype(np.uint8)
        labels = painted.pairs[painted.choose(positions).pair][:, 0]
        return images, rows["caption"], labels
