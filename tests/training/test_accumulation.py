"""A step in passes over parts of its batch is the step of the whole batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling_ldm import config
from scaling_ldm.training import (
    mesh,
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


@pytest.mark.parametrize("part", [4, pytest.param(1, marks=pytest.mark.slow)])
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
