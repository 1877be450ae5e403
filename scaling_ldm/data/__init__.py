"""Sources of pictures and captions, with random access, the same on every host.

`sources` gives what an experiment trains on and `pipeline` its batches. `pictures`
reads sets of pictures in common layouts, from the files of `storage`. `encoded` and
`shards` are the records of the encode stage, `seals` says whether they are what was
written, and `mixture` mixes those of several parts. `manifests` writes what is known of
all shards, and `shard_table` holds it; `row_order` and `row_noise` say which record a
position has and which noise; `shard_files` reads records, remote ones through
`shard_cache`, and `shard_windows` says which it will need. `icons` paints the embedded
icons of `icon_set`; `vocabulary` turns captions into ids, `hashing` gives random
numbers by position. `split` decides which pictures are held out, by what
`near_duplicates` finds too, and `stored_split` reads what was decided. May import:
config, records, models.
"""

from scaling_ldm.data.pipeline import Batches, Source, batches, stack
from scaling_ldm.data.sources import (
    naming,
    parts,
    records_folder,
    sources,
    training_pictures,
)

__all__ = [
    "Batches",
    "Source",
    "batches",
    "naming",
    "parts",
    "records_folder",
    "sources",
    "stack",
    "training_pictures",
]
