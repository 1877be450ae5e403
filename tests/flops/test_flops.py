"""The FLOPs accountant against closed forms, unrolled programs and XLA."""

import inspect
import itertools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, PartitionSpec

from scaling_ldm import flops
from scaling_ldm.flops import peaks


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def total(fn, *args):
    return flops.count(fn, *args).total


def forward_and_backward(fn, *args):
    """FLOPs of the value, and of a gradient with respect to every argument."""
    argnums = tuple(range(len(args)))
    step = jax.value_and_grad(lambda *a: jnp.sum(fn(*a) ** 2), argnums)
    return total(fn, *args), total(step, *args)


MATMUL = 2 * 8 * 8 * 8
X = spec(8, 8)


# --- Products -------------------------------------------------------------------------


def test_dot_general_closed_forms():
    assert total(lambda x, w: x @ w, spec(3, 5), spec(5, 7)) == 2 * 3 * 5 * 7
    assert total(jnp.dot, spec(11), spec(11)) == 2 * 11
    batched = total(
        lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k),
        spec(2, 3, 4, 5),
        spec(2, 7, 4, 5),
    )
    assert batched == 2 * 2 * 4 * 3 * 7 * 5
    outer = total(lambda a, b: jnp.einsum("i,j->ij", a, b), spec(3), spec(5))
    assert outer == 2 * 15


def test_vmap_multiplies_by_the_batch():
    assert total(jax.vmap(lambda x: x @ x), spec(6, 8, 8)) == 6 * MATMUL


def test_backward_of_a_product_is_twice_forward():
    forward, step = forward_and_backward(jnp.matmul, spec(3, 5), spec(5, 7))
    assert step == 3 * forward == 3 * 2 * 3 * 5 * 7


def test_ragged_dot_counts_one_group_a_row():
    sizes = spec(3, dtype=jnp.int32)
    fn = lax.ragged_dot
    args = spec(10, 4), spec(3, 4, 5)
    assert total(fn, *args, sizes) == 2 * 10 * 4 * 5
    loss = jax.value_and_grad(lambda x, w, g: jnp.sum(fn(x, w, g)), (0, 1))
    assert total(loss, *args, sizes) == 3 * 2 * 10 * 4 * 5


def test_elementwise_work_counts_nothing():
    def work(x):
        return jax.nn.softmax(jnp.exp(x)).sum() + jnp.fft.fft(x).real.sum()

    result = flops.count(work, spec(64))
    assert result.total == 0
    assert result.entries == ()
    assert "total" in result.table()


# --- Convolutions ---------------------------------------------------------------------


