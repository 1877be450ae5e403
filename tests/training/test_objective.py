"""Objectives as a seam: their state, their metrics, their costs, what they are held to.

The toy here has a teacher, a counter and a metric.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stop_at import stop_at

from scaling_ldm import config, data, flops
from scaling_ldm.models import denoisers
from scaling_ldm.records.errors import Preempted
from scaling_ldm.stages import plan, train
from scaling_ldm.training import (
    costs,
    mesh,
    objective,
    objective_checks,
    progress,
    train_step,
)
from scaling_ldm.workdir import runs

ROOT = pathlib.Path(__file__).parents[2]
TEACHER = """
import dataclasses
import jax
import jax.numpy as jnp
from scaling_ldm.models import from_config
from scaling_ldm.training import objective


@dataclasses.dataclass(frozen=True)
class Weights:  # a file may define what it likes
    agreement: float = 0.25


def build(config, width, depth, unroll):
    base = objective.OBJECTIVES["denoising"](config, width, depth, unroll)
    denoiser = from_config.denoiser(config, width, depth, unroll)

    def init_aux(key, params):
        return {"teacher": params, "steps": jnp.int32(0)}

    def loss(params, averages, aux, batch, uncond, step, key):
        value, _, _ = base.loss(params, averages, {}, batch, uncond, step, key)
        cond = {name: batch[name] for name in denoiser.conditioning}
        t = jnp.full_like(batch["x"][:, 0, 0, 0], 0.5)
        taught = denoiser.apply(aux["teacher"], batch["x"], t, cond)
        teacher = jax.tree.map(
            lambda a, e: 0.5 * a + 0.5 * e, aux["teacher"], averages["ema"]
        )
        metrics = {"taught": jnp.mean(taught**2) + step}
        value = value + Weights().agreement * jnp.mean(taught**2)
        return value, {"teacher": teacher, "steps": aux["steps"] + 1}, metrics

    return dataclasses.replace(
        base, init_aux=init_aux, loss=loss, metrics=("taught",)
    )
"""


@pytest.fixture(scope="module")
def given(tiny, tmp_path_factory):
    """A run of 8 steps of the toy, with parameters in two parts on each replica."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "teacher.py").write_text(TEACHER)
    c = tiny.copy_and_resolve_references()
    c.model.head_dim = 16
    c.plan.sizes, c.plan.steps, c.plan.budgets_flops = ((64, 1),), 8, ()
    c.plan.minimum_steps = 2
    c.mesh.fsdp = 2
    c.train.log_every_steps = 1
    c.objective.kind, c.objective.folder = "teacher.py:build", str(folder)
    return c


@pytest.fixture(scope="module")
def experiment(given):
    return config.resolve(given)


@pytest.fixture(scope="module")
def plain(given):
    c = given.copy_and_resolve_references()
    c.objective.kind = "auto"
    return config.resolve(c)


def functions(experiment):
    return train_step.train_functions(
        train_step.compiled_part(experiment), 64, 1, unroll=False
    )


def test_a_teacher_costs_its_forward_pass_and_its_memory(experiment, plain):
    ours, theirs = (
        train_step.cost(e, functions(e), batch_size=8) for e in (experiment, plain)
    )
    learnt = functions(plain).objective
    batch, uncond = objective_checks.abstract_inputs(plain, learnt, 8)
    params = jax.eval_shape(lambda: learnt.init(jax.random.key(0)))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def forward(params, batch, uncond, key):
        return learnt.loss(params, {}, {}, batch, uncond, jnp.int32(0), key)[0]

    one = flops.count(forward, params, batch, uncond, key)
    assert one.model > 0
    assert ours.flops.model == theirs.flops.model + one.model
    count, _ = denoisers.count_params(learnt)
    assert ours.state_bytes == theirs.state_bytes + 4 * count + 4


