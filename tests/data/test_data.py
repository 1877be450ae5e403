"""The pipeline and the sources: position decides the picture, nothing else does."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import config, data
from scaling_ldm.data import icons
from scaling_ldm.data.vocabulary import NULL

NOWHERE = pathlib.Path("nowhere")


@pytest.fixture(scope="module")
def experiment():
    c = config.default()
    c.data.shape, c.data.text_tokens, c.data.vocab_size = (16, 16, 3), 8, 512
    return config.resolve(c)


def resolved(experiment, **changes):
    section = dataclasses.replace(experiment.data, **changes)
    return dataclasses.replace(experiment, data=section)


@pytest.fixture(scope="module")
def source(experiment):
    return data.sources(experiment, NOWHERE)[0]


def stream(source, batch_size, rows, prefetch=0):
    return data.batches(source, batch_size=batch_size, rows=rows, prefetch=prefetch)


def test_batches_are_the_positions_in_order(source):
    it = stream(source, 4, np.arange(0, 4))
    got = [next(it) for _ in range(3)]
    want = source.rows(np.arange(12))
    for name in ("x", "text", "mask", "label"):
        assert_array_equal(np.concatenate([g[name] for g in got]), want[name])
    assert want["x"].dtype == np.float32
    assert want["x"].shape == (12, 16, 16, 3)
    assert -1 <= want["x"].min() < want["x"].max() <= 1


def test_batch_size_and_process_count_do_not_change_the_stream(source):
    whole = next(stream(source, 8, np.arange(0, 8)))
    halves = stream(source, 4, np.arange(0, 4))
    by_size = np.concatenate([next(halves)["x"] for _ in range(2)])
    by_process = np.concatenate(
        [next(stream(source, 8, np.arange(2 * p, 2 * p + 2)))["x"] for p in range(4)]
    )
    assert_array_equal(by_size, whole["x"])
    assert_array_equal(by_process, whole["x"])


def test_the_state_is_json_and_continues_on_another_process_count(source):
    it = stream(source, 8, np.arange(0, 8), prefetch=2)
    for _ in range(3):
        next(it)
    state = json.loads(json.dumps(it.get_state()))
    want = next(it)["x"]
    again = stream(source, 8, np.arange(0, 8))
    again.set_state(state)
    assert_array_equal(next(again)["x"], want)
    second = stream(source, 8, np.arange(4, 8))
    second.set_state(state)
    assert_array_equal(next(second)["x"], want[4:])


def test_stack_fills_a_leading_axis_and_leaves_the_rest_zero(source):
    stacked = data.stack(stream(source, 2, np.arange(0, 2)), 3, rows=4)
    assert_array_equal(
        stacked["x"][:3].reshape(6, 16, 16, 3), source.rows(np.arange(6))["x"]
    )
    assert stacked["x"].shape == (4, 2, 16, 16, 3)
    assert not stacked["x"][3].any()


def test_captions_belong_to_the_pictures(source):
    positions = np.array([5, 70_000, 3])
    vocabulary = icons.build_vocabulary(512, 0.05)
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


def test_null_condition_differs_from_every_caption(experiment):
    uncond = data.sources(resolved(experiment, text_tokens=5), NOWHERE)[0].uncond
    assert_array_equal(uncond["text"], [NULL, 0, 0, 0, 0])
    assert_array_equal(uncond["mask"], [True, False, False, False, False])
    assert uncond["label"] == len(icons.PALETTE)


def test_a_coarse_picture_is_the_mean_of_squares(experiment):
    coarse = resolved(experiment, coarse=4)
    for plain, given in zip(
        data.sources(experiment, NOWHERE), data.sources(coarse, NOWHERE), strict=True
    ):
        want, got = plain.rows(np.arange(3)), given.rows(np.arange(3))
        assert_array_equal(got["x"], want["x"])
        square = want["x"][1, 4:8, 8:12].mean((0, 1))
        for row, column in ((4, 8), (7, 11)):
            assert_allclose(got["image"][1, row, column], square, rtol=1e-5, atol=1e-6)
        assert given.captions(np.arange(3)) == plain.captions(np.arange(3))
        assert "image" not in given.uncond


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"shape": (24, 24, 3)}}, "the icons source has one of"),
        (
            {"model": {"architecture": "adaln_zero", "classes": 3}},
            "config.model.classes = 3, but the icons source has",
        ),
        (
            {"data": {"source": "memory"}, "encode": {"path": "/nonexistent"}},
            "no records in /nonexistent: add encode to --stages",
        ),
    ],
)
def test_sources_refuse_what_does_not_fit(change, said):
    c = config.default()
    for section, values in change.items():
        c[section].update(values)
    with pytest.raises(config.ConfigError, match=said):
        data.sources(config.resolve(c), NOWHERE)
