"""Nested budgets: a trajectory and its marks against separate runs, to the bit."""

import dataclasses
import json
import shutil

import finished_study
import jax
import numpy as np
import pytest
from reused_studies import (
    BUDGETS,
    SIZES,
    WEIGHTS,
    Killed,
    killed,
    planned,
    study,
    trained,
)

from scaling_ldm import config, records, report
from scaling_ldm.evaluation import likelihoods
from scaling_ldm.records import table
from scaling_ldm.report import page, reading, run_tables
from scaling_ldm.stages import evaluate, fit, plan
from scaling_ldm.training import checkpoint, loop, marks, mesh, progress
from scaling_ldm.workdir import missing, plan_table, runs


@pytest.fixture(scope="module", autouse=True)
def _one(one_device):
    """Programs are for one device."""


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """By value of plan.reuse: experiment, workdir, plan."""
    found = {}
    for reuse in ("separate", "nested"):
        experiment = study(tiny, reuse)
        workdir = tmp_path_factory.mktemp(reuse)
        trained(experiment, workdir)
        found[reuse] = experiment, workdir, records.read_plan(workdir)
    return found


def test_a_plan_has_one_run_for_each_size(tiny):
    separate, nested = (planned(study(tiny, r)) for r in ("separate", "nested"))
    assert [(s.budget_flops, s.width, s.depth) for s in nested] == [
        (BUDGETS[-1], *size) for size in SIZES
    ]
    assert nested == [
        dataclasses.replace(s, smaller_budgets=BUDGETS[:-1])
        for s in separate
        if s.budget_flops == BUDGETS[-1]
    ]
    # What a trajectory stands for is the plan of separate runs.
    points = [p for spec in nested for p in spec.points()]
    own = {(p.budget_flops, p.width, p.depth): p for p in points}
    for run in separate:
        point = own[run.budget_flops, run.width, run.depth]
        assert point.hours == pytest.approx(run.hours)
        same = {"run_id": run.run_id, "hours": run.hours, "smaller_budgets": ()}
        assert dataclasses.replace(point, **same) == run


def test_each_size_is_as_long_as_its_own_largest_budget(tiny):
    few = {"plan.sizes_per_budget": 2, "plan.expected_coef": 2e-4}
    few |= {"plan.expected_exponent": 0.9}
    axes = {"train.seed": (0, 1), "optimizer.learning_rate": (1e-2, 2e-2)}
    only = {"optimizer.learning_rate": {"budgets": BUDGETS[:1]}}
    few |= {"plan.axes": config.axes.pairs(axes)}
    few |= {"plan.axes_only": config.axes.pairs(only)}
    separate, nested = (planned(study(tiny, r, **few)) for r in ("separate", "nested"))

    def keys(specs):
        return {(p.budget_flops, p.width, p.depth, str(p.overrides)) for p in specs}

    assert len(separate) > len(nested) and len({s.budget_flops for s in nested}) > 1
    points = [p for spec in nested for p in spec.points()]
    assert len(points) == len(separate) and keys(points) == keys(separate)
    assert len(keys(nested)) == len({k[1:] for k in keys(separate)})
    rates = [s for s in nested if s.overrides["optimizer.learning_rate"] == 2e-2]
    assert rates and all(s.smaller_budgets == () for s in rates)
    assert [s.run_id for s in nested] == [  # in the order of separate runs
        s.run_id for s in separate if s.run_id in {n.run_id for n in nested}
    ]


