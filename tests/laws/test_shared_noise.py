"""Noise that budgets have in common: what is read from residuals, and what is drawn."""

import numpy as np
import pytest
from law_studies import inside
from numpy.testing import assert_allclose

from scaling_ldm.laws import fit, shared_noise

SIZES, BUDGETS = 7, 4
X = np.linspace(-1.4, 1.4, SIZES)
DESIGN = np.stack([np.ones(SIZES), X, X**2], axis=1)
GROUP = np.tile(np.arange(SIZES), BUDGETS)


def residuals(rho, rng):
    """Of parabolas through noise of variance 1, of which rho is common to a size."""
    noise = np.sqrt(1 - rho) * rng.standard_normal((BUDGETS, SIZES))
    noise = noise + np.sqrt(rho) * rng.standard_normal(SIZES)
    return (noise - noise @ np.linalg.pinv(DESIGN).T @ DESIGN.T).ravel()


def read(rho, seed, draws=300):
    rng = np.random.default_rng(seed)
    return shared_noise.shared_noise(
        residuals(rho, rng), np.kron(np.eye(BUDGETS), DESIGN), GROUP, draws, rng
    )


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_shares_of_all_draws_hold_the_true_share(rho):
    found = [read(rho, seed) for seed in range(60)]
    held = [np.mean(one.rho <= rho) for one in found]  # uniform if the draws are right
    assert np.mean(held) == pytest.approx(0.5, abs=0.15) or rho == 0.0
    if rho == 0.0:
        alone = [one.p < 0.05 for one in found]
        assert sum(alone) <= 9  # 5% of 60 is 3
        assert 0.3 < np.mean([np.mean(one.rho == 0) for one in found]) < 0.7
    else:
        inside_90 = [0.05 <= share <= 0.95 for share in held]
        assert np.mean(inside_90) > 0.75
    if rho == 0.9:
        assert np.mean([one.p < 0.05 for one in found]) > 0.9
    scales = np.array([np.median(one.scale) for one in found])
    assert_allclose(np.median(scales), 1, rtol=0.2)


def test_drawn_noise_has_the_scale_and_the_correlation_of_its_share():
    draws = 4000
    of = shared_noise.SharedNoise(
        GROUP, np.full(draws, 0.6), np.full(draws, 2.0), p=0.01
    )
    rng = np.random.default_rng(0)
    noise = of.noise(rng.standard_normal(500), rng)
    assert noise.shape == (draws, SIZES * BUDGETS)
    correlation = np.corrcoef(noise.T)
    same = GROUP[:, None] == GROUP
    np.fill_diagonal(correlation, np.nan)
    assert_allclose(np.nanmean(correlation[same]), 0.6, atol=0.03)
    assert_allclose(np.nanmean(correlation[~same]), 0, atol=0.01)
    assert_allclose(noise.std(), 2, rtol=0.1)


def test_points_share_noise_by_trajectory_or_else_by_size():
    budgets = [1.0, 1.0, 2.0, 2.0]
    by_size = shared_noise.groups([5.0, 6.0, 5.0, 7.0], ["a", "b", "c", "d"], budgets)
    assert list(by_size) == [0, 1, 0, 2]
    by_run = shared_noise.groups([5.0, 6.0, 6.0, 5.0], ["a", "b", "a", "b"], budgets)
    assert list(by_run) == [0, 1, 0, 1]
    assert shared_noise.groups([5.0, 6.0, 7.0, 8.0], [""] * 4, budgets) is None
    seeds = shared_noise.groups([5.0, 5.0, 6.0, 7.0], [""] * 4, budgets)
    assert seeds is None  # two seeds of one budget


def test_laws_of_runs_that_share_noise_are_wider_and_a_note_says_so():
    rng = np.random.default_rng(1)
    budgets = tuple(np.geomspace(1e12, 1e13, 4))
    sizes = 4e5 * np.geomspace(0.2, 10, 9)
    grid = [
        (c, n, c / (6 * n), 10 * c**-0.04 + 0.1 * np.log(n / (0.4 * c**0.5)) ** 2)
        for c in budgets
        for n in sizes
    ]
    common = 0.01 * rng.standard_normal(9)
    own = 0.001 * rng.standard_normal(len(grid))
    shared = [(*p[:3], p[3] + common[k % 9] + own[k]) for k, p in enumerate(grid)]
    apart = [(c, n * (1 + 1e-3 * k), d, y) for k, (c, n, d, y) in enumerate(shared)]
    together, alone = (fit.isoflop(p, bootstrap=300) for p in (shared, apart))
    (note,) = (n for n in together.notes if n.startswith("losses of one size"))
    assert " share 9" in note
    assert not any(n.startswith("losses of one size") for n in alone.notes)
    for result in (together, alone):
        assert inside(result.laws["N_opt"].exponent_interval, 0.5)
    widths = [
        r.laws["N_opt"].exponent_interval.high - r.laws["N_opt"].exponent_interval.low
        for r in (together, alone)
    ]
    assert widths[0] > 1.1 * widths[1]
