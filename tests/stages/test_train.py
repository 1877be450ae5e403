"""The training loop on eight devices: what it computes, what interrupts it."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib

import jax
import numpy as np
import pytest
from stop_at import stop_at

from scaling_ldm import config, records
from scaling_ldm import data as data_lib
from scaling_ldm.records import goodput as records_goodput
from scaling_ldm.records import table
from scaling_ldm.records.errors import CheckpointError, Held, Preempted
from scaling_ldm.stages import plan, train
from scaling_ldm.training import (
    checkpoint,
    held_out,
    loop,
    members,
    mesh,
    progress,
    signals,
    train_step,
)
from scaling_ldm.workdir import lock, runs

STEPS = (24, 36)  # of the two runs, which have one size
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def experiment(tiny):
    """Two runs of one size, at 24 and 36 steps, saved every 6 or 9."""
    c = tiny.copy_and_resolve_references()
    c.plan.sizes = ((16, 1),)
    (row,) = plan.plan(config.resolve(c))
    c.plan.budgets_flops = tuple(float(n * row.flops_per_step) for n in STEPS)
    c.train.checkpoints_per_run = 4
    c.train.log_every_steps = 1
    c.validation.samples = 48
    return config.resolve(c)


planned = functools.cache(plan.plan)


def run(experiment, workdir, steps=STEPS):
    rows = [(i, r) for i, r in enumerate(planned(experiment)) if r.steps in steps]
    return train.run(experiment, workdir, rows, len(STEPS))


def row_of(experiment, steps=STEPS[0]):
    return next(r for r in planned(experiment) if r.steps == steps)


def final(experiment, workdir, steps=STEPS[0]):
    """The last checkpoint's arrays and data position."""
    row = row_of(experiment, steps)
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        state = train_step.compile_functions(
            experiment, row.width, row.depth, device_mesh
        ).abstract_state
        folder = runs.run_files(workdir, row.run_id).checkpoints
        saved = checkpoint.Checkpoints(folder, row, 2)
        restored = saved.restore(state)
        saved.close()
    assert restored.step == steps
    return jax.tree.map(np.asarray, restored.state), restored.progress.data


def rows_of(workdir, experiment, steps=STEPS[0]):
    path = runs.run_files(workdir, row_of(experiment, steps).run_id).metrics
    return [json.loads(line) for line in path.read_text().splitlines()]


def ends_of(experiment, workdir, steps=STEPS[0]):
    """Metric and weights -> what was measured at the end of a run."""
    row = row_of(experiment, steps)
    path = runs.run_files(workdir, row.run_id).measurements
    rows = table.read_rows(path)[0] if path.exists() else []
    return {(r.metric, r.weights): r.value for r in rows if r.step == row.steps}


def assert_identical(experiment, workdir, reference):
    ends = ends_of(experiment, workdir)
    assert ends and ends == ends_of(experiment, reference)
    ours, theirs = final(experiment, workdir), final(experiment, reference)
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
    assert ours[1] == theirs[1]
    a, b = rows_of(workdir, experiment), rows_of(reference, experiment)
    assert [(r["step"], r["loss"]) for r in a] == [(r["step"], r["loss"]) for r in b]


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    return said


@pytest.fixture(scope="module")
def reference(experiment, tmp_path_factory):
    """(workdir, records, compilations in the second run) of both runs, undisturbed."""
    workdir = tmp_path_factory.mktemp("reference")
    counts = []
    compilations = []
    begin = progress.SweepProgress.begin

    def counted(event, *_, **__):
        if event == COMPILED:
            compilations.append(event)

    def noted(self, *args):
        counts.append(len(compilations))
        begin(self, *args)

    train_step.compile_functions.cache_clear()  # an earlier file may have filled it
    jax.monitoring.register_event_duration_secs_listener(counted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.SweepProgress, "begin", noted)
        done = run(experiment, workdir)
    jax.monitoring.unregister_event_duration_listener(counted)
    assert counts[1] > counts[0], "the listener hears nothing"
    return workdir, done, len(compilations) - counts[1]


def test_another_budget_of_a_size_compiles_nothing(reference):
    assert reference[2] == 0


