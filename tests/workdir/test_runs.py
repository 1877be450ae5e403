"""Weights of a run by name: what training kept, and what is made of it afterwards."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from stop_at import stop_at

from scaling_ldm import config
from scaling_ldm.records.errors import AverageError, CheckpointError, Preempted
from scaling_ldm.stages import plan, train
from scaling_ldm.training import mesh, train_step
from scaling_ldm.training.averages import Profile
from scaling_ldm.workdir import runs

STEPS = (6, 8)  # of the two runs, which have one size
AVERAGES = ("power_0.1", "ema", "power_0.05")


@pytest.fixture(scope="module")
def experiment(tiny):
    """Two runs with three averages and a decaying rate, on 2 x 4 devices.

    Every step of the first one is saved.
    """
    c = tiny.copy_and_resolve_references()
    c.plan.sizes = ((64, 1),)
    (row,) = plan.plan(config.resolve(c))
    c.plan.budgets_flops = tuple(float(n * row.flops_per_step) for n in STEPS)
    c.plan.minimum_steps = STEPS[0]
    c.optimizer.averages = AVERAGES
    c.optimizer.schedule, c.optimizer.decay_fraction = "wsd", 0.5
    c.optimizer.warmup_fraction, c.optimizer.warmup_samples = 0.0, 24
    c.train.checkpoints_per_run = c.train.keep_checkpoints = STEPS[0]
    c.train.log_every_steps = 1
    c.mesh.fsdp = 2
    return config.resolve(c)


planned = functools.cache(plan.plan)


def run(experiment, workdir, steps=STEPS):
    rows = [(i, r) for i, r in enumerate(planned(experiment)) if r.steps in steps]
    return train.run(experiment, workdir, rows, len(STEPS))


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    """(workdir, records) of both runs."""
    workdir = tmp_path_factory.mktemp("trained")
    return workdir, run(experiment, workdir)


@pytest.fixture(scope="module")
def load(experiment, trained):
    """load(weights, step, ...): a flat vector of a checkpoint's weights."""
    device_mesh = mesh.build(experiment.mesh, {})
    spec = planned(experiment)[0]

    @functools.cache
    def loaded(weights, step=STEPS[0], workdir=trained[0], **more):
        model = (
            runs.trained_model(experiment, workdir, spec, step, weights)
            if isinstance(weights, str | None)
            else runs.reconstructed(experiment, workdir, spec, weights, step, **more)
        )
        with jax.set_mesh(device_mesh):
            leaves = jax.tree.leaves(model.load(device_mesh))
        return model, np.concatenate([np.asarray(x).ravel() for x in leaves])

    return loaded


def explicit(load, sigma_rel, step):
    weights = Profile(sigma_rel=sigma_rel, step=step).weights()
    return weights @ np.stack([load("raw", k)[1] for k in range(1, step + 1)])


@pytest.mark.slow
def test_training_keeps_the_weighted_sums_of_its_weights(load):
    for name, sigma_rel in (("power_0.1", 0.1), ("power_0.05", 0.05)):
        for step in (1, 4, STEPS[0]):
            model, got = load(name, step)
            assert (model.weights, model.step) == (name, step)
            assert_allclose(got, explicit(load, sigma_rel, step), rtol=1e-4, atol=1e-6)
    assert load(None)[0].weights == AVERAGES[0]
    assert np.abs(load("power_0.1")[1] - load("power_0.05")[1]).max() > 1e-4


@pytest.mark.slow
def test_any_width_is_made_from_the_checkpoints(load):
    for sigma_rel, step in ((0.07, STEPS[0]), (0.15, 5)):
        model, got = load(sigma_rel, step)
        assert (model.weights, model.step) == (
            f"power_{sigma_rel:g} from {2 * STEPS[0]} averages",
            step,
        )
        want = explicit(load, sigma_rel, step)
        assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)
    kept, tracked = load(0.1)[1], load("power_0.1")[1]
    assert_allclose(kept, tracked, rtol=1e-4, atol=1e-6)


