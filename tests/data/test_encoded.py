"""Records of the encode stage: bytes and back, damage, and the rows of a position."""

import collections
import dataclasses
import json
import shutil

import numpy as np
import pytest
from damages import damages, said_about
from encoded_records import (
    CAPTIONS,
    COUNT,
    SCALE,
    SHIFT,
    experiment,
    record,
    write,
)
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import config, data, records
from scaling_ldm.data import (
    encoded,
    seals,
    shard_table,
    shards,
    vocabulary,
)
from scaling_ldm.data.vocabulary import PADDING, RESERVED

MANIFEST = (shards.MANIFEST, shard_table.FILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("records") / "r", experiment())


@pytest.fixture
def source(folder):
    return encoded.Encoded(folder, experiment(), "train")


def test_bytes_and_back():
    layout = shards.Layout(shape=(2, 3, 8), dtype="float16", text_width=6)
    features = np.arange(18, dtype=np.float16).reshape(3, 6)
    want = dataclasses.replace(
        record(7, features), caption="ein Füllhorn 🙂", label=None
    )
    got = shards.unpack(shards.pack(want), layout, "here")
    assert_array_equal(got.x, want.x)
    assert_array_equal(got.features, features)
    for name in ("caption", "name", "label", "held_out"):
        assert getattr(got, name) == getattr(want, name)
    wide = dataclasses.replace(layout, dtype="bfloat16")
    assert shards.unpack(shards.pack(want), wide, "here").x.dtype == np.dtype(
        "bfloat16"
    )


def test_any_changed_byte_and_any_cut_are_noticed():
    layout = shards.Layout(shape=(2, 3, 8), dtype="float16")
    good = shards.pack(record(3))
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 4
        with pytest.raises(records.Damaged, match="shard 1: record 2"):
            shards.unpack(bytes(bad), layout, "shard 1: record 2")
    for length in range(len(good)):
        with pytest.raises(records.Damaged):
            shards.unpack(good[:length], layout, "")
    other = dataclasses.replace(layout, shape=(2, 2, 8))
    with pytest.raises(records.Damaged, match="not have the layout of the manifest"):
        shards.unpack(good, other, "")


def test_the_splits_are_the_held_out_bits(folder, source):
    validation = encoded.Encoded(folder, experiment(), "validation")
    assert (len(source), len(validation)) == (30, 10)
    assert sorted(validation.captions(np.arange(10))) == sorted(CAPTIONS[::4])
    assert set(source.captions(np.arange(30))).isdisjoint(CAPTIONS[::4])
    # Every picture once an epoch, in another order.
    first, second = (source.captions(np.arange(30) + e) for e in (0, 30))
    assert sorted(first) == sorted(second) and first != second
    assert len(set(first)) == 30


def test_a_row_is_a_function_of_its_position(folder, source):
    positions = np.array([3, 1_000_003, 77, 3])
    rows = source.rows(positions)
    again = encoded.Encoded(folder, experiment(), "train")
    for i, position in enumerate(positions):
        alone = again.rows(np.array([position]))
        for name in ("x", "text", "mask", "label"):
            assert_array_equal(alone[name][0], rows[name][i])
    other = encoded.Encoded(folder, experiment(data={"seed": 1}), "train")
    assert other.captions(np.arange(30)) != source.captions(np.arange(30))


def test_latents_are_drawn_from_their_moments(folder, source):
    draws = collections.defaultdict(list)
    captions = source.captions(np.arange(0, 30 * 200))
    for caption, x in zip(captions, source.rows(np.arange(6000))["x"], strict=True):
        draws[caption].append(x)
    for i in (1, 2, 39):
        mean, log_variance = np.split(record(i).x.astype(np.float32), 2, axis=-1)
        found = np.stack(draws[CAPTIONS[i]])
        std = SCALE * np.exp(log_variance / 2)
        assert np.abs(found.mean(0) - (mean - SHIFT) * SCALE).max() < 5 * std.max() / 14
        assert_allclose(found.std(0), std, rtol=0.25)
    # Other noise at each position.
    assert len({x.tobytes() for x in draws[CAPTIONS[1]]}) == 200


def test_text_is_ids_by_rank_in_the_training_split(source):
    words = source._manifest["vocabulary"]
    assert words[:2] == ["a", "number"] and "dog's" in words and "0" not in words
    rows = source.rows(np.arange(4))
    for caption, ids in zip(source.captions(np.arange(4)), rows["text"], strict=True):
        known = [len(RESERVED) + words.index(w) for w in vocabulary.words(caption)]
        assert_array_equal(ids, [*known, PADDING])
    assert_array_equal(rows["mask"], rows["text"] != PADDING)
    assert source.uncond["label"] == source.classes == 3


