"""Turns captions into the ids of their words, and keeps the words in a file.

    vocabulary.json   the words by id, beside weights that read them

Ids have no meaning without their words. So the words are stored with the weights, and
are compared before ids are given to a network.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from scaling_ldm import config, records

PADDING, UNKNOWN, NULL = 0, 1, 2  # reserved token ids
RESERVED = ("<padding>", "<unknown>", "<null>")
FILE = "vocabulary.json"


def words(caption: str) -> list[str]:
    """The words of a caption: lower case, without punctuation; "T-shirt" is two."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", caption.lower())


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

    @functools.cached_property
    def digest(self) -> str:
        """The same for the same words in the same order."""
        return records.digest(list(self.words))

    def encode(self, caption: str, length: int) -> np.ndarray:
        """The ids of a caption's `words`, cut or padded to int32 [length]."""
        known = [self.ids.get(word, UNKNOWN) for word in words(caption)[:length]]
        ids = np.full(length, PADDING, np.int32)
        ids[: len(known)] = known
        return ids

    def unknown(self, caption: str) -> list[str]:
        """The words of a caption that have no id of their own."""
        return [word for word in words(caption) if word not in self.ids]

    def uncond(self, length: int) -> np.ndarray:
        """The ids of the empty caption, int32 [length], for guidance."""
        ids = np.full(length, PADDING, np.int32)
        ids[0] = NULL
        return ids

    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        """The words of ids [length], without padding."""
        return " ".join(self.words[int(i)] for i in ids if i != PADDING)


def of(source: Any) -> Vocabulary | None:
    """The words whose ids a `data.Source` gives; None: features, or unknown words.

    Args:
      source: the library's sources have `vocabulary`; a user's own need not.
    """
    return getattr(source, "vocabulary", None)


def read_by(conditioning: Collection[str], source: Any) -> Vocabulary | None:
    """The words that a network reads of a source; None if it reads no words.

    Args:
      conditioning: of the network.
      source: a `data.Source`.
    """
    return of(source) if "text" in conditioning else None


def refuse_others(there: Vocabulary | None, here: Vocabulary | None, what: str) -> None:
    """Refuses ids that mean other words than those that a network learnt.

    Args:
      there: the words that the network learnt; None: unknown, so nothing is compared.
      here: the words of these pictures; None: the network reads no words.
      what: the network's name, for the message.

    Raises:
      ConfigError: they differ.
    """
    if there is None or here is None:
        return
    if found := difference(there, here):
        raise config.ConfigError(
            f"{what} learnt the ids of other words than these pictures have: {found}"
        )


def difference(there: Vocabulary, here: Vocabulary) -> str:
    """How two vocabularies differ, for people; "" if they do not."""
    if there.words == here.words:
        return ""
    pairs = enumerate(zip(there.words, here.words, strict=False))
    first = next(
        (f"id {i} is {a!r} there, {b!r} here" for i, (a, b) in pairs if a != b), ""
    )
    return f"{len(there)} words there, {len(here)} here" + (first and f"; {first}")


def write(path: pathlib.Path, vocabulary: Vocabulary, of: str = "") -> None:
    """Writes the words for `read`.

    Args:
      of: the recipe hash of the run that learns them; "": the file is of no run.
    """
    held = {"digest": vocabulary.digest, "words": list(vocabulary.words)}
    records.write_json(path, ({"of": of} if of else {}) | held)


def read(path: pathlib.Path, of: str = "") -> Vocabulary | None:
    """The words of a file that `write` wrote; None if there is none.

    Args:
      of: the recipe hash of the run that learnt them; "": it is not compared.

    Raises:
      Damaged: it has changed since it was written, or is another run's.
      NewerVersion: a newer version of the library wrote it.
    """
    if not path.exists():
        return None
    held = records.read_json(path)
    records.check_owner(held, of, path)
    found = held.get("words")
    if not isinstance(found, list) or not all(isinstance(w, str) for w in found):
        raise records.Damaged(f"{path} holds no list of words")
    vocabulary = Vocabulary(tuple(found))
    if vocabulary.digest != held.get("digest"):
        raise records.Damaged(f"{path} does not hold the words that were written")
    return vocabulary