def test_metrics_hold_every_cost(experiment, reference):
    workdir, done, _ = reference
    row, record = row_of(experiment), done[0]
    for r in rows_of(workdir, experiment):
        assert r["flops"] == r["step"] * row.flops_per_step
        assert r["hardware_flops"] == r["step"] * row.hardware_flops_per_step
        assert r["images"] == r["step"] * row.batch_size
        assert r["tokens"] == r["step"] * row.tokens // row.steps
        assert r["six_nd"] == 6 * row.params_without_embeddings * r["tokens"]
        assert r["flops_per_second"] > 0 or r["step"] == 1
        assert r["mfu"] is None
    assert (record.steps, record.flops) == (row.steps, row.planned_flops)
    assert record.mfu is None
    assert "no published peak" in record.mfu_reason


def test_smoothed_loss_is_the_average_of_logged_losses(experiment, reference):
    rows = rows_of(reference[0], experiment)
    assert [r["step"] for r in rows] == list(range(1, STEPS[0] + 1))
    smoothed = rows[0]["loss"]
    for r in rows[1:]:
        smoothed = 0.9 * smoothed + 0.1 * r["loss"]
        assert r["loss_smoothed"] == pytest.approx(smoothed, rel=1e-5)
    ends = ends_of(experiment, reference[0])
    assert ends["train_loss_smoothed", "raw"] == pytest.approx(smoothed, rel=1e-5)


def test_step_keeps_types_and_places_and_averages_new_weights(experiment):
    device_mesh = mesh.build(experiment.mesh, {})
    row = row_of(experiment)
    with jax.set_mesh(device_mesh):
        files = runs.run_files(pathlib.Path(), row.run_id)
        member = members.Member(experiment, row, files)
        training = loop.TrainingRun(
            [member],
            device_mesh,
            progress.SweepProgress(1, [], 1.0),
            signals.StopSignal(),
        )
        source, _ = data_lib.sources(experiment, pathlib.Path())
        data = data_lib.batches(
            source,
            batch_size=row.batch_size,
            rows=np.arange(row.batch_size),
            prefetch=0,
        )
        hyper = training._hyper() | mesh.put(
            device_mesh,
            {"peak": np.float32(1e-2), "warmup": np.float32(3)},
            mesh.REPLICATED,
        )
        uncond = {name: source.uncond[name] for name in training.names if name != "x"}
        uncond = mesh.put(device_mesh, uncond, mesh.REPLICATED)
        flags = [mesh.request_flags(device_mesh, r) for r in range(4)]
        state = member._first_state(training.compiled, device_mesh)
        ema = jax.tree.map(np.asarray, state.averages["ema"])
        for done in range(5):
            state, metrics = training.compiled.step(
                state, training._next_batch(data, 1), uncond, hyper, flags[done % 4]
            )
            for leaf, like in zip(
                jax.tree.leaves(state),
                jax.tree.leaves(training.compiled.abstract_state),
                strict=True,
            ):
                assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
                assert leaf.sharding == like.sharding
            decay = min(experiment.optimizer.ema_decay, (2 + done) / (11 + done))
            ema = jax.tree.map(
                lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p),
                ema,
                state.params,
            )
            for a, b in zip(
                jax.tree.leaves(ema),
                jax.tree.leaves(state.averages["ema"]),
                strict=True,
            ):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
            rate = 1e-2 * min(1, (done + 1) / 3)
            assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-6)
            assert int(metrics["request"]) == done % 4
        assert training.compiled.step._cache_size() == 1


def test_metrics_are_read_after_the_next_dispatch(experiment, tmp_path, monkeypatch):
    events = []
    batch, look = loop.TrainingRun._next_batch, loop.TrainingRun._read_metrics

    def dispatched(self, *args):
        events.append("dispatch")
        return batch(self, *args)

    def looked(self, step, *args):
        events.append(step)
        return look(self, step, *args)

    monkeypatch.setattr(loop.TrainingRun, "_next_batch", dispatched)
    monkeypatch.setattr(loop.TrainingRun, "_read_metrics", looked)
    run(experiment, tmp_path, STEPS[:1])
    # Step n is looked at when n + 1 is under way; at a save (every 6), n as well.
    expected = []
    for step in range(1, STEPS[0] + 1):
        expected.append("dispatch")
        if step % 6 != 1:
            expected.append(step - 1)
        if step % 6 == 0:
            expected.append(step)
    assert events == expected


