"""Which part of a mix a position is of: shares, order, and nothing but the position."""

import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm import config, data
from scaling_ldm.data import mixture
from scaling_ldm.data.sources import _check_classes

WEIGHTS = [(0.8, 0.2), (1.0, 1.0, 1.0), (5.0, 0.001, 2.0, 3.0), (0.1, 0.2, 0.3, 0.4)]


class Counted:
    """Pictures whose only value is their row, in an epoch of its own order."""

    shape, classes, uncond = (1, 1, 1), 0, {}

    def __init__(self, length):
        self.length = length

    def rows(self, positions):
        x = np.asarray(positions, np.float32).reshape(-1, 1, 1, 1)
        text = np.full((len(x), 2), self.length, np.int32)
        return {"x": x, "text": text, "mask": text > 0}

    def captions(self, positions):
        return [f"{self.length}: {position}" for position in positions]


def counted(seed=3, weights=(0.8, 0.2), numbers=(0, 1)):
    return mixture.Mixture(
        [Counted(7 + k) for k in range(len(weights))],
        weights,
        seed,
        numbers=numbers,
        identity=None,
    )


@pytest.mark.parametrize("weights", [*WEIGHTS, (1e-6, 1.0), (2.0, 1.0), (1e300, 1e300)])
def test_shares_are_the_weights_to_one_in_a_thousand_million(weights):
    found = mixture.shares(weights)
    assert sum(found) == mixture.WHOLE
    for weight, share in zip(weights, found, strict=True):
        wanted = weight / max(weights) / sum(w / max(weights) for w in weights)
        assert abs(share - wanted * mixture.WHOLE) < 1
    assert (
        mixture.shares((0.8, 0.2)) == mixture.shares((4, 1)) == [8 * 10**8, 2 * 10**8]
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_any_window_has_the_shares(weights, seed):
    """Up to less than the number of parts - 1 rows, which is less than one of two."""
    shares = mixture.shares(weights)
    part, _ = mixture.assign(np.arange(20_000), shares, seed)
    exact = np.array(shares) / mixture.WHOLE
    counts = np.cumsum(part[:, None] == np.arange(len(weights)), axis=0)
    counts = np.concatenate([np.zeros((1, len(weights)), int), counts])
    for window in (1, 2, 3, 5, 8, 100, 1_001, 19_999):
        off = counts[window:] - counts[:-window] - window * exact
        assert np.abs(off).max() < len(weights) - 1 + 1e-9, window


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("start", [0, 10**15])
def test_every_row_of_a_part_is_taken_once_in_order(weights, start):
    shares = mixture.shares(weights)
    part, row = mixture.assign(start + np.arange(5_000), shares, 5)
    for k, share in enumerate(shares):
        mine = row[part == k].tolist()
        if not mine:
            assert share * 5_000 < len(shares) * mixture.WHOLE
            continue
        assert mine == list(range(mine[0], mine[0] + len(mine)))
        off = mine[0] * mixture.WHOLE - start * share  # of the rows before these
        assert abs(off) < (len(shares) - 1) * mixture.WHOLE


def test_the_seed_moves_the_parts_and_their_orders_differ():
    shares = mixture.shares((0.7, 0.3))
    by_seed = {
        mixture.assign(np.arange(100), shares, s)[0].tobytes() for s in range(20)
    }
    assert len(by_seed) > 3
    seeds = {mixture.seed_of_part(seed, k) for seed in range(5) for k in range(5)}
    assert len(seeds) == 25


def test_a_row_is_a_function_of_its_position():
    source = counted()
    positions = np.array([3, 1_000_003, 77, 3])
    rows, captions = source.rows(positions), source.captions(positions)
    assert set(rows) == {"x", "text", "mask", "part"} and rows["part"].dtype == np.int32
    for i, position in enumerate(positions):
        alone = counted().rows(np.array([position]))
        for name, value in rows.items():
            assert_array_equal(alone[name][0], value[i])
        part, row = mixture.assign(positions, mixture.shares((0.8, 0.2)), 3)
        assert rows["part"][i] == part[i] and rows["text"][i, 0] == 7 + part[i]
        assert captions[i] == f"{7 + part[i]}: {row[i]}"
    assert counted(numbers=(4, 2)).rows(positions)["part"].max() == 4


def stream(batch_size, rows):
    return data.batches(counted(), batch_size=batch_size, rows=rows, prefetch=2)


def test_batches_processes_and_restarts_do_not_change_the_stream():
    whole = counted().rows(np.arange(48))
    for size, processes in ((8, 1), (24, 1), (24, 4), (48, 3)):
        mine = size // processes
        its = [
            stream(size, np.arange(p * mine, (p + 1) * mine)) for p in range(processes)
        ]
        got = [next(it) for _ in range(48 // size) for it in its]
        for name, value in whole.items():
            assert_array_equal(np.concatenate([g[name] for g in got]), value)
    it = stream(8, np.arange(0, 8))
    for _ in range(4):
        next(it)
    state = json.loads(json.dumps(it.get_state()))
    for p in range(2):  # continued on twice as many processes
        again = stream(8, np.arange(4 * p, 4 * p + 4))
        again.set_state(state)
        batch = next(again)
        for name, value in whole.items():
            assert_array_equal(batch[name], value[32 + 4 * p : 36 + 4 * p])


def test_words_have_one_rank_in_all_parts():
    assert mixture.ranked([["a", "cat", "sat"], ["the", "a", "dog"]]) == [
        "a",
        "the",
        "cat",
        "dog",
        "sat",
    ]


def test_a_label_is_the_same_class_in_every_part():
    parts = {}
    for part, names in (("own", ("cat", "dog")), ("prior", ()), ("more", ("cat", "x"))):
        parts[part] = Counted(7)
        parts[part].label_names = names
    said = (
        "part 'more' of config.data.mix: .* part 'own' learnt other classes .* 2 here"
    )
    with pytest.raises(config.ConfigError, match=said):
        _check_classes(parts)
    parts["more"].label_names = ("cat", "dog")
    _check_classes(parts)