def conv(
    stride=1, pad="SAME", lhs_dilation=1, rhs_dilation=1, groups=1, batch_groups=1
):
    def fn(x_BHWC, kernel):
        return lax.conv_general_dilated(
            x_BHWC,
            kernel,
            (stride, stride),
            pad,
            lhs_dilation=(lhs_dilation, lhs_dilation),
            rhs_dilation=(rhs_dilation, rhs_dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            batch_group_count=batch_groups,
        )

    return fn


def test_conv_closed_forms():
    x, w = spec(2, 9, 9, 4), spec(3, 3, 4, 6)
    taps = 2 * 2 * 9 * 4 * 6  # 2 x batch x kernel x channels in x channels out
    assert total(conv(), x, w) == taps * 81
    assert total(conv(pad="VALID"), x, w) == taps * 49
    assert total(conv(stride=2), x, w) == taps * 25
    assert total(conv(pad="VALID", rhs_dilation=2), x, w) == taps * 25
    assert total(conv(groups=2), x, spec(3, 3, 2, 6)) == taps * 81 // 2
    assert total(conv(groups=4), x, spec(3, 3, 1, 4)) == 2 * 2 * 9 * 4 * 81
    assert total(conv(batch_groups=2), x, w) == taps * 81 // 2


def test_conv_counts_taps_on_padding_even_where_the_kernel_is_larger():
    assert total(conv(), spec(1, 2, 2, 1), spec(3, 3, 1, 1)) == 2 * 4 * 9


SIZES = (4, 7, 8)
KERNELS = (1, 2, 3, 5)
PADDINGS = ("SAME", "VALID", [(1, 0), (2, 1)])


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_forward_and_backward_is_three_times_forward(stride, dilation, groups):
    for size, k, pad in itertools.product(SIZES, KERNELS, PADDINGS):
        if pad == "VALID" and size < (k - 1) * dilation + 1:
            continue
        fn = conv(stride, pad, rhs_dilation=dilation, groups=groups)
        args = spec(2, size, size, 4), spec(k, k, 4 // groups, 6)
        out = jax.eval_shape(fn, *args).shape
        if 0 in out:
            continue
        forward, step = forward_and_backward(fn, *args)
        expected = 2 * 2 * out[1] * out[2] * k * k * 4 * 6 // groups
        assert forward == expected, (size, k, pad)
        assert step == 3 * forward, (size, k, pad)


@pytest.mark.parametrize("kernel_dilation", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("dilation", [2, 3])
def test_transposed_conv_meets_every_input_with_every_tap(
    dilation, k, size, kernel_dilation
):
    reach = (k - 1) * kernel_dilation
    fn = conv(
        pad=[(reach, reach)] * 2, lhs_dilation=dilation, rhs_dilation=kernel_dilation
    )
    forward, step = forward_and_backward(fn, spec(2, size, size, 4), spec(k, k, 4, 6))
    assert forward == 2 * 2 * size**2 * k**2 * 4 * 6
    assert step == 3 * forward


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_lax_conv_transpose_backward(transpose_kernel, stride, padding):
    def fn(x, w):
        return lax.conv_transpose(
            x,
            w,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=transpose_kernel,
        )

    forward, step = forward_and_backward(fn, spec(2, 5, 5, 4), spec(3, 3, 4, 4))
    plain = stride == 1 and padding == "VALID"  # counted as a convolution
    assert forward == 2 * 2 * (49 if plain else 25) * 9 * 16
    assert step == 3 * forward


def test_resampling_conv_backward():
    fn = conv(stride=3, lhs_dilation=2, pad=[(1, 1), (1, 1)])
    forward, step = forward_and_backward(fn, spec(2, 9, 9, 4), spec(3, 3, 4, 6))
    assert forward == 2 * 2 * (6 * 3 // 2) ** 2 * 4 * 6  # 6 outputs, half of the taps
    assert step == 3 * forward


def test_batch_groups_backward():
    forward, step = forward_and_backward(
        conv(batch_groups=2), spec(4, 5, 5, 3), spec(3, 3, 3, 6)
    )
    assert forward == 2 * 2 * 25 * 9 * 3 * 6
    assert step == 3 * forward


def test_conv_under_vmap_over_kernels_and_jit():
    fn = jax.jit(jax.vmap(conv(pad="VALID")))
    forward, step = forward_and_backward(fn, spec(3, 2, 7, 7, 4), spec(3, 3, 3, 4, 6))
    assert forward == 3 * 2 * 2 * 25 * 9 * 4 * 6
    assert step == 3 * forward


def test_vmapped_gradient_with_a_kernel_larger_than_the_input():
    fn = conv(pad=[(1, 1), (1, 1)])
    args = spec(3, 2, 4, 4, 4), spec(3, 5, 5, 4, 6)

    def loss(x, w):
        return jnp.sum(fn(x, w) ** 2)

    step = jax.vmap(jax.value_and_grad(loss, (0, 1)))
    assert total(jax.vmap(fn), *args) == 3 * 2 * 2 * 4 * 25 * 4 * 6
    assert total(step, *args) == 3 * total(jax.vmap(fn), *args)


def test_flipped_activations_are_not_taken_for_a_flipped_kernel():
    def fn(x, w):
        return lax.rev(conv(pad="VALID")(x, w), (1, 2))

    forward, step = forward_and_backward(fn, spec(2, 9, 9, 4), spec(3, 3, 4, 6))
    assert step == 3 * forward


def test_conv_with_features_first_and_batch_last():
    def fn(x, w):
        layout = ("CHWN", "HWIO", "CHWN")
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=layout)

    forward, step = forward_and_backward(fn, spec(4, 9, 9, 2), spec(3, 3, 4, 6))
    assert forward == 2 * 2 * 49 * 9 * 4 * 6
    assert step == 3 * forward


@pytest.mark.parametrize("features", [1, 3])
def test_conv_in_one_and_three_dimensions(features):
    module = nn.Conv(5, (3,) * features, strides=2, padding="VALID")
    x = spec(2, *(9,) * features, 4)
    params = jax.eval_shape(module.init, jax.random.key(0), x)

    def fn(x, p):
        return module.apply(p, x)

    forward, step = forward_and_backward(fn, x, params)
    assert forward == 2 * 2 * (4 * 3) ** features * 4 * 5
    assert step == 3 * forward


# --- Control flow ---------------------------------------------------------------------


def test_scan_equals_unrolled():
    def body(x, w):
        return jnp.tanh(x @ w), None

    def scanned(x, ws):
        return lax.scan(body, x, ws)[0]

    def unrolled(x, ws):
        for w in ws:
            x, _ = body(x, w)
        return x

    args = X, spec(5, 8, 8)
    assert total(scanned, *args) == total(unrolled, *args) == 5 * MATMUL
    for fn in (scanned, unrolled):
        forward, step = forward_and_backward(fn, *args)
        assert step == 3 * forward

    def reverse(x, ws):
        return lax.scan(body, x, ws, reverse=True, unroll=2)[0]

    assert total(reverse, *args) == 5 * MATMUL


def test_nested_scan_with_constants():
    def outer(x, w):
        def inner(c, _):
            return (c @ w, None)

        def step(c, _):
            return (lax.scan(inner, c, None, length=3)[0] @ w, None)

        return lax.scan(step, x, None, length=4)[0]

    assert total(outer, X, X) == 4 * (3 + 1) * MATMUL


def square(_, x):
    return x @ x


def test_fori_loop_with_constant_bounds():
    assert total(lambda x: lax.fori_loop(2, 7, square, x), X) == 5 * MATMUL
    # As the bounds go through jit they are arrays, and the loop is a `while`.
    jitted = jax.jit(lambda x: lax.fori_loop(jnp.int32(2), jnp.int32(9), square, x))
    assert "while" in str(jax.make_jaxpr(jitted)(X))
    assert total(jitted, X) == 7 * MATMUL
    bound = jax.jit(lambda n, x: lax.fori_loop(0, 2 * n + 1, square, x))
    assert total(lambda x: bound(3, x), X) == 7 * MATMUL
    empty = jax.jit(lambda x: lax.fori_loop(jnp.int32(5), jnp.int32(2), square, x))
    assert total(empty, X) == 0


@pytest.mark.parametrize(
    ("test", "step", "trips"),
    [
        (lambda i: i < 10, 1, 10),
        (lambda i: i <= 10, 1, 11),
        (lambda i: i < 10, 3, 4),
        (lambda i: i < 9, 3, 3),
        (lambda i: 10 > i, 4, 3),
        (lambda i: i > -6, -2, 3),
        (lambda i: i >= -6, -2, 4),
    ],
)
def test_while_loop_with_a_counter(test, step, trips):
    def run(x):
        def body(s):
            return (s[0] + step, s[1] @ s[1])

        return lax.while_loop(lambda s: test(s[0]), body, (0, x))

    i = iterations = 0
    while test(i):
        i, iterations = i + step, iterations + 1
    assert iterations == trips
    assert total(run, X) == trips * MATMUL


def test_while_condition_is_evaluated_once_more_than_the_body():
    def condition(state):
        i, x = state
        jnp.dot(x, x)
        return i < 4

    def run(x):
        return lax.while_loop(condition, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))

    assert total(run, X) == (4 + 5) * MATMUL


def test_early_exit_has_no_trip_count():
    def condition(state):
        i, x = state
        return (i < 4) & (jnp.sum(x) < 1)

    def run(x):
        return lax.while_loop(condition, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))

    with pytest.raises(flops.UnknownTripCount):
        total(run, X)


def test_unknown_trip_count_names_the_line():
    def adaptive(x):
        return lax.while_loop(lambda c: jnp.sum(c) < 1.0, lambda c: c @ c, x)

    line = inspect.getsourcelines(adaptive)[1] + 1
    with pytest.raises(flops.UnknownTripCount) as error:
        total(adaptive, X)
    assert f"test_flops.py:{line}" in str(error.value)
    assert "fori_loop" in str(error.value)
    assert isinstance(error.value, ValueError)
    traced = jax.jit(lambda n, x: lax.fori_loop(0, n, square, x))
    with pytest.raises(flops.UnknownTripCount):
        total(traced, 3, X)


def test_unknown_trip_count_without_flops_is_harmless():
    def fn(key, x):
        halved = lax.while_loop(lambda c: jnp.sum(c) > 1.0, lambda c: c / 2, x)
        return halved @ jax.random.gamma(key, 2.0, (8, 8))

    key = jax.eval_shape(lambda: jax.random.key(0))
    assert total(fn, key, X) == MATMUL


def test_the_default_of_a_platform_counts():
    def both(x):
        return lax.platform_dependent(
            x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x
        )

    counted = flops.count(both, X)
    assert counted.total == flops.count(lambda x: x @ x, X).total > 0
    assert not counted.notes


def test_cond_counts_the_largest_branch_and_says_so():
    def fn(i, x):
        return lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    result = flops.count(fn, spec(dtype=jnp.int32), X)
    assert result.total == 2 * MATMUL
    (note,) = result.notes
    assert "test_flops.py" in note
    assert str(2 * MATMUL) in note
    same = flops.count(lambda p, x: lax.cond(p, lambda: x @ x, lambda: x @ x), True, X)
    assert same.total == MATMUL
    assert same.notes == ()


# --- Calls ----------------------------------------------------------------------------


def test_jit_and_custom_derivatives_count_once():
    @jax.custom_vjp
    def with_vjp(x):
        return x @ x

    with_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))

    @jax.custom_jvp
    def with_jvp(x):
        return x @ x

    with_jvp.defjvp(lambda p, t: (with_jvp(*p), t[0] @ p[0]))
    for fn in (with_vjp, with_jvp, jax.jit(jax.jit(lambda x: x @ x))):
        assert total(fn, X) == MATMUL
    for fn in (with_vjp, with_jvp):
        assert total(jax.grad(lambda x, fn=fn: fn(x).sum()), X) == 2 * MATMUL