def test_a_state_without_aux_has_the_tree_of_before(plain, experiment):
    def parts(e):
        leaves = jax.tree_util.tree_leaves_with_path(
            train_step.abstract_state(functions(e))
        )
        return list(dict.fromkeys(str(path[0]) for path, _ in leaves))

    before = [".params", ".ema", ".opt", ".step", ".smoothed_loss"]
    assert parts(plain) == before
    assert parts(experiment) == [*before, ".aux"]


def test_the_state_is_sharded_like_parameters(experiment):
    device_mesh = mesh.build(experiment.mesh, {})
    state = train_step.compile_functions(experiment, 64, 1, device_mesh).abstract_state
    same = jax.tree.map(
        lambda a, p: a.sharding == p.sharding, state.aux["teacher"], state.params
    )
    assert all(jax.tree.leaves(same))
    kernel = state.aux["teacher"]["blocks"]["mlp_up"]["kernel"]
    assert "fsdp" in jax.tree.leaves(tuple(kernel.sharding.spec))


def rows_of(workdir, spec):
    path = runs.run_files(workdir, spec.run_id).metrics
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_with_a_teacher_logs_its_metrics_and_continues_to_the_same_bits(
    experiment, tmp_path, monkeypatch
):
    specs = list(enumerate(plan.plan(experiment)))
    (spec,) = (spec for _, spec in specs)
    (whole,) = train.run(experiment, tmp_path / "whole", specs, 1)
    stop_at(monkeypatch, 5)
    with pytest.raises(Preempted):
        train.run(experiment, tmp_path / "stopped", specs, 1)
    monkeypatch.undo()
    (again,) = train.run(experiment, tmp_path / "stopped", specs, 1)
    assert (whole.status, again.restarts) == ("finished", 1)
    losses = {runs.last_loss(tmp_path / name, spec) for name in ("whole", "stopped")}
    assert len(losses) == 1
    one, two = (rows_of(tmp_path / name, spec) for name in ("whole", "stopped"))
    assert [r["step"] for r in one] == list(range(1, 9))
    for name in ("loss", "taught"):
        assert [r[name] for r in one] == [r[name] for r in two]
    # The step is that of the state, and the teacher's answer is small.
    assert [int(r["taught"]) for r in one] == list(range(8))
    folder = runs.run_files(tmp_path / "whole", spec.run_id).checkpoints / "8"
    held = json.loads((folder / "state" / "_METADATA").read_text())["tree_metadata"]
    names = {
        json.loads(
            key.replace("'", '"').replace("(", "[").replace(")", "]").replace(",]", "]")
        )[0]
        for key in held
    }
    assert names == {"params", "ema", "opt", "step", "smoothed_loss", "aux"}


@pytest.mark.slow  # its plan is made by day, and a teacher of these tests trains
def test_the_example_trains(tmp_path):
    """experiments/tiny_teacher.py, as docs/own_objectives.md has it, to its end."""
    c = config.load(ROOT / "experiments" / "tiny_teacher.py")
    c.plan.steps, c.plan.budgets_flops, c.train.log_every_steps = 64, (), 8
    e = config.resolve(c)
    c.objective.kind = "auto"
    (spec,), (other,) = map(plan.plan, (e, config.resolve(c)))
    assert spec.flops_per_step == pytest.approx(4 / 3 * other.flops_per_step, rel=0.03)
    (record,) = train.run(e, tmp_path, [(0, spec)], 1)
    assert (record.status, record.steps) == ("finished", 64)
    first, *_, last = rows_of(tmp_path, spec)
    assert 0 < last["error"] < first["error"]
    whole = last["error"] + 0.5 * last["agreement"]
    assert last["loss"] == pytest.approx(whole, rel=1e-5)


def base(tiny):
    e = config.resolve(tiny)
    return e, objective.build(e, 16, 2, unroll=False)


class Source:
    """A source of a user's own: pictures, and the depth of each."""

    shape, classes, uncond = (8, 8, 3), 0, {}

    def rows(self, positions):
        n = len(positions)
        return {"x": np.zeros((n, 8, 8, 3), "f"), "depth": np.zeros((n, 8, 8, 1), "f")}

    def captions(self, positions):
        return [""] * len(positions)


