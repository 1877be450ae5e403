"""A study of seeds, rates and architectures from its plan to its report."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from finished_study import Page, table_rows
from processes import ROOT, run_main

from scaling_ldm import config, records, report
from scaling_ldm.stages import export, fit, generate, plan, train
from scaling_ldm.workdir import exit_status, runs

PREEMPTED = "preempted, run the same command again"
RATE, ARCHITECTURE = "optimizer.learning_rate", "model.architecture"
ONE = "1.000e08-16x1"
OTHER = f"{ONE}-cross_attention-lr2e-3-seed1"


@pytest.fixture(scope="module")
def given(tiny, one_device):
    c = tiny.copy_and_resolve_references()
    c.plan.sizes, c.plan.budgets_flops = ((8, 1), (16, 1)), (1e8,)
    c.plan.sizes_per_budget = 1
    c.plan.expected_coef, c.plan.expected_exponent = 1e9, 0.01  # the larger size
    c.generate.images = c.generate.batch_size = 8
    c.generate.steps = 2
    c.fit.bootstrap = 50
    return c


def trained(given, workdir):
    """(experiment, specs) after the stages plan, train and fit."""
    e = config.resolve(given)
    specs = plan.plan(e)
    plan.write(specs, workdir)
    train.run(e, workdir, list(enumerate(specs)), len(specs))
    fit.run(e, workdir, specs)
    return e, specs


@pytest.fixture(scope="module")
def study(given, tmp_path_factory):
    """(experiment, workdir, specs, records before the axes were added)."""
    workdir = tmp_path_factory.mktemp("study")
    trained(given, workdir)
    before = {path: path.read_text() for path in runs.record_paths(workdir)}
    c = given.copy_and_resolve_references()
    c.plan.axes = {
        "train.seed": (0, 1),
        RATE: (1e-2, 2e-3),
        ARCHITECTURE: ("in_context", "cross_attention"),
    }
    e, specs = trained(c, workdir)
    return e, workdir, specs, before


@pytest.mark.slow
def test_a_study_grows_axes_and_keeps_its_runs(study):
    e, workdir, specs, before = study
    assert len(before) == 1 and len(specs) == 8
    assert [path.read_text() for path in before] == list(before.values())
    every = [runs.read_record_of(workdir, spec) for spec in specs]
    assert {r.status for r in every} == {"finished"}
    assert len({runs.last_loss(workdir, spec) for spec in specs}) == 8
    assert OTHER in {r.run_id for r in every}
    assert e.recipe_hash in {r.recipe_hash for r in every}


@pytest.mark.slow
def test_a_run_is_that_of_an_experiment_with_its_values(given, study, tmp_path):
    """To the bit, although its compiled step is shared with other rates and seeds."""
    _, workdir, specs, _ = study
    c = given.copy_and_resolve_references()
    c.train.seed, c.optimizer.learning_rate = 1, 2e-3
    c.model.architecture = "cross_attention"
    _, (alone,) = trained(c, tmp_path)
    (spec,) = [s for s in specs if s.run_id == OTHER]
    ours = runs.read_record(workdir, OTHER)
    theirs = runs.read_record(tmp_path, ONE)
    for name in ("recipe_hash", "flops"):
        assert getattr(ours, name) == getattr(theirs, name)
    for weights in ("raw", "ema"):
        loss = runs.last_loss(workdir, spec, weights)
        assert loss == runs.last_loss(tmp_path, alone, weights)
    logs = [
        [
            json.loads(line)
            for line in runs.run_files(*of).metrics.read_text().split("\n")[:-1]
        ]
        for of in ((workdir, OTHER), (tmp_path, ONE))
    ]
    for name in ("loss", "learning_rate"):
        assert [row[name] for row in logs[0]] == [row[name] for row in logs[1]]
    assert logs[0][-1]["learning_rate"] == np.float32(2e-3)


@pytest.mark.slow
def test_each_group_is_fitted_alone_and_reported(study):
    _, workdir, specs, _ = study
    *found, in_context, cross = records.read_jsonl(workdir / "laws.json")
    for rates in (in_context, cross):  # two rates of one size
        assert [b.reason for b in rates.best] == ["fewer than 3 rates"]
    assert (in_context.group, cross.group) == ("in_context", "cross_attention")
    assert [r.group for r in found] == list(dict.fromkeys(s.group for s in specs))
    assert len(found) == 4
    for result in found:  # two seeds of one size
        (refused,) = result.parabolas
        assert "1 distinct size in 2 usable runs" in refused.detail
        assert result.excluded == ()
    page = Page(report.write(workdir).read_text(encoding="utf-8"))
    for result in found:
        assert f"Laws: {result.group}" in page.text
    rows = table_rows(workdir, "losses")
    assert [row["finished"] for row in rows] == ["2"] * 4
    (row,) = [r for r in rows if r["group"] == found[-1].group]
    pair = [runs.last_loss(workdir, s) for s in specs if s.group == found[-1].group]
    assert float(row["loss"]) == pytest.approx(np.mean(pair), rel=1e-12)
    assert float(row["deviation"]) == pytest.approx(np.std(pair, ddof=1), rel=1e-9)
    assert (float(row["loss_low"]), float(row["loss_high"])) == tuple(sorted(pair))


@pytest.mark.slow
def test_pictures_and_exports_are_of_the_runs_own_network(study):
    e, workdir, specs, _ = study
    named = dataclasses.replace(e, generate=dataclasses.replace(e.generate, run=OTHER))
    generate.check(named)
    record = generate.run(named, workdir, specs)
    assert record.run_id == OTHER and record.images == 8
    export.run(named, workdir, specs)
    card = json.loads((workdir / "export" / "training.json").read_text())
    assert card["reads"][ARCHITECTURE] == "cross_attention"
    (spec,) = [s for s in specs if s.run_id == OTHER]
    assert card["recipe_hash"] == spec.recipe_hash


@pytest.mark.slow
def test_a_stopped_run_of_a_group_continues(study, tmp_path):
    """From the checkpoint in the middle, to the same loss."""
    e, workdir, specs, _ = study
    shutil.copytree(workdir, tmp_path / "w")
    (numbered,) = [(k, s) for k, s in enumerate(specs) if s.run_id == OTHER]
    files = runs.run_files(tmp_path / "w", OTHER)
    files.record.unlink()
    last = max(int(p.name) for p in files.checkpoints.iterdir() if p.name.isdigit())
    shutil.rmtree(files.checkpoints / str(last))
    (record,) = train.run(e, tmp_path / "w", [numbered], len(specs))
    assert record.restarts == 1
    one, two = (
        runs.run_files(w, OTHER).measurements for w in (workdir, tmp_path / "w")
    )
    assert one.read_bytes() == two.read_bytes()


def test_an_objective_as_an_axis_has_no_best_run(given, tmp_path):
    c = given.copy_and_resolve_references()
    c.plan.axes = {"objective.prediction": ("flow", "v")}
    e = config.resolve(c)
    with pytest.raises(config.ConfigError, match="no run is the best one"):
        generate.check(e)
    with pytest.raises(config.ConfigError, match="no run is the best one"):
        runs.run_to_sample(e, tmp_path, plan.plan(e))
    c.generate.run = ONE
    generate.check(config.resolve(c))
    c.generate.run, c.plan.axes = "", {"objective.weighting": ("uniform", "min_snr")}
    generate.check(config.resolve(c))


def test_every_objective_of_an_axis_must_be_sampled(given):
    c = given.copy_and_resolve_references()
    c.generate.spacing, c.generate.run = "flow_shifted", ONE
    generate.check(config.resolve(c))
    c.plan.axes = {
        "objective.schedule,objective.prediction": (
            ("rectified_flow", "flow"),
            ("vp_cosine", "v"),
        )
    }
    with pytest.raises(config.ConfigError, match="cannot sample with .*'flow_shifted'"):
        generate.check(config.resolve(c))


@pytest.mark.slow
def test_a_study_with_axes_by_the_launcher(tmp_path):
    """Two runs at a time, stopped and continued: the numbers of one process."""
    workdir = tmp_path / "w"
    varied = (
        '--config.plan.axes=(("train.seed", (0, 1)), '
        '("optimizer.learning_rate", (3e-3, 1e-3)), '
        '("model.architecture", ("in_context", "cross_attention")))'
    )
    sizes = "--config.plan.sizes=((16, 1),)", "--config.plan.budgets_flops=(1.6e9,)"
    flags = "--config=experiments/tiny.py", f"--workdir={workdir}"
    run_main(*flags, "--stages=plan,encode", *sizes, varied)
    launcher = [sys.executable, "launch/local.py", *flags, "--at_once=2", "--"]
    with subprocess.Popen([*launcher, *sizes, varied], cwd=ROOT) as first:
        while not list(workdir.glob("runs/*/record.json")):
            assert first.poll() is None
            time.sleep(0.1)
        first.terminate()
        assert first.wait(300) == exit_status.EXIT[PREEMPTED]
    assert 0 < len(list(workdir.glob("runs/*/record.json"))) < 8
    subprocess.run([*launcher, *sizes, varied], cwd=ROOT, check=True, timeout=900)
    _, err = run_main(*flags, "--stages=fit,generate,report", *sizes, varied)
    specs = records.read_jsonl(workdir / "runs.jsonl")
    assert len(specs) == 8
    for spec in specs:
        assert runs.read_record_of(workdir, spec).status == "finished"
    # Four groups, and the rates of each architecture.
    assert len(records.read_jsonl(workdir / "laws.json")) == 4 + 2
    assert "learning_rate 1e-3, cross_attention:" in err

    alone = tmp_path / "alone"
    one = "--config=experiments/tiny.py", f"--workdir={alone}", *sizes, varied
    run_main(*one, "--stages=plan,train,fit")
    assert records.read_table(workdir) == records.read_table(alone)
    ours, theirs = (records.read_jsonl(w / "laws.json") for w in (workdir, alone))
    assert ours == theirs
    assert "cross_attention" in (workdir / "report" / "index.html").read_text()