def test_budgets_on_one_step_are_refused_and_so_is_what_depends_on_the_length(
    tiny, monkeypatch
):
    one = {"plan.sizes": SIZES[:1]}
    near = one | {"plan.budgets_flops": (2e8, 2.0001e8, 3e8)}
    plan.plan(study(tiny, "separate", **near))
    with pytest.raises(config.ConfigError, match="2e.08 and 2.0001e.08 FLOPs are both"):
        plan.plan(study(tiny, "nested", **near))
    # What a separate run of the smallest budget may not be, a point may not be either.
    short = one | {"plan.minimum_steps": 400}
    with pytest.raises(config.ConfigError, match=r"2e\+08 FLOPs, 8 x 1: .* fewer than"):
        plan.plan(study(tiny, "nested", **short))
    long = one | {"optimizer.warmup_steps": 400}
    with pytest.raises(config.ConfigError, match="warm-up of 400 steps"):
        plan.plan(study(tiny, "nested", **long))
    # A law of the rate that looks at the length of a run, and one that does not.
    law = one | {"optimizer.rate_law": "own", "optimizer.learning_rate": 1e-4}
    own = "optimizer.rate_law_constants"
    with pytest.raises(config.ConfigError, match="its learning_rate is .* not the beg"):
        plan.plan(study(tiny, "nested", **law, **{own: (1.0, -0.5, -0.1, 0.0)}))
    assert plan.plan(study(tiny, "nested", **law, **{own: (1.0, -0.5, 0.0, 0.5)}))
    # A policy whose rate depends on the budget, which no check knows by its name.
    row = plan._row

    def by_length(variant, budget, *rest):
        found = row(variant, budget, *rest)
        return dataclasses.replace(found, learning_rate=1 / found.steps)

    monkeypatch.setattr(plan, "_row", by_length)
    with pytest.raises(config.ConfigError, match="its learning_rate is .* not the beg"):
        plan.plan(study(tiny, "nested", **one))
    plan.plan(study(tiny, "separate", **one))


def test_the_plan_says_what_is_saved(tiny):
    separate, nested = (planned(study(tiny, r)) for r in ("separate", "nested"))
    whole, parts = (sum(s.planned_flops for s in p) for p in (separate, nested))
    text = plan_table.table(study(tiny, "nested"), nested)
    assert "They are measured at 12 points" in text
    assert f"Separate runs would take {whole:.4g} FLOPs" in text
    assert f"{whole / parts:.3g} times as much" in text and whole / parts > 2
    assert text.splitlines()[2].split()[2] == "3"  # points
    assert "Separate runs" not in plan_table.table(study(tiny, "separate"), separate)


def test_every_budget_is_measured_whatever_it_takes(tiny, monkeypatch):
    for wanted in (0, 3):
        dear = {"validation.marks": wanted, "validation.samples": 240}
        experiment = study(tiny, "nested", **dear)
        for spec in planned(experiment):
            got = marks.marks_of(experiment, spec)
            assert {p.steps for p in spec.points()} <= set(got.steps)
            assert got.points == 2 and got.share > marks.SHARE and got.spaced == 0
    said = marks.line([got])
    assert said.endswith("all are measured at their end") and "0 times beside" in said
    assert "1 of 1 runs are measured at their smaller budgets" in said
    assert f"takes up to {got.share:.2g} of a run's FLOPs" in said
    # Where there is room, other marks share what is left of it.
    monkeypatch.setattr(marks, "measuring_flops", lambda *_: spec.flops_per_step / 10)
    got = marks.marks_of(experiment, spec)
    most = int(marks.SHARE * 10 * spec.steps)
    assert got.spaced == 3 and len(got.steps) - 1 == 5 <= most


def rows_at(workdir, spec, step):
    """The rows of a run at a step, but for the name of the run."""
    rows = records.read_table(workdir)
    return [
        dataclasses.replace(row, run_id="")
        for row in rows
        if (row.run_id, row.step) == (spec.run_id, step)
    ]


def test_each_budget_has_the_rows_of_a_separate_run(both):
    _, separate, specs = both["separate"]
    _, nested, trajectories = both["nested"]
    of = {(s.width, s.depth): s for s in trajectories}
    assert len(specs) == 12 and len(trajectories) == 4
    for spec in specs:
        wanted = rows_at(separate, spec, spec.steps)
        got = rows_at(nested, of[spec.width, spec.depth], spec.steps)
        assert wanted == got and {row.weights for row in got} == set(WEIGHTS)
        assert {r.budget_flops for r in got} == {spec.budget_flops}
        assert {r.tokens for r in got} == {spec.tokens}
    marks_between = [r for r in records.read_table(nested) if r.step == 1]
    assert {r.budget_flops for r in marks_between} <= {BUDGETS[-1]}


