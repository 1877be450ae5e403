"""The surface: its intervals under noise of several kinds, and when it is refused."""

import numpy as np
import pytest
from law_studies import CHINCHILLA, SYMMETRIC, inside, optimum, surface_study

from scaling_ldm.laws import fit, surface
from scaling_ldm.records import Parametric, Refusal


def losses(constants, n, d):
    k = constants
    return k["E"] + k["A"] / n ** k["alpha"] + k["B"] / d ** k["beta"]


def ladder(rng, own, common):
    """Runs of one list of sizes at every budget, with noise of their own and of a size.

    Returns:
      N, D and the losses.
    """
    sizes = optimum(3e19, **CHINCHILLA) * np.geomspace(1 / 16, 16, 11)
    budgets = np.geomspace(1e18, 1e21, 5)[:, None]
    n = np.broadcast_to(sizes, (5, 11)).ravel()
    d = (budgets / (6 * sizes)).ravel()
    noise = own * rng.standard_normal(55) + np.tile(common * rng.standard_normal(11), 5)
    return n, d, losses(CHINCHILLA, n, d) + noise


@pytest.mark.parametrize(
    ("own", "common"), [(5e-3, 0.0), (2e-3, 6e-3)], ids=["own", "of a size"]
)
def test_the_surface_is_covered(own, common):
    """20 studies: a standard error of 7% at 90%, and one set for all five constants."""
    hits, found = {name: 0 for name in CHINCHILLA}, 0
    for seed in range(20):
        points = ladder(np.random.default_rng(seed), own, common)
        got = surface.surface(*points, bootstrap=200, seed=seed)
        if isinstance(got, Refusal):
            continue
        found += 1
        for name, value in CHINCHILLA.items():
            hits[name] += inside(got.intervals[name], value)
    assert found >= 18
    assert all(count >= 0.6 * found for count in hits.values()), hits


def test_noise_that_differs_from_run_to_run_is_covered():
    """No size is at two budgets: each residual keeps its run."""
    hits = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n, d, y = np.array(surface_study(CHINCHILLA, span=6, sizes=8))[:, 1:].T
        noise = np.repeat(np.geomspace(1e-3, 1e-2, 6), 8) * rng.standard_normal(48)
        got = surface.surface(n, d, y + noise, bootstrap=200, seed=seed)
        i = got.intervals["n_opt_exponent"]
        hits += inside(
            i, CHINCHILLA["beta"] / (CHINCHILLA["alpha"] + CHINCHILLA["beta"])
        )
    assert hits >= 15, hits


def test_all_draws_at_once_are_the_least_squares_of_each():
    n, d, y = np.array(surface_study(CHINCHILLA, sizes=5))[:, 1:].T
    u, w = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()
    start, _ = surface._start(u, w, y)
    fitted = surface._refine(u, w, y, start, None).x
    rng = np.random.default_rng(0)
    drawn = y + 3e-3 * rng.standard_normal((4, len(y)))
    found = surface._refitted(u, w, drawn, fitted)
    for one, constants in zip(drawn, found, strict=True):
        alone = surface._refine(u, w, one, fitted, None).x
        np.testing.assert_allclose(constants, alone, rtol=1e-4)


def test_no_seed_decides_whether_a_surface_is_identified():
    rng = np.random.default_rng(1)
    n, d, y = np.array(surface_study(SYMMETRIC, sizes=5))[:, 1:].T
    verdicts = {
        level: {
            type(surface.surface(n, d, y + noise, bootstrap=60, seed=s)).__name__
            for s in range(4)
        }
        for level in (0.01, 0.05, 1.0)
        for noise in [level * rng.standard_normal(len(y))]
    }
    assert all(len(v) == 1 for v in verdicts.values()), verdicts
    assert verdicts[0.01] == {"Parametric"} and verdicts[1.0] == {"Refusal"}


def test_runs_that_are_on_no_surface():
    """Minima that scatter by a factor 1.4 about their law."""
    rng, runs = np.random.default_rng(0), []
    for c in np.geomspace(1e18, 1e21, 6):
        moved = np.exp(0.35 * rng.standard_normal())
        for n in optimum(c, **CHINCHILLA) * np.geomspace(1 / 4, 4, 7):
            y = losses(CHINCHILLA, n / moved, c / (6 * n) * moved)
            runs.append((c, n, c / (6 * n), y + 1e-3 * rng.standard_normal()))
    refused = fit.isoflop(runs, bootstrap=60)
    assert isinstance(refused.parametric, Refusal)
    assert refused.parametric.reason == "the runs are on no such surface"
    assert "F test" in refused.parametric.detail
    assert all(e.estimator != "surface" for e in refused.estimates)
    still = surface_study(CHINCHILLA, noise=1e-3, rng=rng)
    assert isinstance(fit.isoflop(still, bootstrap=60).parametric, Parametric)
