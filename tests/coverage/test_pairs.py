"""Simulated pairs are what they say, and the table of docs/compare.md is theirs."""

import dataclasses
import importlib.util
import pathlib
import re
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose

HERE = pathlib.Path(__file__).parent
_spec = importlib.util.spec_from_file_location(
    "coverage_measure_pairs", HERE / "measure_pairs.py"
)
measure = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = measure
_spec.loader.exec_module(measure)
pairs = measure.pairs


def table():
    """Cells of the rows of the page's table, by pair; of its text, the studies."""
    text = measure.PAGE.read_text("utf-8")
    part = text.split(measure.BEGIN)[1].split(measure.END)[0]
    (replicates,) = re.findall(r"(\d+) simulated pairs of each kind", part)
    rows = [line.strip("| ").split(" | ") for line in part.splitlines()[4:] if line]
    return {row[0]: row[1:] for row in rows}, int(replicates)


def test_the_page_has_a_row_for_each_pair():
    rows, replicates = table()
    assert list(rows) == [pair.name for pair in pairs.PAIRS]
    assert replicates >= 200
    assert {len(cells) for cells in rows.values()} == {len(measure.COLUMNS) + 2}


def test_equal_laws_show_no_difference_in_nine_of_ten_pairs():
    rows, _ = table()
    for name, cells in rows.items():
        if name.startswith("equal laws"):
            assert int(cells[-2].split(" / ")[-1]) >= 90


def test_a_truth_is_that_of_the_surfaces():
    truth = pairs.truth_of(pairs.Pair(name="", second=pairs.CROSSES))
    a, b = pairs.BASE.surface, pairs.CROSSES
    assert_allclose(truth.exponent, 0.3 / 0.66 - 0.5)
    assert_allclose(a.least(truth.crossing), b.least(truth.crossing), rtol=1e-4)
    assert 1.5 < truth.crossing / a.C0 < 3
    assert_allclose(b.least(truth.compute * a.C0), a.least(a.C0), rtol=1e-6)
    assert truth.compute > 1
    equal = pairs.truth_of(pairs.PAIRS[0])
    assert (equal.slope, equal.exponent, equal.n_ratio) == (0, 0, 1)
    assert np.isnan(pairs.truth_of(pairs.Pair(name="", second=pairs.LATE)).crossing)


def test_a_pair_has_the_correlation_that_it_names():
    def noise(pair):
        exact = [
            [p["loss"] for p in points]
            for points in pairs.draw(_without_noise(pair), 0)[:2]
        ]
        sides = [[], []]
        for seed in range(20):
            for i, points in enumerate(pairs.draw(pair, seed)[:2]):
                ratio = np.array([p["loss"] for p in points]) / exact[i] - 1
                sides[i] += list(ratio)
        return np.corrcoef(sides)[0, 1], np.std(sides)

    share, level = noise(pairs.Pair(name="", **pairs.PAIRED))
    assert abs(share - 0.9) < 0.03
    assert_allclose(level, 0.005, rtol=0.1)
    assert abs(noise(pairs.Pair(name=""))[0]) < 0.12


def _without_noise(pair):
    return dataclasses.replace(pair, design=dataclasses.replace(pair.design, noise=0.0))


@pytest.mark.slow  # 40 pairs of each kind: minutes
@pytest.mark.parametrize("pair", pairs.PAIRS, ids=lambda p: p.name)
def test_the_pages_shares_are_measured_again(pair):
    rows, replicates = table()
    said = measure.coverage(pair, 40)
    for name, cell in zip(measure.COLUMNS, rows[pair.name], strict=False):
        results = said.get(name, [])
        if cell == "-" or len(results) < 20:
            continue
        shown = int(cell.strip("*")) / 100
        spread = max(shown * (1 - shown), 0.02)
        errors = spread / len(results) + spread / replicates
        assert abs(np.mean(results) - shown) < 4 * np.sqrt(errors), (name, cell)