def test_a_stop_is_saved_and_continues_to_the_same_bits(
    experiment, reference, tmp_path, monkeypatch, lines
):
    for dispatch in (4, 7):
        stop_at(monkeypatch, dispatch)
        with pytest.raises(Preempted, match="is saved at step"):
            run(experiment, tmp_path, STEPS[:1])
    monkeypatch.undo()
    (record,) = run(experiment, tmp_path, STEPS[:1])
    assert record.restarts == 2
    assert_identical(experiment, tmp_path, reference[0])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(
    experiment, tmp_path, lines
):
    files = runs.run_files(tmp_path, row_of(experiment).run_id)
    (files.checkpoints / "damaged-6").mkdir(parents=True)
    with pytest.raises(CheckpointError) as e:
        run(experiment, tmp_path, STEPS[:1])
    assert "set aside as damaged: damaged-6. Put copies back" in str(e.value)
    assert f"or remove {files.folder}, and the same command" in str(e.value)
    assert not files.metrics.exists()


@pytest.fixture(scope="module")
def marked(experiment):
    """The experiment with checkpoints at chosen FLOPs; it begins at 1, ends at 24."""
    each = row_of(experiment).flops_per_step
    flops = tuple(each * step for step in (0.4, 2.2, 9.0, 15.6, 25.0))
    cfg = dataclasses.replace(
        experiment.train, keep_checkpoints=1, checkpoint_flops=flops
    )
    return dataclasses.replace(experiment, train=cfg)


def test_chosen_flops_are_the_nearest_steps_of_a_run(experiment, marked):
    assert members.checkpoint_steps(marked, row_of(experiment)) == {2, 9, 16}


@pytest.mark.slow  # by day, one at chosen FLOPs stays among those of the clock
def test_checkpoints_at_chosen_flops_stay_and_change_nothing(
    experiment, marked, reference, tmp_path, monkeypatch, lines
):
    row = row_of(experiment)
    stop_at(monkeypatch, 11)
    with pytest.raises(Preempted, match="is saved at step 12"):
        run(marked, tmp_path, STEPS[:1])
    monkeypatch.undo()
    assert runs.checkpoint_steps(tmp_path, row) == [2, 9, 12]
    run(marked, tmp_path, STEPS[:1])
    assert runs.checkpoint_steps(tmp_path, row) == [2, 9, 16, 24]
    assert_identical(experiment, tmp_path, reference[0])
    assert runs.checkpoint_steps(tmp_path, row) == [
        2,
        9,
        16,
        24,
    ]  # which opened the folder


class SaveAt(signals.StopSignal):
    """Signals to save that arrive before these dispatches of the process."""

    def __init__(self, dispatches):
        super().__init__()
        self.dispatches, self.at = dispatches, 0

    def request(self):
        self.at += 1
        self.save_asked = self.at in self.dispatches
        return super().request()


@pytest.fixture
def saves(monkeypatch):
    """The steps that are saved, in order."""
    steps, save = [], checkpoint.Checkpoints.save

    def noted(self, step, *args):
        steps.append(step)
        save(self, step, *args)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", noted)
    return steps


