"""Rates of a size from another study: the policy "tuned"."""

import dataclasses
import math

import pytest

from scaling_ldm import config, records, study
from scaling_ldm.laws import fit, tuned_rates
from scaling_ldm.records import RateFit, Refusal
from scaling_ldm.stages import plan
from scaling_ldm.workdir import exit_status, plan_table, tuned_from

SIZES = ((8, 1), (16, 1), (24, 1), (32, 1))
BUDGETS = (3e8, 3e9)
SMALL = 1e8


def best(params):
    return 0.2 * params**-0.5


def rates(sizes, batch=8, edge=(), budget=SMALL):
    """The fit of a study of rates in which some sizes have their best at an edge."""
    runs = [
        (
            n,
            1e6 / n,
            batch,
            best(n) * 2**k,
            1 + 0.05 * (k + 3 * (n in edge)) ** 2 + noise,
        )
        for n in sizes
        for k in (-2, -1, 0, 1, 2)
        for noise in (-1e-4, 1e-4)
    ]
    found = fit.rate_law(runs, size="params_without_embeddings")
    told = tuple(dataclasses.replace(b, budget_flops=budget) for b in found.best)
    return dataclasses.replace(found, best=told)


@pytest.fixture(scope="module")
def given(tiny):
    c = tiny.copy_and_resolve_references()
    c.plan.sizes, c.plan.budgets_flops, c.plan.sizes_per_budget = SIZES, BUDGETS, 0
    c.plan.minimum_steps = 1
    return c


@pytest.fixture(scope="module")
def untuned(given):
    """The rows of the plan at one rate."""
    return plan.plan(config.resolve(given))


@pytest.fixture(scope="module")
def params(untuned):
    """The sizes' parameters without embeddings."""
    return [r.params_without_embeddings for r in untuned[: len(SIZES)]]


def tuned(given, source, **fields):
    c = given.copy_and_resolve_references()
    c.optimizer.learning_rate_policy = "tuned"
    c.optimizer.learning_rate = config.OptimizerConfig().learning_rate
    c.optimizer.tuned_from = str(source)
    c.optimizer.update(fields)
    return c


def write(folder, *fits):
    folder.mkdir(exist_ok=True)
    records.write_jsonl(folder / "laws.json", fits)
    return folder


def test_each_run_has_the_measured_rate_of_its_size(given, untuned, params, tmp_path):
    source = write(tmp_path / "s", rates(params))
    e = config.resolve(tuned(given, source))
    rows, problems = plan._tuned(e, untuned, None)
    assert problems == []
    assert len(rows) == len(SIZES) * len(BUDGETS)
    for row in rows:
        right = best(row.params_without_embeddings)
        assert row.learning_rate == pytest.approx(right, rel=1e-6)
        assert row.rate_source == "measured"
    table = plan_table.table(e, rows)
    assert "rate from" in table and table.count(" measured") == len(rows)
    assert "rate from" not in plan_table.table(config.resolve(given), untuned)
    changes = {
        f.name
        for f in dataclasses.fields(rows[0])
        if getattr(rows[0], f.name) != getattr(untuned[0], f.name)
    }
    assert changes == {"learning_rate", "rate_source"}
    # The file itself may be named.
    named = config.resolve(tuned(given, source / "laws.json"))
    assert plan._tuned(named, untuned, None)[0] == rows


@pytest.fixture
def refused(untuned):
    """refused(c): why the rows of a plan are not tuned."""

    def said(c):
        try:
            return "; ".join(plan._tuned(config.resolve(c), untuned, None)[1])
        except config.ConfigError as e:
            return str(e)

    return said


def test_a_best_rate_at_the_edge_is_no_rate(given, params, refused, tmp_path):
    source = write(tmp_path / "s", rates(params, edge=params[2:3]))
    said = refused(tuned(given, source))
    assert (
        f"24 x 1: tuned learning rate of {params[2]} parameters, batch 8: its" in said
    )
    assert "best rate at the edge of the grid" in said
    assert said.count("tuned learning rate") == 1  # once, not for each budget


def test_a_size_that_was_not_tuned_is_refused_or_by_the_law(
    given, untuned, params, refused, tmp_path
):
    source = write(tmp_path / "s", rates([params[0], params[2], 0.9 * params[3]]))
    said = refused(tuned(given, source))
    assert said.count("no best rate of this size") == 2
    assert "tuned_sizes = 'law'" in said
    e = config.resolve(tuned(given, source, tuned_sizes="law"))
    rows, _ = plan._tuned(e, untuned, None)
    assert [r.rate_source for r in rows[:4]] == [
        *("measured", "law, between sizes", "measured", "law, beyond sizes")
    ]
    for row in rows:
        right = best(row.params_without_embeddings)
        assert row.learning_rate == pytest.approx(right, rel=1e-6)
    few = write(tmp_path / "few", rates(params[:2]))
    assert "fewer than 3 best rates" in refused(tuned(given, few, tuned_sizes="law"))