def test_words_are_lower_case_without_punctuation():
    said = "A man's “Red-hot” CAFÉ, 3½ stars!"
    found = ["a", "man's", "red", "hot", "café", "3½", "stars"]
    assert vocabulary.words(said) == found
    icon = "on a light blue background 3d rotate"
    assert vocabulary.words(icon) == icon.split()
    # A prompt has the ids of the caption that it is, however it is written.
    known = vocabulary.Vocabulary((*RESERVED, "a", "red", "t", "shirt"))
    for written in ("a red t-shirt", "A red T-shirt.", "a red t shirt"):
        assert_array_equal(known.encode(written, 5), [3, 4, 5, 6, PADDING])
    assert known.unknown("A blue T-shirt") == ["blue"]


def test_features_are_padded_with_zeros(tmp_path):
    rng = np.random.default_rng(0)
    features = [
        rng.normal(size=(1 + i % 5, 6)).astype(np.float16) for i in range(COUNT + 1)
    ]
    wanted = experiment(encode={"text_encoder": "owner/encoder"})
    folder = write(tmp_path / "r", wanted, features, text_width=6)
    source = encoded.Encoded(folder, wanted, "train")
    rows = source.rows(np.arange(9))
    assert rows["text"].shape == (9, 5, 6) and rows["text"].dtype == np.float16
    for i, caption in enumerate(source.captions(np.arange(9))):
        want = features[CAPTIONS.index(caption)]
        assert_array_equal(rows["text"][i, : len(want)], want)
        assert not rows["text"][i, len(want) :].any()
        assert rows["mask"][i].tolist() == [True] * len(want) + [False] * (
            5 - len(want)
        )
    assert_array_equal(source.uncond["text"][:1], features[COUNT])
    assert source.uncond["mask"].tolist() == [True] + [False] * 4
    with pytest.raises(config.ConfigError, match="text_width=6"):
        other = experiment(
            model={"text_width": 7}, encode={"text_encoder": "owner/encoder"}
        )
        encoded.Encoded(folder, other, "train")


def test_statistics_are_of_the_training_split(folder, source):
    kept = [record(i).x.astype(np.float64) for i in range(COUNT) if i % 4]
    mean, log_variance = np.split(np.stack(kept), 2, axis=-1)
    mean, variance = (mean - SHIFT) * SCALE, np.exp(log_variance) * SCALE**2
    assert_allclose(source._manifest["mean"], mean.mean((0, 1, 2)), rtol=1e-5)
    spread = variance.mean((0, 1, 2)) + mean.var((0, 1, 2))
    assert_allclose(source._manifest["std"], np.sqrt(spread), rtol=1e-5)


