"""Attention and its own gradient, with stored and with recomputed scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm import flops
from scaling_ldm.models import attention


@pytest.fixture(params=["keep the scores", "compute them again"])
def both(request, monkeypatch):
    """Each test runs with stored scores and, at the same size, with recomputed ones."""
    again = request.param == "compute them again"
    monkeypatch.setattr(attention, "LONG", 1 if again else 10**9)


def plainly(q_BTKH, k_BSKH, v_BSKH, mask_B11S):
    """The definition, whose gradients JAX derives by itself."""
    scores = jnp.einsum("BTKH,BSKH->BKTS", q_BTKH, k_BSKH) / q_BTKH.shape[-1] ** 0.5
    if mask_B11S is not None:
        scores = jnp.where(mask_B11S, scores, -jnp.inf)
    return jnp.einsum("BKTS,BSKH->BTKH", jax.nn.softmax(scores, axis=-1), v_BSKH)


def inputs(dtype=jnp.float32, masked=True):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (3, 5, 2, 4), dtype)
    k, v = (jax.random.normal(key, (3, 7, 2, 4), dtype) for key in keys[1:3])
    mask = jnp.arange(7)[None] < jnp.array([7, 4, 1])[:, None]
    weights = jax.random.normal(keys[3], q.shape)
    return (q, k, v), mask[:, None, None] if masked else None, weights


def loss(attend, mask, weights):
    return lambda q, k, v: jnp.sum(jnp.tanh(attend(q, k, v, mask)) * weights)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("masked", [True, False])
def test_value_and_gradients_are_those_of_the_definition(masked):
    args, mask, weights = inputs(masked=masked)
    ours, theirs = (
        jax.jit(jax.value_and_grad(loss(attend, mask, weights), (0, 1, 2)))(*args)
        for attend in (attention.attend, plainly)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        ours,
        theirs,
    )
    if masked:  # a key that is always masked has no gradient
        assert not np.any(ours[1][1][1, 4:]) and not np.any(ours[1][2][2, 1:])


@pytest.mark.usefixtures("both")
def test_in_bfloat16_the_gradients_have_its_type_and_its_precision():
    args, mask, weights = inputs(jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in args]
    ours = jax.jit(jax.grad(loss(attention.attend, mask, weights), (0, 1, 2)))(*args)
    theirs = jax.jit(jax.grad(loss(plainly, mask, weights), (0, 1, 2)))(*wide)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(a.astype(np.float32) - b).max() < 0.02 * np.abs(b).max()


@pytest.mark.usefixtures("both")
def test_the_gradient_has_a_gradient():
    args, mask, weights = inputs()

    def squared(attend):
        def norm(*args):
            inner = jax.grad(loss(attend, mask, weights), (0, 1, 2))(*args)
            return sum(jnp.sum(leaf**2) for leaf in inner)

        return jax.jit(jax.grad(norm, (0, 1, 2)))(*args)

    for a, b in zip(squared(attention.attend), squared(plainly), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("both")
def test_each_query_may_have_a_mask_of_its_own():
    args, _, weights = inputs(masked=False)
    mask = (
        jax.random.bernoulli(jax.random.key(9), 0.5, (3, 1, 5, 7)).at[..., 0].set(True)
    )
    ours, theirs = (
        jax.jit(jax.grad(loss(attend, mask, weights), (0, 1, 2)))(*args)
        for attend in (attention.attend, plainly)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def large(shape):
    """Arguments with 512 x 512 scores a head, the first size that is long."""
    keys = jax.random.split(jax.random.key(3), 3)
    return [jax.random.normal(key, shape) for key in keys]


def derivative(q, k, v):
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    return jax.grad(loss(attention.attend, None, weights), (0, 1, 2))(q, k, v)


def test_long_sequences_keep_no_scores_and_recompute_is_not_the_models_flops(
    monkeypatch,
):
    args = large((2, 512, 2, 4))
    again = flops.count(derivative, *args)
    lowered = jax.jit(derivative).lower(*args)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * 512 * 512 * 4  # one array of scores, not two
    monkeypatch.setattr(attention, "LONG", 10**9)
    jax.clear_caches()
    kept = flops.count(derivative, *args)
    product = 2 * 2 * 2 * 512 * 512 * 4
    assert kept.total == 6 * product and not kept.recomputed
    assert again.model == kept.model
    assert again.recomputed == product


@pytest.mark.parametrize(
    "parts",
    [
        *(pytest.param(p, marks=pytest.mark.slow) for p in ((1, 1), (2, 1), (1, 2))),
        (2, 2),
    ],
)
def test_sharded_pictures_and_heads_stay_where_they_are(parts):
    args = large((2, 512, 2, 4))
    alone = derivative(*args)
    mesh = jax.make_mesh(
        parts, ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2
    )
    with jax.set_mesh(mesh):
        spec = jax.P("data", None, "model")
        given = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in args]
        compiled = jax.jit(derivative).lower(*given).compile()
        for a, b in zip(compiled(*given), alone, strict=True):
            assert tuple(a.sharding.spec)[:3] == tuple(spec)
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
        collectives = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
        assert not [name for name in collectives if name in compiled.as_text()]


def test_no_array_of_queries_by_keys_is_transposed():
    """On a CPU these transpositions take longer than the arithmetic."""
    args, mask, weights = inputs()
    text = str(
        jax.make_jaxpr(jax.grad(loss(attention.attend, mask, weights), (0, 1, 2)))(
            *args
        )
    )
    moved = [
        line
        for line in text.splitlines()
        if "transpose[" in line and ("[3,2,5,7]" in line or "[3,2,7,5]" in line)
    ]
    assert not moved
    assert "f32[3,2,5,7]" in text  # the check above does look at such arrays
