"""What the fits read: order, units, records, runs that diverged, and the examples."""

import collections
import dataclasses
import doctest
import functools
import json
import math
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from law_studies import (
    BUDGETS,
    CHINCHILLA,
    SYMMETRIC,
    study,
    surface_study,
)
from numpy.testing import assert_allclose

from scaling_ldm import records
from scaling_ldm.laws import fit, forms, minima, points, surface
from scaling_ldm.records import (
    FitResult,
    HeldOut,
    Measurement,
    Parabola,
    PowerLaw,
    Refusal,
    TrainRecord,
)


@functools.cache
def four_budgets():
    """Points of four budgets, and what is fitted to them."""
    points = study(np.random.default_rng(0), 0.01, budgets=BUDGETS[:4])
    return points, fit.isoflop(points, bootstrap=50)


@settings(max_examples=4, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_points_does_not_matter(random):
    points, fitted = four_budgets()
    shuffled = list(points)
    random.shuffle(shuffled)
    assert fitted == fit.isoflop(shuffled, bootstrap=50)


@settings(max_examples=4, deadline=None)
@given(st.floats(1e-3, 1e9))
def test_units_of_compute_change_only_the_coefficient(scale):
    points, fitted = four_budgets()
    scaled = [(c * scale, n, d, y) for c, n, d, y in points]
    a = fitted.laws["N_opt"]
    b = fit.isoflop(scaled, bootstrap=50).laws["N_opt"]
    assert_allclose(b.exponent, a.exponent, rtol=1e-9)
    assert_allclose(b.exponent_interval.low, a.exponent_interval.low, rtol=1e-6)
    assert_allclose(b.coef * scale**b.exponent, a.coef, rtol=1e-6)


def record(k, c, n, d, **changes):
    """A record of a run of n parameters; n and d are rounded to whole numbers."""
    n, d = round(n), round(d)
    fields = dataclasses.fields(TrainRecord)
    values = {f.name: "" if f.type == "str" else 0 for f in fields} | {
        "run_id": f"run{k}",
        "status": "finished",
        "detail": "",
        "study": "s",
        "budget_flops": c,
        "params": 2 * n,
        "params_without_embeddings": n,
        "tokens": d,
        "mfu": None,
    }
    return TrainRecord(**(values | changes))


def row(record, loss, **changes):
    """The row of the table with the loss of a run at its end."""
    fields = dataclasses.fields(Measurement)
    ends = dict.fromkeys(("value", "low", "high"), loss)
    values = {f.name: getattr(record, f.name, "") for f in fields} | {
        "step": record.steps,
        "metric": "loss",
        **ends,
        "level": 1.0,
        "weights": "ema",
        "protocol_hash": "p",
    }
    return Measurement(**(values | changes))


def of_table(points, **changes):
    """Records of runs, and their rows."""
    runs = [record(k, *p[:3]) for k, p in enumerate(points)]
    rows = [row(r, p[3], **changes) for r, p in zip(runs, points, strict=True)]
    return runs, rows


def test_tuples_mappings_arrays_and_records_are_the_same_points():
    points = [
        (c, round(n), round(d), y)
        for c, n, d, y in study(np.random.default_rng(0), 0.01)
    ]
    names = ("budget_flops", "params", "tokens", "loss")
    expected = fit.isoflop(points, bootstrap=50)
    mappings = [dict(zip(names, p, strict=True)) for p in points]
    assert fit.isoflop(mappings, bootstrap=50) == expected
    assert fit.isoflop(np.array(points), bootstrap=50) == expected
    assert fit.isoflop(iter(points), bootstrap=50) == expected
    runs, rows = of_table(points)
    others = [dataclasses.replace(r, step=7, value=9.0) for r in rows]
    others += [dataclasses.replace(r, weights="raw", value=9.0) for r in rows]
    others += [dataclasses.replace(r, metric="fd", value=9.0) for r in rows]
    got = fit.fit_records(runs, [*rows, *others], weights="ema", bootstrap=50)
    assert (got.metric, got.weights, got.protocol_hash) == ("loss", "ema", "p")
    assert got.size == "params_without_embeddings"
    bare = {"size": "params", "weights": "", "protocol_hash": ""}
    assert dataclasses.replace(got, **bare) == expected
    twice = fit.fit_records(runs, rows, size="params", weights="ema", bootstrap=50)
    assert_allclose(twice.laws["N_opt"].coef, 2 * got.laws["N_opt"].coef, rtol=1e-9)


def _rows_of_a_database(names, rows):
    with sqlite3.connect(":memory:") as database:
        database.row_factory = sqlite3.Row
        database.execute(f"create table runs ({', '.join(names)})")
        database.executemany("insert into runs values (?, ?, ?, ?)", rows)
        return database.execute("select * from runs").fetchall()


def test_values_with_names_are_read_by_name_whatever_their_order():
    wanted = points.read(study(), "loss", "params")[0]
    names = ("budget_flops", "tokens", "loss", "params")
    rows = [(c, d, y, n) for c, n, d, y in study()]
    run = collections.namedtuple("run", names)
    array = np.array(rows, [(name, np.float64) for name in names])
    for given_rows in (
        [run(*row) for row in rows],
        array,
        array.view(np.recarray),
        _rows_of_a_database(names, rows),
        [dict(zip(names, row, strict=True)) for row in rows],
    ):
        assert points.read(given_rows, "loss", "params")[0] == wanted
    other = collections.namedtuple("other", "c n d y")
    with pytest.raises(ValueError, match="it has: c, n, d, y"):
        points.read([other(*row) for row in study()], "loss", "params")
    with pytest.raises(ValueError, match="itertuples"):
        points.read(["budget_flops", "params"], "loss", "params")


def test_budgets_that_differ_by_rounding_are_one():
    rng, exact = np.random.default_rng(0), study()
    measured = [(c * (1 + 1e-12 * rng.normal()), *rest) for c, *rest in exact]
    found, wanted = (fit.isoflop(p, bootstrap=50) for p in (measured, exact))
    assert_allclose(
        [p.n_opt for p in found.parabolas], [p.n_opt for p in wanted.parabolas]
    )
    assert len({p.budget for p in points.read(measured, "loss", "params")[0]}) == len(
        {c for c, *_ in exact}
    )
    assert found.notes == wanted.notes


def test_budgets_as_they_were_measured_are_united_and_a_note_says_so():
    rng, exact = np.random.default_rng(0), study()
    measured = [(c * (1 + rng.uniform(0, 0.019)), *rest) for c, *rest in exact]
    found, wanted = (fit.isoflop(p, bootstrap=50) for p in (measured, exact))
    assert_allclose(
        [p.n_opt for p in found.parabolas], [p.n_opt for p in wanted.parabolas]
    )
    (note,) = (n for n in found.notes if "of each other are one budget" in n)
    assert note.startswith("budgets within 2%") and note.count(" to ") == len(BUDGETS)
    # More than that is not united: a note asks, and the refusal says why.
    half = [(c * (1.04 if k % 2 else 1), *p) for k, (c, *p) in enumerate(exact)]
    apart = fit.isoflop(half, bootstrap=50)
    assert sum("differ by 4.0%" in n for n in apart.notes) == len(BUDGETS)
    assert "more have nearly this budget" in apart.parabolas[0].detail


def test_a_point_that_is_given_twice_counts_once():
    once = study(np.random.default_rng(0), 0.01)
    twice = fit.isoflop([*once, once[3], once[3]], bootstrap=50)
    (line,) = twice.excluded
    assert line.startswith(points.run_name(*once[3][:2])) and "given 3 times" in line
    wanted = fit.isoflop(once, bootstrap=50)
    assert dataclasses.replace(twice, excluded=()) == wanted
    names = ("budget_flops", "params", "tokens", "loss")
    named = [dict(zip(names, p, strict=True)) for p in once]
    seeds = [{**p, "run_id": f"seed {k}"} for k in (0, 1) for p in named]
    assert fit.isoflop(seeds, bootstrap=50).excluded == ()  # two runs, equal losses


def test_sizes_in_billions_are_noted():
    points_in_billions = [(c, n / 1e9, d, y) for c, n, d, y in study()]
    (note,) = fit.isoflop(points_in_billions, bootstrap=50).notes
    assert note.startswith("6 N D / C lies between 1e-09 and 1e-09")
    assert f"at {len(study())} of {len(study())} points" in note
    few = [
        (c, n, d * (20 if k == 5 else 1), y) for k, (c, n, d, y) in enumerate(study())
    ]
    assert any(f"at 1 of {len(few)}" in n for n in fit.isoflop(few, bootstrap=50).notes)


def test_budgets_within_a_factor_of_two_have_no_law():
    narrow = study(np.random.default_rng(0), 0.01, budgets=(1e12, 1.3e12, 1.9e12))
    for law in fit.isoflop(narrow, bootstrap=50).laws.values():
        assert law.reason == "budgets span less than a factor 2"
        assert law.detail == "1e+12 to 1.9e+12 FLOPs, a factor 1.9"


def test_a_law_that_lost_budgets_to_the_edge_of_the_grid_says_so_or_is_refused():
    budgets = tuple(np.geomspace(1e12, 1e14, 6))
    rng = np.random.default_rng(0)

    def with_lost(number):
        lost = study(rng, 1e-3, budgets=budgets[6 - number :], off=2.0)
        return fit.isoflop(study(rng, 1e-3, budgets[: 6 - number]) + lost, bootstrap=50)

    kept = with_lost(1)
    assert isinstance(kept.laws["N_opt"], PowerLaw)
    (note,) = (n for n in kept.notes if "have no minimum inside" in n)
    assert note.startswith("1 of 6 budgets") and "1e+14" in note
    refused = with_lost(2)
    assert not any("inside their grid" in n for n in refused.notes)
    for law in (*refused.laws.values(), *(f.law for f in refused.loss_forms)):
        assert law.reason == "too many minima outside their grids"
        assert law.detail.startswith("2 of 6 budgets")


@pytest.mark.parametrize(
    ("ratio", "place"),
    [
        pytest.param(ratio, place, marks=() if by_day else pytest.mark.slow)
        for ratio in (1.3, 2.0)
        for place in (0, 3, 6)
        for by_day in [(ratio, place) in ((1.3, 0), (1.3, 3), (2.0, 6))]
    ],
)
def test_a_run_that_diverged_to_a_number_is_left_out_by_name(place, ratio):
    rng = np.random.default_rng(5)
    good = surface_study(CHINCHILLA, span=4.0, noise=2e-3, rng=rng)
    assert not fit.isoflop(good, bootstrap=50).excluded
    bad = list(good)
    for at in (7 + place, 14 + place):  # the same size of two budgets
        bad[at] = (*good[at][:3], good[at][3] * ratio)
    found = fit.isoflop(bad, bootstrap=50)
    assert len(found.excluded) == 2
    for at in (7 + place, 14 + place):
        c, n, _, loss = bad[at]
        (line,) = (x for x in found.excluded if f"{c:.6g} FLOPs" in x)
        assert points.run_name(c, n) in line and f"{loss:.6g}" in line
        assert "diverged" in line
    without = [p for i, p in enumerate(good) if i not in (7 + place, 14 + place)]
    wanted = fit.isoflop(without, bootstrap=50)
    assert found.laws == wanted.laws and found.parametric == wanted.parametric
    refused = fit.parametric(bad, bootstrap=50)
    assert isinstance(refused, Refusal) and "diverged" in refused.detail


@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 12), marks=pytest.mark.slow)], ids=len
)
def test_good_runs_of_any_grid_are_not_taken_for_diverged(seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for span in (4.0, 16.0, 64.0):
            for noise in (0.0, 1e-4, 5e-3):
                grid = surface_study(CHINCHILLA, span, 9, noise, rng)
                for first in (0, 1, 2):  # the centre of 7 sizes is off the optimum
                    kept = [p for i, p in enumerate(grid) if 0 <= i % 9 - first < 7]
                    read, *_ = points.read(kept, "loss", "params")
                    assert points.without_diverged(read, "loss") == (read, [])


def test_runs_that_did_not_finish_are_named():
    points = study()
    runs, rows = of_table(points)
    lost = record(99, *points[0][:3], status="non_finite_loss", detail="step 7")
    bare = record(98, *points[0][:3])
    result = fit.fit_records(
        [lost, bare, *runs], [row(lost, 9.0), *rows], weights="ema", bootstrap=50
    )
    assert result.excluded == (
        "run98: no validation loss, average ema at its last step",
        "run99: non_finite_loss (step 7)",
    )
    assert isinstance(result.laws["N_opt"], PowerLaw)


def test_rows_of_several_protocols_are_not_mixed():
    runs, rows = of_table(study())
    half = len(rows) // 2
    mixed = [*rows[:half], *(row(r, 0.1, protocol_hash="q") for r in runs[half:])]
    result = fit.fit_records(runs, mixed, weights="ema", bootstrap=50)
    law = result.laws["N_opt"]
    assert isinstance(law, Refusal) and law.reason == "measured by several protocols"
    assert f"p ({half} runs), q ({len(rows) - half} runs)" in law.detail
    assert {p.reason for p in result.parabolas} == {law.reason}
    assert isinstance(result.parametric, Refusal) and result.protocol_hash == ""
    # One of them has every run.
    wanted = fit.fit_records(runs, rows, weights="ema", bootstrap=50)
    assert (
        fit.fit_records(runs, [*mixed[half:], *rows], weights="ema", bootstrap=50)
        == wanted
    )
    both = [*rows, *(row(r, 0.1, protocol_hash="q") for r in runs)]
    result = fit.fit_records(runs, both, weights="ema", bootstrap=50)
    assert isinstance(result.laws["N_opt"], Refusal)


def trajectories(points):
    """Records of one run for each place in the grid, and its rows at every budget."""
    budgets = sorted({p[0] for p in points})
    grids = [[p for p in points if p[0] == budget] for budget in budgets]
    runs, rows = [], []
    for k, along in enumerate(zip(*grids, strict=True)):
        last = record(k, *along[-1][:3], steps=len(along), steps_planned=len(along))
        runs.append(last)
        for step, point in enumerate(along, 1):
            at = record(k, *point[:3], steps=step)
            rows.append(row(at, point[3]))
    return runs, rows


def test_points_of_trajectories_have_the_laws_of_separate_runs():
    points = study()
    separate = fit.fit_records(*of_table(points), weights="ema", bootstrap=50)
    assert isinstance(separate.laws["N_opt"], PowerLaw) and separate.held_out
    runs, rows = trajectories(points)
    assert len(rows) == len(points) > len(runs)
    between = dataclasses.replace(rows[-1], step=99, value=9.0)  # no budget's step
    found = fit.fit_records(runs, [*rows, between], weights="ema", bootstrap=50)
    said = f"{len(rows)} points lie on {len(runs)} trajectories: those"
    assert any(n.startswith(said) for n in set(found.notes) - set(separate.notes))
    # The same minima and laws; the intervals allow for noise that budgets share.
    for one, other in zip(found.parabolas, separate.parabolas, strict=True):
        assert (one.n_opt, one.l_opt) == (other.n_opt, other.l_opt)
    for name, law in separate.laws.items():
        again = found.laws[name]
        assert (again.exponent, again.coef) == (law.exponent, law.coef)
    kept, *_ = points_of(rows)
    assert {p.run for p in kept} == {r.run_id for r in runs}


def points_of(rows):
    return points.read(rows, "value", "params_without_embeddings")


def test_a_trajectory_counts_as_far_as_it_came():
    runs, rows = trajectories(study())
    last = runs[2].steps
    lost = dataclasses.replace(runs[2], status="non_finite_loss", steps=last - 1)
    found = fit.fit_records(
        [*runs[:2], lost, *runs[3:]], rows, weights="ema", bootstrap=50
    )
    assert found.excluded == ("run2: non_finite_loss",)
    counts = [p.points for p in found.parabolas]
    assert counts == [len(runs)] * (last - 2) + [len(runs) - 1] * 2


def test_a_budget_of_a_trajectory_without_the_number_is_named():
    runs, rows = trajectories(study())
    first = [r for r in rows if (r.run_id, r.step) != ("run2", 1)]
    first.append(dataclasses.replace(rows[0], run_id="run2", step=1, metric="other"))
    found = fit.fit_records(runs, first, weights="ema", bootstrap=50)
    budget = f"{rows[0].budget_flops:.6g}"
    said = f"run2: no validation loss, average ema at step 1 ({budget} FLOPs)"
    assert found.excluded == (said,)
    # A protocol that lacks one budget of one trajectory is not that of all.
    both = [*first, *(dataclasses.replace(r, protocol_hash="q") for r in rows[3:])]
    found = fit.fit_records(runs, both, weights="ema", bootstrap=50)
    law = found.laws["N_opt"]
    assert isinstance(law, Refusal) and f"all of {len(rows)} runs" in law.detail


def test_no_laws_of_a_metric_of_which_more_is_better():
    runs, rows = of_table(study(), metric="precision_lite0")
    result = fit.fit_records(
        runs, rows, metric="precision_lite0", weights="ema", bootstrap=50
    )
    assert {law.reason for law in result.laws.values()} == {"larger is better"}
    assert len(result.parabolas) == len({p[0] for p in study()})
    line = "refused: N_opt: larger is better (laws are of minima)"
    assert line in fit.summary(result)


def test_values_that_are_not_positive_have_minima_and_no_law_of_l():
    points = [(c, n, d, y - 10) for c, n, d, y in study()]
    runs, rows = of_table(points)
    result = fit.fit_records(runs, rows, weights="ema", bootstrap=50)
    assert isinstance(result.laws["N_opt"], PowerLaw)
    assert isinstance(result.laws["L_opt"], Refusal)


def test_points_of_another_form_are_an_error_that_says_what_was_given():
    with pytest.raises(ValueError, match="3 values; 4 are needed"):
        fit.isoflop([(1e12, 1e5, 1e6)])
    with pytest.raises(ValueError, match="no 'loss'; it has: budget_flops, params"):
        fit.isoflop([{"budget_flops": 1, "params": 1, "tokens": 1}])
    with pytest.raises(ValueError, match="TrainRecord.*no 'loss'; it has: run_id"):
        fit.isoflop([record(0, 1, 1, 1)])
    for options in (
        {"confidence": 1.0},
        {"bootstrap": 10},
        {"window": 1.0},
        {"extend": 0.5},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            fit.isoflop(study(), **options)


def test_the_result_survives_json():
    points = study(np.random.default_rng(0), 0.01) + [(1e12, 1e5, 1e6, math.nan)]
    points += study(budgets=(9e13,), off=2.0) + surface_study(SYMMETRIC)
    result = fit.isoflop(points, bootstrap=50)
    assert {type(p) for p in result.parabolas} == {Parabola, Refusal}
    assert any(isinstance(h, HeldOut) for h in result.held_out)
    line = records.dumps(result)
    json.loads(line)
    back = records.loads(line)
    assert isinstance(back, FitResult) and back == result
    surface = fit.parametric(surface_study(SYMMETRIC), bootstrap=50)
    assert records.loads(records.dumps(surface)) == surface


def test_the_examples_run():
    for module in (fit, forms, minima, points, surface):
        assert doctest.testmod(module).failed == 0
    assert doctest.testmod(fit).attempted >= 2


@pytest.mark.slow  # test_architecture.py imports it beside other light modules
def test_fitting_needs_no_jax():
    code = (
        "import sys; from scaling_ldm import fit as f; f.published(); "
        "bad = {'jax', 'flax', 'ml_collections', 'matplotlib'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
