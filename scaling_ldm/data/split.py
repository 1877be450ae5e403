"""Which captions are held out of training: a hash decides, the same on every host."""

from __future__ import annotations

import hashlib


def caption_fraction(caption: str) -> float:
    """A number in [0, 1) of the caption's words, whatever their order and case."""
    key = " ".join(sorted(caption.lower().split()))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def held_out(caption: str, fraction: float) -> bool:
    """Whether the caption belongs to the validation split, a `fraction` of them all.

    Equal captions never straddle; growing the fraction keeps what was held out.
    """
    return caption_fraction(caption) < fraction
