"""Runs side by side: each does what it does alone, whatever becomes of the others."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from stop_at import stop_at

from scaling_ldm import config, records
from scaling_ldm.records import table
from scaling_ldm.records.errors import Preempted
from scaling_ldm.stages import plan, train
from scaling_ldm.training import (
    capacity,
    checkpoint,
    loop,
    marks,
    members,
    mesh,
    packing,
    progress,
    signals,
    train_step,
)
from scaling_ldm.workdir import plan_table, runs

STEPS = (12, 20)
SLOTS = 4  # of three runs; one is empty


@pytest.fixture(scope="module", autouse=True)
def _room():
    """The marks of these runs may take more than two percent of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "SHARE", 100.0)
        yield


@pytest.fixture(scope="module")
def given(tiny):
    """Runs of 12 and 20 steps and two seeds with rates of their own."""
    c = tiny.copy_and_resolve_references()
    c.plan.sizes = ((16, 1),)
    (row,) = plan.plan(config.resolve(c))
    c.plan.budgets_flops = tuple(float(n * row.flops_per_step) for n in STEPS)
    c.plan.axes = {
        "train.seed,optimizer.learning_rate": ((0, 1e-2), (1, 3e-3)),
    }
    c.optimizer.warmup_fraction = 0.25
    c.train.steps_per_dispatch = 4
    c.train.checkpoints_per_run = 4
    c.train.log_every_steps = 1
    c.validation.marks = 1
    return c


def study(given, slots=1, **fields):
    c = given.copy_and_resolve_references()
    c.mesh.runs = slots
    for name, value in fields.items():
        section, _, field = name.partition("__")
        c[section][field] = value
    return config.resolve(c)


@functools.cache
def rows_of(experiment):
    """Two runs of 20 steps, and one of 12."""
    rows = (*enumerate(plan.plan(experiment)),)
    assert [spec.steps for _, spec in rows] == [12, 12, 20, 20]
    return rows[1:]


def trained(experiment, workdir, devices):
    build = functools.partial(mesh.build, use=jax.devices()[:devices])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "build", build)
        rows = rows_of(experiment)
        return train.run(experiment, workdir, rows, len(rows))


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, trained(study(given), workdir, 1)


@pytest.fixture(scope="module")
def packed(given, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("packed")
    return workdir, trained(study(given, SLOTS), workdir, SLOTS)


def measured(workdir, record):
    """(step, metric, weights) -> value, of a run."""
    path = runs.run_files(workdir, record.run_id).measurements
    rows = table.read_rows(path)[0]
    return {(r.step, r.metric, r.weights): r.value for r in rows}


def logged(workdir, record):
    text = runs.run_files(workdir, record.run_id).metrics.read_text()
    return {row["step"]: row for row in map(json.loads, text.splitlines())}


STATES = {}  # (workdir, run_id) -> what `last_state` gave; it is read once


def last_state(given, workdir, record):
    """The arrays of the last checkpoint of a run that is over."""
    key = workdir, record.run_id
    if key not in STATES:
        STATES[key] = read_state(given, *key)
    return STATES[key]


def read_state(given, workdir, run_id):
    """The arrays of a run's last checkpoint, read for one device."""
    experiment = study(given)
    (spec,) = [s for _, s in rows_of(experiment) if s.run_id == run_id]
    one = mesh.build(experiment.mesh, {}, use=jax.devices()[:1])
    part = train_step.compiled_part(experiment)
    with jax.set_mesh(one):
        like = train_step.compile_functions(part, 16, 1, one).abstract_state
        folder = runs.run_files(workdir, run_id).checkpoints
        saved = checkpoint.Checkpoints(folder, spec, 9)
        restored = saved.restore(like)
        saved.close()
    return restored.step, jax.tree.map(np.asarray, restored.state)


def assert_close(given, ours, theirs):
    """Two sets of runs (workdir, records) have the same numbers, but for rounding."""
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a.run_id, a.status, a.steps) == (b.run_id, "finished", b.steps)
        assert measured(ours[0], a) == pytest.approx(measured(theirs[0], b), rel=1e-5)
        la, lb = logged(ours[0], a), logged(theirs[0], b)
        # Which steps are logged follows from the dispatches.
        assert max(la) == max(lb) == a.steps
        for step in la.keys() & lb.keys():
            for name in ("loss", "learning_rate", "flops", "tokens"):
                assert la[step][name] == pytest.approx(lb[step][name], rel=1e-5)
        (at, state), (there, other) = (
            last_state(given, w, r) for w, r in ((ours[0], a), (theirs[0], b))
        )
        assert at == there == a.steps
        # Adam makes steps of rounding errors where a gradient is zero.
        apart = jax.tree.map(np.subtract, state.params, other.params)
        assert norm(apart) < 1e-3 * norm(state.params)
        assert state.smoothed_loss == pytest.approx(other.smoothed_loss, rel=1e-5)
        assert int(state.step) == int(other.step) == a.steps


