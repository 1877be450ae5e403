"""Validation through training: what is measured, and that a kill leaves no trace."""

import contextlib
import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

from scaling_ldm import config, records
from scaling_ldm import data as data_lib
from scaling_ldm.diffusion.losses import validation
from scaling_ldm.records import table
from scaling_ldm.stages import plan, train
from scaling_ldm.training import (
    checkpoint,
    held_out,
    loop,
    marks,
    measuring,
    mesh,
    objective,
    progress,
    train_step,
)
from scaling_ldm.workdir import runs

STEPS = 24
AT = (1, 2, 4, 10, 12, 24)  # marks, the smaller budget, the end; saves: 6, 12, 18, 24
WEIGHTS = ("raw", "ema", "power_0.1")
TENTHS = tuple(f"loss_t{number}" for number in range(10))
SAMPLES = 24
EACH = len(WEIGHTS) * (1 + len(TENTHS)) + 1  # rows of a mark


@pytest.fixture(scope="module", autouse=True)
def _room(one_device):
    """The marks of these runs may take more than two percent of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "SHARE", 100.0)
        yield


@pytest.fixture(scope="module")
def experiment(tiny):
    """A run of 24 steps; the smaller budget is that of 12 steps."""
    c = tiny.copy_and_resolve_references()
    (row,) = plan.plan(config.resolve(c))
    c.plan.budgets_flops = tuple(float(n * row.flops_per_step) for n in (12, STEPS))
    c.plan.minimum_steps = 5
    c.optimizer.averages = WEIGHTS[1:]
    c.train.checkpoints_per_run = c.train.steps_per_dispatch = 4
    c.train.log_every_steps = 1
    c.validation.samples = SAMPLES
    c.validation.marks = 4
    return config.resolve(c)


@functools.cache
def spec_of(experiment):
    (row,) = (r for r in plan.plan(experiment) if r.steps == STEPS)
    return row


def run(experiment, workdir):
    (record,) = train.run(experiment, workdir, [(1, spec_of(experiment))], 2)
    return record


def with_fields(experiment, section, **changes):
    part = dataclasses.replace(getattr(experiment, section), **changes)
    return dataclasses.replace(experiment, **{section: part})


def files_of(experiment, workdir):
    return runs.run_files(workdir, spec_of(experiment).run_id)


def rows_of(experiment, workdir):
    rows, rest = table.read_rows(files_of(experiment, workdir).measurements)
    assert rest == ""
    return rows


def logged(experiment, workdir):
    """The log of the run, by step."""
    lines = files_of(experiment, workdir).metrics.read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def final_state(experiment, workdir):
    """The functions of the run and its last checkpoint's arrays; on a mesh."""
    row = spec_of(experiment)
    functions = train_step.compile_functions(
        experiment, row.width, row.depth, mesh.build(experiment.mesh, {})
    )
    folder = files_of(experiment, workdir).checkpoints
    with contextlib.closing(checkpoint.Checkpoints(folder, row, 2)) as saved:
        restored = saved.restore(functions.abstract_state)
    assert restored.step == STEPS
    return functions, restored.state


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 4])
def undisturbed(request, experiment, tmp_path_factory):
    """(experiment with 1 or 4 steps in a dispatch, workdir, record)."""
    several = with_fields(experiment, "train", steps_per_dispatch=request.param)
    workdir = tmp_path_factory.mktemp("undisturbed")
    return several, workdir, run(several, workdir)


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    return said


def test_every_mark_has_its_rows(undisturbed):
    experiment, workdir, _ = undisturbed
    rows = rows_of(experiment, workdir)
    metrics = [(m, w) for w in WEIGHTS for m in ("loss", *TENTHS)]
    metrics.append(("train_loss_smoothed", "raw"))
    assert [(r.step, r.metric, r.weights) for r in rows] == [
        (step, *each) for step in AT for each in metrics
    ]
    spec, log = spec_of(experiment), logged(experiment, workdir)
    for r in rows:
        assert (r.flops, r.run_id) == (r.step * spec.flops_per_step, spec.run_id)
        assert math.isfinite(r.value) and (r.low, r.high) == (r.value, r.value)
        if r.metric == "train_loss_smoothed" and r.step in log:
            assert r.value == log[r.step]["loss_smoothed"]
    shown = records.to_json(experiment)
    assert {(r.metric == "train_loss_smoothed", r.protocol_hash) for r in rows} == {
        (metric != "loss", table.loss_protocol_hash(metric, shown, spec.overrides))
        for metric in ("loss", "train_loss_smoothed")
    }