def test_linear_solve_counts_its_solver_alone():
    def fn(w, b):
        return lax.custom_linear_solve(
            lambda v: w @ (w @ v), b, lambda matvec, b: w @ b, symmetric=True
        )

    assert total(fn, X, spec(8)) == 2 * 8 * 8


def test_shard_map_multiplies_by_the_manual_axes():
    mesh = AbstractMesh((4, 2), ("data", "model"))
    rows = PartitionSpec("data")
    for axes, devices in (({"data"}, 4), ({"data", "model"}, 8)):
        fn = jax.shard_map(
            lambda x, w: x @ w,
            mesh=mesh,
            in_specs=(rows, PartitionSpec()),
            out_specs=rows,
            axis_names=axes,
        )
        # The second row of devices repeats the work of the first.
        assert total(fn, X, X) == MATMUL * devices // 4


def test_sharded_arguments_count_globally():
    axis = jax.sharding.AxisType.Explicit
    mesh = AbstractMesh((4,), ("data",), axis_types=(axis,))
    with jax.sharding.use_abstract_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
        x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=rows)
        step = jax.value_and_grad(lambda x, w: jnp.sum(x @ w), (0, 1))
        assert total(step, x, X) == 3 * MATMUL


def test_attention():
    q, kv = spec(2, 16, 4, 8), spec(2, 24, 4, 8)
    closed_form = 2 * 2 * (2 * 4) * 16 * 24 * 8
    for causal in (False, True):

        def fn(q, k, v, causal=causal):
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

        forward, step = forward_and_backward(fn, q, kv, kv)
        assert forward == closed_form
        assert step == 3 * forward


