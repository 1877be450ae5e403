"""Reads every picture before any is encoded, to decide which are held out.

Pictures are read in blocks of `encode.records_per_shard`. Block b is read by process b
modulo the number of processes, and its findings are written to a file in the folder of
records. So a survey that was stopped continues. Then every process decides by itself.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import config
from scaling_ldm.data import label_names, near_duplicates, pictures, shards, split
from scaling_ldm.data.pictures import BadRecord, Picture, Pictures, Tally
from scaling_ldm.records.errors import NO_ARRAYS
from scaling_ldm.training import mesh, progress

_Block = dict[str, Any]  # the arrays of a block


def run(
    experiment: config.Experiment,
    found: Pictures,
    positions: np.ndarray,
    store: shards.Store,
    tally: Tally,
) -> split.Split:
    """The split of the pictures at some positions of a set.

    All processes call it together.

    Args:
      positions: int64 [n], ascending.
      store: of the folder of records, which gets the findings.
      tally: counts the records.

    Raises:
      ConfigError: as `split.decide`; too many records are bad; or the network would
        have another number of classes than the pictures.
    """
    size = experiment.encode.records_per_shard
    blocks = [positions[i : i + size] for i in range(0, len(positions), size)]
    told = pictures.digest(found.identity, positions.tobytes())
    shown = progress.Progress(
        "split",
        len(positions),
        "pictures looked at",
        experiment.train.show_every_seconds,
    )
    known: dict[int, _Block] = {}
    processes = jax.process_count()
    early = Tally(allowed=tally.allowed, minimum=tally.minimum)

    def look(number: int) -> None:
        if (block := _stored(store, number, told)) is None:
            block = _look(found, blocks[number], experiment.encode.workers)
            _store(store, number, block | {"told": np.array(told)})
        if processes == 1 and number not in known:  # no other blocks come between
            _count(block, early)
        known[number] = block
        shown.show(min((number + 1) * size, len(positions)))

    def look_at(numbers: Sequence[int]) -> None:
        for number in numbers:
            if number < len(blocks):
                look(number)

    turns = [[n + jax.process_index()] for n in range(0, len(blocks), processes)]
    # Last, the blocks of other processes. What this host cannot see is read again.
    turns.append(list(range(len(blocks))))
    for numbers in turns:
        missing = [number for number in numbers if number not in known]
        mesh.failing_together(functools.partial(look_at, missing))
    return mesh.failing_together(lambda: _decide(experiment, found, known, tally))


def remove(store: shards.Store) -> None:
    """Removes the findings of blocks, once the split is stored."""
    for name in store.names():
        if name.startswith("survey-"):
            store.remove(name)


def _name(number: int) -> str:
    return f"survey-{number:05d}.npz"


def _decide(
    experiment: config.Experiment,
    found: Pictures,
    known: dict[int, _Block],
    tally: Tally,
) -> split.Split:
    """The split from what is known of every block."""
    blocks = [known[number] for number in sorted(known)]
    for block in blocks:
        _count(block, tally)
    tally.finish()
    fields = ("positions", "captions", "labels", "thumbnails", "said")
    arrays = {
        name: np.concatenate([block[name] for block in blocks]) for name in fields
    }
    label_names.refuse_labels(
        experiment.model.classes, label_names.of(found), arrays["labels"]
    )
    return split.decide(split.Survey(size=len(found), **arrays), experiment.data)


def _count(block: _Block, tally: Tally) -> None:
    """Counts the records of a block; ConfigError if too many are bad."""
    tally.good += len(block["positions"])
    for name, reason in json.loads(str(block["bad"])):
        tally.add(BadRecord(name, reason))


def _look(found: Pictures, positions: np.ndarray, workers: int) -> _Block:
    """The findings of some pictures."""
    rows: list[tuple[int, int, int, np.ndarray, int]] = []
    bad: list[tuple[str, str]] = []
    for position, one in pictures.read_ahead(found, positions, workers, _seen):
        if isinstance(one, BadRecord):
            bad.append((one.name, one.reason))
        else:
            rows.append((position, *one))
    columns = list(zip(*rows, strict=True)) or [(), (), (), (), ()]
    values = near_duplicates.SIDE**2 * 3
    return {
        "positions": np.array(columns[0], np.int64),
        "captions": np.array(columns[1], np.uint64),
        "labels": np.array(columns[2], np.int64),
        "thumbnails": np.array(columns[3], np.uint8).reshape(len(rows), values),
        "said": np.array(columns[4], np.int64),
        "bad": np.array(json.dumps(bad)),
    }


def _seen(picture: Picture) -> tuple[int, int, np.ndarray, int]:
    """(hash of the caption, label, thumbnail, side in the set's own split)."""
    label = split.NO_LABEL if picture.label is None else picture.label
    said = split.NOT_SAID if picture.held_out is None else int(picture.held_out)
    key = split.caption_key(picture.caption)
    return key, label, near_duplicates.thumbnail(picture.image), said


def _stored(store: shards.Store, number: int, told: str) -> _Block | None:
    """The findings of a block; None if there are none of these pictures."""
    data = store.read(_name(number))
    if data is None:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            block = dict(found)
    except (*NO_ARRAYS, OSError):
        return None
    return block if str(block.get("told")) == told else None


def _store(store: shards.Store, number: int, block: _Block) -> None:
    with store.replace(_name(number)) as path, path.open("wb") as file:
        np.savez(file, **block)