def norm(tree):
    return sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)) ** 0.5


def assert_identical(given, workdir, reference):
    """The runs that a folder has are those of another, bit for bit."""
    for record in reference[1]:
        assert measured(workdir, record) == measured(reference[0], record)
        ours, theirs = (last_state(given, w, record) for w in (workdir, reference[0]))
        assert ours[0] == theirs[0]
        jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])


def test_each_run_of_a_pack_has_the_numbers_of_the_run_alone(given, alone, packed):
    assert_close(given, packed, alone)
    rates = [rows[20]["learning_rate"] for rows in map_logs(packed) if 20 in rows]
    assert rates == pytest.approx([1e-2, 3e-3])
    for record in packed[1]:
        assert record.devices == 1
        attempt = attempts_of(packed[0], record)[-1]
        assert (attempt.ended, attempt.devices) == ("finished", 1)
        assert (attempt.first_step, attempt.last_step) == (0, record.steps)
    short, long = (attempts_of(packed[0], packed[1][i])[-1] for i in (0, 1))
    assert short.seconds < long.seconds


def map_logs(done):
    return [logged(done[0], record) for record in done[1]]


def attempts_of(workdir, record):
    path = runs.run_files(workdir, record.run_id).attempts
    return records.read_attempts(path, record.run_id)


@pytest.mark.slow  # programs for parts of several devices take long to compile
def test_devices_that_share_a_run_change_rounding_alone(given, alone, tmp_path):
    found = trained(study(given, 2), tmp_path, 4)  # two packs
    assert {record.devices for record in found} == {2}
    assert_close(given, (tmp_path, found), alone)


def test_no_collective_of_a_step_crosses_runs(given, tmp_path):
    experiment = study(given, SLOTS)
    device_mesh = mesh.build(experiment.mesh, {}, runs=SLOTS)
    with jax.set_mesh(device_mesh):
        spec = rows_of(experiment)[0][1]
        files = runs.run_files(tmp_path, spec.run_id)
        member = members.Member(experiment, spec, files)
        training = loop.TrainingRun(
            [member],
            device_mesh,
            progress.SweepProgress(1, [], 1.0),
            signals.StopSignal(),
        )
        compiled = training.compiled
        state = compiled.slots.spread(member._first_state(compiled, device_mesh))
        rows = {
            "x": np.zeros((4, 8, 8, 8, 3), np.float32),
            "text": np.zeros((4, 8, 4), np.int32),
            "mask": np.ones((4, 8, 4), bool),
        }
        batch = mesh.put(device_mesh, rows, mesh.STACKED_BATCHES)
        uncond = {name: rows[name][0, 0] for name in ("text", "mask")}
        uncond = mesh.put(device_mesh, uncond, mesh.REPLICATED)
        flags = mesh.request_flags(device_mesh, 0)
        text = (
            compiled.steps.lower(
                state, batch, training._count(0, 4), uncond, training._hyper(), flags
            )
            .compile()
            .as_text()
        )
    assert "while" in text
    found = re.findall(r"all-reduce|all-gather|all-to-all|collective|reduce-scat", text)
    assert not found