def test_weights_that_a_run_does_not_keep_are_refused(experiment, trained):
    spec, workdir = planned(experiment)[0], trained[0]
    with pytest.raises(config.ConfigError, match="known: raw, power_0.1, ema, power"):
        runs.trained_model(experiment, workdir, spec, weights="power_0.2")
    with pytest.raises(AverageError, match="would be off by"):
        runs.reconstructed(experiment, workdir, spec, 0.2, largest_error=1e-9)
    other = dataclasses.replace(experiment.optimizer, averages=("ema",))
    other = dataclasses.replace(experiment, optimizer=other)
    with pytest.raises(config.ConfigError, match="made from power-function averages"):
        runs.reconstructed(other, workdir, spec, 0.2)


@pytest.mark.parametrize("gone", ["the step", "all"])
def test_a_checkpoint_that_is_gone_says_what_to_do(load, trained, tmp_path, gone):
    workdir, record = trained
    shutil.copytree(workdir, tmp_path / "w")
    folder = tmp_path / "w" / "runs" / record[0].run_id
    steps = folder / "checkpoints"
    shutil.rmtree(steps if gone == "all" else steps / str(STEPS[0]))
    with pytest.raises(CheckpointError) as e:
        load("raw", workdir=tmp_path / "w")
    before = 0 if gone == "all" else STEPS[0] - 1
    remove = folder if gone == "all" else folder / "record.json"
    assert str(e.value) == (
        f"checkpoint {STEPS[0]} in {steps} is damaged (there is no such folder). Put a "
        f"copy of it back; or remove {remove}, and the same command with --stages "
        f"train trains this run again from step {before}"
    )


def test_the_end_is_measured_with_each_average(experiment, trained):
    record, row = trained[1][0], planned(experiment)[0]
    assert record.status == "finished"
    losses = {runs.last_loss(trained[0], row, w) for w in ("raw", *AVERAGES)}
    assert len(losses) == 4 and runs.last_loss(trained[0], row) in losses
    per_copy = row.params * 4
    # Parameters, three averages, two moments, gradients, and a few counters.
    assert 0 <= row.state_bytes - 7 * per_copy < 64


def test_rates_follow_the_schedule_and_runs_share_a_compiled_step(experiment, trained):
    for row in planned(experiment):
        path = runs.run_files(trained[0], row.run_id).metrics
        got = [json.loads(x)["learning_rate"] for x in path.read_text().splitlines()]
        s, fall = np.arange(row.steps), round(0.5 * row.steps)
        want = np.minimum(1, (s + 1) / 3)  # 24 samples, 8 in a batch
        want *= np.clip((row.steps - s) / fall, 0, 1)
        assert row.warmup_steps == 3
        assert_allclose(got, row.learning_rate * want, rtol=1e-5)
    device_mesh = mesh.build(experiment.mesh, {})
    compiled = train_step.compile_functions(
        train_step.compiled_part(experiment), 64, 1, device_mesh
    )
    assert compiled.step._cache_size() == 1


def test_averages_lie_as_their_parameters_do(experiment):
    device_mesh = mesh.build(experiment.mesh, {})
    assert device_mesh.shape == {"replica": 2, "fsdp": 2}
    compiled = train_step.compile_functions(experiment, 64, 1, device_mesh)
    with jax.set_mesh(device_mesh):
        state = compiled.init(jax.random.key(0))
    assert set(state.averages) == set(AVERAGES)
    sharded = 0
    for average in state.averages.values():
        for a, p in zip(
            jax.tree.leaves(average), jax.tree.leaves(state.params), strict=True
        ):
            assert a.sharding == p.sharding
            sharded += not a.sharding.is_fully_replicated
    assert sharded >= 3 * 4


@pytest.mark.slow  # by day, test_train_marks kills runs with several averages
def test_a_stopped_run_comes_to_the_same_bits(
    experiment, trained, load, tmp_path, monkeypatch
):
    stop_at(monkeypatch, 4)
    with pytest.raises(Preempted):
        run(experiment, tmp_path, STEPS[:1])
    monkeypatch.undo()
    (record,) = run(experiment, tmp_path, STEPS[:1])
    assert record.restarts == 1
    run_id = planned(experiment)[0].run_id
    one, two = (runs.run_files(w, run_id).measurements for w in (trained[0], tmp_path))
    assert one.read_bytes() == two.read_bytes()
    for name in ("raw", *AVERAGES):
        again = load(name, STEPS[0], tmp_path)[1]
        np.testing.assert_array_equal(again, load(name)[1])
