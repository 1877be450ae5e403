"""Random numbers by position: hashes and permutations, the same on every machine.

It is uint64 arithmetic modulo 2**64, vectorised over positions; numpy only.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, UInt64

BitsN = UInt64[np.ndarray, "N"]
NumbersN = Int64[np.ndarray, "N"]


def mix(x: np.ndarray | np.uint64) -> BitsN:
    """The finaliser of splitmix64, a bijection of uint64 that looks random."""
    x = np.array(x, np.uint64, ndmin=1)
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def draw(seed: int, stream: int, positions: BitsN) -> BitsN:
    """64 random bits for each position, uint64 [n]: a hash of all three arguments."""
    key = mix(mix(np.uint64(seed % 2**64)) ^ np.uint64(stream))
    return mix(mix(positions) ^ key)


def below(bits: BitsN, bound: NumbersN | int) -> NumbersN:
    """Maps 64 random bits to int64 of 0..bound-1; bound below 2**31."""
    bound = np.asarray(bound, np.uint64)
    return (((bits >> np.uint64(32)) * bound) >> np.uint64(32)).astype(np.int64)


def permute(slots: NumbersN, keys: BitsN, size: int) -> NumbersN:
    """A keyed permutation of 0..size-1: int64 [n] slots, uint64 [n] keys -> int64 [n].

    It is a Feistel network of six rounds on the smallest even number of bits that holds
    `size`. A result outside the range goes through it again until it is inside. That
    keeps it a bijection and takes fewer than four turns on average.

    References: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [mix(keys ^ np.uint64(r + 1)) for r in range(6)]

    def once(x, round_keys):
        left, right = x >> half, x & mask
        for key in round_keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << half) | right

    x = once(slots.astype(np.uint64), round_keys)
    while True:
        out = np.flatnonzero(x >= np.uint64(size))
        if not out.size:
            return x.astype(np.int64)
        x[out] = once(x[out], [key[out] for key in round_keys])
