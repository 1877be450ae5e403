"""A step in passes over parts of its batch is the step of the whole batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import config
from scaling_ldm.diffusion.losses import denoise
from scaling_ldm.flops.collectives import collectives
from scaling_ldm.stages import train
from scaling_ldm.training import (
    accumulation,
    mesh,
    objective,
    objective_checks,
    optimizer,
    signals,
    train_step,
)

ROWS, SIZE = 16, (16, 1)


def experiment_of(tiny, **fields):
    c = tiny.copy_and_resolve_references()
    c.train.batch_size, c.train.optimize_code = ROWS, False
    c.optimizer.eps = 1e-3  # Adam would make much of rounding where a gradient is 0
    for where, value in fields.items():
        section, name = where.split("__")
        setattr(c[section], name, value)
    return config.resolve(c)


def state_of(made):
    """A state with other numbers in every parameter; nothing is compiled for it."""
    rng = np.random.default_rng(1)
    shapes = made.abstract_state

    def drawn(leaf):
        value = rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)
        return jax.device_put(value, leaf.sharding)

    def zero(leaf):
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    state = jax.tree.map(zero, shapes)
    return dataclasses.replace(
        state,
        params=jax.tree.map(drawn, shapes.params),
        aux=jax.tree.map(drawn, shapes.aux),
    )


def inputs_of(e, made, device_mesh):
    """Batch, empty condition, numbers of the schedule with a key, and a request."""
    rng = np.random.default_rng(0)

    def filled(shape):
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return rng.uniform(-1, 1, shape.shape).astype(shape.dtype)
        return rng.integers(0, 2, shape.shape).astype(shape.dtype)

    batch, none = objective_checks.abstract_inputs(e, made.objective, ROWS)
    numbers = optimizer.schedule_numbers(e.optimizer, 1e-2, 1, 10)
    everywhere = mesh.named_sharding(device_mesh, mesh.REPLICATED)
    key = jax.device_put(jax.random.key(0), everywhere)
    return (
        mesh.put(device_mesh, jax.tree.map(filled, batch)),
        mesh.put(device_mesh, jax.tree.map(filled, none), mesh.REPLICATED),
        mesh.put(device_mesh, numbers, mesh.REPLICATED) | {"key": key},
        mesh.request_flags(device_mesh, signals.GO_ON),
    )


def stepped(e, device_mesh=None, size=SIZE):
    """The state and the metrics of a step, as numpy arrays."""
    device_mesh = device_mesh or mesh.build(e.mesh, {}, use=jax.devices()[:1])
    with jax.set_mesh(device_mesh):
        made = train_step.compile_functions(e, *size, device_mesh)
        found = made.step(state_of(made), *inputs_of(e, made, device_mesh))
    return jax.tree.map(np.asarray, found)


def close(found, wanted):
    """The same metrics, gradients and parameters to 1e-6 of the largest.

    Each leaf also to 1e-4 of its own largest value.
    After the first step the first moment is the clipped gradient, times 1 - b1.
    """

    def leaf(a, b):
        assert a.dtype == b.dtype
        own = 1e-4 * np.abs(b).max() + 1e-9 * largest
        assert_allclose(a, b, rtol=0, atol=min(1e-6 * largest, own))

    (state, metrics), (before, measured) = found, wanted
    assert measured["gradient_norm"] > 0.02
    for some, others in (
        (metrics, measured),
        (state.params, before.params),
        (state.opt[1].mu, before.opt[1].mu),
        (state.aux, before.aux),
    ):
        largest = max([np.abs(b).max() for b in jax.tree.leaves(others)] or [0.0])
        jax.tree.map(leaf, some, others)


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 4])
def test_passes_give_the_step_of_the_whole_batch(tiny, part):
    wanted = stepped(experiment_of(tiny))
    close(stepped(experiment_of(tiny, train__microbatch=part)), wanted)


@pytest.mark.parametrize("fsdp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_passes_on_a_mesh(tiny, fsdp, monkeypatch):
    monkeypatch.setattr(mesh, "MIN_SHARDED_SIZE", 64)
    wanted = stepped(experiment_of(tiny))
    e = experiment_of(tiny, train__microbatch=8, mesh__fsdp=fsdp)
    close(stepped(e, mesh.build(e.mesh, {})), wanted)


def autoencoder_of(tiny, **fields):
    c = tiny.copy_and_resolve_references()
    c.model = config.default().model  # which has no patches, heads or texts
    c.model.architecture, c.model.compute_dtype = "autoencoder_kl", "float32"
    c.model.groups, c.model.latent_channels = 4, 2
    c.plan.sizes = ((8, 1),)
    return experiment_of(c, **fields)


@pytest.mark.slow
def test_an_autoencoder_on_a_mesh_and_in_passes(tiny, monkeypatch):
    monkeypatch.setattr(mesh, "MIN_SHARDED_SIZE", 64)
    wanted = stepped(autoencoder_of(tiny), size=(8, 1))
    e = autoencoder_of(tiny, train__microbatch=8, mesh__fsdp=2)
    close(stepped(e, mesh.build(e.mesh, {}), size=(8, 1)), wanted)


def test_each_pass_has_a_part_of_the_rows_of_each_device():
    """And of what was drawn for the whole batch: pass i, device d, rows in order."""
    device_mesh = mesh.build(config.MeshConfig(fsdp=2), {})
    rows = np.arange(ROWS, dtype=np.float32)
    batch = {"x": np.broadcast_to(rows[:, None, None, None], (ROWS, 2, 2, 1))}
    key = jax.random.key(0)
    with jax.set_mesh(device_mesh):
        given = mesh.put(device_mesh, batch)
        compiled = (
            jax.jit(
                lambda batch: accumulation.split((batch, denoise.draw(batch, key)), 8)
            )
            .lower(given)
            .compile()
        )
        parts, drawn = jax.tree.map(np.asarray, compiled(given))
        with pytest.raises(ValueError, match="passes of 2 rows over 16 rows on 4 dev"):
            jax.eval_shape(lambda a: accumulation.split(a, 2), given)
    order = np.array([[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]])
    assert_array_equal(parts["x"][..., 0, 0, 0], order)
    whole = denoise.draw({"x": jnp.asarray(batch["x"])}, key)
    for name in ("noise", "time", "drop"):
        assert_array_equal(drawn[name], np.asarray(whole[name])[order])
    assert collectives(compiled.as_text()) == []


def test_rows_of_an_own_draw_are_those_of_the_batch():
    """What a user's function draws is spread over the devices as the batch is."""

    def of_rows(params, averages, aux, batch, uncond, step, drawn):
        return jnp.mean((drawn - batch["x"]) ** 2), {"same": aux["same"]}, {}

    learnt = objective.Objective(
        init=lambda key: {"w": jnp.float32(3)},
        loss=objective.MeanLoss(lambda batch, key: jnp.arange(8.0), of_rows),
        per_example_loss=lambda *_: jnp.zeros(1),
        conditioning=(),
        image_tokens=1,
        other_tokens=0,
        embeddings=(),
    )
    device_mesh = mesh.build(config.MeshConfig(), {}, jax.devices()[:2])
    aux = {"same": jnp.float32(0.1)}
    with jax.set_mesh(device_mesh):
        x = mesh.put(device_mesh, {"x": np.arange(8, dtype=np.float32)})
        for rows in (0, 4, 2):
            step = accumulation.gradient(learnt, rows, lambda *_: None)
            (value, (after, _)), _ = jax.jit(
                lambda x, step=step: step(
                    {"w": jnp.float32(3)}, {}, aux, x, {}, 0, jax.random.key(0)
                )
            )(x)
            assert float(value) == 0.0
            assert after["same"] == aux["same"]  # to the bit


