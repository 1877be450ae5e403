"""Two sets of runs whose laws are known, against each other."""

import math

import numpy as np
import pytest
from law_studies import BUDGETS, study
from numpy.testing import assert_allclose

from scaling_ldm import records
from scaling_ldm.laws import fit
from scaling_ldm.laws.compared_minima import TOO_SURE
from scaling_ldm.records import AtBudget, CrossingBudget, EqualLoss, Refusal

FIRST = (0.4, 0.5, 10.0, -0.04)
MIDDLE = math.exp(np.mean(np.log(BUDGETS)))
FASTER = (0.4 * MIDDLE**0.03, 0.47, 10.0 * MIDDLE**0.01, -0.05)  # equal in the middle


def compared(first, second, **options):
    return fit.compare(first, second, **({"bootstrap": 200} | options))


def noisy(law, seed=0, noise=0.002, **changes):
    return study(np.random.default_rng(seed), noise, law=law, **changes)


@pytest.fixture(scope="module")
def exact():
    return compared(study(law=FIRST), study(law=FASTER), names=("a", "b"))


def test_known_laws_come_back(exact):
    n, d, loss = (exact.laws[q] for q in ("N_opt", "D_opt", "L_opt"))
    assert_allclose(n.exponents, (0.5, 0.47), rtol=1e-6)
    assert_allclose([n.difference, d.difference], [-0.03, 0.03], rtol=1e-6)
    assert_allclose(n.ratio, 1.0, rtol=1e-6)
    assert_allclose(n.at_middle[0], 0.4 * MIDDLE**0.5, rtol=1e-6)
    assert_allclose(loss.exponents, (-0.04, -0.05), rtol=1e-6)
    assert_allclose(exact.middle, MIDDLE)
    assert loss.differs and n.differs
    without = dict(loss.left_out)
    assert_allclose([*without], BUDGETS)
    assert_allclose([*without.values()], -0.01, rtol=1e-5)


def test_exact_laws_cross_where_they_are_equal(exact):
    assert exact.verdict == "they cross"
    assert isinstance(exact.crossing, CrossingBudget)
    assert_allclose(exact.crossing.budget_flops, MIDDLE, rtol=1e-6)
    assert exact.crossing.better_beyond == "second"
    (low, _, first), (_, high, second) = exact.better
    assert (first, second) == ("first", "second")
    assert_allclose([low, high], [BUDGETS[0], BUDGETS[-1]])


def test_equal_loss_needs_another_budget(exact):
    """At the last budget C, 10 C^-0.04 = 10 M^0.01 C'^-0.05 for C' = r C."""
    at = exact.at_budgets[-1]
    assert isinstance(at, AtBudget) and isinstance(at.compute, EqualLoss)
    c = BUDGETS[-1]
    wanted = (c**-0.04 / MIDDLE**0.01) ** (-1 / 0.05) / c
    assert_allclose(at.compute.ratio, wanted, rtol=1e-3)
    assert_allclose(at.loss_ratio, (c / MIDDLE) ** -0.01, rtol=1e-6)
    assert not at.compute.extrapolated
    assert exact.at_budgets[0].compute.extrapolated is False
    assert exact.at_budgets[0].compute.ratio > 1


def test_a_comparison_is_a_line_of_a_file(exact):
    assert records.loads(records.dumps(exact)) == exact


def test_budgets_are_stated_within_those_compared():
    found = compared(study(law=FIRST), study(law=FASTER), budgets=(1e11, 5e12))
    outside, inside = found.at_budgets
    assert isinstance(outside, Refusal)
    assert outside.reason == "outside the budgets compared"
    assert outside.budget_flops == 1e11 and inside.budget_flops == 5e12


def test_equal_laws_show_no_difference():
    found = compared(noisy(FIRST), noisy(FIRST, seed=1))
    assert found.verdict == "no difference shown" and found.better == ()
    assert isinstance(found.crossing, Refusal)
    assert found.crossing.reason == "slopes are not shown to differ"
    same = noisy(FIRST)
    alike = compared(same, same, paired=True)
    assert alike.verdict == "no difference shown"
    assert alike.laws["L_opt"].difference == 0
    assert_allclose(alike.correlation, 1.0)


def test_a_crossing_outside_the_budgets_is_refused():
    lower = (0.4, 0.5, 10.0 * MIDDLE**0.01 * 0.9, -0.05)
    found = compared(study(law=FIRST), study(law=lower))
    assert found.verdict == "second better"
    assert isinstance(found.crossing, Refusal)
    assert found.crossing.reason == "outside the budgets compared"
    meet = float(found.crossing.detail.split()[4])
    assert_allclose(meet, MIDDLE * 0.9**100, rtol=1e-3)


def test_pairs_take_out_the_noise_that_they_share():
    """Both sides have one noise, and each a little of its own."""
    rng = np.random.default_rng(3)
    first, second = study(law=FIRST), study(law=FASTER)
    for i, common in enumerate(0.003 * rng.standard_normal(len(first))):
        own = 0.0005 * rng.standard_normal(2)
        first[i] = (*first[i][:3], first[i][3] + common + own[0])
        second[i] = (*second[i][:3], second[i][3] + common + own[1])
    apart, pairs = (compared(first, second, paired=p) for p in (False, True))
    assert apart.correlation is None and pairs.correlation > 0.9
    for name in ("N_opt", "L_opt"):
        wide, narrow = (
            found.laws[name].difference_interval for found in (apart, pairs)
        )
        assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)
    # The order in which points are given changes nothing, as far as pairs stay pairs.
    order = rng.permutation(len(first))
    other = compared([first[i] for i in order], [second[i] for i in order], paired=True)
    assert_allclose(
        other.laws["L_opt"].difference_interval.low,
        pairs.laws["L_opt"].difference_interval.low,
        rtol=1e-9,
    )


