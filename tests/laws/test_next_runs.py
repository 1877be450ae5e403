"""Which runs are proposed for a study, and that they are worth their FLOPs."""

import importlib.util
import itertools
import math
import pathlib
import sys

import numpy as np
import pytest
from law_studies import study

from scaling_ldm.laws import next_runs
from scaling_ldm.records import Refusal

BUDGETS = (1e12, 1e13, 1e14)


def losses(noise=0.01, budgets=BUDGETS, sizes=6):
    rng = np.random.default_rng(0)
    every = study(rng, noise=noise, budgets=budgets, sizes=sizes)
    return [(c, n, y) for c, n, _, y in every]


def candidates(points):
    return [(c, n * k) for c, n, _ in points for k in (0.8, 1.1)]


def proposed(points, **how):
    given = {"target": 1e15, "count": 4} | how
    return next_runs.propose(points, candidates(points), **given)


def test_each_run_is_new_and_narrows_the_prediction():
    points = losses()
    found = proposed(points)
    assert len(found.runs) == 4 == len({(r.budget, r.n) for r in found.runs})
    assert {(r.budget, r.n) for r in found.runs} <= {*candidates(points)}
    factors = [found.factor, *(r.factor for r in found.runs)]
    assert all(b < a for a, b in itertools.pairwise(factors)) and factors[-1] > 1
    assert found == proposed(points)


def test_what_is_left_open_is_that_of_the_line_through_the_vertices():
    """Against the formulas of least squares, whose noise is that of the residuals."""
    points = losses(noise=0.004)
    squares = dof = 0.0
    variances = []
    for budget in BUDGETS:
        x, y = np.array([(math.log(n), y) for c, n, y in points if c == budget]).T
        x = x - x.mean()
        design = np.stack([np.ones_like(x), x, x * x], 1)
        coefs, rss, *_ = np.linalg.lstsq(design, y, rcond=None)
        squares, dof = squares + rss[0], dof + len(x) - 3
        slope = np.array([0, -1 / (2 * coefs[2]), coefs[1] / (2 * coefs[2] ** 2)])
        variances.append(slope @ np.linalg.inv(design.T @ design) @ slope)
    u = np.log(BUDGETS) - np.mean(np.log(BUDGETS))
    at = math.log(1e15) - np.mean(np.log(BUDGETS))
    weights = 1 / 3 + u * at / np.sum(u * u)
    noise = squares / (dof - 2)  # the mean of squares / chi2
    wanted = 1.645 * math.sqrt(noise * np.sum(weights**2 * np.array(variances)))
    assert math.log(proposed(points).factor) == pytest.approx(wanted, rel=0.1)


def test_a_run_at_a_cheap_budget_is_taken_before_an_equal_one_that_costs_more():
    """At the middle of the budgets all count alike."""
    middle = float(np.exp(np.mean(np.log(BUDGETS))))
    assert {r.budget for r in proposed(losses(), target=middle).runs} == {BUDGETS[0]}


def test_the_loss_is_narrowed_at_its_vertex_and_the_size_at_its_ends():
    points = losses()
    best = {c: 0.4 * c**0.5 for c in BUDGETS}

    def off(quantity):
        runs = proposed(points, quantity=quantity, count=3).runs
        return np.mean([abs(math.log(r.n / best[r.budget])) for r in runs])

    assert off("N_opt") > 0.9 > off("L_opt")
    assert proposed(points, quantity="D_opt").runs == proposed(points).runs


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (losses(budgets=BUDGETS[:2]), "fewer than 3 budgets with a minimum"),
        (losses(sizes=3), "fewer than 3 budgets with a minimum"),
        ([(c, n, 1 - y) for c, n, y in losses()], "fewer than 3 budgets"),
        (losses(sizes=4)[:8] + losses(sizes=4, noise=0.0)[8:], ""),
    ],
)
def test_a_study_without_a_law_has_no_proposals(points, said):
    found = proposed(points)
    assert isinstance(found, Refusal) == bool(said)
    assert said in getattr(found, "reason", "")


def test_no_candidates_are_a_refusal():
    points = losses()
    found = next_runs.propose(points, [(1.0, 1.0)], target=1e15, count=1)
    assert isinstance(found, Refusal) and "no run to add" in found.reason


@pytest.mark.slow
def test_proposed_runs_beat_a_uniform_grid_of_the_same_flops():
    """docs/advice.md has the numbers of more replicates."""
    path = pathlib.Path(__file__).parent / "next_runs_study.py"
    spec = importlib.util.spec_from_file_location("next_runs_study", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    by_proposal, by_grid, count = module.study(40)
    assert count > 35
    assert by_proposal < by_grid