def test_damage_names_shard_and_record(folder, tmp_path):
    for name in [*MANIFEST, *(shards.shard_name(n) for n in range(3))]:
        content = (tmp_path.parent / folder / name).read_bytes()
        (tmp_path / name).write_bytes(content)
    source = encoded.Encoded(str(tmp_path), experiment(), "train")
    damaged = tmp_path / shards.shard_name(1)
    good = damaged.read_bytes()
    bad = bytearray(good)
    bad[300] ^= 255  # of the first records; the end is padding
    source.captions(np.arange(30))  # all shards are open
    damaged.write_bytes(bad)
    with pytest.raises(records.Damaged, match=r"shard-00001.array_record: record \d+"):
        source.rows(np.arange(30))
    for place in (300, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 255
        damaged.write_bytes(bad)
        source = encoded.Encoded(str(tmp_path), experiment(), "train")
        with pytest.raises(records.Damaged, match="shard-00001.* or damaged"):
            source.rows(np.arange(30))
    damaged.write_bytes(good[: len(good) // 2])
    source = encoded.Encoded(str(tmp_path), experiment(), "train")
    with pytest.raises(records.Damaged, match=rf"shard-00001.*wanted {len(good)}"):
        source.rows(np.arange(30))
    damaged.unlink()
    source = encoded.Encoded(str(tmp_path), experiment(), "train")
    with pytest.raises(records.Damaged, match="shard-00001.array_record is missing"):
        source.rows(_of_other_shards(source, 1))
    (tmp_path / shards.MANIFEST).write_text("{")
    with pytest.raises(records.Damaged, match="manifest.json is not JSON"):
        encoded.Encoded(str(tmp_path), experiment(), "train")


def _of_other_shards(source, number):
    """A position whose record is not in a shard."""
    places = source._order.places(np.arange(30))
    return np.flatnonzero(source._side.shards(places) != number)[:1]


def _swap(a, b):
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


@pytest.fixture
def two_folders(folder, tmp_path):
    """A copy of the records, and other records that are laid out alike."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    shutil.copytree(folder, ours)
    write(other, experiment(data={"vocab_size": 65}), identity_digest="other")
    other_shard = other / shards.shard_name(0)
    data = bytearray(other_shard.read_bytes())
    data[-1] ^= 1
    other_shard.write_bytes(data)  # of the same size
    return ours, other


FOREIGN = {
    "another set's": lambda ours, other: shutil.copy(
        other / shards.shard_name(0), ours
    ),
    "swapped": lambda ours, _: _swap(*(ours / shards.shard_name(n) for n in (0, 1))),
    "twice": lambda ours, _: shutil.copy(
        ours / shards.shard_name(1), ours / shards.shard_name(0)
    ),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_shards_that_are_not_where_they_were_are_refused(two_folders, change):
    ours, other = two_folders
    change(ours, other)
    source = encoded.Encoded(str(ours), experiment(), "train")
    with pytest.raises(records.Damaged, match="shard-0000[01].array_record"):
        source.rows(np.arange(30))
    # The stage that goes on after a stop looks at them, too.
    store = shards.Store(str(ours))
    with pytest.raises(records.Damaged, match="shard-00000.array_record"):
        seals.stored_shard(store, 0, "ours")
    assert seals.stored_shard(store, 2, "ours")["records"] == 8


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_shards_with_their_summaries_are_refused_elsewhere(two_folders, change):
    """A shard and its summary fit, but they are of another place or other records."""
    ours, other = two_folders
    change(ours, other)
    if change is FOREIGN["swapped"]:
        _swap(*(ours / shards.summary_name(n) for n in (0, 1)))
    else:
        source = other if change is FOREIGN["another set's"] else ours
        number = 0 if source is other else 1
        shutil.copy(source / shards.summary_name(number), ours / shards.summary_name(0))
    with pytest.raises(records.Damaged, match="shard-00000.json belongs to"):
        seals.stored_shard(shards.Store(str(ours)), 0, "ours")


def test_a_manifest_or_summary_that_was_changed_is_refused(two_folders):
    ours, _ = two_folders
    path = ours / shards.MANIFEST
    held = json.loads(path.read_text())
    changes = {
        "vocabulary": held["vocabulary"][::-1],
        "classes": held["classes"] + 1,
        "mean": [0.0] * 4,
        "records": 41,
    }
    for key, value in changes.items():
        path.write_text(json.dumps(held | {key: value}))
        with pytest.raises(records.Damaged, match="manifest.json was changed"):
            encoded.Encoded(str(ours), experiment(), "train")
    del held["seal"]
    for key, value in changes.items():
        path.write_text(json.dumps(held | {key: value}))
        with pytest.raises(records.Damaged, match="manifest.json has changed"):
            encoded.Encoded(str(ours), experiment(), "train")
    del held["digest"]  # as of 0.1.0
    path.write_text(json.dumps(held))
    encoded.Encoded(str(ours), experiment(), "train").rows(np.arange(30))
    path = ours / shards.summary_name(0)
    held = json.loads(path.read_text())
    del held["seal"]
    path.write_text(json.dumps(held | {"words": {"cat": 1}}))
    with pytest.raises(records.Damaged, match="shard-00000.json has changed"):
        seals.stored_shard(shards.Store(str(ours)), 0, "ours")
    for key in ("digest", "number", "of"):
        del held[key]
    path.write_text(json.dumps(held))
    seals.stored_shard(shards.Store(str(ours)), 0, "ours")


@damages
def test_files_that_are_no_json_of_ours_are_named(two_folders, damage):
    ours, _ = two_folders
    store = shards.Store(str(ours))
    store.write_json(shards.IDENTITY, {"source": "memory", "set": "0"})
    for name, read in (
        (shards.MANIFEST, lambda: encoded.Encoded(str(ours), experiment(), "train")),
        (shards.summary_name(1), lambda: seals.stored_shard(store, 1, "ours")),
        (shards.IDENTITY, lambda: store.read_json(shards.IDENTITY, "source", "set")),
    ):
        path = ours / name
        assert not said_about(path, read)
        held = path.read_bytes()
        path.write_bytes(damage(held))
        assert said_about(path, read)
        path.write_bytes(held)


def test_the_files_of_a_folder_say_their_version(tmp_path):
    """Those of 0.1.0 say none; the identity has a number of its own."""
    store, value = shards.Store(str(tmp_path)), {"records": 3}
    for name in (shards.MANIFEST, shards.summary_name(0)):
        store.write_json(name, value)
        held = json.loads(store.read(name))
        assert records.version_of(held, name) == records.SCHEMA
        assert records.unstamped(held, name) == value and len(held) == 3
        assert store.read_json(name) == value
        (tmp_path / name).write_text(json.dumps(value))
        assert store.read_json(name) == value
        (tmp_path / name).write_text(json.dumps(value | {"version": "9.0.0"}))
        with pytest.raises(records.NewerVersion, match=f"{name} was written by"):
            store.read_json(name)
    identity = {"version": shards.VERSION, "source": "icons"}
    store.write_json(shards.IDENTITY, identity)
    assert json.loads(store.read(shards.IDENTITY)) == identity
    assert store.read_json(shards.IDENTITY) == identity


def test_damage_reaches_the_reader_of_batches(folder, tmp_path):
    for name in [*MANIFEST, *(shards.shard_name(n) for n in range(3))]:
        (tmp_path / name).write_bytes((tmp_path.parent / folder / name).read_bytes())
    damaged = tmp_path / shards.shard_name(0)
    damaged.write_bytes(damaged.read_bytes()[:-70_000])
    source = encoded.Encoded(str(tmp_path), experiment(), "train")
    stream = data.batches(source, batch_size=4, rows=np.arange(4), prefetch=2)
    with pytest.raises(records.Damaged, match="shard-00000"):
        for _ in range(20):
            next(stream)


def test_unfinished_and_empty_folders_say_what_to_do(tmp_path):
    with pytest.raises(config.ConfigError, match="no records in .* add encode to"):
        encoded.Encoded(str(tmp_path / "none"), experiment(), "train")
    shards.Store(str(tmp_path)).write_json(shards.IDENTITY, {})
    with pytest.raises(config.ConfigError, match="are not finished: add encode to"):
        encoded.Encoded(str(tmp_path), experiment(), "train")


def test_a_split_without_pictures_is_refused(folder, monkeypatch):
    monkeypatch.setattr(
        shard_table.ShardTable, "held_out_counts", lambda self: 0 * self.records
    )
    with pytest.raises(config.ConfigError, match="pictures is in the validation split"):
        encoded.Encoded(folder, experiment(), "validation")


@pytest.mark.parametrize(
    ("held", "wanted", "said"),
    [
        ({"name": "a", "digest": "1"}, {"name": "b", "digest": "1"}, False),
        ({"name": "a", "digest": "1"}, {"name": "a", "digest": "2"}, True),
        ({"name": "a", "digest": "1"}, {"name": "a"}, False),
        ({"name": "a"}, {"name": "b", "digest": "1"}, True),
    ],
)
def test_networks_are_the_same_by_their_files_or_their_name(held, wanted, said):
    found = encoded.differences({"autoencoder": held}, {"autoencoder": wanted})
    assert bool(found) == said


def test_records_of_other_captions_are_others():
    """0.1.0 does not say which; they are those by the usual names."""
    usual, named = ({"captions": name, "label": ""} for name in ("", "title"))
    assert not encoded.differences({}, usual)
    for held, wanted in (({}, named), (usual, named), (named, usual)):
        (said,) = encoded.differences(held, wanted)
        assert said.startswith("captions: ")


def test_a_folder_may_be_far_away(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    far = "memory://test_encoded/records"
    wanted = experiment(encode={"path": far})
    write_far = write(far, wanted)
    there = encoded.Encoded(write_far, wanted, "train")
    here = encoded.Encoded(folder, experiment(), "train")
    assert_array_equal(there.rows(np.arange(50))["x"], here.rows(np.arange(50))["x"])
    assert data.records_folder(wanted, tmp_path) == far


def test_two_jobs_do_not_write_into_one_file(tmp_path):
    store = shards.Store(str(tmp_path))
    with store.replace("a") as first, store.replace("a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the last to be complete
    (tmp_path / ".a.left.partial").write_text("of a process that was killed")
    with store.replace("a") as path:
        path.write_text("3")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~shards._umask()


def test_the_bits_of_a_shard_are_its_records(folder):
    store = shards.Store(folder)
    table = shard_table.read(store, seals.stored_manifest(store))
    want = [i % 4 == 0 for i in range(32, COUNT)]
    assert table.held_out(2).tolist() == want
    assert table.held_out_counts().tolist() == [4, 4, 2]
    assert len(table.to_bytes()) < 3 * 30 + 4 * 300


def test_what_is_kept_in_memory_is_what_is_stored(tmp_path, monkeypatch):
    wanted = experiment()
    folder = write(tmp_path / "r", wanted)
    kept = encoded.Encoded(folder, wanted, "train")
    assert kept._fits
    monkeypatch.setattr(encoded, "KEPT_BYTES", 0)
    fresh = encoded.Encoded(folder, wanted, "train")
    for positions in (np.arange(3), np.arange(40), np.array([7, 7, 2])):
        want, got = fresh.rows(positions), kept.rows(positions)
        assert want.keys() == got.keys()
        for name, value in want.items():
            assert_array_equal(got[name], value)
            assert got[name].dtype == value.dtype
    assert kept._memory["there"].all() and not fresh._memory
    reads = []
    monkeypatch.setattr(kept, "_records", reads.append)
    kept.rows(np.arange(9))
    assert not reads
