"""The embedded icons: their masks and names, read from data/icons; numpy only.

There are about 207,000 shapes of about 40,000 names, from many icon sets.
icons/NOTICES.md has the sets and their licences; tools/build_icons.py builds the files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import io
import json
import lzma
from collections.abc import Sequence

import numpy as np

SIDE = 32  # pixels of a side of a mask


PACKAGE = "scaling_ldm.data"  # whose folder icons/ holds the files


def _read(name: str) -> bytes:
    file = importlib.resources.files(PACKAGE).joinpath("icons", name)
    try:
        return file.read_bytes()
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"scaling_ldm/data/icons/{name} is missing. Reinstall the package, or build"
            " the file:\n  npm pack @iconify/json@2.2.535\n"
            "  pip install pillow resvg-py==0.5.0\n"
            "  python tools/build_icons.py --package"
            " iconify-json-2.2.535.tgz --out scaling_ldm/data/icons"
        ) from e


def unpack(packed: np.ndarray) -> np.ndarray:
    """Levels of packed masks: uint8 [n, 16, 32] -> intp [n, 32, 32], 0..15."""
    levels = np.empty((len(packed), SIDE, SIDE), np.intp)
    np.right_shift(packed, 4, out=levels[:, 0::2])
    np.bitwise_and(packed, 15, out=levels[:, 1::2])
    return levels


def _inflate(compressed: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Decompresses into one array, without a second copy in memory."""
    array = np.empty(shape, np.uint8)
    flat, filled = array.reshape(-1), 0
    decompressor = lzma.LZMADecompressor()
    try:
        while not decompressor.eof:
            part = decompressor.decompress(compressed, max_length=1 << 22)
            compressed = b""
            if not part and decompressor.needs_input:
                break
            flat[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
            filled += len(part)
    except (lzma.LZMAError, ValueError) as e:
        raise ValueError(f"icons/masks.xz is damaged ({e}); reinstall it") from e
    if not decompressor.eof or filled != flat.size:
        raise ValueError("icons/masks.xz is cut short; reinstall it")
    return array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IconSet:
    """The embedded masks and their names. Masks are in the order of names.

    Attributes:
      packed: uint8 [masks, 16, 32]; a byte holds row 2r (high bits) and row 2r + 1.
      offsets: int64 [names + 1]; masks offsets[k] to offsets[k + 1] have name k.
      names: base names, [a-z0-9 ], sorted and distinct.
      keys: a split key for each name; names with the same key differ in form alone.
      styles: style words, for example "thin outline" or "".
      sets: the icon sets that the masks come from.
      mask_style: uint8 [masks], an index into styles.
      mask_set: uint8 [masks], an index into sets.
      mask_twin: uint32 [masks], equal for masks that look the same, 0 for a lone mask.
    """

    packed: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...]
    keys: tuple[str, ...]
    styles: tuple[str, ...]
    sets: tuple[str, ...]
    mask_style: np.ndarray
    mask_set: np.ndarray
    mask_twin: np.ndarray

    @functools.cached_property
    def mask_name(self) -> np.ndarray:
        """int32 [masks], an index into names."""
        counts = np.diff(self.offsets)
        return np.repeat(np.arange(len(self.names), dtype=np.int32), counts)

    def levels(self, indices: Sequence[int | np.integer] | np.ndarray) -> np.ndarray:
        """Alpha of some masks as stored: int [n] -> intp [n, 32, 32], 0..15."""
        return unpack(self.packed[np.asarray(indices, np.int64)])

    def masks(self, indices: Sequence[int | np.integer] | np.ndarray) -> np.ndarray:
        """Alpha of some masks: int [n] -> uint8 [n, 32, 32], 0..255."""
        return (self.levels(indices) * 17).astype(np.uint8)

    def split_names(self, validation_fraction: float = 0.05) -> dict[str, np.ndarray]:
        """The names of each split: {"train": int64 [a], "validation": int64 [b]}.

        A hash of a name's key decides its side, so its side depends on no other name. A
        name of the validation side is in neither split if each of its masks looks like
        a train mask (see `split_masks`). With a larger fraction, no name joins train
        and no name leaves validation. So a name in neither split may join validation,
        and a train name may end in neither.
        """
        return {
            split: np.unique(self.mask_name[masks])
            for split, masks in self.split_masks(validation_fraction).items()
        }

    def split_masks(self, validation_fraction: float = 0.05) -> dict[str, np.ndarray]:
        """The masks of each split: {"train": int64 [a], "validation": int64 [b]}.

        These are the masks of its names. Validation masks that look like a train mask
        (the same at 16 x 16, in two levels) are left out.
        """
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction is {validation_fraction}; give a number between"
                " 0 and 1, for example 0.05"
            )
        validation = (self._key_fraction < validation_fraction)[self.mask_name]
        seen = np.zeros(int(self.mask_twin.max(initial=0)) + 1, bool)
        seen[self.mask_twin[~validation]] = True
        seen[0] = False
        return {
            "train": np.flatnonzero(~validation),
            "validation": np.flatnonzero(validation & ~seen[self.mask_twin]),
        }

    @functools.cached_property
    def _key_fraction(self) -> np.ndarray:
        digests = b"".join(
            hashlib.blake2b(key.encode(), digest_size=8).digest() for key in self.keys
        )
        return np.frombuffer(digests, "<u8") / 2.0**64


def manifest() -> dict:
    """The manifest of the files: counts, source, and size and SHA-256 of each."""
    return json.loads(_read("manifest.json"))


@functools.lru_cache(maxsize=1)
def load() -> IconSet:
    """Reads the embedded icons once; it takes about a second and 110 MB."""
    with np.load(io.BytesIO(_read("names.npz")), allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    text = {
        name: tuple(arrays[name].tobytes().decode().split("\n"))
        for name in ("names", "keys", "styles", "sets")
    }
    offsets = np.concatenate([[0], np.cumsum(arrays["masks_per_name"], dtype=np.int64)])
    packed = _inflate(_read("masks.xz"), (int(offsets[-1]), SIDE // 2, SIDE))
    icons = IconSet(
        packed=packed,
        offsets=offsets,
        mask_style=arrays["mask_style"],
        mask_set=arrays["mask_set"],
        mask_twin=arrays["mask_twin"],
        **text,
    )
    for array in (icons.packed, icons.offsets, icons.mask_twin):
        array.setflags(write=False)  # shared by every caller
    return icons
