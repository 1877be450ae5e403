"""Decay branches: runs that share a constant rate, against separate runs."""

import dataclasses
import json
import shutil

import pytest
from reused_studies import WEIGHTS, Killed, killed, planned, study, trained

from scaling_ldm import config, records
from scaling_ldm.report import reading, run_tables
from scaling_ldm.stages import plan
from scaling_ldm.training import checkpoint, loop
from scaling_ldm.workdir import plan_table, runs

SIZES = ((8, 1), (16, 1))
BUDGETS = (5e7, 7.5e7, 1.125e8)
ONE = {"plan.sizes": SIZES[:1]}  # of the studies that are trained


@pytest.fixture(scope="module", autouse=True)
def _one(one_device):
    """Programs are for one device."""


def wsd(tiny, reuse, **changes):
    given = {"plan.sizes": SIZES, "plan.budgets_flops": BUDGETS}
    given |= {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.25}
    given |= {"optimizer.decay_shape": "1-sqrt"}
    return study(tiny, reuse, **(given | changes))


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """By value of plan.reuse: experiment, workdir, plan."""
    found = {}
    for reuse in ("separate", "decay"):
        experiment = wsd(tiny, reuse, **ONE)
        workdir = tmp_path_factory.mktemp(reuse)
        trained(experiment, workdir)
        found[reuse] = experiment, workdir, records.read_plan(workdir)
    return found


def test_a_plan_has_the_runs_of_separate_ones_and_what_they_share(tiny):
    separate, decay = (planned(wsd(tiny, r)) for r in ("separate", "decay"))
    assert len(decay) == len(separate) == 6
    trunks, branches = decay[:2], decay[2:]
    assert [(t.budget_flops, t.width) for t in trunks] == [
        (BUDGETS[-1], 8),
        (BUDGETS[-1], 16),
    ]
    by_id = {row.run_id: row for row in separate}
    alone = {"trunk": "", "trunk_steps": 0, "shared_steps": 0, "branch_steps": ()}
    for row in decay:
        assert dataclasses.replace(row, **alone) == by_id[row.run_id]
    for row in branches:
        (trunk,) = [t for t in trunks if t.width == row.width]
        assert (row.trunk, row.trunk_steps) == (trunk.run_id, trunk.steps)
        assert row.shared_steps == row.steps - round(0.25 * row.steps)
        assert row.shared_steps in trunk.branch_steps and len(trunk.branch_steps) == 2
    text = plan_table.table(wsd(tiny, "decay"), decay)
    spent = sum(r.planned_flops - r.shared_steps * r.flops_per_step for r in decay)
    whole = sum(r.planned_flops for r in decay)
    assert f"6 runs, {spent:.4g} FLOPs" in text and "from the trunk" in text
    assert f"Separate runs would take {whole:.4g} FLOPs" in text
    assert f"{whole / spent:.3g} times as much" in text
    assert "trunk" not in plan_table.table(wsd(tiny, "separate"), separate)


def test_a_run_that_is_no_branch_is_refused(tiny):
    law = {"optimizer.rate_law": "own", "optimizer.learning_rate": 1e-4}
    law |= {"optimizer.rate_law_constants": (1.0, -0.5, -0.1, 0.0)}
    with pytest.raises(config.ConfigError, match="its learning_rate is .* no branch"):
        plan.plan(wsd(tiny, "decay", **law))


def rows_of(workdir, run_id):
    return [row for row in records.read_table(workdir) if row.run_id == run_id]


def test_each_budget_ends_as_a_separate_run(both):
    """Losses of all weights and the checksum of the whole state, to the bit."""
    _, separate, specs = both["separate"]
    _, decay, others = both["decay"]
    assert sorted(s.run_id for s in specs) == sorted(s.run_id for s in others)
    for spec in others:
        wanted, got = (rows_of(w, spec.run_id) for w in (separate, decay))
        own = [row for row in wanted if row.step > spec.shared_steps]
        assert got == own and {row.step for row in got} >= {spec.steps}
        assert {row.weights for row in got} == set(WEIGHTS)
        one, two = (
            checkpoint.saved_identity(
                runs.run_files(w, spec.run_id).checkpoints, spec.steps
            )
            for w in (separate, decay)
        )
        assert one == two
        records_ = [runs.read_record_of(w, spec) for w in (separate, decay)]
        assert [r.shared_steps for r in records_] == [0, spec.shared_steps]
        assert records_[0].flops == records_[1].flops == spec.planned_flops
        assert [r.restarts for r in records_] == [0, 0]