def test_rows_are_the_losses_of_the_weights(undisturbed):
    """Those of the end, by the last checkpoint; a tenth, by its pictures' times."""
    experiment, workdir, _ = undisturbed
    rows = {
        (r.metric, r.weights): r.value
        for r in rows_of(experiment, workdir)
        if r.step == STEPS
    }
    one = mesh.build(experiment.mesh, {})
    _, source = data_lib.sources(experiment, workdir)
    settings = objective.diffusion_objective(experiment.objective)
    times = validation.stratified_times(SAMPLES, settings, seed=0)
    bounds = [math.ceil(number * SAMPLES / 10) for number in range(11)]
    with jax.set_mesh(one):
        compiled, state = final_state(experiment, workdir)
        names = ("x", *compiled.objective.conditioning)
        batches = held_out.held_out_batches(experiment, one, source, names)
        for weights, params in {"raw": state.params, **state.averages}.items():
            losses = held_out.losses(compiled, params, batches)
            assert losses.mean() == rows["loss", weights]
            ascending = losses[np.argsort(times)]
            for name, low, high in zip(TENTHS, bounds, bounds[1:], strict=False):
                mean = ascending[low:high].mean()
                assert rows[name, weights] == pytest.approx(mean, rel=1e-12)


def test_measuring_changes_nothing_of_training(undisturbed, tmp_path):
    experiment, workdir, record = undisturbed
    plain = with_fields(experiment, "validation", marks=0)
    alone = run(plain, tmp_path)
    assert alone.flops == record.flops
    with jax.set_mesh(mesh.build(experiment.mesh, {})):
        states = [final_state(experiment, w)[1] for w in (workdir, tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    ours, theirs = (logged(experiment, w) for w in (workdir, tmp_path))
    for step in theirs.keys() & ours.keys():
        for name in ("loss", "loss_smoothed", "gradient_norm"):
            assert ours[step][name] == theirs[step][name]
    assert rows_of(plain, tmp_path) == rows_of(experiment, workdir)[-EACH:]


class Killed(BaseException):
    """What ends a process of these tests."""


# What a process was doing when it was killed: the function, its call, and how far it
# was. Calls are counted in each process; it continues from the last save.
MOMENTS = (
    (table, "append_rows", 1, "before"),  # of step 1
    (table, "append_rows", 3, "half"),  # of step 4
    (checkpoint.Checkpoints, "save", 1, "before"),  # of step 6, after the row of 4
    (checkpoint.Checkpoints, "save", 1, "after"),
    (table, "append_rows", 1, "half"),  # of step 10
    (table, "append_rows", 1, "after"),
    (table, "append_rows", 2, "half"),  # of step 12
    (checkpoint.Checkpoints, "save", 1, "after"),  # of step 12
    (checkpoint.Checkpoints, "save", 2, "after"),  # of step 24
    (table, "append_rows", 1, "half"),  # of the end
    (table, "append_rows", 1, "after"),
    (runs, "write_record", 1, "before"),
)


@contextlib.contextmanager
def killed(place, name, call, how_far):
    """In it, a function's process is killed at one of its calls."""
    whole, calls = getattr(place, name), []

    def cut(*arguments):
        calls.append(arguments)
        if len(calls) < call:
            return whole(*arguments)
        if how_far == "half":
            path, rows = arguments
            text = "".join(records.dumps(row) + "\n" for row in rows)
            with open(path, "a", encoding="utf-8") as file:
                file.write(text[: len(text) // 2])
        if how_far == "after":
            whole(*arguments)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, cut)
        yield


@pytest.mark.slow
def test_a_run_killed_at_any_moment_has_the_same_rows(undisturbed, tmp_path, lines):
    experiment, workdir, record = undisturbed
    for moment in MOMENTS:
        with killed(*moment), pytest.raises(Killed):
            run(experiment, tmp_path)
        assert not files_of(experiment, tmp_path).record.exists()
    again = run(experiment, tmp_path)
    assert again.restarts == 3  # saves at 6, 12 and 24 were continued from
    one, two = (
        files_of(experiment, w).measurements.read_bytes() for w in (workdir, tmp_path)
    )
    assert one == two
    cut = [line for line in lines if "was cut off and is dropped" in line]
    assert len(cut) == 4 and "everything after step 6 is measured again" in cut[1]


def test_marks_whose_losses_are_gone_are_named(undisturbed, tmp_path, lines):
    experiment, workdir, _ = undisturbed
    spec, files = spec_of(experiment), files_of(experiment, tmp_path)
    whole = files_of(experiment, workdir).measurements.read_bytes()
    rows = whole.splitlines(keepends=True)
    files.measurements.parent.mkdir(parents=True)
    for kept, gone in ((len(rows), ""), (2 * EACH + 3, "(4, 10, 12)"), (0, "(1, 2, 4")):
        files.measurements.write_bytes(b"".join(rows[:kept]))
        measuring.RunTable(experiment, spec, files, 12, AT)
        assert len(lines) == bool(gone)
        assert all(f"{files.measurements} has no losses" in line for line in lines)
        assert all(gone in line for line in lines)
        lines.clear()


@pytest.mark.slow
def test_what_a_run_has_lost_of_its_past_is_said(experiment, tmp_path, lines):
    def lacking():
        found = [line for line in lines if "has no l" in line]
        lines.clear()
        return found

    files = files_of(experiment, tmp_path)
    with killed(checkpoint.Checkpoints, "save", 2, "after"), pytest.raises(Killed):
        run(experiment, tmp_path)  # step 12 is saved; marks 1, 2, 4, 10 and 12 passed
    whole = files.measurements.read_bytes().splitlines(keepends=True)
    with killed(loop.TrainingRun, "_next_batch", 1, "before"), pytest.raises(Killed):
        run(experiment, tmp_path)
    assert not lacking()
    files.measurements.write_bytes(b"".join(whole[: 2 * EACH + EACH // 2]))
    log = files.metrics.read_bytes().splitlines(keepends=True)
    files.metrics.write_bytes(log[0])
    run(experiment, tmp_path)
    metrics, measured = lacking()
    assert f"{files.metrics} has no lines of steps " in metrics and "to 12;" in metrics
    assert "passed (4, 10, 12), and they are not measured again: put a copy" in measured


def test_a_loss_that_is_not_finite_is_a_row_and_ends_no_run(
    experiment, tmp_path, monkeypatch
):
    measure, calls = held_out.losses, []

    def poisoned(*arguments):
        calls.append(arguments)
        found = measure(*arguments)
        return found * math.nan if len(calls) == 5 else found  # step 2, the average

    monkeypatch.setattr(held_out, "losses", poisoned)
    assert run(experiment, tmp_path).status == "finished"
    text = files_of(experiment, tmp_path).measurements.read_text()
    assert text.count('"value": "nan"') == 1 + len(TENTHS)
    odd = [r for r in rows_of(experiment, tmp_path) if math.isnan(r.value)]
    assert {(r.step, r.weights) for r in odd} == {(2, "ema")}


def test_a_run_that_stops_keeps_its_rows(experiment, tmp_path, monkeypatch):
    batch, given = loop.TrainingRun._next_batch, []

    def poisoned(self, *arguments):
        given.append(batch(self, *arguments))
        if len(given) == 5:  # after dispatches to 1, 2, 4 and 6, one to 10, a mark
            factors = np.array([1, 1, 1, math.nan], np.float32)
            given[-1]["x"] *= factors[:, None, None, None, None]
        return given[-1]

    monkeypatch.setattr(loop.TrainingRun, "_next_batch", poisoned)
    record = run(experiment, tmp_path)
    assert (record.status, record.steps) == ("non_finite_loss", 10)
    assert sorted({r.step for r in rows_of(experiment, tmp_path)}) == [1, 2, 4]
