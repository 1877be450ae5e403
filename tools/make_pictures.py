"""Writes a set of labelled pictures to try the library with, from the embedded icons.

    python tools/make_pictures.py --pictures 10000 --folder walk

Ten classes, as many pictures of each, in two layouts:

    walk/pictures/cat/00002.png     a folder for each class
    walk/shards/shard-00000.tar     00002.png and 00002.txt, "a picture of one cat"

A picture is 32 x 32 pixels: one of the icons of this name, moved by up to three pixels,
in two colours that differ. The same call writes the same bytes.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from scaling_ldm.data import icon_set, icons
from scaling_ldm.data.icon_set import SIDE

CLASSES = "apple bell cat cloud fish heart key moon star tree".split()  # by name
SHARDS = 2
_MOVED = 3  # pixels
_AT_ONCE = 1000


def caption(name: str) -> str:
    """What is said of a picture of this class."""
    return f"a picture of one {name}"


def paintings(count: int, seed: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(class, uint8 [32, 32, 3]) of each picture; the classes take turns."""
    shapes = icon_set.load()
    places = [shapes.names.index(name) for name in CLASSES]
    first, end = shapes.offsets[places], shapes.offsets[np.array(places) + 1]
    pairs = icons.PaintedIcons("train", seed).pairs
    palette = np.array(list(icons.PALETTE.values()), np.float64)
    rng = np.random.default_rng(seed)
    for start in range(0, count, _AT_ONCE):
        classes = np.arange(start, min(start + _AT_ONCE, count)) % len(CLASSES)
        masks = rng.integers(first[classes], end[classes])
        colours = palette[pairs[rng.integers(len(pairs), size=len(classes))]]
        colours += rng.uniform(-icons.JITTER, icons.JITTER, colours.shape)
        moves = rng.integers(-_MOVED, _MOVED + 1, (len(classes), 2))
        levels = shapes.levels(masks) / 15
        for k, level, (fore, back), move in zip(
            classes.tolist(), levels, colours, moves, strict=True
        ):
            y, x = _MOVED + move
            shape = np.pad(level, _MOVED)[y : y + SIDE, x : x + SIDE, None]
            image = np.clip(np.round(back + (fore - back) * shape), 0, 255)
            yield k, image.astype(np.uint8)


def write(folder: pathlib.Path, count: int) -> tuple[str, str]:
    """Writes both layouts; what `data.path` is for folders and for shards."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for name in CLASSES:
        (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
    shards = [
        tarfile.open(folder / "shards" / f"shard-{n:05d}.tar", "w")
        for n in range(SHARDS)
    ]
    for i, (k, image) in enumerate(paintings(count)):
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        picture = encoded.getvalue()
        (folder / "pictures" / CLASSES[k] / f"{i:05d}.png").write_bytes(picture)
        text = caption(CLASSES[k]).encode()
        for ending, data in ((".png", picture), (".txt", text)):
            member = tarfile.TarInfo(f"{i:05d}{ending}")
            member.size = len(data)
            shards[i * SHARDS // count].addfile(member, io.BytesIO(data))
    for shard in shards:
        shard.close()
    pattern = f"shard-{{00000..{SHARDS - 1:05d}}}.tar"
    return str(folder / "pictures"), str(folder / "shards" / pattern)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("walk"))
    given = parser.parse_args()
    folders, shards = write(given.folder, given.pictures)
    print(f"{given.pictures:,} pictures of {len(CLASSES)} classes: {folders}, {shards}")


if __name__ == "__main__":
    main()
