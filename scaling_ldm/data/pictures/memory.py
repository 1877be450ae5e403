"""Arrays as a set of pictures: for notebooks and tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaling_ldm import config
from scaling_ldm.data.pictures import record

_REGISTERED: dict[str, Memory] = {}


class Memory:
    """Pictures given as arrays.

    Args:
      images: uint8 [h, w, 3] each; sizes may differ.
      captions: as many; an empty one is a bad record.
      labels: as many, or None.
      name: for messages; it is also the path by which the source "memory" finds it.

    Raises:
      ConfigError: the numbers of images and captions differ, or an array is of another
        kind.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        captions: Sequence[str],
        labels: Sequence[int] | None = None,
        name: str = "memory",
    ) -> None:
        counts = {"images": len(images), "captions": len(captions)}
        if labels is not None:
            counts["labels"] = len(labels)
        if len(set(counts.values())) > 1 or not len(images):
            raise config.ConfigError(f"memory {name!r}: {counts}; give as many of each")
        for i, image in enumerate(images):
            shape, dtype = np.shape(image), getattr(image, "dtype", type(image))
            if len(shape) != 3 or shape[2] != 3 or dtype != np.uint8:
                raise config.ConfigError(
                    f"memory {name!r}: image {i} is {dtype} {shape}; "
                    "uint8 [h, w, 3] is wanted"
                )
        self._images, self._captions, self._labels = images, captions, labels
        self._name = name
        self.identity = record.digest(
            "memory",
            *(part for x in images for part in (x.shape, x.tobytes())),
            list(captions),
            None if labels is None else [int(label) for label in labels],
        )

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> record.Picture:
        name = f"{self._name}:{index}"
        return record.Picture(
            image=np.asarray(self._images[index]),
            caption=record.clean_caption(self._captions[index], name),
            name=name,
            label=None if self._labels is None else int(self._labels[index]),
        )


def memory(
    images: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    labels: Sequence[int] | None = None,
    name: str = "memory",
) -> Memory:
    """A set of arrays; open_pictures("memory", name) finds it from now on."""
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
