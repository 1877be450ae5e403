"""Random numbers by position: hashes and permutations, the same on every machine.

All of it is uint64 arithmetic modulo 2**64, vectorised over positions; numpy only.
"""

from __future__ import annotations

import numpy as np


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of uint64 that looks random."""
    x = np.array(x, np.uint64, ndmin=1)
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def draw(seed: int, stream: int, positions: np.ndarray) -> np.ndarray:
    """64 random bits for each position: uint64 [n], of (seed, stream, position)."""
    key = mix(mix(np.uint64(seed % 2**64)) ^ np.uint64(stream))
    return mix(mix(positions) ^ key)


def below(bits: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Maps 64 random bits to int64 of 0..bound-1; bound below 2**31."""
    bound = np.asarray(bound, np.uint64)
    return (((bits >> np.uint64(32)) * bound) >> np.uint64(32)).astype(np.int64)


def permute(slots: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """A keyed permutation of 0..size-1: int64 [n] slots, uint64 [n] keys -> int64 [n].

    A Feistel network of six rounds on the smallest even number of bits that holds
    `size`; where it leaves the range it is applied again until it is back, which keeps
    it a bijection and takes fewer than four turns on average.

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
