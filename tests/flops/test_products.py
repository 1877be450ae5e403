"""Products, control flow and calls against closed forms and unrolled programs."""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flops_helpers import MATMUL, X, forward_and_backward, spec, total
from jax import lax
from jax.experimental import io_callback, sparse
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, PartitionSpec

from scaling_ldm import flops

# --- Products


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


# --- Control flow


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
    assert f"{pathlib.Path(__file__).name}:{line}" in str(error.value)
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
    assert pathlib.Path(__file__).name in note
    assert str(2 * MATMUL) in note
    same = flops.count(lambda p, x: lax.cond(p, lambda: x @ x, lambda: x @ x), True, X)
    assert same.total == MATMUL
    assert same.notes == ()


# --- Calls


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
    with pytest.raises(flops.UncountedPrimitive, match=pathlib.Path(__file__).name):
        total(lambda x: fn(x), X)


@pytest.mark.parametrize("kind", [sparse.BCOO, sparse.BCSR, sparse.CSR, sparse.COO])
def test_sparse_products_are_refused(kind):
    matrix = kind.fromdense(jnp.eye(8))
    with pytest.raises(flops.UncountedPrimitive, match=pathlib.Path(__file__).name):
        total(lambda x: matrix @ x, X)


def test_code_that_cannot_be_seen_is_refused():
    exported = jax.export.export(jax.jit(lambda x: x @ x))(X)
    for fn in (
        lambda x: jax.pure_callback(lambda a: a @ a, X, x),
        lambda x: io_callback(lambda a: a @ a, X, x),
        exported.call,
    ):
        with pytest.raises(flops.UncountedPrimitive, match="cannot be seen"):
            total(fn, X)
        with pytest.raises(flops.UncountedPrimitive, match="cannot be seen"):
            total(lambda x, fn=fn: lax.scan(lambda c, _: (fn(c), None), x, None, 3), X)


def test_printing_counts_nothing():
    def fn(x):
        jax.debug.print("{}", x)
        jax.debug.callback(print, x)
        return x @ x

    assert total(fn, X) == MATMUL