def test_a_run_that_fails_leaves_the_others_to_the_bit(
    given, packed, tmp_path, monkeypatch
):
    numbers = members.Member.numbers

    def poisoned(self):
        found = numbers(self)
        if self.spec.seed == 1 and self.spec.steps == STEPS[1]:
            found["peak"] = np.float32(np.nan)
        return found

    monkeypatch.setattr(members.Member, "numbers", poisoned)
    found = trained(study(given, SLOTS), tmp_path, SLOTS)
    assert [r.status for r in found] == ["finished", "finished", "non_finite_loss"]
    assert found[2].steps == 2  # the first step makes the weights NaN
    folder = runs.run_files(tmp_path, found[2].run_id).checkpoints
    assert not any(folder.iterdir())
    assert attempts_of(tmp_path, found[2])[-1].ended == "non_finite_loss"
    others = packed[0], packed[1][:2]
    assert_identical(given, tmp_path, others)


@pytest.fixture(scope="module")
def stopped(given, tmp_path_factory):
    """A pack that was stopped after step 12, where one run ends."""
    workdir = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Preempted, match="saved at step 15"):
            trained(study(given, SLOTS), workdir, SLOTS)
    return workdir


@pytest.mark.parametrize("again", ["packed", "alone"])
def test_a_stopped_pack_goes_on_packed_or_alone(
    given, packed, stopped, tmp_path, again
):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    saved = [max(runs.checkpoint_steps(tmp_path, s)) for _, s in rows_of(study(given))]
    assert saved == [12, 15, 15]
    short, long = (attempts_of(tmp_path, packed[1][i])[-1] for i in (0, 1))
    assert (short.ended, short.last_step) == ("finished", 12)
    assert (long.ended, long.last_step) == ("stopped", 15)
    slots = SLOTS if again == "packed" else 1
    found = trained(study(given, slots), tmp_path, slots)
    assert [r.restarts for r in found] == [0, 1, 1]
    if again == "packed":
        assert_identical(given, tmp_path, packed)
    else:
        assert_close(given, (tmp_path, found), packed)


def test_runs_that_were_begun_alone_go_on_in_a_pack(
    given, packed, tmp_path, monkeypatch
):
    """They come from different steps: one from a later one, the others from 0."""
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Preempted):
            trained(study(given), tmp_path, 1)
    found = trained(study(given, SLOTS), tmp_path, SLOTS)
    assert sorted(r.restarts for r in found) == [0, 0, 1]
    assert_close(given, (tmp_path, found), packed)


def test_packs_hold_runs_of_one_shape_and_similar_length(given):
    experiment = study(
        given,
        2,
        plan__sizes=((16, 1), (8, 1)),
        plan__axes=(
            ("train.seed", (0, 1)),
            ("optimizer.weight_decay", (0.0, 0.1)),
        ),
        plan__sizes_per_budget=0,
    )
    rows = [*enumerate(plan.plan(experiment))]
    together, places = packing.choose(experiment, rows)
    assert places == 2
    assert sorted(row for pack in together for row in pack) == rows
    for pack in together:
        assert len(pack) == 2
        shapes = {
            (s.width, s.steps, s.overrides["optimizer.weight_decay"]) for _, s in pack
        }
        assert len(shapes) == 1 and {s.seed for _, s in pack} == {0, 1}
    specs = [spec for _, spec in rows]
    said = f"{len(rows)} runs train in {len(together)} packs of up to 2, side by side"
    assert said in plan_table.table(experiment, specs)
    assert "side by side" not in plan_table.table(study(given), specs)
    one_each = [[row] for row in rows]
    assert packing.choose(study(given), rows) == (one_each, 1)
    alone = rows[:1]
    assert packing.choose(experiment, alone) == ([alone], 1)
    assert "2 places are empty" in packing.line([rows[:2], rows[2:4]], 3)
    assert packing.line(one_each, 1) == ""


