"""Attention's own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm import attention


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


@pytest.mark.parametrize("masked", [True, False])
def test_value_and_gradients_are_those_of_the_definition(masked):
    args, mask, weights = inputs(masked=masked)
    ours, theirs = (
        jax.value_and_grad(loss(attend, mask, weights), (0, 1, 2))(*args)
        for attend in (attention.attend, plainly)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        ours,
        theirs,
    )
    if masked:  # nothing reaches what nobody attends to
        assert not np.any(ours[1][1][1, 4:]) and not np.any(ours[1][2][2, 1:])


def test_in_bfloat16_the_gradients_have_its_type_and_its_precision():
    args, mask, weights = inputs(jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in args]
    ours = jax.grad(loss(attention.attend, mask, weights), (0, 1, 2))(*args)
    theirs = jax.grad(loss(plainly, mask, weights), (0, 1, 2))(*wide)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(a.astype(np.float32) - b).max() < 0.02 * np.abs(b).max()


def test_the_gradient_has_a_gradient():
    args, mask, weights = inputs()

    def squared(attend):
        def norm(*args):
            inner = jax.grad(loss(attend, mask, weights), (0, 1, 2))(*args)
            return sum(jnp.sum(leaf**2) for leaf in inner)

        return jax.grad(norm, (0, 1, 2))(*args)

    for a, b in zip(squared(attention.attend), squared(plainly), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_no_array_of_queries_by_keys_is_transposed():
    """On a CPU these transpositions take longer than the arithmetic (README, Speed)."""
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
    assert "f32[3,2,5,7]" in text  # the arrays are there to be seen