def test_cudnn_attention_agrees_with_the_plain_one(monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_: True)
    q, kv = (
        spec(2, 64, 4, 32, dtype=jnp.bfloat16),
        spec(2, 128, 4, 32, dtype="bfloat16"),
    )

    def step(implementation):
        def loss(q, k, v):
            out = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32))

        return flops.count(jax.value_and_grad(loss, (0, 1, 2)), q, kv, kv)

    plain, kernel = step("xla"), step("cudnn")
    assert "dot_product_attention_bwd_wrapper" in kernel.by_primitive
    assert kernel.model == plain.total
    assert kernel.recomputed == plain.total // 6  # q.k: half of the forward


def test_pallas_calls_need_a_cost_estimate():
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    def call(x, estimate):
        return pl.pallas_call(kernel, out_shape=X, cost_estimate=estimate)(x)

    with pytest.raises(flops.UncountedPrimitive, match="cost_estimate"):
        total(lambda x: call(x, None), X)
    estimate = pl.CostEstimate(flops=MATMUL, transcendentals=0, bytes_accessed=0)
    assert total(lambda x: call(x, estimate), X) == MATMUL
    assert total(jax.vmap(lambda x: call(x, estimate)), spec(3, 8, 8)) == 3 * MATMUL


@pytest.mark.parametrize(
    "fn", [jnp.linalg.cholesky, jnp.linalg.svd, jnp.linalg.eigh, jnp.linalg.inv]
)
def test_factorisations_are_refused(fn):
    with pytest.raises(flops.UncountedPrimitive, match="test_flops.py"):
        total(lambda x: fn(x), X)