def test_only_the_branch_is_trained(both):
    _, workdir, specs = both["decay"]
    for spec in specs:
        lines = runs.run_files(workdir, spec.run_id).metrics.read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert min(steps) > spec.shared_steps and max(steps) == spec.steps


def test_the_report_says_what_was_spent_and_what_separate_runs_cost(both):
    _, workdir, specs = both["decay"]
    total = run_tables.ledger(reading.read(workdir)).total
    spent = sum(r.planned_flops - r.shared_steps * r.flops_per_step for r in specs)
    assert total["model_flops"] == pytest.approx(spent, rel=1e-9)
    assert total["separate_flops"] == sum(r.planned_flops for r in specs)
    assert total["images"] == sum((r.steps - r.shared_steps) * 8 for r in specs)
    plain = run_tables.ledger(reading.read(both["separate"][1])).total
    assert "separate_flops" not in plain
    assert plain["model_flops"] == total["separate_flops"]


@pytest.mark.parametrize("saved", [False, True])
def test_a_branch_that_is_killed_ends_as_one_that_is_not(
    tiny, both, tmp_path, saved, capsys
):
    """Before its first checkpoint it leaves the trunk anew; after it, it does not."""
    _, workdir, specs = both["decay"]
    branch = len(specs) - 1
    spec = specs[branch]
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(runs.run_files(tmp_path / "w", spec.run_id).folder)
    experiment = wsd(tiny, "decay", **ONE, **{"train.checkpoints_per_run": 10})
    # A second save begins when the first one is on the disk.
    steps = loop.TrainingRun, "_next_batch", 2
    moment = (checkpoint.Checkpoints, "save", 2) if saved else steps
    with killed(*moment), pytest.raises(Killed):
        trained(experiment, tmp_path / "w", rows=[branch])
    found = runs.run_files(tmp_path / "w", spec.run_id)
    assert any(found.checkpoints.glob("[0-9]*")) == saved
    trained(experiment, tmp_path / "w", rows=[branch])
    assert rows_of(tmp_path / "w", spec.run_id) == rows_of(workdir, spec.run_id)
    record = runs.read_record_of(tmp_path / "w", spec)
    assert record.shared_steps == spec.shared_steps
    assert record.restarts == (1 if saved else 0)
    assert "it lacks them now" not in capsys.readouterr().err


def test_a_branch_waits_for_its_trunk(tiny, both, tmp_path):
    experiment, workdir, specs = both["decay"]
    spec = specs[-1]
    with pytest.raises(config.ConfigError, match="not trained yet: train that row"):
        trained(experiment, tmp_path / "new", rows=[len(specs) - 1])
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(runs.run_files(tmp_path / "w", spec.run_id).folder)
    trunk = runs.run_files(tmp_path / "w", spec.trunk)
    shutil.rmtree(trunk.checkpoints / str(spec.shared_steps))
    with pytest.raises(config.ConfigError, match="there is no such checkpoint"):
        trained(experiment, tmp_path / "w", rows=[len(specs) - 1])
    # Of a trunk that failed before, a separate run would fail as well.
    record = records.read(trunk.record)
    failed = dataclasses.replace(record, status="non_finite_loss", steps=3)
    records.write_jsonl(trunk.record, [failed])
    trained(experiment, tmp_path / "w", rows=[len(specs) - 1])
    alone = runs.read_record_of(tmp_path / "w", spec)
    assert alone.shared_steps == 0 and alone.status == "finished"
    ends = [
        [r for r in rows_of(w, spec.run_id) if r.step == spec.steps]
        for w in (tmp_path / "w", workdir)
    ]
    assert ends[0] == ends[1]
