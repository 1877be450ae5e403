"""The pipeline and the sources: position decides the picture, nothing else does."""

import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm import config, data
from scaling_ldm.data import icons


@pytest.fixture(scope="module")
def source():
    cfg = config.Data(shape=(16, 16, 3), text_tokens=8, vocab_size=512)
    return data.sources(cfg)[0]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "latents.npy", rng.normal(size=(60, 4, 4, 2)).astype("f2"))
    lines = [f"a {('red', 'blue')[i % 2]} thing number{i}" for i in range(60)]
    (tmp_path / "captions.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def latents(folder, **changes):
    values = dict(
        source="latents", path=str(folder), shape=(4, 4, 2), text_tokens=4
    ) | {"vocab_size": 64, "validation_fraction": 0.2}
    return data.sources(config.Data(**(values | changes)))


def stream(source, batch_size, rows, prefetch=0):
    return data.batches(source, batch_size=batch_size, rows=rows, prefetch=prefetch)


def test_batches_are_the_positions_in_order(source):
    it = stream(source, 4, slice(0, 4))
    got = [next(it) for _ in range(3)]
    want = source.rows(np.arange(12))
    for name in ("x", "text", "mask", "label"):
        assert_array_equal(np.concatenate([g[name] for g in got]), want[name])
    assert want["x"].dtype == np.float32
    assert want["x"].shape == (12, 16, 16, 3)
    assert -1 <= want["x"].min() < want["x"].max() <= 1


def test_batch_size_and_process_count_do_not_change_the_stream(source):
    whole = next(stream(source, 8, slice(0, 8)))
    halves = stream(source, 4, slice(0, 4))
    by_size = np.concatenate([next(halves)["x"] for _ in range(2)])
    by_process = np.concatenate(
        [next(stream(source, 8, slice(2 * p, 2 * p + 2)))["x"] for p in range(4)]
    )
    assert_array_equal(by_size, whole["x"])
    assert_array_equal(by_process, whole["x"])


def test_the_state_is_json_and_continues_on_another_process_count(source):
    it = stream(source, 8, slice(0, 8), prefetch=2)
    for _ in range(3):
        next(it)
    state = json.loads(json.dumps(it.get_state()))
    want = next(it)["x"]
    again = stream(source, 8, slice(0, 8))
    again.set_state(state)
    assert_array_equal(next(again)["x"], want)
    second = stream(source, 8, slice(4, 8))
    second.set_state(state)
    assert_array_equal(next(second)["x"], want[4:])


def test_stack_fills_a_leading_axis_and_leaves_the_rest_zero(source):
    stacked = data.stack(stream(source, 2, slice(0, 2)), 3, rows=4)
    assert_array_equal(
        stacked["x"][:3].reshape(6, 16, 16, 3), source.rows(np.arange(6))["x"]
    )
    assert stacked["x"].shape == (4, 2, 16, 16, 3)
    assert not stacked["x"][3].any()


def test_captions_belong_to_the_pictures(source):
    positions = np.array([5, 70_000, 3])
    vocabulary = icons.Vocabulary.build(512, 0.05)
    ids = source.rows(positions)["text"]
    for caption, row in zip(source.captions(positions), ids, strict=True):
        assert_array_equal(vocabulary.encode(caption, 8), row)


def test_labels_are_the_foreground_colours(source):
    positions = np.arange(50)
    names = list(icons.PALETTE)
    for caption, label in zip(
        source.captions(positions), source.rows(positions)["label"], strict=True
    ):
        assert names[label] in caption
    assert source.classes == len(names)


def test_null_condition_differs_from_every_caption():
    null = data.null_condition(config.Data(text_tokens=5), classes=3)
    assert_array_equal(null["text"], [icons.NULL, 0, 0, 0, 0])
    assert_array_equal(null["mask"], [True, False, False, False, False])
    assert null["label"] == 3


def test_latents_splits_share_no_caption_and_cover_all(folder):
    train, held_out = latents(folder)
    captions = [set(s.captions(np.arange(200))) for s in (train, held_out)]
    assert not captions[0] & captions[1]
    assert len(captions[0] | captions[1]) == 60
    assert 4 <= len(captions[1]) <= 20


def test_latents_visit_each_record_once_an_epoch(folder):
    train, _ = latents(folder)
    n = len(set(train.captions(np.arange(500))))
    for epoch in range(3):
        seen = train.captions(np.arange(epoch * n, (epoch + 1) * n))
        assert len(set(seen)) == n
    assert train.captions(np.arange(n)) != train.captions(np.arange(n, 2 * n))


def test_latents_rows_match_their_captions(folder):
    train, _ = latents(folder)
    stored = np.load(folder / "latents.npy")
    lines = (folder / "captions.txt").read_text().splitlines()
    rows = train.rows(np.arange(7))
    for x, caption in zip(rows["x"], train.captions(np.arange(7)), strict=True):
        assert_array_equal(x, stored[lines.index(caption)].astype("f"))
    assert (rows["text"] != icons.UNKNOWN).sum() > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": ""}, "config.data.path is not set"),
        ({"path": "/nonexistent"}, "no latents.npy in it"),
        ({"shape": (4, 4, 3)}, r"has shape \(60, 4, 4, 2\)"),
        ({"source": "webdataset"}, "known: icons, latents"),
        ({"source": "icons"}, "the icons source has one of"),
    ],
)
def test_sources_refuse_what_does_not_fit(folder, changes, said):
    with pytest.raises(config.ConfigError, match=said):
        latents(folder, **changes)


def test_missing_captions_are_counted(folder):
    (folder / "captions.txt").write_text("one\ntwo\n")
    with pytest.raises(config.ConfigError, match="2 captions for 60 latents"):
        latents(folder)
