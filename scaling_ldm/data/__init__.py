"""Sources of pictures and captions: random access, the same on every host.

`pictures` reads other people's layouts, `encoded` the records of the encode stage,
`icons` the embedded pictures. May import: config, records, models.
"""

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