def test_the_batch_the_budget_and_the_group_must_be_those(
    given, untuned, params, refused, tmp_path
):
    source = write(tmp_path / "s", rates(params, batch=16))
    assert "tuned for another batch (there are 16)" in refused(tuned(given, source))
    small, large = rates(params), rates(params, budget=4 * SMALL)
    worse = tuple(dataclasses.replace(b, rate=9.0) for b in large.best)
    both = dataclasses.replace(small, best=(*small.best, *worse))
    write(tmp_path / "s", both)
    assert "several budgets (there are 1e+08, 4e+08 FLOPs" in refused(
        tuned(given, source)
    )
    for budget, right in ((SMALL, best(params[0])), (4 * SMALL, 9.0)):
        e = config.resolve(tuned(given, source, tuned_budget=budget))
        rows, _ = plan._tuned(e, untuned, None)
        assert rows[0].learning_rate == pytest.approx(right)
    groups = [
        dataclasses.replace(small, group=group) for group in ("norm rms", "norm layer")
    ]
    write(tmp_path / "s", *groups)
    assert "has the groups 'norm rms', 'norm layer'" in refused(tuned(given, source))
    e = config.resolve(tuned(given, source, tuned_group="norm layer"))
    assert len(plan._tuned(e, untuned, None)[0]) == 8


def test_what_is_not_there_is_said(given, refused, tmp_path):
    assert "there is no" in refused(tuned(given, tmp_path / "none"))
    laws = fit.isoflop([(1e9, n, 1e9 / n, 1.0) for n in (1e3, 2e3)])
    source = write(tmp_path / "s", laws)
    assert "has no best learning rates of the loss" in refused(tuned(given, source))
    for fields, said in (
        ({"tuned_from": ""}, "needs config.optimizer.tuned_from"),
        ({"rate_law": "step_law"}, "both say the rate"),
        ({"learning_rate": 0.5}, "learning_rate = 0.5 is not read by"),
    ):
        with pytest.raises(config.ConfigError, match=said):
            config.resolve(tuned(given, source, **fields))
    c = given.copy_and_resolve_references()
    c.optimizer.tuned_from = "runs/rates"
    with pytest.raises(config.ConfigError, match="tuned_from = 'runs/rates' is not re"):
        config.resolve(c)


def planned(c, workdir):
    """The exit status of the stage plan, and its rates."""
    status = study.run(
        c,
        workdir=str(workdir),
        stages=("plan",),
        only=None,
        cluster=(None, None, None),
    )
    rows = records.read_plan(workdir) if (workdir / "runs.jsonl").exists() else []
    return status, [row.learning_rate for row in rows]


def test_a_study_keeps_the_rates_that_it_was_planned_with(
    given, params, tmp_path, capsys
):
    source, workdir = write(tmp_path / "s", rates(params)), tmp_path / "w"
    c = tuned(given, source)
    c.plan.sizes, c.plan.budgets_flops = SIZES[:1], BUDGETS[:1]
    done, bad = (exit_status.EXIT[k] for k in ("done", "bad configuration"))
    status, found = planned(c, workdir)
    assert status == done and found == [pytest.approx(best(params[0]))]
    held = records.read_experiment(workdir / "experiment.json")
    digest = held["config"]["optimizer"]["tuned_digest"]
    assert digest and records.read(workdir / "tuned.json", RateFit) == rates(params)
    other = rates([1.1 * n for n in params])
    write(source, dataclasses.replace(other, runs=rates(params).runs))
    assert planned(c, workdir)[0] == bad
    assert (
        "other best rates than this study was planned with" in capsys.readouterr().err
    )
    (source / "laws.json").unlink()
    assert planned(c, workdir) == (done, found)
    assert planned(c, tmp_path / "u")[0] == bad
    c.optimizer.tuned_digest = "0" * 16
    assert planned(c, workdir)[0] == bad
    assert "tuned_digest = '0000000000000000', but" in capsys.readouterr().err
    assert tuned_from.is_tuned(config.resolve(c))


def test_a_rate_by_the_law_is_that_of_the_one_batch():
    two = rates([1e4, 2e4, 4e4]), rates([1e4, 2e4, 4e4], batch=32)
    wide = tuple(dataclasses.replace(b, rate=2 * b.rate) for b in two[1].best)
    both = dataclasses.replace(
        two[0], best=(*two[0].best, *wide), runs=(*two[0].runs, *two[1].runs)
    )
    for batch, factor in ((8, 1), (32, 2)):
        found = tuned_rates.tuned_rate(both, 3e4, batch, 0.0, True)
        assert found.rate == pytest.approx(factor * best(3e4), rel=1e-6)
    assert isinstance(tuned_rates.tuned_rate(both, 3e4, 8, 2e8, True), Refusal)
    assert math.isfinite(found.rate)
