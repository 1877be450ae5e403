"""Parameters of one network as those of another: what fits, what is grown or new."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm.models import denoisers, from_config
from scaling_ldm.models.denoisers import dit, unet
from scaling_ldm.models.weights import transfer

DIT = dit.DiTConfig(
    architecture="adaln_zero",
    width=8,
    depth=2,
    heads=2,
    image_shape=(4, 4, 3),
    patch_size=2,
    classes=3,
)
UNET = unet.UNetConfig(
    base=32,
    heads=2,
    image_shape=(4, 4, 3),
    text_tokens=2,
    text_width=8,
    multiples=(1,),
    blocks=1,
)


def fit(theirs, ours, *exceptions):
    shapes = map(from_config.parameter_shapes, (theirs, ours))
    return transfer.fit(theirs, ours, *shapes, exceptions)


def params(network, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape).astype("f")),
        from_config.parameter_shapes(network),
    )


def test_the_same_network_takes_every_leaf():
    theirs = params(DIT)
    found = fit(DIT, DIT)
    assert found.problems == () and not found.treated
    jax.tree.map(
        assert_array_equal, transfer.transferred(found, theirs, params(DIT, 1)), theirs
    )


def test_another_resolution_and_type_of_arithmetic_fit():
    ours = dataclasses.replace(DIT, image_shape=(8, 8, 3), remat="blocks", unroll=True)
    assert fit(DIT, ours).problems == ()


def test_everything_that_differs_is_listed():
    ours = dataclasses.replace(DIT, classes=5, activation="silu", depth=1)
    problems = fit(DIT, ours).problems
    assert "network.activation: 'gelu' there, 'silu' here" in problems
    assert "entry/label_embedding: (4, 8) there, (6, 8) here" in problems
    stacked = [line for line in problems if line.startswith("blocks/")]
    assert len(stacked) == 10  # every leaf of the stack of blocks
    assert fit(UNET, DIT).problems == ("network: UNetConfig there, DiTConfig here",)


def test_a_missing_and_a_further_leaf_are_listed():
    ours = dataclasses.replace(DIT, positions="learned")
    (settings, missing) = fit(DIT, ours).problems
    assert settings.startswith("network.positions")
    assert missing == "entry/position_table: missing there, (1, 4, 8) here"
    _, further = fit(ours, DIT).problems
    assert further == "entry/position_table: (1, 4, 8) there, none here"
    allowed = ("entry/position_table", "drop"), ("network.positions", "here")
    assert fit(ours, DIT, *allowed).problems == ()
    allowed = ("entry/position_table", "new"), ("network.positions", "here")
    assert fit(DIT, ours, *allowed).treated == {"entry/position_table": "new"}


def test_a_new_head_is_newly_initialised_and_the_rest_kept():
    ours = dataclasses.replace(DIT, out_channels=4)
    found = fit(DIT, ours, ("exit/patch/*", "new"))
    assert found.problems == ()
    theirs, fresh = params(DIT), params(ours, 1)
    got = transfer.transferred(found, theirs, fresh)
    jax.tree.map(assert_array_equal, got["exit"]["patch"], fresh["exit"]["patch"])
    jax.tree.map(assert_array_equal, got["blocks"], theirs["blocks"])


def test_new_channels_of_a_transformer_start_at_zero():
    """Its output is that of the old network on the old channels."""
    ours = dataclasses.replace(DIT, image_shape=(4, 4, 5), out_channels=3)
    found = fit(DIT, ours, ("entry/patch/kernel", "zero"))
    assert found.problems == ()
    theirs = params(DIT)
    got = transfer.transferred(found, theirs, params(ours, 1))
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 4, 4, 5)).astype("f")
    t, cond = np.array([0.2, 0.7], "f"), {"label": np.array([0, 2])}
    new = jax.jit(denoisers.transformer(ours).apply)(got, x, t, cond)
    old = jax.jit(denoisers.transformer(DIT).apply)(theirs, x[..., :3], t, cond)
    assert np.abs(old).max() > 0.1
    assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_a_coarse_picture_beside_that_of_a_u_net_starts_at_zero():
    ours = dataclasses.replace(UNET, extra_channels=3)
    found = fit(UNET, ours, ("enter/kernel", "zero"))
    assert found.problems == ()
    theirs = params(UNET)
    got = transfer.transferred(found, theirs, params(ours, 1))
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 4, 4, 3)).astype("f")
    cond = {
        "text": rng.normal(size=(2, 2, 8)).astype("f"),
        "mask": np.ones((2, 2), bool),
    }
    t = np.array([0.2, 0.7], "f")
    old = jax.jit(denoisers.u_net(UNET).apply)(theirs, x, t, cond)
    image = {"image": rng.normal(size=x.shape).astype("f")}
    new = jax.jit(denoisers.u_net(ours).apply)(got, x, t, cond | image)
    assert_allclose(new, old, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["exit/patch/kernel", "entry/patch/kernel"])
def test_only_more_inputs_can_start_at_zero(path):
    ours = dataclasses.replace(DIT, image_shape=(4, 4, 2), out_channels=5)
    (bad,) = (p for p in fit(DIT, ours, (path, "zero")).problems if "only new" in p)
    assert bad.startswith(path)


def test_patches_of_another_size_do_not_grow():
    ours = dataclasses.replace(DIT, patch_size=4, out_channels=3)
    allowed = ("network.patch_size", "here"), ("entry/patch/kernel", "zero")
    problems = fit(DIT, ours, *allowed, ("exit/*", "new")).problems
    assert any(p.startswith("entry/patch/kernel") for p in problems)


def test_an_exception_of_nothing_is_refused():
    (said,) = fit(DIT, DIT, ("exit/pach/*", "new")).problems
    assert said == (
        "config.train.init_exceptions: exit/pach/*=new matches no difference"
    )


def test_growing_keeps_shardings_of_a_mesh():
    mesh = jax.make_mesh((2, 2), ("replica", "fsdp"))
    ours = dataclasses.replace(DIT, image_shape=(4, 4, 5), out_channels=3)
    found = fit(DIT, ours, ("entry/patch/kernel", "zero"))
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, jax.P("fsdp"))
        place = lambda tree: jax.tree.map(  # noqa: E731
            lambda a: jax.device_put(a, split if a.shape[0] % 2 == 0 else jax.P()), tree
        )
        theirs, fresh = place(params(DIT)), place(params(ours, 1))
        got = transfer.transferred(found, theirs, fresh)
    kernel = got["entry"]["patch"]["kernel"]
    assert kernel.sharding == fresh["entry"]["patch"]["kernel"].sharding
    old = np.asarray(theirs["entry"]["patch"]["kernel"]).reshape(4, 3, 8)
    new = np.asarray(kernel).reshape(4, 5, 8)
    assert_array_equal(new[:, :3], old)
    assert_array_equal(new[:, 3:], 0)