def test_a_loss_that_cannot_be_taken_in_parts_is_refused(tiny):
    e = experiment_of(tiny, train__microbatch=4)
    learnt = objective.build(e, *SIZE, False)
    accumulation.check(e, learnt)

    def doubled(*given):
        value, aux, measured = learnt.loss(*given)
        return 2 * value, aux, measured

    own = dataclasses.replace(learnt, loss=doubled)
    with pytest.raises(config.ConfigError, match="microbatch = 4 .* parts of a batch"):
        accumulation.check(e, own)
    accumulation.check(experiment_of(tiny), own)
    accumulation.check(experiment_of(tiny, train__microbatch=ROWS), own)
    counts = dataclasses.replace(learnt, init_aux=lambda *_: {"n": jnp.int32(0)})
    with pytest.raises(
        config.ConfigError,
        match=r"taken: aux\['n'\] is int32; set config\.train\.micro",
    ):
        accumulation.check(e, counts)


def test_state_and_metrics_of_an_objective_are_means_over_passes():
    """Of a loss of one parameter, written out."""

    def of_rows(params, averages, aux, batch, uncond, step, drawn):
        value = jnp.mean((params["w"] * batch["x"] + drawn) ** 2)
        seen = {"seen": 0.5 * aux["seen"] + 0.5 * jnp.mean(batch["x"])}
        return value, seen, {"mean": jnp.mean(drawn)}

    learnt = objective.Objective(
        init=lambda key: {"w": jnp.float32(3)},
        loss=objective.MeanLoss(lambda batch, key: 1.0 + batch["x"], of_rows),
        per_example_loss=lambda *_: jnp.zeros(1),
        conditioning=(),
        image_tokens=1,
        other_tokens=0,
        embeddings=(),
        metrics=("mean",),
    )
    checked = []
    x = np.arange(8, dtype=np.float32)
    given = ({"w": jnp.float32(3)}, {}, {"seen": jnp.float32(2)}, {"x": x}, {}, 0, None)
    found = accumulation.gradient(learnt, 2, lambda *rest: checked.append(rest))(*given)
    (value, (aux, measured)), slope = found
    assert_allclose(value, np.mean((4 * x + 1) ** 2), rtol=1e-6)
    assert_allclose(slope["w"], np.mean(2 * x * (4 * x + 1)), rtol=1e-6)
    assert_allclose(aux["seen"], 0.5 * 2 + 0.5 * 3.5, rtol=1e-6)
    assert_allclose(measured["mean"], 4.5, rtol=1e-6)
    assert checked and set(checked[0][1]) == {"mean"}


