"""Sources of pictures and captions: random access, the same on every host."""

from scaling_ldm.data.pipeline import Batches, Source, batches, stack
from scaling_ldm.data.sources import SOURCES, null_condition, sources

__all__ = [
    "SOURCES",
    "Batches",
    "Source",
    "batches",
    "null_condition",
    "sources",
    "stack",
]
