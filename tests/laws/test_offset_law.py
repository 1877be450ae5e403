"""The law of the loss with an offset, its choice, and scatter about any law."""

import dataclasses
import math

import numpy as np
import pytest
import refit_quickstart
import scipy.optimize
from law_studies import inside
from numpy.testing import assert_allclose

from scaling_ldm import records
from scaling_ldm.laws import checked_laws, fit, law_of_minima, minima, offset_law
from scaling_ldm.records import HeldOut, OffsetLaw, PowerLaw, Refusal

C = np.geomspace(1e17, 1e19, 5)


def found(budgets, losses, noise=1e-3, draws=400, ln_n=None, seed=0):
    """Minima at these budgets whose logarithms have so much normal noise."""
    rng, k = np.random.default_rng(seed), len(budgets)
    ln_n = np.log(1e8 * (budgets / 1e18) ** 0.5) if ln_n is None else ln_n
    ln_d = np.log(budgets / 6) - ln_n
    z = noise * rng.standard_normal((draws, k))
    drawn = [ln_n + z, ln_d - z, losses * np.exp(z)]
    return minima.Minima(
        parabolas=[],
        budgets=budgets,
        centre=np.stack([ln_n, ln_d, losses], 1),
        draws=np.stack(drawn, 2),
        losses=(float(losses.min()), float(losses.max())),
        notes=[],
    )


def loss_laws(of, level=0.9):
    pure = law_of_minima.fit_law(of, 2, level, 4.0, [0, 2])
    return offset_law.fit_loss(of, pure, level, 4.0, [0, 3])


@pytest.mark.parametrize("budgets", [C[:3], C[:4], C])
def test_an_offset_is_recovered(budgets):
    losses = 0.35 + 0.1 * (budgets / 1e18) ** -0.3
    laws = loss_laws(found(budgets, losses, noise=1e-6))
    law = laws.offset.law
    assert_allclose(law.offset, 0.35, rtol=1e-5)
    assert_allclose(law.exponent, -0.3, rtol=1e-5)
    assert_allclose(law.coef, 0.1 * 1e18**0.3, rtol=1e-3)
    assert_allclose(law(4e19), 0.35 + 0.1 * 40**-0.3, rtol=1e-6)
    assert law.points == len(budgets) and (law.x_min, law.x_max) == (C[0], budgets[-1])
    assert law.band[-1][0] == pytest.approx(4 * budgets[-1])
    if len(budgets) > 3:
        assert law.bends and law.identified and laws.chosen.law == law
        assert laws.errors[1] < 1e-5 < 1e-3 < laws.errors[0]
    else:  # three budgets cannot tell an offset from scatter about a pure law
        assert law.offset_interval.low == 0 and laws.errors == (None, None)


def test_the_least_squares_are_those_of_a_general_solver():
    rng = np.random.default_rng(0)
    u = np.log(C) - np.log(C).mean()
    for k in range(6):
        y = (k > 2) * 0.4 + 0.5 * np.exp(-0.2 * u) + 0.01 * rng.standard_normal(5)
        ours = offset_law.solve(u, y[None], y)
        best = math.inf
        for b in (0.02, 0.1, 0.3, 1.0):
            other = scipy.optimize.least_squares(
                lambda p, y=y: (p[0] + p[1] * np.exp(-p[2] * u)) / y - 1,
                [0.5 * y.min(), 0.5, b],
                bounds=([0, 0, 1e-4], [np.inf, np.inf, offset_law.MAX_DECAY]),
            )
            best = min(best, 2 * other.cost)
        assert ours.squares[0] <= best * (1 + 1e-6)
        assert ours.E[0] >= 0 and ours.A[0] >= 0
        own = np.sum((ours(u)[0] / y - 1) ** 2)
        assert_allclose(ours.squares[0], own, rtol=1e-9)