def test_the_plan_counts_the_activations_of_a_pass(tiny):
    whole, parts = (
        train_step.cost(e, train_step.train_functions(e, *SIZE, False), ROWS)
        for e in (experiment_of(tiny), experiment_of(tiny, train__microbatch=4))
    )
    assert parts.flops == whole.flops and whole.activation_bytes > 0
    assert parts.activation_bytes == whole.activation_bytes // 4
    assert parts.state_bytes == whole.state_bytes


@pytest.mark.parametrize(
    ("part", "nearest"), [(3, "2 or 4"), (5, "4 or 8"), (32, "16")]
)
def test_a_microbatch_that_does_not_divide_the_batch_is_refused(tiny, part, nearest):
    with pytest.raises(config.ConfigError, match=f"= 16; nearest: {nearest}$"):
        experiment_of(tiny, train__microbatch=part)


def test_a_microbatch_that_the_devices_do_not_divide_is_refused(tiny):
    with pytest.raises(config.ConfigError, match="microbatch = 2 is not divisible by"):
        mesh.build(config.MeshConfig(), {"config.train.microbatch": 2})


def test_it_is_no_part_of_a_recipe(tiny):
    a, b = experiment_of(tiny), experiment_of(tiny, train__microbatch=4)
    assert a.recipe_hash == b.recipe_hash
    narrow = experiment_of(tiny, optimizer__first_moment_dtype="bfloat16")
    assert narrow.recipe_hash != a.recipe_hash


@pytest.mark.parametrize(
    ("field", "value", "best"), [("microbatch", 4, 0), ("steps_per_dispatch", 2, 1)]
)
def test_convolutions_in_a_loop_are_refused_on_a_cpu(tiny, field, value, best):
    c = tiny.copy_and_resolve_references()
    c.model.architecture, c.model.heads, c.model.head_dim = "unet", 4, 0
    c.plan.sizes = ((32, 2),)
    plain = config.ModelConfig()
    c.model.patch_size, c.model.time_width = plain.patch_size, plain.time_width
    c.train.steps_per_dispatch = 1
    train.check(config.resolve(c))
    c.train[field] = value
    with pytest.raises(config.ConfigError, match=f"{field} = {value}: .* to {best}$"):
        train.check(config.resolve(c))
