"""A manifest of very many shards, without the shards; and what opening it costs.

    python tests/large_records.py FOLDER SHARDS RECORDS_PER_SHARD

writes the manifest, unless it is there, and opens it as training does, in this process.
It prints seconds, bytes and the shards of some batches as JSON.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
from encoded_records import shards_of

from scaling_ldm import config
from scaling_ldm.data import encoded, seals, shard_table, shards

WINDOW = 4
BATCH, HOSTS = 1024, 64
HELD_OUT = 0.05


def experiment(folder: str, **data: Any) -> config.Experiment:
    """Latents of 32 x 32 x 4 and 77 tokens of 768 features, in windows of shards."""
    c = config.default()
    c.data.source, c.data.path = "memory", ""
    c.data.shape, c.data.text_tokens = (32, 32, 4), 77
    c.data.split_by = "caption_alone"
    c.data.shuffle_window = WINDOW
    c.data.update(data)
    c.model.text_width = 768
    c.encode.path, c.encode.autoencoder = folder, "owner/autoencoder"
    c.encode.text_encoder = "owner/encoder"
    return config.resolve(c)


def write(folder: str, count: int, per_shard: int, seed: int = 0) -> None:
    """Writes a manifest and its table; five percent are held out, by chance."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros((count, -(-per_shard // 8)), np.uint8)
    for some in np.array_split(held_out, max(count // 1000, 1)):
        flags = rng.random((len(some), per_shard), np.float32) < HELD_OUT
        some[:] = np.packbits(flags, axis=1)
    table = shard_table.ShardTable(
        np.full(count, per_shard, np.int64),
        rng.integers(1, 1 << 30, count),
        rng.integers(0, 256, (count, 16)).astype(np.uint8),
        held_out.reshape(-1),
    )
    validation = int(table.held_out_counts().sum())
    wanted = experiment(folder)
    identity = encoded.identity(wanted)
    identity["autoencoder"] |= {"scale": 1.0, "shift": 0.0}
    content = table.to_bytes()
    manifest = {
        "identity": identity,
        "records": count * per_shard,
        "train": count * per_shard - validation,
        "validation": validation,
        "bad": {"count": 0, "first": []},
        "classes": 0,
        "label_names": [],
        "layout": vars(
            shards.Layout(shape=(32, 32, 8), dtype="float16", text_width=768)
        ),
        "mean": [0.0] * 4,
        "std": [1.0] * 4,
        "null": "",
        "vocabulary": [],
        "shards": shard_table.described(content, count),
    }
    store = shards.Store(folder)
    store.write(shard_table.FILE, content)
    store.write_json(shards.MANIFEST, seals.sealed(manifest))


def opened(folder: str) -> dict[str, Any]:
    """What it costs to open both splits, and what batches need."""
    before = peak()
    begin = time.perf_counter()
    train, validation = (
        encoded.Encoded(folder, experiment(folder), split)
        for split in ("train", "validation")
    )
    seconds = time.perf_counter() - begin
    after = peak()
    begin, steps = time.perf_counter(), [0, 1, 100_000]
    files = []
    for step in steps:
        rows = step * BATCH + np.arange(BATCH).reshape(HOSTS, -1)
        files.append([len(shards_of(train, host)) for host in rows])
    return {
        "train": len(train),
        "validation": len(validation),
        "seconds": seconds,
        "peak_bytes": after,
        "of_these": after - before,
        "milliseconds_a_row": 1e3
        * (time.perf_counter() - begin)
        / (len(steps) * BATCH),
        "most_files_of_a_host": max(map(max, files)),
    }


def peak() -> int:
    """The largest memory of this process so far, in bytes."""
    # Not ru_maxrss: a process begins with that of the one that has started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    place, number, each = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if not (pathlib.Path(place) / shards.MANIFEST).exists():
        write(place, number, each)
        print("written")
    else:
        print(json.dumps(opened(place)))
