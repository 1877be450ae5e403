"""Captions as the ids of their words; numpy only."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

PADDING, UNKNOWN, NULL = 0, 1, 2  # token ids that are no word
RESERVED = ("<padding>", "<unknown>", "<null>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Words and their token ids: 0 padding, 1 unknown, 2 the null caption.

    Attributes:
      words: every token by id, the three reserved ones included.
    """

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """{word: id}, without the reserved ones."""
        start = len(RESERVED)
        return {word: start + i for i, word in enumerate(self.words[start:])}

    def encode(self, caption: str, length: int) -> np.ndarray:
        """int32 [length]: an id a word, cut or padded to length."""
        known = [self.ids.get(word, UNKNOWN) for word in caption.split()[:length]]
        ids = np.full(length, PADDING, np.int32)
        ids[: len(known)] = known
        return ids

    def uncond(self, length: int) -> np.ndarray:
        """int32 [length]: the caption of no caption, for guidance."""
        ids = np.full(length, PADDING, np.int32)
        ids[0] = NULL
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The words of int [length], padding left out."""
        return " ".join(self.words[int(i)] for i in ids if i != PADDING)
