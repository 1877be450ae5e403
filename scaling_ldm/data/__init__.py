"""Sources of pictures and captions: random access, the same on every host."""

from scaling_ldm.data.pipeline import Batches, Source, batches, stack
from scaling_ldm.data.sources import records_folder, sources

__all__ = [
    "Batches",
    "Source",
    "batches",
    "records_folder",
    "sources",
    "stack",
]
