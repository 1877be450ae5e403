"""The simulated studies are what they say, and the table of docs/laws.md is theirs."""

import importlib.util
import pathlib
import re
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose

HERE = pathlib.Path(__file__).parent


def _load(name):
    spec = importlib.util.spec_from_file_location(
        f"coverage_{name}", HERE / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


measure = _load("measure")
studies = measure.studies
SCENARIOS = studies.SCENARIOS


def table():
    """Cells of the rows of the page's table, by scenario; of its text, the studies."""
    text = measure.PAGE.read_text("utf-8")
    part = text.split(measure.BEGIN)[1].split(measure.END)[0]
    (replicates,) = re.findall(r"(\d+) studies of each scenario", part)
    rows = [line.strip("| ").split(" | ") for line in part.splitlines()[4:] if line]
    return {row[0]: row[1:] for row in rows}, int(replicates)


@pytest.mark.parametrize(
    "surface",
    [studies.EQUAL, studies.LOPSIDED, studies.CHINCHILLA, studies.SODA, studies.PURE],
)
def test_the_truth_of_a_surface_is_its_own(surface):
    """N_opt, the least loss and C = 6 N D, against a fine grid of sizes."""
    for c in surface.C0 * np.array([0.1, 1.0, 30.0]):
        sizes = surface.n_opt(c) * np.exp(np.linspace(-0.5, 0.5, 2001))
        losses = surface.loss(c, sizes)
        assert_allclose(sizes[losses.argmin()], surface.n_opt(c), rtol=1e-3)
        assert_allclose(losses.min(), surface.least(c), rtol=1e-7)
    few = surface.least(surface.C0 * np.array([1.0, 2.0, 4.0])) - surface.E
    assert_allclose(few[1] / few[0], few[2] / few[1], rtol=1e-9)
    assert_allclose(-np.log2(few[1] / few[0]), surface.decay, rtol=1e-9)


def test_chinchillas_constants_are_those_of_the_refit():
    s = studies.CHINCHILLA
    for n in (1e8, 8e8, 5e9):
        d = 1e20 / (6 * n)
        wanted = 1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658
        assert_allclose(s.loss(1e20, n), wanted, rtol=1e-4)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_a_scenario_differs_from_the_base_in_what_it_names(scenario):
    points, truth = studies.draw(scenario, 0)
    assert len(points) == scenario.budgets * scenario.sizes
    for p in points:
        assert_allclose(6 * p["params"] * p["tokens"], p["budget_flops"])
    c, n = (np.array([p[k] for p in points]) for k in ("budget_flops", "params"))
    assert_allclose(np.log10(c.max() / c.min()), scenario.decades)
    for budget in np.unique(c):
        sizes = n[c == budget]
        assert_allclose(sizes.max() / sizes.min(), scenario.width)
    assert truth.beyond[0] == studies.TOP * c.max()
    if scenario.named:  # a trajectory for each size of the list
        assert len({p["run_id"] for p in points}) < len(points)


def test_a_study_has_its_noise_and_its_outlier():
    def losses(**changes):
        points, _ = studies.draw(studies.Scenario(name="", **changes), 0)
        return np.array([p["loss"] for p in points])

    exact = losses(noise=0.0)
    ratio = losses(noise=0.01, budgets=4, sizes=7) / exact - 1
    assert 0.007 < ratio.std() < 0.013
    high = losses(noise=0.0, outlier=1.0) / exact
    assert sorted(high)[-1] == 2.0 and sorted(high)[-2] == 1.0
    spread = (losses(noise=0.01, ratio=10.0) / exact - 1).reshape(4, 7).std(1)
    assert 3 < spread[-1] / spread[0] < 30


def test_the_page_has_a_row_for_each_scenario():
    rows, replicates = table()
    assert list(rows) == [s.name for s in SCENARIOS]
    assert replicates >= 40
    assert {len(cells) for cells in rows.values()} == {len(measure.COLUMNS) + 1}


def _agrees(said, name, cell, replicates):
    """Whether a share is that of the page, within four standard errors of both."""
    results = said.get(name, [])
    if cell == "-" or len(results) < 20:
        return True
    shown = int(cell.strip("*")) / 100
    spread = max(shown * (1 - shown), 0.02)
    # Budgets of one study share their noise level: counted as one.
    errors = spread / min(len(results), 40) + spread / replicates
    return abs(np.mean(results) - shown) < 4 * np.sqrt(errors)


def test_a_study_of_the_base_has_every_column():
    said = measure.coverage(SCENARIOS[0], 1, draws=50)
    assert set(measure.COLUMNS) <= set(said)
    line = measure.row(SCENARIOS[0], {k: 20 * v for k, v in said.items()})
    assert line.startswith("| base | ") and line.count("|") == len(measure.COLUMNS) + 3


@pytest.mark.slow  # 40 studies of each scenario: minutes
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_pages_shares_are_measured_again(scenario):
    rows, replicates = table()
    said = measure.coverage(scenario, 40)
    for name, cell in zip(measure.COLUMNS, rows[scenario.name], strict=False):
        assert _agrees(said, name, cell, replicates), (name, cell, np.mean(said[name]))