def test_auto_is_as_many_as_fit(given, monkeypatch):
    experiment = study(given, 0)
    rows = [*enumerate(plan.plan(experiment))]  # four that may share a pack
    devices = jax.devices()

    def auto(rows=rows, count=4, **fields):
        return packing.auto(study(given, 0, **fields), rows, devices[:1] * count)

    assert auto() == 4
    assert [auto(rows[:n]) for n in (1, 2, 3)] == [1, 2, 2]
    assert [auto(count=n) for n in (1, 3, 6, 8)] == [1, 3, 3, 4]
    assert auto(mesh__fsdp=2) == 1
    spec = rows[0][1]
    held = [
        capacity.step_bytes(spec.state_bytes, spec.activation_bytes, n, 1)
        for n in (1, 2, 4)
    ]
    # A run on two devices has room, and one on a single device has none.
    for there, found in ((held[0], 4), (held[1], 2), (held[2], 1)):
        monkeypatch.setattr(capacity, "device_bytes", lambda _, n=there: 2 * n)
        assert auto() == found
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert auto() == 1


@pytest.mark.parametrize(
    ("fields", "processes", "why"),
    [
        ({"mesh__fsdp": 2}, 1, "whole parameters on every device"),
        ({}, 2, "in a job of 2 processes"),
    ],
)
def test_what_cannot_be_packed_is_refused(given, fields, processes, why):
    with pytest.raises(config.ConfigError, match=why):
        packing.check(study(given, 2, **fields), processes)


def test_devices_that_the_runs_cannot_share_are_refused(given):
    cfg = study(given, 3).mesh
    with pytest.raises(config.ConfigError, match=r"runs = 3 does not divide the 4 dev"):
        mesh.build(cfg, {}, runs=3)
    built = mesh.build(cfg, {"config.train.batch_size": 2}, runs=2)
    assert (mesh.runs_of(built), mesh.devices_of_run(built)) == (2, 2)
    with pytest.raises(config.ConfigError, match="batch_size = 3 is not divisible"):
        mesh.build(cfg, {"config.train.batch_size": 3}, runs=2)


@pytest.mark.parametrize("reuse", ["nested", "decay"])
def test_runs_that_share_steps_train_side_by_side(given, tmp_path, reuse):
    """A trajectory is measured at each budget; branches follow the pack of trunks."""
    changes = {"plan__reuse": reuse, "optimizer__warmup_fraction": 0.0}
    changes |= {"optimizer__warmup_steps": 3, "train__log_every_steps": 1}
    if reuse == "decay":
        changes |= {"optimizer__schedule": "wsd", "optimizer__decay_fraction": 0.25}
    whole, found = mesh.build, []
    for slots in (1, SLOTS):  # room for two trunks and two branches
        workdir = tmp_path / f"{slots}"
        experiment = study(given, slots, **changes)
        rows = [*enumerate(plan.plan(experiment))]
        build = functools.partial(whole, use=jax.devices()[:slots])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mesh, "build", build)
            done = train.run(experiment, workdir, rows, len(rows))
        assert len(done) == (4 if reuse == "decay" else 2)
        assert {record.status for record in done} == {"finished"}
        assert any(record.shared_steps for record in done) == (reuse == "decay")
        found.append({r.run_id: measured(workdir, r) for r in done})
    assert found[0].keys() == found[1].keys()
    for run_id, rows in found[0].items():
        assert {step for step, _, _ in rows} >= (
            {12, 20} if reuse == "nested" else set()
        )
        assert found[1][run_id] == pytest.approx(rows, rel=1e-5)