@pytest.mark.parametrize(
    ("each", "asked", "saved", "told"),
    [
        (1, (3, 5, 10), [4, 6, 11], [4, 6, 11]),  # 6, 12, 18 and 24 are marks
        # Dispatches end at 2, 4, 6 and so on.
        pytest.param(2, (1, 4), [4, 6, 10], [4, 10], marks=pytest.mark.slow),
    ],
)
def test_a_save_on_request_is_one_dispatch_later_and_changes_nothing(
    experiment, reference, tmp_path, monkeypatch, lines, saves, each, asked, saved, told
):
    cfg = dataclasses.replace(experiment.train, steps_per_dispatch=each)
    several = dataclasses.replace(experiment, train=cfg)
    whole = reference[0]
    if each > 1:
        whole = tmp_path / "whole"
        run(several, whole, STEPS[:1])
        saves.clear()
    look = loop.TrainingRun._read_metrics
    with monkeypatch.context() as patch:
        patch.setattr(signals, "current", lambda: SaveAt(asked))
        patch.setattr(loop.TrainingRun, "_read_metrics", dies_at(look, 12))
        with contextlib.suppress(KeyboardInterrupt):
            run(several, tmp_path / "cut", STEPS[:1])
            raise AssertionError("it was to die")
    assert saves == saved
    name = row_of(experiment).run_id
    said = [f"{name} is saved at step {step} and goes on" for step in told]
    assert [line for line in lines if line.endswith("goes on")] == said
    run(several, tmp_path / "cut", STEPS[:1])
    assert f"{name} continues from step {saved[-1]} of 24" in lines
    assert_identical(several, tmp_path / "cut", whole)
    killed, after = attempts_of(tmp_path / "cut", row_of(experiment))
    assert (killed.ended, after.ended) == ("", "finished")
    assert (after.number, after.first_step, after.last_step) == (1, saved[-1], 24)
    found = records_goodput.of_run([killed, after])
    # The metrics of the dispatch that ends at step 12 were never read.
    assert found.lost_steps == 12 - each - saved[-1]
    pace = killed.parts["STEP"] / killed.last_step
    lost = found.seconds["WASTED_PROGRESS_FROM_DISRUPTION"]
    assert lost == pytest.approx(pace * found.lost_steps)
    kept = killed.parts["STEP"] + after.parts["STEP"]
    assert found.seconds["STEP"] + lost == pytest.approx(kept)


def attempts_of(workdir, row):
    """The attempts of a run, each with as many seconds as its parts have."""
    found = records.read_jsonl(runs.run_files(workdir, row.run_id).attempts)
    for attempt in found:
        assert sum(attempt.parts.values()) == pytest.approx(attempt.seconds)
        assert min(attempt.parts.values()) >= 0
    return found


@pytest.mark.slow
def test_the_clock_saves_between_marks_and_changes_nothing(
    experiment, reference, tmp_path, monkeypatch, lines, saves
):
    """At every dispatch of process 0 it is time to save."""
    row = row_of(experiment)
    hasty = dataclasses.replace(
        experiment,
        train=dataclasses.replace(
            experiment.train,
            checkpoint_minutes=1e-9,
            checkpoint_flops=(9.0 * row.flops_per_step,),
        ),
    )
    stop_at(monkeypatch, 16)
    with pytest.raises(Preempted, match="is saved at step 16"):
        run(hasty, tmp_path, STEPS[:1])
    monkeypatch.undo()
    # A request is read when the next dispatch is under way, and at a mark at once.
    assert saves == [2, 4, 6, 8, 9, 11, 12, 14, 16]
    assert not [line for line in lines if line.endswith("goes on")]
    assert runs.checkpoint_steps(tmp_path, row) == [9, 12, 14, 16]
    calm = dataclasses.replace(hasty.train, checkpoint_minutes=0.0)
    run(dataclasses.replace(hasty, train=calm), tmp_path, STEPS[:1])
    assert runs.checkpoint_steps(tmp_path, row) == [9, 18, 24]
    assert_identical(experiment, tmp_path, reference[0])
    stopped, after = attempts_of(tmp_path, row)
    assert (stopped.ended, after.ended) == ("stopped", "finished")
    assert (stopped.first_step, stopped.last_step, after.first_step) == (0, 16, 16)
    assert stopped.parts["UNPRODUCTIVE_CHECKPOINT_SAVE_TIME"] > 0
    assert after.parts["UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME"] > 0
    assert after.parts["EVAL_STEP"] > 0
    assert records_goodput.of_run([stopped, after]).lost_steps == 0


@pytest.mark.slow  # by day, test_train_marks kills runs of several steps in a dispatch
def test_several_steps_in_a_dispatch_resume_to_the_same_bits(
    experiment, tmp_path, monkeypatch
):
    several = dataclasses.replace(
        experiment, train=dataclasses.replace(experiment.train, steps_per_dispatch=4)
    )
    run(several, tmp_path / "whole", STEPS[:1])
    look = loop.TrainingRun._read_metrics
    for at in (9, 15, 23):
        with monkeypatch.context() as patch:
            patch.setattr(loop.TrainingRun, "_read_metrics", dies_at(look, at))
            with contextlib.suppress(KeyboardInterrupt):
                run(several, tmp_path / "cut", STEPS[:1])
                raise AssertionError("it was to die")
    run(several, tmp_path / "cut", STEPS[:1])
    assert_identical(several, tmp_path / "cut", tmp_path / "whole")


