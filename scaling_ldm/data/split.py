"""Which captions are held out of training: a hash decides, equally on every host."""

from __future__ import annotations

import hashlib


def caption_fraction(caption: str) -> float:
    """A hash of the caption's words in [0, 1); their order and case do not matter."""
    key = " ".join(sorted(caption.lower().split()))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def held_out(caption: str, fraction: float) -> bool:
    """Whether a caption belongs to the validation split.

    Equal captions are always on one side. A larger fraction keeps what a smaller one
    held out.

    Args:
      fraction: about this share of all captions is held out.
    """
    return caption_fraction(caption) < fraction