def test_seeds_are_paired_as_they_are_given_not_by_their_losses():
    """With independent noise, pairs of two seeds have no correlation."""
    a, b = (noisy(FIRST, 2 * s) + noisy(FIRST, 2 * s + 1) for s in (0, 1))
    found = compared(a, b, paired=True)
    assert abs(found.correlation) < 0.35


def test_a_run_without_its_other_is_left_out():
    first, second = noisy(FIRST), noisy(FASTER, 1)
    second[7] = (*second[7][:3], math.nan)
    found = compared(first, second, names=("a", "b"), paired=True)
    assert found.paired
    (nan, alone) = sorted(found.excluded, reverse=True)
    assert nan.startswith("b: run of") and "loss is nan" in nan
    assert alone.startswith("a: run of") and "its pair is missing" in alone
    third = [(1.5 * c, n, d, y) for c, n, d, y in second]
    apart = compared(first, third, paired=True)
    assert isinstance(apart, Refusal)  # no budget is common


REFUSED = {
    "measured unlike": (
        {"conventions": ({"C": "all", "N": 1}, {"C": "half", "N": 1})},
        {},
        "C: 'all' in first, 'half' in second",
    ),
    "larger is better": ({"metric": "recall_lite0"}, {}, "laws are of minima"),
    "fewer than 3 budgets": ({}, {"budgets": BUDGETS[:2]}, "2 budgets have a parabola"),
    "budgets span less than a factor 2": (
        {},
        {"budgets": tuple(1e12 * np.array([1.0, 1.2, 1.5]))},
        "a factor 1.5",
    ),
    "too many minima outside their grids": ({}, {"off": 3.0}, "5 of 5 budgets"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_it_is_refused_by_name(reason):
    options, changes, detail = REFUSED[reason]
    first = {k: v for k, v in changes.items() if k == "budgets"}
    found = compared(study(law=FIRST, **first), study(law=FASTER, **changes), **options)
    assert isinstance(found, Refusal) and found.quantity == "comparison"
    assert found.reason == reason and detail in found.detail
    assert found.group == "second against first"


def test_a_loss_that_is_not_positive_has_no_verdict():
    below = [(c, n, d, y - 20) for c, n, d, y in study(law=FASTER)]
    found = compared(study(law=FIRST), below)
    assert found.verdict == "no verdict" and found.at_budgets == ()
    assert found.laws["L_opt"].reason == "loss not positive"
    assert found.crossing.reason == "loss not positive"
    assert_allclose(found.laws["N_opt"].difference, -0.03, rtol=1e-6)


def test_only_budgets_of_both_are_compared_and_others_are_named():
    found = compared(study(law=FIRST), study(law=FASTER, budgets=BUDGETS[1:]))
    assert_allclose(found.budgets, BUDGETS[1:])
    assert any("1e+12 FLOPs is not one of second" in line for line in found.excluded)


def test_equal_loss_that_may_never_be_reached_is_refused():
    """The second levels off far above the first."""
    high = [(c, n, d, 0.3 * y + 9) for c, n, d, y in noisy(FIRST, 1)]
    low = [(c, n, d, 0.3 * y) for c, n, d, y in noisy(FIRST)]
    found = compared(low, high)
    assert found.verdict == "first better"
    for at in found.at_budgets:
        assert isinstance(at.compute, Refusal)
        assert at.compute.reason in (
            "not shown to be reached",
            "more than 4 times beyond the budgets compared",
        )


def test_equal_loss_far_beyond_the_budgets_is_refused():
    """A loss 1.1 times as large needs 1.1^25 = 10.8 times the compute."""
    found = compared(study(law=FIRST), study(law=(0.4, 0.5, 11.0, -0.04)))
    first, middle, last = (at.compute for at in found.at_budgets)
    assert_allclose([first.ratio, middle.ratio], 1.1**25, rtol=1e-3)
    assert (first.extrapolated, middle.extrapolated) == (False, True)
    assert isinstance(last, Refusal) and last.budget_flops == BUDGETS[-1]
    assert last.reason == "more than 4 times beyond the budgets compared"


def test_the_summary_says_what_was_found(exact):
    said = "\n".join(fit.comparison_summary(exact))
    assert said.startswith("b against a: a has the lower loss from 1e+12 to")
    for words in (
        "N_opt: exponents 0.500",
        "difference -0.030",
        "The losses are equal",
    ):
        assert words in said
    alike = compared(noisy(FIRST), noisy(FIRST, seed=1))
    assert "No difference of the loss is shown" in fit.comparison_summary(alike)[0]


def test_noise_that_sizes_share_makes_a_note():
    """Such pairs are covered in 68% (docs/compare.md), so the verdict is in doubt."""
    law, effect = (1e6, 0.0, 10.0, -0.04), 0.01 * np.array([1, -1, 0.5, 1, -1, 0.3])
    first, second = (noisy(law, seed) for seed in (0, 3))
    shared = [(*p[:3], p[3] + effect[i % 6]) for i, p in enumerate(second)]
    assert TOO_SURE not in compared(first, second).notes
    assert TOO_SURE in compared(first, shared).notes