def dies_at(look, at):
    """`_read_metrics` of a process that is killed when a step is done."""

    def read(self, step, *args):
        if step >= at:
            raise KeyboardInterrupt
        return look(self, step, *args)

    return read


@pytest.mark.parametrize(
    "path",
    [
        ((4, 1), (2, 2)),  # fewer devices and other shardings
        pytest.param(((4, 1), (2, 1), (2, 2)), marks=pytest.mark.slow),
        pytest.param(((4, 1), (2, 1), (1, 1)), marks=pytest.mark.slow),
        pytest.param(((2, 1), (2, 2)), marks=pytest.mark.slow),
    ],
)
def test_resume_on_other_devices(experiment, reference, tmp_path, monkeypatch, path):
    for i, (devices, fsdp) in enumerate(path):
        build = functools.partial(mesh.build, use=jax.devices()[:devices])
        monkeypatch.setattr(mesh, "build", build)
        if i + 1 < len(path):
            stop_at(monkeypatch, 7)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(mesh, "build", build)
        cfg = dataclasses.replace(experiment.mesh, fsdp=fsdp)
        moved = dataclasses.replace(experiment, mesh=cfg)
        if i + 1 < len(path):
            with pytest.raises(Preempted):
                run(moved, tmp_path, STEPS[:1])
    (record,) = run(moved, tmp_path, STEPS[:1])
    assert (record.restarts, record.devices) == (len(path) - 1, path[-1][0])
    assert ends_of(experiment, tmp_path) == pytest.approx(
        ends_of(experiment, reference[0]), rel=1e-5
    )


def test_validation_loss_depends_on_the_weights_alone(experiment, reference):
    """48 samples, and 40 with a filled last batch; 1, 2 and 4 devices."""
    row = row_of(experiment)
    weights, _ = final(experiment, reference[0])
    _, source = data_lib.sources(experiment, pathlib.Path())
    for samples, cases in (
        (48, ((4, 16), (2, 24), (1, 8))),
        (40, ((4, 8), (4, 16))),
    ):
        losses = []
        for devices, batch_size in cases:
            cfg = dataclasses.replace(
                experiment.validation, samples=samples, batch_size=batch_size
            )
            other = dataclasses.replace(experiment, validation=cfg)
            one = mesh.build(other.mesh, {}, use=jax.devices()[:devices])
            with jax.set_mesh(one):
                compiled = train_step.compile_functions(
                    other, row.width, row.depth, one
                )
                names = ("x", *compiled.objective.conditioning)
                batches = held_out.held_out_batches(other, one, source, names)
                params = mesh.put(one, weights.params, mesh.REPLICATED)
                losses.append(held_out.losses(compiled, params, batches).mean())
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
        if samples == 48:
            recorded = ends_of(experiment, reference[0])["loss", "raw"]
            assert losses[0] == pytest.approx(recorded, rel=1e-6)


def poison(monkeypatch, experiment, steps, at):
    """NaN pictures in batch `at` of the run of `steps` steps."""
    batch = loop.TrainingRun._next_batch
    counts = {}

    def poisoned(self, batches, chunk):
        given = batch(self, batches, chunk)
        count = counts[self.spec.steps] = counts.get(self.spec.steps, 0) + 1
        if (self.spec.steps, count) == (steps, at):
            given["x"] = given["x"] * np.float32(math.nan)
        return given

    monkeypatch.setattr(loop.TrainingRun, "_next_batch", poisoned)


