"""Folders of encoded records, made by hand for tests."""

import numpy as np

from scaling_ldm import config
from scaling_ldm.data import encoded, manifests, seals, shards

COUNT, PER_SHARD = 40, 16
SCALE, SHIFT = 0.5, 1.5
CAPTIONS = [f"A {name}, number {i}!" for i, name in enumerate(["Cat", "dog's"] * 20)]


def record(i, features=None):
    rng = np.random.default_rng(i)
    x = rng.normal(size=(2, 3, 8)).astype(np.float16)
    x[..., 4:] -= 3  # log-variances
    return shards.Record(
        x=x,
        features=features,
        caption=CAPTIONS[i],
        name=f"photos/{i}.jpg",
        label=i % 3,
        held_out=i % 4 == 0,
    )


def experiment(**sections):
    c = config.default()
    c.data.source, c.data.path = "memory", ""
    c.data.shape, c.data.text_tokens, c.data.vocab_size = (2, 3, 4), 5, 64
    c.model.patch_size, c.model.text_width = 1, 6
    c.encode.autoencoder = "owner/autoencoder"
    c.encode.text_encoder = "vocabulary"
    for section, values in sections.items():
        c[section].update(values)
    return config.resolve(c)


def write(
    folder,
    wanted,
    features=None,
    identity_digest="ours",
    per_shard=PER_SHARD,
    **layout,
):
    """A folder of records, made by hand."""
    store = shards.Store(str(folder))
    summaries = []
    for number, first in enumerate(range(0, COUNT, per_shard)):
        with store.replace(shards.shard_name(number)) as path:
            writer = shards.Writer(path, count_words=features is None)
            for i in range(first, min(first + per_shard, COUNT)):
                one = record(i, None if features is None else features[i])
                mean, log_variance = np.split(one.x.astype(np.float32), 2, axis=-1)
                variance = np.exp(log_variance) * SCALE**2
                writer.add(one, (mean - SHIFT) * SCALE, variance)
            summaries.append(writer.finish([]))
        summary = seals.summary_of(summaries[-1], number, identity_digest)
        store.write_json(shards.summary_name(number), summary)
    identity = encoded.identity(wanted)
    identity["autoencoder"] |= {"scale": SCALE, "shift": SHIFT}
    manifests.write(
        store,
        identity,
        shards.Layout(shape=(2, 3, 8), dtype="float16", **layout),
        summaries,
        None if features is None else features[COUNT],
        [],
        (),
    )
    return str(folder)


def shards_of(source, positions):
    """The shards that the pictures at some positions are in, ascending."""
    places = source._order.places(np.asarray(positions, np.int64))
    return np.unique(source._side.shards(places)).tolist()
