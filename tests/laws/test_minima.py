"""Estimators of isoFLOP minima: which is right, which is chosen, how they differ."""

import dataclasses
import math

import numpy as np
import pytest
from law_studies import CHINCHILLA, LOPSIDED, inside, optimum, study, surface_study
from numpy.testing import assert_allclose

from scaling_ldm import config, records
from scaling_ldm.laws import (
    curve_models,
    estimates,
    estimators,
    fit,
    isoflop_curve,
    minima,
    points,
    shared_shape,
    summary,
)
from scaling_ldm.records import MinimaEstimate, Refusal


def curves(runs):
    kept, *_ = points.read(runs, "loss", "params")
    found, _ = isoflop_curve.fit_curves(kept, None)
    return [c for c in found if isinstance(c, isoflop_curve.IsoflopCurve)]


@pytest.fixture(scope="module")
def lopsided():
    """Wide grids on a lopsided surface, noise 0.1% of the loss."""
    rng = np.random.default_rng(0)
    return surface_study(LOPSIDED, span=8, sizes=9, noise=2e-3, rng=rng)


@pytest.fixture(scope="module")
def fitted(lopsided):
    return fit.isoflop(lopsided, bootstrap=300)


def test_config_knows_the_names_of_all_estimators():
    known = (estimators.AUTO, *estimators.ESTIMATORS)
    assert sorted(config.FIT_ESTIMATORS) == sorted(known)
    with pytest.raises(ValueError, match="one of auto, parabola, cubic, shape, akima"):
        fit.isoflop(study(), estimator="quartic")


def test_a_shape_is_a_surface_and_its_minimum_is_exact():
    model = curve_models.shapes(curves(surface_study(LOPSIDED, span=8)))
    assert_allclose(model.exponents, (LOPSIDED["alpha"], LOPSIDED["beta"]), rtol=1e-4)
    budgets = np.geomspace(1e18, 1e21, 6)
    truth = np.log([optimum(c, **LOPSIDED) for c in budgets])
    assert_allclose(model.vertices[:, 0], truth, atol=1e-5)
    assert max(map(np.ptp, model.residuals)) < 1e-6


def test_the_basis_of_a_shape_becomes_that_of_a_parabola():
    x = np.linspace(-2, 2, 9)
    one, two, left, right = shared_shape.basis(x, np.array(1e-3), np.array(2e-3))
    assert_allclose(one, x, atol=3e-3)
    assert_allclose(two, x * x, atol=3e-3)
    A, B = shared_shape.amplitudes(np.array(0.7), np.array(0.4), 1e-3, 2e-3)
    curve = 0.7 * one + 0.4 * two
    wanted = A * left + B * right
    assert_allclose(curve - curve[4], wanted - wanted[4], atol=1e-6)


def test_few_or_noisy_runs_leave_the_exponents_at_their_prior():
    rng = np.random.default_rng(1)
    noisy = curve_models.shapes(curves(surface_study(CHINCHILLA, 3.0, 5, 0.02, rng)))
    near = np.abs(np.log(noisy.exponents) - shared_shape.PRIOR)
    assert (near < shared_shape.PRIOR_SPREAD).all()
    assert curve_models.shapes(curves(study(budgets=(1e12,), sizes=5))) is None


def test_the_shape_is_chosen_on_lopsided_curves_and_the_parabola_on_parabolas(fitted):
    assert fitted.estimator == "shape" == fitted.estimates[0].estimator
    for p in fitted.parabolas:
        assert p.estimator == "shape"
        truth = optimum(p.budget_flops, **LOPSIDED)
        assert inside(p.n_opt_interval, truth) and abs(p.n_opt / truth - 1) < 0.05
    errors = {e.estimator: e.run_error for e in fitted.estimates}
    assert errors["shape"] < errors["parabola"] / 2
    calm = fit.isoflop(study(), bootstrap=50)
    assert calm.estimator == "parabola" and calm.parabolas[0].exponents is None


def test_a_parabola_is_off_where_curves_are_lopsided_and_a_note_says_so(lopsided):
    forced = fit.isoflop(lopsided, bootstrap=300, estimator="parabola")
    assert forced.estimator == "parabola"
    ratios = [p.n_opt / optimum(p.budget_flops, **LOPSIDED) for p in forced.parabolas]
    assert min(ratios) > 1.1
    assert any(n.startswith("a cubic and a quartic term") for n in forced.notes)