def test_a_non_finite_loss_ends_its_run_alone(
    experiment, reference, tmp_path, monkeypatch, lines
):
    poison(monkeypatch, experiment, STEPS[0], at=12)  # 12 is a step that is saved
    first, second = run(experiment, tmp_path)
    assert first.status == "non_finite_loss"
    assert first.steps == 12
    assert "at step 12" in first.detail
    assert not ends_of(experiment, tmp_path)
    assert second.status == "finished"
    assert ends_of(experiment, tmp_path, STEPS[1]) == ends_of(
        experiment, reference[0], STEPS[1]
    )
    folder = runs.run_files(tmp_path, row_of(experiment).run_id).checkpoints
    assert sorted(p.name for p in folder.iterdir()) == ["6"]
    assert any("stopped" in line and "step 12" in line for line in lines)
    written = records.loads((folder.parent / "record.json").read_text())
    assert written.status == first.status
    lines.clear()
    again, _ = run(experiment, tmp_path)
    assert again.status == "non_finite_loss"
    assert any("is skipped: non_finite_loss" in line for line in lines)


def test_of_shared_rows_those_of_another_command_are_left_out(experiment, tmp_path):
    rows = [*enumerate(planned(experiment))]
    first, second = (spec for _, spec in rows)
    folder = runs.run_files(tmp_path, second.run_id).folder
    with lock.holding([folder / lock.NAME]):
        with pytest.raises(Held):
            train.run(experiment, tmp_path, rows, len(rows))
        (record,) = train.run(experiment, tmp_path, rows[::-1], len(rows), share=True)
        assert record.run_id == first.run_id
        assert runs.read_record(tmp_path, second.run_id) is None
    assert not list(tmp_path.rglob(lock.NAME))
    # The other command has ended without a record of it.
    found = train.run(experiment, tmp_path, rows, len(rows), share=True)
    assert [r.run_id for r in found] == [first.run_id, second.run_id]


def data_files(folder):
    """Files of array data; all are damaged, as orbax leaves parts of some unused."""
    return [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"]


def truncate(folder):
    for path in data_files(folder):
        os.truncate(path, path.stat().st_size // 2)


def flip(folder):
    for path in data_files(folder):
        content = bytearray(path.read_bytes())
        for i in range(0, len(content), 97):
            content[i] ^= 0x10
        path.write_bytes(content)


def forge(folder):
    """Another data position: valid JSON that orbax cannot tell from the true one."""
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())

    def bump(value):
        if isinstance(value, dict):
            return {k: bump(v) for k, v in value.items()}
        return value + 1 if type(value) is int else value

    meta["progress"]["data"] = bump(meta["progress"]["data"])
    path.write_text(json.dumps(meta))


def unfinish(folder):
    folder.rename(folder.with_name(f"{folder.name}.orbax-checkpoint-tmp"))


@pytest.mark.parametrize(
    "damage",
    [
        unfinish,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (flip, truncate, forge)),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    experiment, reference, tmp_path, monkeypatch, lines, damage
):
    stop_at(monkeypatch, 15)
    with pytest.raises(Preempted):
        run(experiment, tmp_path, STEPS[:1])
    monkeypatch.undo()
    monkeypatch.setattr(progress, "say", lines.append)
    folder = runs.run_files(tmp_path, row_of(experiment).run_id).checkpoints
    steps = sorted(int(p.name) for p in folder.iterdir())
    damage(folder / str(steps[-1]))
    # The same steps are saved again, over the place of the damaged one.
    stop_at(monkeypatch, steps[-1] - steps[-2] - 1)
    with pytest.raises(Preempted):
        run(experiment, tmp_path, STEPS[:1])
    word = "unfinished" if damage is unfinish else "damaged"
    assert any(f"checkpoint {steps[-1]} " in x and word in x for x in lines), lines
    assert any(f"continues from step {steps[-2]} of" in x for x in lines), lines
    assert str(steps[-1]) in {p.name for p in folder.iterdir()}
    monkeypatch.undo()
    run(experiment, tmp_path, STEPS[:1])
    assert_identical(experiment, tmp_path, reference[0])


def test_a_workdir_is_tied_to_the_records_it_read(tmp_path):
    class Source:
        identity = {"source": "memory", "set": "a"}

    train._check_data_identity(tmp_path, Source())
    train._check_data_identity(tmp_path, Source())
    train._check_data_identity(
        tmp_path, object()
    )  # painted icons are told by the recipe
    Source.identity = {"source": "memory", "set": "b"}
    with pytest.raises(config.ConfigError, match="read other records than these"):
        train._check_data_identity(tmp_path, Source())
