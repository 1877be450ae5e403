"""Icons in random colours with captions, by position; numpy only.

This source of pictures for studies of text-to-image scaling needs no download. It has
about 200,000 shapes of about 40,000 names (see `icon_set`). Each is painted in two
named colours and described by a caption. The shapes are real; a procedure chooses the
colours.

Picture i of a source is a pure function of (seed, i). So it is the same on every host,
at every batch size and after every restart, and every picture takes the same time:

    epoch, slot  = divmod(i, number of names)
    name         = P_(seed, epoch)(slot), a keyed permutation of the names
    mask         = one of the name's masks, uniformly
    colours      = one of the pairs that contrast, uniformly, each jittered
    caption      = one of a few word orders, uniformly

Each choice is a 64-bit hash of (seed, choice, i). Every epoch shows each name once, so
common words of user interfaces weigh no more than rare ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from scaling_ldm.data import icon_set
from scaling_ldm.data.hashing import below, draw, permute
from scaling_ldm.data.icon_set import SIDE, IconSet
from scaling_ldm.data.vocabulary import PADDING, RESERVED, UNKNOWN, Vocabulary
from scaling_ldm.data.vocabulary import words as vocabulary_words

SPLITS = ("train", "validation")
Positions = Sequence[int | np.integer] | np.ndarray  # [n], from 0

# sRGB, 0..255. Only pairs with enough contrast are painted together.
PALETTE = {
    "black": (16, 16, 16),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "red": (214, 32, 32),
    "orange": (247, 132, 18),
    "yellow": (250, 214, 30),
    "green": (40, 150, 50),
    "blue": (30, 80, 220),
    "purple": (128, 40, 170),
    "pink": (250, 130, 180),
    "brown": (120, 70, 30),
    "teal": (16, 138, 138),
    "navy": (16, 24, 96),
    "lime": (150, 230, 50),
    "light blue": (150, 205, 250),
    "dark green": (14, 70, 30),
}
JITTER = 10  # of 255, largest change of one channel
# The least difference of a pair of colours in OKLab: distance, and lightness alone.
MIN_CONTRAST, MIN_LIGHTNESS = 0.3, 0.15
# Word orders. {a_fore} and {a_back} are a colour with its article, "a" or "an".
TEMPLATES = (
    "{a_fore} {style} {name} on {back}",
    "{style} {name} in {fore} on {a_back} background",
    "on {back} {a_fore} {style} {name}",
)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB of 0..1 -> OKLab, float64 [..., 3], whose distances match perceived ones.

    References: B. Ottosson, "A perceptual color space for image processing", 2020.
    """
    rgb = np.asarray(rgb, np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lms = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(lms) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def _article(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def _fixed_words() -> list[str]:
    words = {"in", "on", "background"}
    for colour in PALETTE:
        words |= set(_article(colour).split())
    return sorted(words)


def build_vocabulary(
    size: int = 4096,
    validation_fraction: float = 0.05,
    icons: IconSet | None = None,
) -> Vocabulary:
    """The words of colour, style and templates, then the most frequent of the names.

    Words are counted over the base names of the train split, each name once, as they
    are shown; words of equal count are in alphabetical order. The default size covers
    about 98% of the words of train captions.

    Raises:
      ValueError: a size without room for the words of colour, style and templates.
    """
    return _build_vocabulary(
        size, validation_fraction, icon_set.load() if icons is None else icons
    )


@functools.lru_cache(maxsize=8)
def _build_vocabulary(
    size: int, validation_fraction: float, icons: IconSet
) -> Vocabulary:
    fixed = {
        *_fixed_words(),
        *(word for style in icons.styles for word in style.split()),
    }
    if size < len(RESERVED) + len(fixed):
        raise ValueError(
            f"a vocabulary of {size} has no room for the {len(fixed)} words of colour,"
            f" style and templates; give at least {len(RESERVED) + len(fixed)}"
        )
    counts: dict[str, int] = {}
    for name in icons.split_names(validation_fraction)["train"]:
        for word in icons.names[name].split():
            counts[word] = counts.get(word, 0) + 1
    ranked = sorted(counts.keys() - fixed, key=lambda word: (-counts[word], word))
    return Vocabulary((*RESERVED, *sorted(fixed), *ranked)[:size])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What is painted at some positions, int64 [n] each.

    Attributes:
      name: index into IconSet.names.
      mask: index of the mask.
      pair: index into PaintedIcons.pairs.
      template: index into TEMPLATES.
    """

    name: np.ndarray
    mask: np.ndarray
    pair: np.ndarray
    template: np.ndarray


class PaintedIcons:
    """Random access to painted icons and their captions.

    Args:
      split: "train" or "validation"; no base name, key or drawing is in both.
      seed: selects the order of names, the masks, the colours and the captions.
      size: pixels of a side: 32, 16 or 8; smaller pictures are averaged from 32.
      vocabulary: of `token_ids`; by default `build_vocabulary()`.
      validation_fraction: share of the names that is held out.

    Example:
      source = PaintedIcons("train", seed=0)
      batch = source.paint(np.arange(128))  # batch["image"], batch["caption"]
      ids, mask = source.token_ids(np.arange(128), length=16)
    """

    # Streams of the hash. A number is never used for a second purpose.
    _ORDER, _MASK, _PAIR, _JITTER, _TEMPLATE = 1, 2, 3, 4, 5

    def __init__(
        self,
        split: str,
        seed: int,
        size: int = SIDE,
        *,
        vocabulary: Vocabulary | None = None,
        validation_fraction: float = 0.05,
    ):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        if size not in (8, 16, 32):
            raise ValueError(f"size is {size}; masks can be painted at 8, 16 or 32")
        self.split, self.seed, self.size = split, int(seed), size
        self.icons = icon_set.load()
        self._masks = self.icons.split_masks(validation_fraction)[split]
        self.names, counts = np.unique(
            self.icons.mask_name[self._masks], return_counts=True
        )
        self._counts = counts
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._vocabulary = vocabulary
        self._validation_fraction = validation_fraction
        self._colours = np.array(list(PALETTE.values()), np.float32) / 255
        lab = oklab(self._colours)
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
        # int64 [pairs, 2]: (foreground, background), indices into PALETTE.
        lightness = np.abs(lab[:, None, 0] - lab[None, :, 0])
        self.pairs = np.argwhere(
            (distance >= MIN_CONTRAST) & (lightness >= MIN_LIGHTNESS)
        )

    def __len__(self) -> int:
        """The number of positions in an epoch: that of the names."""
        return len(self.names)

    def choose(self, positions: Positions) -> Choices:
        """Name, mask, colours and word order at each position."""
        positions = np.asarray(positions, np.int64)
        if positions.ndim != 1 or (positions.size and positions.min() < 0):
            raise ValueError("positions must be one row of integers, none below 0")
        at = positions.astype(np.uint64)
        epoch, slot = np.divmod(positions, len(self))
        keys = draw(self.seed, self._ORDER, epoch.astype(np.uint64))
        rank = permute(slot, keys, len(self))
        of_name = below(draw(self.seed, self._MASK, at), self._counts[rank])
        pair = below(draw(self.seed, self._PAIR, at), len(self.pairs))
        template = below(draw(self.seed, self._TEMPLATE, at), len(TEMPLATES))
        return Choices(
            name=self.names[rank].astype(np.int64),
            mask=self._masks[self._starts[rank] + of_name],
            pair=pair,
            template=template,
        )

    def colours(self, positions: Positions) -> np.ndarray:
        """Foreground and background: float32 [n, 2, 3], sRGB of 0..1."""
        return self._jittered(positions, self.choose(positions))

    def paint(self, positions: Positions) -> dict:
        """Pictures and captions.

        Args:
          positions: int [n], from 0; they may repeat and may go past an epoch.

        Returns:
          {"image": float32 [n, size, size, 3] in [-1, 1], "caption": list of n str}.
        """
        choices = self.choose(positions)
        fore, back = self._jittered(positions, choices).swapaxes(0, 1) * 2 - 1
        # The 16 colours of each picture, by level; float32 [n, 16, 3].
        level = np.arange(16, dtype=np.float32)[:, None] / np.float32(15)
        ramp = back[:, None] + level * (fore - back)[:, None]
        index = self.icons.levels(choices.mask)
        index += (16 * np.arange(len(index), dtype=np.intp))[:, None, None]
        image = np.take(ramp.reshape(-1, 3), index, axis=0, mode="clip")
        if self.size < SIDE:
            step = SIDE // self.size
            image = image.reshape(-1, self.size, step, self.size, step, 3)
            image = image.mean((2, 4), dtype=np.float32)
        return {"image": image, "caption": self._captions(choices)}

    def captions(self, positions: Positions) -> list[str]:
        """The captions without the pictures; lower case, [a-z0-9 ]."""
        return self._captions(self.choose(positions))

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The words that `token_ids` knows."""
        if self._vocabulary is not None:
            return self._vocabulary
        return build_vocabulary(validation_fraction=self._validation_fraction)

    def token_ids(
        self, positions: Positions, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The captions as ids int32 [n, length], and their mask bool [n, length].

        The ids are equal to `vocabulary.encode(caption, length)` of each caption.
        """
        choices = self.choose(positions)
        fore, back = self.pairs[choices.pair].T
        index = {
            "{name}": choices.name,
            "{style}": self.icons.mask_style[choices.mask],
            "{fore}": fore,
            "{back}": back,
            "{a_fore}": fore,
            "{a_back}": back,
        }
        tables = _token_tables(self.vocabulary)
        ids = np.full((len(choices.name), length), PADDING, np.int32)
        for number, template in enumerate(TEMPLATES):
            rows = np.flatnonzero(choices.template == number)
            # The parts stand side by side, each padded; then the padding is removed.
            parts = [
                tables[part][index[part][rows]]
                if part in index
                else np.broadcast_to(tables[part], (len(rows), 1))
                for part in template.split()
            ]
            wide = np.concatenate(parts, axis=1)
            words = wide != PADDING
            target = np.cumsum(words, axis=1) - 1
            row, column = np.nonzero(words & (target < length))
            ids[rows[row], target[row, column]] = wide[row, column]
        return ids, ids != PADDING

    def _jittered(self, positions, choices: Choices) -> np.ndarray:
        at = np.asarray(positions, np.int64).astype(np.uint64)
        bits = draw(self.seed, self._JITTER, at)
        shifts = np.arange(6, dtype=np.uint64) * np.uint64(8)
        byte = ((bits[:, None] >> shifts) & np.uint64(255)).astype(np.float32)
        jitter = (byte.reshape(-1, 2, 3) / 127.5 - 1) * np.float32(JITTER / 255)
        return np.clip(self._colours[self.pairs[choices.pair]] + jitter, 0, 1)

    def _captions(self, choices: Choices) -> list[str]:
        colours = tuple(PALETTE)
        articles = [_article(colour) for colour in colours]
        captions = []
        for name, style, (fore, back), template in zip(
            choices.name.tolist(),
            self.icons.mask_style[choices.mask].tolist(),
            self.pairs[choices.pair].tolist(),
            choices.template.tolist(),
            strict=True,
        ):
            caption = TEMPLATES[template].format(
                a_fore=articles[fore],
                a_back=articles[back],
                fore=colours[fore],
                back=colours[back],
                style=self.icons.styles[style],
                name=self.icons.names[name],
            )
            captions.append(" ".join(caption.split()))
        return captions


@functools.lru_cache(maxsize=4)
def _token_tables(vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """{part of a template: int32 [number of values, most words of one]}."""
    icons, ids = icon_set.load(), vocabulary.ids
    texts = {
        "{name}": icons.names,
        "{style}": icons.styles,
        "{fore}": tuple(PALETTE),
        "{back}": tuple(PALETTE),
        "{a_fore}": tuple(map(_article, PALETTE)),
        "{a_back}": tuple(map(_article, PALETTE)),
    }
    for template in TEMPLATES:
        for part in template.split():
            texts.setdefault(part, (part,))
    tables = {}
    for part, values in texts.items():
        words = [
            [ids.get(word, UNKNOWN) for word in vocabulary_words(v)] for v in values
        ]
        table = np.full((len(words), max(map(len, words))), PADDING, np.int32)
        for row, known in zip(table, words, strict=True):
            row[: len(known)] = known
        tables[part] = table
    return tables
