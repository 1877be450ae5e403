"""A stream whose rows are of several parts, in given shares; numpy only.

Which part position i is of, and which row of that part, is a pure function of
(data.seed, i). Part 0 has the share s0 of the positions, spread evenly: position i
belongs to it where floor(i s0 + u0) increases, and that floor is its row. So every row
of a part is taken once, in order. The positions that are left are divided in the same
way between part 1, with its share of the rest, and the later parts. The offsets u
depend on the seed.

In any window of n positions, the rows of a part differ from n times its share by less
than the number of parts - 1: with two parts, by less than one row. Shares are multiples
of 1 / WHOLE and all arithmetic is in integers, so it is exact at every position.
"""

from __future__ import annotations

import fractions
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from scaling_ldm.data import hashing, label_names, vocabulary
from scaling_ldm.data.pipeline import Rows, Source

WHOLE = 10**9
# Streams of the hash. No other use of data.seed has these numbers.
_OFFSET, _PART = 201, 202


def shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers that sum to WHOLE, each rounded up or down.

    The largest remainders are rounded up.
    """
    exact = [fractions.Fraction(weight) for weight in weights]
    exact = [weight * WHOLE / sum(exact) for weight in exact]
    found = [int(share) for share in exact]
    order = sorted(range(len(found)), key=lambda k: found[k] - exact[k])
    for k in order[: WHOLE - sum(found)]:
        found[k] += 1
    return found


def assign(
    positions: np.ndarray, parts: Sequence[int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The part of each position, and the row of that part; int64 [n] each.

    Args:
      positions: int64 [n], from 0.
      parts: share of each part, as `shares` gives them.
      seed: of the offsets.
    """
    part, row = np.zeros((2, len(positions)), np.int64)
    places, left = np.arange(len(positions)), np.asarray(positions, np.int64)
    whole = sum(parts)
    for k, share in enumerate(parts):
        bits = hashing.draw(seed, _OFFSET, np.array([k], np.uint64))
        offset = int(hashing.below(bits, whole)[0])
        before, behind = (_taken(n, share, whole, offset) for n in (left, left + 1))
        mine = behind > before
        part[places[mine]], row[places[mine]] = k, before[mine]
        places, left = places[~mine], (left - before)[~mine]
        whole -= share
        if not whole:
            break
    return part, row


def _taken(count: np.ndarray, share: int, whole: int, offset: int) -> np.ndarray:
    """floor((count * share + offset) / whole), without overflow below 2**63 / 2."""
    times, rest = np.divmod(count, whole)
    return times * share + (rest * share + offset) // whole


def seed_of_part(seed: int, number: int) -> int:
    """The seed of a part's order and noise, so that no two parts have the same."""
    return int(hashing.draw(seed, _PART, np.array([number], np.uint64))[0])


def ranked(vocabularies: Iterable[Sequence[str]]) -> list[str]:
    """The words of several vocabularies by their best rank in one, then by alphabet."""
    best: dict[str, int] = {}
    for words in vocabularies:
        for rank, word in enumerate(words):
            best[word] = min(best.get(word, rank), rank)
    return sorted(best, key=lambda word: (best[word], word))


class Mixture:
    """Several sources in given shares; a pipeline.Source.

    Its rows also have "part" int32 [n]. They have labels if all sources have the same
    number of classes.

    Args:
      sources: of equal shape and text.
      weights: share of each, in any unit.
      seed: decides where the parts begin.
      numbers: the value of "part" for the rows of each source.
      identity: what the records of all sources are made of.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        seed: int,
        *,
        numbers: Sequence[int],
        identity: Any,
    ) -> None:
        self._sources, self._seed, self.identity = sources, seed, identity
        self._shares = shares(weights)
        self._numbers = np.array(numbers, np.int32)
        classes = {source.classes for source in sources}
        self.shape = sources[0].shape
        self.vocabulary = vocabulary.of(sources[0])  # all parts have the same
        self.classes = classes.pop() if len(classes) == 1 else 0
        self.label_names = label_names.of(sources[0]) if self.classes else ()
        label = np.array(self.classes, np.int32)
        self.uncond: Rows = sources[0].uncond | {"label": label}

    def rows(self, positions: np.ndarray) -> Rows:
        part, row = assign(positions, self._shares, self._seed)
        found: Rows = {"part": self._numbers[part]}
        for k, source in enumerate(self._sources):
            places = np.flatnonzero(part == k)
            if not len(places):
                continue
            for name, value in source.rows(row[places]).items():
                if name == "label" and not self.classes:
                    continue
                if name not in found:
                    shape = (len(positions), *value.shape[1:])
                    found[name] = np.zeros(shape, value.dtype)
                found[name][places] = value
        return found

    def captions(self, positions: np.ndarray) -> list[str]:
        part, row = assign(positions, self._shares, self._seed)
        found = [""] * len(part)
        for k, source in enumerate(self._sources):
            places = np.flatnonzero(part == k)
            for place, caption in zip(
                places, source.captions(row[places]), strict=True
            ):
                found[place] = caption
        return found