def test_runs_that_are_left_out_are_those_of_a_fit_without_them():
    (curve,) = curves(study(np.random.default_rng(0), 0.01, budgets=(1e12,)))
    model, errors = curve_models.parabolas([curve]), []
    for i in np.flatnonzero((curve.x > curve.x.min()) & (curve.x < curve.x.max())):
        rest = np.arange(len(curve.x)) != i
        line = np.polyfit(curve.x[rest], curve.y[rest], 2)
        errors.append(curve.y[i] - np.polyval(line, curve.x[i]))
    wanted = math.sqrt(np.mean(np.square(errors)))
    assert_allclose(model.left_out_error([curve]), wanted, rtol=1e-9)


@pytest.mark.parametrize("name", ["cubic", "akima"])
def test_other_estimators_find_a_minimum_between_sizes(name):
    of_budget = estimators.ESTIMATORS[name]
    runs = surface_study(CHINCHILLA, span=4, sizes=9)
    off_centre = [run for i, run in enumerate(runs) if i % 9 > 1]
    for curve in curves(off_centre):
        (found,) = of_budget(curve, curve.y[None])
        truth = math.log(optimum(curve.budget, **CHINCHILLA))
        assert abs(found[0] - truth) < 0.02
    few = curves(study(budgets=(1e12,), sizes=4))[0]
    assert np.isnan(estimators.ESTIMATORS["cubic"](few, few.y[None])).all()


def test_a_shape_needs_more_runs_than_constants():
    runs = study(budgets=(1e12,), sizes=5)
    (refused,) = fit.isoflop(runs, bootstrap=50, estimator="shape").parabolas
    assert isinstance(refused, Refusal)
    assert refused.reason == "too few runs for a shared shape"


def test_all_estimators_stand_side_by_side(fitted):
    names = [e.estimator for e in fitted.estimates]
    assert names[0] == "shape" and "parabola" in names and "surface" in names
    assert "parabola, window 4" in names and estimates.LEAST in names
    (least,) = (e for e in fitted.estimates if e.estimator == estimates.LEAST)
    assert least.exponent is not None and least.exponent_interval is None
    first = fitted.estimates[0]
    assert first.exponent == pytest.approx(fitted.laws["N_opt"].exponent)
    assert first.exponent_interval == fitted.laws["N_opt"].exponent_interval
    assert first.held_out == fitted.held_out[0]
    assert [n for _, n, _ in first.minima] == [p.n_opt for p in fitted.parabolas]
    assert len(fitted.left_out) == 3 * len(fitted.parabolas)
    lines = summary.summary(fitted)
    assert any(line.startswith("minima by akima: N_opt ~ C^") for line in lines)
    assert any(
        line.startswith("the laws use the minima by shape; dis") for line in lines
    )


def test_no_estimator_has_an_exponent_where_the_law_is_refused(lopsided):
    budgets, rng = tuple(np.geomspace(1e12, 1e14, 6)), np.random.default_rng(0)
    lost = study(rng, 1e-3, budgets=budgets[4:], off=2.0)
    found = fit.isoflop(study(rng, 1e-3, budgets=budgets[:4]) + lost, bootstrap=50)
    assert isinstance(found.laws["N_opt"], Refusal)
    assert [e.estimator for e in found.estimates][:1] == [found.estimator]
    for e in found.estimates:
        assert e.exponent is None or e.estimator == "surface"
    free = fit.isoflop(lopsided, bootstrap=50, hold_out_largest=False)
    assert free.held_out == () and all(e.held_out is None for e in free.estimates)
    assert free.estimates[0].exponent is not None


def test_a_budget_left_out_is_predicted_by_a_line_through_the_others(fitted):
    rows = [r for r in fitted.left_out if r.quantity == "N_opt"]
    u, v = np.log([[r.budget_flops, r.measured] for r in rows]).T
    line = np.polyfit(u[1:], v[1:], 1)
    assert_allclose(rows[0].predicted, math.exp(np.polyval(line, u[0])), rtol=1e-8)
    error = rows[0].predicted / rows[0].measured - 1
    assert rows[0].relative_error == pytest.approx(error)
    rms = math.sqrt(np.mean([math.log(r.predicted / r.measured) ** 2 for r in rows]))
    assert fitted.estimates[0].left_out_error == pytest.approx(rms)


