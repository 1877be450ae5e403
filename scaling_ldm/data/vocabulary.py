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
    """Words and their token ids; ids 0 to 2 are padding, unknown, the empty caption.

    Attributes:
      words: every token by id, with the three reserved ones.
    """

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """{word: id}, without the reserved tokens."""
        start = len(RESERVED)
        return {word: start + i for i, word in enumerate(self.words[start:])}

    def encode(self, caption: str, length: int) -> np.ndarray:
        """The ids of the words, cut or padded to int32 [length]."""
        known = [self.ids.get(word, UNKNOWN) for word in caption.split()[:length]]
        ids = np.full(length, PADDING, np.int32)
        ids[: len(known)] = known
        return ids

    def uncond(self, length: int) -> np.ndarray:
        """The ids of the empty caption, int32 [length], for guidance."""
        ids = np.full(length, PADDING, np.int32)
        ids[0] = NULL
        return ids

    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        """The words of ids [length], without padding."""
        return " ".join(self.words[int(i)] for i in ids if i != PADDING)