def test_the_pure_law_is_chosen_where_it_predicts_as_well():
    rng = np.random.default_rng(3)
    losses = 0.5 * (C / 1e18) ** -0.07 * np.exp(2e-3 * rng.standard_normal(5))
    laws = loss_laws(found(C, losses, noise=2e-3))
    assert laws.errors[0] < laws.errors[1]
    pure, law = laws.pure.law, laws.chosen.law
    assert isinstance(pure, PowerLaw) and isinstance(law, OffsetLaw)
    assert (law.offset, law.coef, law.exponent) == (0.0, pure.coef, pure.exponent)
    # It might bend: beyond the budgets the band is that of the offset law.
    assert (
        law.band == laws.offset.law.band and law.band[-1][2] > 1.02 * pure.band[-1][2]
    )
    assert law.offset_interval.low == 0 < law.offset_interval.high
    assert inside(law.exponent_interval, pure.exponent)


def test_losses_that_do_not_fall_have_no_law_with_an_offset():
    law = loss_laws(found(C, np.linspace(0.5, 0.6, 5))).offset.law
    assert isinstance(law, Refusal)
    assert law.reason == "loss does not fall with the budget"
    assert law.detail.startswith("0.5 at 1e+17, 0.6 at 1e+19")


def test_an_offset_that_nothing_bounds_is_not_identified():
    losses = 0.35 + 0.1 * (C[:4] / 1e18) ** -0.3
    rng = np.random.default_rng(1)
    noisy = losses * np.exp(0.02 * rng.standard_normal(4))
    vague = loss_laws(found(C[:4], noisy, noise=0.05)).chosen.law
    assert not vague.identified and not vague.bends
    clear = loss_laws(found(C[:4], losses, noise=1e-4)).chosen.law
    assert clear.identified and clear.bends
    assert inside(clear.offset_interval, 0.35)


def test_an_offset_has_a_profile():
    """The ends are where the best law with that E is refuted, by a general solver."""
    losses = 0.35 + 0.1 * (C / 1e18) ** -0.3
    of = found(C, losses * np.exp([1e-3, -1e-3, 5e-4, -5e-4, 5e-4]), noise=2e-3)
    i, u = loss_laws(of).offset.law.offset_interval, np.log(C) - np.log(C).mean()
    y = of.centre[:, 2]
    errors = np.log(of.draws[:, :, 2]) - np.log(y)
    white = np.linalg.inv(np.linalg.cholesky(np.cov(errors.T)))

    def squares(E):
        def rest(p):
            return white @ ((E + np.exp(p[0]) * np.exp(-np.exp(p[1]) * u)) / y - 1)

        starts = [(math.log(0.1), math.log(b)) for b in (0.1, 0.3, 1.0)]
        return min(2 * scipy.optimize.least_squares(rest, s).cost for s in starts)

    least = min(squares(E) for E in np.linspace(0.3, 0.38, 81))
    assert 0.3 < i.low < 0.35 < i.high < 0.38
    for end in (i.low, i.high):
        assert_allclose(squares(end) - least, 2.7055, rtol=0.03)


def test_excess_scatter_is_what_was_added_and_none_where_there_is_none():
    rng = np.random.default_rng(0)
    noise, dof, medians, none = 0.1, 3, [], 0
    for _ in range(200):
        drawn = noise**2 * rng.chisquare(dof, 500)
        total = noise**2 + 0.4**2
        squares = total * rng.chisquare(dof)
        got = law_of_minima.excess_scatter(squares, dof, drawn, noise**2, rng)
        medians.append(np.median(got))
        of_noise = noise**2 * rng.chisquare(dof)
        none += not law_of_minima.excess_scatter(
            of_noise, dof, drawn, noise**2, rng
        ).any()
    assert 0.3 < np.median(medians) < 0.5
    assert 115 < none < 165  # 70% of the studies without scatter


@pytest.mark.parametrize("budgets", [3, 4, 6])
@pytest.mark.parametrize("scatter", [0.0, 1.0, 5.0])
def test_exponents_are_covered_whatever_the_scatter(budgets, scatter):
    """200 studies: a standard error of 2% at 90%; 60 here."""
    c, rng = np.geomspace(1e17, 3e18, budgets), np.random.default_rng(budgets)
    hits = 0
    for k in range(60):
        error = 0.05 * math.hypot(1, scatter) * rng.standard_normal(budgets)
        ln_n = np.log(1e8 * (c / 1e18) ** 0.5) + error
        of = found(c, np.ones(budgets), noise=0.05, draws=200, ln_n=ln_n, seed=k)
        law = law_of_minima.fit_law(of, 0, 0.9, 4.0, [k]).law
        hits += inside(law.exponent_interval, 0.5)
    assert hits >= 48, hits