def test_estimators_that_differ_by_more_than_noise_are_noted():
    """Grids that drift away from the optimum: a parabola's error drifts with them."""
    runs, k = [], LOPSIDED
    rng = np.random.default_rng(2)
    for i, c in enumerate(np.geomspace(1e18, 1e21, 6)):
        for n in optimum(c, **k) * np.geomspace(1 / 10, 10, 9) * 1.9 ** (i - 2.5):
            d = c / (6 * n)
            loss = k["E"] + k["A"] / n ** k["alpha"] + k["B"] / d ** k["beta"]
            runs.append((c, n, d, loss * (1 + 2e-4 * rng.standard_normal())))
    found = fit.isoflop(runs, bootstrap=200)
    exponent = k["beta"] / (k["alpha"] + k["beta"])
    assert found.estimator == "shape" and found.disagreement > 1
    assert inside(found.laws["N_opt"].exponent_interval, exponent)
    (note,) = (n for n in found.notes if n.startswith("estimators of the minima dis"))
    parabola = next(e for e in found.estimates if e.estimator == "parabola")
    assert f"parabola {parabola.exponent:.3f}" in note
    assert not inside(parabola.difference_interval, 0)


def test_estimators_that_differ_by_noise_are_not_noted():
    noted = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        found = fit.isoflop(study(rng, 0.01), bootstrap=100)
        noted += any(n.startswith("estimators of") for n in found.notes)
        assert found.disagreement is not None
    assert noted <= 2, noted


def test_a_run_far_off_its_curve_is_named():
    rng = np.random.default_rng(0)
    runs = study(rng, 0.005, sizes=7)
    c, n, d, loss = runs[10]
    runs[10] = (c, n, d, loss + 0.06)
    (line,) = (x for x in fit.isoflop(runs, bootstrap=50).notes if "lies +" in x)
    assert line.startswith(points.run_name(c, n)) and "standard deviations" in line
    fine = fit.isoflop(study(rng, 0.005, sizes=7), bootstrap=50)
    assert not any("standard deviations" in x for x in fine.notes)


def test_the_middle_coefficient_is_the_law_at_the_middle_budget(fitted):
    for law in fitted.laws.values():
        middle = math.exp(np.mean(np.log([p.budget_flops for p in fitted.parabolas])))
        assert law.middle == pytest.approx(middle)
        offset = getattr(law, "offset", 0.0)
        assert law(middle) - offset == pytest.approx(law.middle_coef)
        i, j = law.middle_coef_interval, law.coef_interval
        assert i.low <= law.middle_coef <= i.high
        assert i.high / i.low < (j.high / j.low) ** 0.2


def test_a_curve_is_drawn_as_it_was_fitted(fitted):
    p, h = fitted.parabolas[0], 1e-3
    around = [p(p.n_opt * math.exp(z)) for z in (-h, 0, h)]
    assert around[1] == pytest.approx(p.l_opt)
    second = (around[0] - 2 * around[1] + around[2]) / h**2
    assert second / 2 == pytest.approx(p.curvature, rel=1e-4)
    a, b = p.exponents
    one, two = (p(p.n_opt * math.exp(z)) - p.l_opt for z in (-2, 2))
    assert (one > two) == (a > b)
    plain = dataclasses.replace(p, exponents=None, estimator="parabola")
    assert plain(p.n_opt * math.e) == pytest.approx(p.l_opt + p.curvature)


@pytest.mark.slow
@pytest.mark.parametrize("surface", [LOPSIDED, CHINCHILLA], ids=["lopsided", "even"])
def test_vertices_of_wide_grids_are_covered(surface):
    """40 studies of 5 budgets: a standard error of about 4% at 90%."""
    hits = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        runs = surface_study(surface, span=8, sizes=7, noise=4e-3, rng=rng)
        for p in minima.find_minima(curves(runs), 300, 0.9, [seed]).parabolas:
            hits.append(inside(p.n_opt_interval, optimum(p.budget_flops, **surface)))
    assert 0.8 <= np.mean(hits) <= 0.98, np.mean(hits)


def test_an_estimate_survives_json(fitted):
    assert records.loads(records.dumps(fitted)) == fitted
    assert all(isinstance(e, MinimaEstimate) for e in fitted.estimates)


def test_a_run_is_not_judged_by_others_without_noise():
    """The others are on their curve but for rounding, so no distance is known."""
    points = study(np.random.default_rng(1), 0.002, law=(1e6, 0.0, 10.0, -0.04))
    notes = fit.isoflop(points, bootstrap=50).notes
    assert not [note for note in notes if "standard deviations" in note]
