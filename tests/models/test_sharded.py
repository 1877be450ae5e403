"""Where devices share parameters: what is gathered, kept, added up and scattered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm import config
from scaling_ldm.flops.collectives import collectives
from scaling_ldm.models import denoisers, remat, sharded
from scaling_ldm.models.denoisers import dit
from scaling_ldm.training import mesh

DEPTH = 3


def network(dtype="float32", policy="none"):
    return denoisers.transformer(
        dit.DiTConfig(
            architecture="in_context",
            width=32,
            depth=DEPTH,
            heads=2,
            image_shape=(8, 8, 4),
            patch_size=2,
            text_tokens=4,
            text_width=8,
            time_width=8,
            vocab_size=0,
            dtype=denoisers.DTYPES[dtype],
            remat=policy,
        )
    )


def arguments(rows=8):
    draw = np.random.default_rng(0).normal
    x = draw(size=(rows, 8, 8, 4)).astype(np.float32)
    cond = {
        "text": draw(size=(rows, 4, 8)).astype(np.float32),
        "mask": np.ones((rows, 4), bool),
    }
    return x, np.linspace(0, 1, rows, dtype=np.float32), cond


def gradient(net):
    def loss(params, x, t, cond):
        return jnp.mean((net.apply(params, x, t, cond) - x) ** 2)

    return jax.grad(loss)


@pytest.fixture(scope="module")
def shared():
    """A mesh of two copies on two devices each, and how parameters lie there."""
    found = mesh.build(config.MeshConfig(fsdp=2), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "MIN_SHARDED_SIZE", 512)
        shapes = jax.eval_shape(network().init, jax.random.key(0))
        yield found, mesh.shardings(found, shapes)


def placed(net, shared):
    found, where = shared
    with jax.set_mesh(found):
        params = jax.jit(net.init, out_shardings=where)(jax.random.key(1))
        # The last layer starts at zero, and would hide all gradients but its own.
        params = jax.tree.map(lambda a: a + 0.01, params)
        return params, mesh.put(found, arguments())


def lowered(net, shared):
    found, where = shared
    params, inputs = placed(net, shared)
    with jax.set_mesh(found):
        return jax.jit(gradient(net), out_shardings=where).lower(params, *inputs)


def sharded_kernels(shared):
    specs = jax.tree.map(lambda s: s.spec, shared[1]["blocks"])
    return sum("fsdp" in spec for spec in jax.tree.leaves(specs, is_leaf=tuple_like))


def tuple_like(x):
    return isinstance(x, jax.sharding.PartitionSpec)


def test_weights_are_gathered_twice_and_gradients_scattered(shared):
    kernels = sharded_kernels(shared)
    assert kernels >= 4
    ends = (
        len([s for s in jax.tree.leaves(shared[1]) if "fsdp" in s.spec]) - kernels
    )  # entry and exit
    found = {
        one.kind: one.count
        for one in collectives(lowered(network(), shared).compile().as_text())
    }
    # Each block's in the forward and the backward pass; the ends once.
    assert found["all-gather"] == 2 * DEPTH * kernels + ends
    assert found["reduce-scatter"] == DEPTH * kernels + ends


def test_weights_travel_in_bfloat16_and_gradients_in_float32(shared):
    text = lowered(network("bfloat16"), shared).as_text()
    gathers = re.findall(r"all_gather.*-> tensor<\S*x(\w+)>", text)
    assert gathers.count("bf16") >= 2 * sharded_kernels(shared)
    scatters = re.findall(r"reduce_scatter(?:.|\n)*?-> tensor<\S*x(\w+)>", text)
    assert set(scatters) == {"f32"}
    assert len(scatters) >= sharded_kernels(shared)


@pytest.mark.parametrize(
    "policy",
    [
        "none",
        *(
            pytest.param(policy, marks=[] if policy == "blocks" else [pytest.mark.slow])
            for policy in remat.POLICIES
        ),
    ],
)
def test_every_policy_has_the_gradient_of_one_device(shared, policy):
    net = network(policy=policy)
    params, inputs = placed(net, shared)
    with jax.set_mesh(shared[0]):
        found = jax.jit(gradient(net), out_shardings=shared[1])(params, *inputs)
    alone = jax.tree.map(np.asarray, params)
    with jax.set_mesh(None):
        wanted = jax.jit(gradient(network()))(alone, *arguments())
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    assert largest > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest),
        jax.tree.map(np.asarray, found),
        jax.tree.map(np.asarray, wanted),
    )


def test_rows_that_are_not_split_over_the_devices_are_computed_as_before(shared):
    net = network()
    params, _ = placed(net, shared)
    x, t, cond = arguments(rows=3)
    with jax.set_mesh(shared[0]):
        given = mesh.put(shared[0], (x, t, cond), mesh.REPLICATED)
        found = jax.jit(net.apply)(params, *given)
    alone = jax.tree.map(np.asarray, params)
    with jax.set_mesh(None):
        wanted = jax.jit(net.apply)(alone, x, t, cond)
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=1e-5)


def test_one_row_stands_for_all_and_other_numbers_are_refused(shared):
    net = network()
    params, (x, t, cond) = placed(net, shared)
    with jax.set_mesh(shared[0]):
        one = jnp.full((1,), 0.5)
        found = jax.jit(net.apply)(params, x, one, cond)
        wanted = jax.jit(net.apply)(params, x, jnp.full((x.shape[0],), 0.5), cond)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
        for wrong in (jnp.float32(0.5), jnp.full((2,), 0.5)):
            with pytest.raises(ValueError, match="beside 8 rows"):
                jax.jit(net.apply)(params, x, wrong, cond)


def test_what_is_not_split_keeps_its_type(shared):
    """A norm's scale is used in float32, however many values all blocks have."""
    found = shared[0]
    scale = jnp.full((3, 2**15), 1 + 2.0**-12)  # not a bfloat16

    def apply(params, x, t, cond):
        whole = sharded.gather(params, jnp.bfloat16)
        assert whole["scale"].dtype == jnp.float32
        return x * whole["scale"].mean()

    with jax.set_mesh(found):
        x = mesh.put(found, np.ones((4, 1), np.float32))
        given = mesh.put(found, {"scale": np.asarray(scale)}, mesh.REPLICATED)
        y = jax.jit(sharded.on_rows(apply))(given, x, x[:, 0], {})
    np.testing.assert_array_equal(np.asarray(y), np.float32(1 + 2.0**-12))


def test_the_policies_are_those_of_the_config():
    assert tuple(remat.POLICIES) == config.REMAT_POLICIES


@pytest.mark.parametrize("policy", [True, False, "block"])
def test_a_policy_that_is_not_known_is_refused(policy, unchecked):
    with pytest.raises(ValueError, match=f"remat = {policy!r}; known: none, blocks, "):
        remat.block(lambda x, params: x, policy, jnp.float32)