def test_scatter_is_noted_only_where_noise_does_not_explain_it():
    ln_n = np.log(1e8 * (C / 1e18) ** 0.5)
    bumps = np.array([0.2, -0.2, 0.2, -0.2, 0.2])
    (note,) = law_of_minima.fit_law(
        found(C, np.ones(5), noise=0.02, ln_n=ln_n + bumps), 0, 0.9, 4.0, [0]
    ).notes
    assert note.startswith("N_opt: minima scatter about the law")
    assert "by 0.25 beyond it" in note
    calm = found(C, np.ones(5), noise=0.02, ln_n=ln_n + bumps / 20)
    assert law_of_minima.fit_law(calm, 0, 0.9, 4.0, [0]).notes == ()


def test_a_loss_law_that_its_held_out_budget_refutes_is_refused():
    """The largest budget is 10% worse than any law of the smaller ones."""
    points = [
        (
            c,
            n,
            c / (6 * n),
            (0.35 + 0.1 * (c / 1e18) ** -0.3) * (1.1 if c > 9e18 else 1),
        )
        for c in C
        for n in 1e8 * (c / 1e18) ** 0.5 * np.array([0.25, 0.5, 1.0, 2.0, 4.0])
    ]
    rng = np.random.default_rng(0)
    points = [
        (c, n, d, y * (1 + 0.02 * math.log(n / 1e8 / (c / 1e18) ** 0.5) ** 2))
        for c, n, d, y in points
    ]
    points = [(*p[:3], p[3] * (1 + 1e-3 * rng.standard_normal())) for p in points]
    result = fit.isoflop(points, bootstrap=200)
    (check,) = (h for h in result.held_out if h.quantity == "L_opt")
    assert isinstance(check, HeldOut) and not check.inside
    law = result.laws["L_opt"]
    assert isinstance(law, Refusal) and law.reason == checked_laws.REFUTED
    i = check.predicted_interval
    for value in (check.measured, check.predicted, i.low, i.high):
        assert f"{value:.4g}" in law.detail
    assert isinstance(result.laws["N_opt"], PowerLaw)
    line = f"refused: L_opt: {checked_laws.REFUTED} ({law.detail})"
    assert line in fit.summary(result)
    free = fit.isoflop(points, bootstrap=200, hold_out_largest=False)
    assert isinstance(free.laws["L_opt"], OffsetLaw)
    assert [f.held_out for f in free.loss_forms] == [None, None]


def test_a_summary_never_has_the_exponent_of_a_loss_without_its_offset():
    losses = 0.35 + 0.1 * (C / 1e18) ** -0.3
    law = loss_laws(found(C, losses, noise=1e-5)).chosen.law
    result = dataclasses.replace(fit.isoflop([]), laws={"L_opt": law})
    (line,) = (x for x in fit.summary(result) if x.startswith("L_opt"))
    assert line.startswith("L_opt = 0.35 + ") and "E 0.35 to 0.35" in line


# The quickstart


def test_the_stored_laws_of_the_quickstart_are_those_of_its_stored_losses():
    stored = records.loads(refit_quickstart.LAWS.read_text("utf-8"))
    assert refit_quickstart.MEASUREMENTS.exists()
    again = refit_quickstart.refitted()
    assert again.notes == stored.notes and again.protocol_hash == stored.protocol_hash
    assert_allclose(
        [p.l_opt for p in again.parabolas], [p.l_opt for p in stored.parabolas]
    )
    for name, law in stored.laws.items():
        assert_allclose(again.laws[name].exponent, law.exponent, rtol=1e-4)
        i, j = again.laws[name].exponent_interval, law.exponent_interval
        assert_allclose([i.low, i.high], [j.low, j.high], rtol=1e-3)


def test_the_quickstarts_largest_budget_is_predicted():
    """The pure law of version 0.1.0 said 0.601 (0.582 to 0.617)."""
    stored = records.loads(refit_quickstart.LAWS.read_text("utf-8"))
    (check,) = (h for h in stored.held_out if h.quantity == "L_opt")
    assert check.inside and abs(check.measured - 0.633) < 5e-4
    assert abs(check.predicted - 0.620) < 2e-3
    assert check.predicted_interval.high < 0.66