def test_a_source_without_what_the_objective_reads_is_refused_by_name(
    tiny, tmp_path, monkeypatch
):
    e = config.resolve(tiny)
    specs = list(enumerate(plan.plan(e)))
    monkeypatch.setattr(data, "sources", lambda *_: (Source(), Source()))
    monkeypatch.setattr(
        train_step, "compile_functions", lambda *_: pytest.fail("it was compiled")
    )
    with pytest.raises(config.ConfigError) as error:
        train.run(e, tmp_path, specs, 1)
    assert str(error.value) == (
        "the objective denoising reads text, mask of in_context's batch, which the "
        "source does not have; it has depth, x"
    )


def test_what_no_source_here_has_is_declared_by_the_objective(tiny):
    e, learnt = base(tiny)
    reads = (*learnt.conditioning, "depth")
    lacking = dataclasses.replace(learnt, conditioning=reads)
    with pytest.raises(config.ConfigError, match="reads depth of in_context's batch"):
        objective_checks.abstract_inputs(e, lacking, 2)
    shape = jax.ShapeDtypeStruct((8, 8, 1), np.float32)
    stated = dataclasses.replace(lacking, arrays={"depth": shape})
    batch, uncond = objective_checks.abstract_inputs(e, stated, 2)
    assert batch["depth"].shape == (2, 8, 8, 1)
    assert set(uncond) == {"text", "mask"}


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (lambda v, aux: (v, {"n": aux["n"] * 1.5}, {"m": v}), "another aux"),
        (lambda v, aux: (v, {}, {"m": v}), "another aux than init_aux: "),
        (lambda v, aux: (v, aux, {}), r"measures \[\], its field `metrics` has \['m'"),
        (lambda v, aux: (v, aux, {"m": jnp.zeros(2)}), r"no scalars: \['m'\]"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused(
    tiny, returned, why, monkeypatch
):
    e, learnt = base(tiny)

    def loss(params, averages, aux, batch, uncond, step, key):
        return returned(jnp.float32(1), aux)

    own = dataclasses.replace(
        learnt,
        init_aux=lambda key, params: {"n": jnp.int32(2)},
        loss=loss,
        metrics=("m",),
    )
    monkeypatch.setitem(objective.OBJECTIVES, "denoising", lambda *_: own)
    made = train_step.train_functions.__wrapped__(e, 16, 2, unroll=False)
    batch, uncond = objective_checks.abstract_inputs(e, own, 2)
    hyper = {"key": jax.random.key(0), "peak": 1.0, "warmup": 1.0}
    with pytest.raises(config.ConfigError, match=why):
        jax.eval_shape(made.step, train_step.abstract_state(made), batch, uncond, hyper)


def test_a_metric_may_not_have_the_name_of_another(tiny):
    e, learnt = base(tiny)
    for name in ("loss", "seconds"):
        own = dataclasses.replace(learnt, metrics=(name,))
        with pytest.raises(config.ConfigError, match=f"name of another: ..{name}"):
            objective_checks.check_loss(
                e, own, {}, {}, {name: jnp.float32(0)}, train_step.METRICS
            )


def test_what_a_log_holds_is_known():
    """A metric of one of these names would replace another number of the line."""
    source = pathlib.Path(costs.__file__).read_text()
    held = source.split("return {")[1].split("}")[0]
    names = {line.split('"')[1] for line in held.splitlines() if '"' in line}
    assert names <= set(objective_checks.LOGGED)
    assert {"step", "stop", "version"} <= set(objective_checks.LOGGED)


def test_a_number_that_is_not_finite_is_a_text_in_the_log(tmp_path):
    log = progress.MetricLog(runs.run_files(tmp_path, "a"), 0, tensorboard=False)
    log.write(1, {"mine": float("nan"), "mfu": None})
    log.close()
    (line,) = runs.run_files(tmp_path, "a").metrics.read_text().splitlines()
    assert json.loads(line)["mine"] == "nan"