# --- Remat ----------------------------------------------------------------------------


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


# --- Networks -------------------------------------------------------------------------


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


# --- Interface ------------------------------------------------------------------------


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


# --- Peaks ----------------------------------------------------------------------------


def test_every_peak_has_a_source_and_sane_numbers():
    for name, row in peaks.PEAKS.items():
        assert len(row.source) > 10, name
        assert row.device_kinds, name
        assert 8e9 < row.memory_bytes < 300e9, name
        assert row.flops_per_second, name
        for dtype, rate in row.flops_per_second.items():
            assert dtype in ("bfloat16", "float16", "tensorfloat32", "float32"), name
            assert 5e12 < rate < 5e15, (name, dtype)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("TPU v2", 22.5e12),
        ("TPU v3", 61.5e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_device_kinds_as_jax_reports_them(kind, rate):
    assert peaks.peak(kind).flops_per_second["bfloat16"] == rate
    share, source = peaks.mfu(rate, kind, 2)
    assert share == 0.5
    assert source == peaks.peak(kind).source


@pytest.mark.parametrize(
    ("kind", "dtype", "reason"),
    [
        ("cpu", "bfloat16", "'cpu'"),
        ("TPU v5 lite pro", "bfloat16", "TPU v5 lite pro"),
        ("NVIDIA H100", "bfloat16", "NVIDIA H100"),
        ("Tesla T4", "bfloat16", "no published bfloat16 rate"),
        ("TPU v4", "float32", "no published float32 rate"),
    ],
)
def test_unknown_peaks_give_a_reason_and_no_number(kind, dtype, reason):
    row = peaks.peak(kind, dtype)
    assert isinstance(row, peaks.Unknown)
    assert reason in row.reason
    assert "PEAKS" in row.reason
    assert peaks.mfu(1e12, kind, 1, dtype) == (None, row.reason)


def test_mfu_refuses_the_impossible():
    share, reason = peaks.mfu(700e12, "NVIDIA H200", 1, "float32")
    assert share is None
    assert "number format" in reason
    with pytest.raises(ValueError, match="n_devices"):
        peaks.mfu(1e12, "TPU v4", 0)
