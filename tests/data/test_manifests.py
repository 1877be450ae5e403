"""The manifest's classes: counted from labels and their names, read by a source."""

import dataclasses

import encoded_records
import numpy as np
import pytest

from scaling_ldm.data import encoded, manifests, seals, shards


def write(folder, labels, names):
    """A folder of one shard for each picture, with these labels; None: it has none."""
    store, summaries = shards.Store(str(folder)), []
    for number, label in enumerate(labels):
        one = dataclasses.replace(
            encoded_records.record(number), label=label, held_out=number == 0
        )
        with store.replace(shards.shard_name(number)) as path:
            writer = shards.Writer(path, count_words=True)
            mean = np.zeros((2, 3, 4), np.float32)
            writer.add(one, mean, mean)
            summaries.append(writer.finish([]))
        summary = seals.summary_of(summaries[-1], number, "ours")
        store.write_json(shards.summary_name(number), summary)
    identity = encoded.identity(encoded_records.experiment())
    identity["autoencoder"] |= {"scale": 1.0, "shift": 0.0}
    layout = shards.Layout(shape=(2, 3, 8), dtype="float16")
    return manifests.write(store, identity, layout, summaries, None, [], names)


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        ((0, 2, 1), (), 3),
        ((0, 2, 0), (), 3),  # no picture has label 1
        ((2, 0, 1), (), 3),  # the largest is held out
        ((0, 1, 0), ("cat", "dog", "owl"), 3),  # no picture is an owl
        ((0, 0, 0), ("cat", "dog", "owl"), 3),
        ((0, 3, 1), ("cat", "dog"), 4),  # a label beyond the names
        ((0, None, 1), (), 0),
        ((None, 0, 1), ("cat", "dog"), 0),
        ((None, None, None), (), 0),
        ((None, None, None), ("cat", "dog"), 0),
    ],
)
def test_classes_are_the_labels_of_all_pictures_and_their_names(
    tmp_path, labels, names, classes
):
    made = write(tmp_path, labels, names)
    kept = list(names) if classes else []
    assert (made["classes"], made["label_names"]) == (classes, kept)
    for split in ("train", "validation"):
        source = encoded.Encoded(str(tmp_path), encoded_records.experiment(), split)
        assert source.classes == classes
        assert source.label_names == tuple(kept)
        # A row without its condition is of the class after the last.
        assert source.uncond["label"] == classes
        rows, caption = source.rows(np.arange(1)), source.captions(np.arange(1))[0]
        if classes:
            number = encoded_records.CAPTIONS.index(caption)
            assert rows["label"] == labels[number]
        else:
            assert "label" not in rows
