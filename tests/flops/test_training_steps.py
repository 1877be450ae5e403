"""Whole training steps, with and without remat: closed forms, scopes, XLA."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flops_helpers import MATMUL, X, conv, spec, total
from jax import lax

from scaling_ldm import flops

# --- Remat


def layer(x, w):
    return jnp.tanh(jnp.tanh(x @ w) @ w)


def pair(x, w, wrap):
    return wrap(layer)(wrap(layer)(x, w), w)


def scanned_layers(x, w, wrap):
    body = wrap(lambda x, _: (layer(x, w), None))
    return lax.scan(body, x, None, length=5)[0]


def scan_inside(x, w, wrap):
    def run(x, w):
        return lax.scan(lambda c, _: (layer(c, w), None), x, None, length=5)[0]

    return wrap(run)(x, w)


def nested(x, w, wrap):
    return wrap(lambda x, w: pair(x, w, wrap))(x, w)


def convolution(x, w, wrap):
    fn = conv(stride=2, pad="VALID")
    x, w = x.reshape(1, 8, 8, 1), w[:3, :3].reshape(3, 3, 1, 1)
    return wrap(lambda x, w: jnp.sin(jnp.sin(fn(x, w))))(x, w)


def jitted(x, w, wrap):
    return jax.jit(wrap(jax.jit(layer)))(x, w)


def batched(x, w, wrap):
    return jax.vmap(wrap(layer), (0, None))(x[None].repeat(3, 0), w)


@pytest.mark.parametrize(
    "network",
    [pair, scanned_layers, scan_inside, nested, convolution, jitted, batched],
)
@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable"])
def test_model_flops_are_those_without_remat(network, policy):
    policy = getattr(jax.checkpoint_policies, policy)

    def remat(fn):
        return jax.checkpoint(fn, policy=policy)

    def step(wrap):
        def loss(x, w):
            return jnp.sum(network(x, w, wrap) ** 2)

        return flops.count(jax.value_and_grad(loss, (0, 1)), X, X)

    plain, rematted = step(lambda fn: fn), step(remat)
    assert plain.recomputed == 0
    assert rematted.model == plain.total
    assert rematted.hardware == plain.total + rematted.recomputed
    saves_nothing = policy is jax.checkpoint_policies.nothing_saveable
    assert (rematted.recomputed > 0) == saves_nothing


def test_recompute_closed_form():
    def loss(x, w):
        return jnp.sum(jax.checkpoint(layer)(x, w))

    result = flops.count(jax.grad(loss, (0, 1)), X, X)
    assert result.model == 3 * 2 * MATMUL
    assert result.recomputed == 2 * MATMUL
    assert flops.count(jax.checkpoint(layer), X, X).recomputed == 0


def test_recomputed_convolution_is_a_forward_pass():
    fn = conv(pad="VALID")
    args = spec(2, 9, 9, 4), spec(3, 3, 4, 6)

    @jax.checkpoint
    def block(x, w):
        return jnp.sin(jnp.sin(fn(x, w)))

    def loss(x, w):
        return jnp.sum(block(x, w))

    result = flops.count(jax.value_and_grad(loss, (0, 1)), *args)
    assert result.recomputed == total(fn, *args)
    assert result.model == 3 * total(fn, *args)


# --- Networks


class Block(nn.Module):
    @nn.compact
    def __call__(self, x_BND, _):
        att_BND = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x_BND)
        x_BND = x_BND + att_BND
        hidden = nn.gelu(nn.Dense(32, name="expand")(x_BND))
        return x_BND + nn.Dense(8, name="contract")(hidden), None


class Network(nn.Module):
    depth: int = 3
    scan: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x_BND):
        x_BND = nn.Dense(8, name="embed")(x_BND)
        block = nn.remat(Block) if self.remat else Block
        if self.scan:
            split = {"params": True}
            stack = nn.scan(
                block, variable_axes={"params": 0}, split_rngs=split, length=self.depth
            )
            x_BND, _ = stack(name="blocks")(x_BND, None)
        else:
            for i in range(self.depth):
                x_BND, _ = block(name=f"block_{i}")(x_BND, None)
        return nn.Dense(4, name="head")(x_BND)


TOKENS = spec(2, 6, 4)
# Linear layers, 2 x MAC x tokens; then the two products of attention.
BLOCK = 2 * 12 * (4 * 8 * 8 + 2 * 8 * 32) + 2 * 2 * 2 * 6 * 6 * 8
NETWORK = 2 * 12 * (4 * 8 + 8 * 4) + 3 * BLOCK


def training_step(network):
    params = jax.eval_shape(network.init, jax.random.key(0), TOKENS)

    def loss(p, x):
        return jnp.mean(network.apply(p, x) ** 2)

    return flops.count(jax.value_and_grad(loss, (0, 1)), params, TOKENS)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_network_closed_form_and_scopes(scan, remat):
    result = training_step(Network(scan=scan, remat=remat))
    assert result.model == 3 * NETWORK
    assert (result.recomputed > 0) == remat
    assert sum(result.by_scope.values()) == result.total
    assert sum(result.by_primitive.values()) == result.total
    tree = result.tree(depth=3)
    assert tree[""] == tree["Network"] == result.total
    assert tree["Network/head"] == 3 * 2 * 12 * 8 * 4
    assert tree["Network/embed"] == 3 * 2 * 12 * 4 * 8
    blocks = ["blocks"] if scan else [f"block_{i}" for i in range(3)]
    assert set(result.tree(depth=2)) == {
        "",
        "Network",
        "Network/embed",
        "Network/head",
        *(f"Network/{name}" for name in blocks),
    }
    if not remat:
        per_block = 3 * BLOCK * 3 // len(blocks)
        for name in blocks:
            assert tree[f"Network/{name}"] == per_block
            expand = tree[f"Network/{name}/expand"]
            assert expand == 3 * 2 * 12 * 8 * 32 * 3 // len(blocks)
    assert f"{result.total:.4e}" in result.table()


def test_scope_is_kept_through_jit_and_vmap():
    @jax.named_scope("outer")
    def fn(x):
        return jax.jit(jax.vmap(jax.named_scope("inner")(lambda x: x @ x)))(x).sum()

    result = flops.count(jax.grad(fn), spec(3, 8, 8))
    assert result.by_scope == {"outer/inner": 3 * 3 * MATMUL}


def test_agrees_with_xla_on_an_unrolled_network():
    # Nothing but products, as XLA counts elementwise work too, and no padding, as it
    # skips taps there.
    def fn(x_BHWC, kernel, w, u):
        y = conv(stride=2, pad="VALID")(x_BHWC, kernel)
        y = y.reshape(y.shape[0], -1) @ w
        for _ in range(3):
            y = y @ u
        return y

    args = spec(2, 9, 9, 3), spec(3, 3, 3, 4), spec(64, 16), spec(16, 16)
    cost = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert total(fn, *args) == cost["flops"]


def test_jit_of_the_whole_step_changes_nothing():
    network = Network(remat=True)
    params = jax.eval_shape(network.init, jax.random.key(0), TOKENS)
    step = jax.grad(lambda p, x: jnp.mean(network.apply(p, x) ** 2))
    assert total(jax.jit(step), params, TOKENS) == total(step, params, TOKENS)


# --- Interface


def test_arguments_may_be_arrays_keys_trees_and_keywords():
    def fn(tree, *, key, scale):
        noise = jax.random.normal(key, (8, 8))
        return tree["w"] @ noise * scale

    array = {"w": np.ones((8, 8), np.float32)}
    result = flops.count(fn, array, key=jax.random.key(0), scale=2.0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert result == flops.count(fn, {"w": X}, key=key, scale=spec())
    assert result.total == MATMUL


def test_to_macs():
    assert flops.to_macs(MATMUL) == 8**3
    with pytest.raises(ValueError, match="odd"):
        flops.to_macs(3)


def test_counting_touches_no_device():
    program = """
import jax, jax.numpy as jnp, numpy as np
from scaling_ldm import flops
def loss(w, key, x):
    table = jnp.asarray(np.arange(8.0, dtype=np.float32))
    noise = jax.random.normal(jax.random.fold_in(key, 3), x.shape)
    return jnp.sum(jnp.tanh((x + noise + table) @ w))
x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
key = jax.eval_shape(lambda: jax.random.key(0))
print(flops.count(jax.grad(loss), x, key, x).total)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 2 * MATMUL