def test_each_budget_has_the_weights_of_a_separate_run(both):
    _, separate, specs = both["separate"]
    experiment, nested, trajectories = both["nested"]
    of = {(s.width, s.depth): s for s in trajectories}
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        for spec in specs[:2]:  # of the smallest budget
            whole = of[spec.width, spec.depth]
            assert spec.steps in runs.checkpoint_steps(nested, whole)
            for name in WEIGHTS:
                one = runs.trained_model(experiment, separate, spec, None, name)
                two = runs.trained_model(experiment, nested, whole, spec.steps, name)
                jax.tree.map(
                    np.testing.assert_array_equal,
                    one.load(device_mesh),
                    two.load(device_mesh),
                )


@pytest.mark.parametrize("weights", ["", "raw"])
def test_the_same_laws_are_fitted(both, weights):
    found = []
    for experiment, workdir, specs in both.values():
        own = dataclasses.replace(experiment.fit, weights=weights)
        found += fit.run(dataclasses.replace(experiment, fit=own), workdir, specs)
    separate, nested = found
    assert dataclasses.replace(nested, notes=separate.notes) == separate
    assert [n for n in nested.notes if n not in separate.notes] == [
        "12 points lie on 4 trajectories: those of one trajectory share their seed, "
        "and the intervals of minima and laws allow for noise that they have in "
        "common; those of the surface do not"
    ]
    assert not nested.excluded and len(nested.parabolas) == 3


def test_the_report_has_the_points_of_separate_runs_and_what_they_would_cost(both):
    studies = []
    for experiment, workdir, specs in both.values():
        fit.run(experiment, workdir, specs)
        studies.append(reading.read(workdir))
    separate, nested = studies
    assert separate.budgets() == nested.budgets() == list(BUDGETS)
    for budget in BUDGETS:
        points = nested.points(budget)
        assert len(points) == 4 and points == separate.points(budget)
    assert run_tables.losses(nested).rows == run_tables.losses(separate).rows
    alone, together = run_tables.ledger(separate).total, run_tables.ledger(nested).total
    assert together["separate_flops"] == alone["model_flops"]
    assert "separate_flops" not in alone
    spent = sum(spec.planned_flops for spec in both["nested"][2])
    assert together["model_flops"] == spent < alone["model_flops"] / 2
    (row,) = run_tables.costs(nested).rows
    assert (row["runs"], row["separate_flops"]) == (4, alone["model_flops"])
    said = page._facts(nested, run_tables.ledger(nested))
    assert f"({alone['model_flops'] / spent:.3g} times as much)" in said
    assert "separate" not in page._facts(separate, run_tables.ledger(separate))


@pytest.mark.slow
def test_the_report_of_trajectories_is_written(both):
    experiment, workdir, specs = both["nested"]
    fit.run(experiment, workdir, specs)
    with finished_study.figures_as("svg"):
        text = report.write(workdir).read_text(encoding="utf-8")
    assert "as separate runs, FLOPs" in text and "12 points lie on" in text


def test_bounds_are_measured_at_every_budget(both, monkeypatch, tmp_path):
    experiment, workdir, specs = both["nested"]
    shutil.copytree(workdir, tmp_path / "w")
    own = dataclasses.replace(experiment.evaluate, held_out=("vlb",))
    bound = {"vlb": lambda _, where, model, __: np.full(4, 1.0 / model.step)}
    monkeypatch.setattr(likelihoods, "METRICS", bound)
    asked = dataclasses.replace(experiment, evaluate=own)
    evaluate.run(asked, tmp_path / "w", specs)
    rows = [r for r in records.read_table(tmp_path / "w") if r.metric == "vlb"]
    assert {(r.run_id, r.step, r.budget_flops, r.value) for r in rows} == {
        (p.run_id, p.steps, p.budget_flops, 1.0 / p.steps)
        for spec in specs
        for p in spec.points()
    }
    laws = dataclasses.replace(asked.fit, metrics=("vlb",))
    (found,) = fit.run(dataclasses.replace(asked, fit=laws), tmp_path / "w", specs)
    assert not found.excluded and len(found.parabolas) == 3


