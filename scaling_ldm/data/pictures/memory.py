"""Arrays as a set of pictures: for notebooks and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling_ldm import config
from scaling_ldm.data.pictures import columns, record

_REGISTERED: dict[str, Memory] = {}


class Memory:
    """Pictures given as arrays.

    Args:
      images: uint8 [h, w, 3] each, or grey [h, w, 1] or [h, w]; sizes may differ.
      captions: as many; an empty one is a bad record.
      labels: as many, or None; one that is no whole number is a bad record.
      name: for messages; it is also the path by which the source "memory" finds it.

    Raises:
      ConfigError: the numbers of images and captions differ, or an array is of another
        kind.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        captions: Sequence[str],
        labels: Sequence[Any] | np.ndarray | None = None,
        name: str = "memory",
    ) -> None:
        counts = {"images": len(images), "captions": len(captions)}
        if labels is not None:
            counts["labels"] = len(labels)
        if len(set(counts.values())) > 1 or not len(images):
            raise config.ConfigError(f"memory {name!r}: {counts}; give as many of each")
        for i, image in enumerate(images):
            shape, dtype = np.shape(image), getattr(image, "dtype", type(image))
            if (
                (shape[2:] not in ((3,), (1,), ()))
                or len(shape) < 2
                or dtype != np.uint8
            ):
                raise config.ConfigError(
                    f"memory {name!r}: image {i} is {dtype} {shape}; "
                    "uint8 [h, w, 3] is wanted, or grey [h, w, 1] or [h, w]"
                )
        self._images, self._captions, self._labels = images, captions, labels
        self._name = name
        self.identity = record.digest(
            "memory",
            *(part for x in images for part in (x.shape, x.tobytes())),
            list(captions),
            None if labels is None else [_plain(label) for label in labels],
        )

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> record.Picture:
        name, labels = f"{self._name}:{index}", self._labels
        return record.Picture(
            image=_rgb(np.asarray(self._images[index])),
            caption=record.clean_caption(self._captions[index], name),
            name=name,
            label=None
            if labels is None
            else columns.whole(_plain(labels[index]), name),
        )


def _rgb(image: np.ndarray) -> np.ndarray:
    """Grey or RGB -> uint8 [h, w, 3]."""
    if image.shape[2:] == (3,):
        return image
    return np.repeat(image.reshape(*image.shape[:2], 1), 3, 2)


def _plain(label: object) -> object:
    """A label as a Python int; a value that is not a whole number as it is."""
    value = label.item() if isinstance(label, np.ndarray | np.generic) else label
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole or isinstance(value, bool) else value


def memory(
    images: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    labels: Sequence[Any] | np.ndarray | None = None,
    name: str = "memory",
) -> Memory:
    """Makes a set of arrays; open_pictures("memory", name) then finds it by its name.

    The arguments are those of `Memory`.

    Raises:
      ConfigError: as `Memory`.
    """
    _REGISTERED[name] = Memory(images, captions, labels, name)
    return _REGISTERED[name]


def registered(path: str) -> Memory:
    """The source "memory": the set that `memory` has made under this name."""
    if path not in _REGISTERED:
        known = ", ".join(map(repr, _REGISTERED)) or "none"
        raise config.ConfigError(
            f"no pictures in memory under the name {path!r}; known: {known}; make them "
            "with pictures.memory(images, captions, name=...) in the same process"
        )
    return _REGISTERED[path]