def test_a_killed_trajectory_ends_with_the_same_rows(tiny, both, tmp_path):
    experiment, workdir, specs = both["nested"]
    for moment in (
        (table, "append_rows", 1),  # of the first budget, before its checkpoint
        (checkpoint.Checkpoints, "save", 3),  # of the second budget
        (table, "append_rows", 1),  # of the end
    ):
        with killed(*moment), pytest.raises(Killed):
            trained(experiment, tmp_path, rows=(2,))
        assert len(missing.rows(tmp_path, enumerate(specs))) == 4
    (record,) = trained(experiment, tmp_path, rows=(2,))
    assert record.restarts > 0
    one, two = (
        runs.run_files(w, specs[2].run_id).measurements.read_bytes()
        for w in (workdir, tmp_path)
    )
    assert one == two
    left = missing.rows(tmp_path, enumerate(specs))
    assert [number for number, _ in left] == [0, 1, 3]


def test_what_was_trained_as_separate_runs_is_not_taken_for_a_trajectory(
    tiny, both, tmp_path
):
    experiment, _, _ = both["nested"]
    trained(study(tiny, "separate", **{"validation.marks": 0}), tmp_path, rows=(8,))
    nested = planned(experiment)
    with pytest.raises(config.ConfigError, match=r"was not measured at 2e\+08, 3e\+08"):
        missing.rows(tmp_path, enumerate(nested))
    plan.write(nested, tmp_path)
    (found,) = fit.run(experiment, tmp_path, nested)
    assert f"{nested[0].run_id}: nothing was measured at 2e+08 FLOPs" in found.excluded
    # The plan of today says what a step stands for.
    plan.write(planned(study(tiny, "separate")), tmp_path)
    assert {r.budget_flops for r in records.read_table(tmp_path)} == {BUDGETS[-1]}


def test_a_trajectory_that_fails_keeps_the_budgets_before(tiny, tmp_path, monkeypatch):
    experiment = study(tiny, "nested", **{"plan.sizes": SIZES[1:2]})
    (spec,) = planned(experiment)
    first, second, _ = spec.points()
    read, at = loop.TrainingRun._read_metrics, second.steps - 4

    def poisoned(self, step, chunk, metrics, *rest):
        if step > at:
            metrics = metrics | {"loss": metrics["loss"] * np.nan}
        return read(self, step, chunk, metrics, *rest)

    monkeypatch.setattr(loop.TrainingRun, "_read_metrics", poisoned)
    (record,) = trained(experiment, tmp_path)
    assert record.status == "non_finite_loss" and first.steps < record.steps
    assert record.steps <= second.steps
    (found,) = fit.run(experiment, tmp_path, [spec])
    assert [p.budget_flops for p in found.parabolas] == [first.budget_flops]
    assert f"{spec.run_id}: non_finite_loss" in found.excluded[0]
    seen = reading.read(tmp_path)
    assert seen.reached(spec) == [first]
    assert len(seen.points(first.budget_flops)) == 1
    done = [row["finished"] for row in run_tables.losses(seen).rows]
    assert done == [1, 0, 0]
    # Lost before its record was read: what it had reached is asked for.
    runs.run_files(tmp_path, spec.run_id).measurements.unlink()
    with pytest.raises(config.ConfigError, match=r"not measured at 2e\+08 FLOPs"):
        runs.read_record_of(tmp_path, spec)


def test_progress_says_what_is_measured(tiny, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    trained(study(tiny, "nested", **{"plan.sizes": SIZES[:1]}), tmp_path)
    assert any("1 of 1 runs are measured at their smaller budgets" in s for s in said)
    log = json.loads((tmp_path / "experiment.json").read_text())
    assert log["config"]["plan"]["reuse"] == "nested"
