"""Peak memory from a jaxpr, against peaks counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from scaling_ldm.flops import lifetimes, memory

N = 64
A = 4 * N * N  # bytes of a float32 matrix
PLAIN = memory.Compiler()
matrix = jax.ShapeDtypeStruct((N, N), jnp.float32)


def peak(fn, *args, compiler=PLAIN, donated=0):
    return memory.peak(jax.make_jaxpr(fn)(*args), compiler, donated)


def test_of_a_chain_of_products_two_arrays_live_at_once():
    found = peak(lambda x, w: x @ w @ w @ w, matrix, matrix)
    assert found.inputs == 2 * A
    assert found.temporaries == 2 * A  # a product, and the one that it is made of
    assert found.total == 4 * A
    assert found.largest[0] == (A, "dot_general", (N, N))


def test_two_branches_live_until_they_join():
    def fn(x):
        one, two = x @ x, x @ x.T
        return one @ two, one

    # x.T is read by a product, so it is stored, but dies before the join.
    assert peak(fn, matrix).temporaries == 3 * A


def test_a_fused_chain_is_not_stored_and_its_source_lives():
    def fn(x):
        y = x @ x
        z = jnp.exp(jnp.sin(y) + 1.0)  # only a sum reads it
        w = x @ x.T
        return jnp.sum(z * w)

    # y (for z) with x.T and w; neither sin, exp nor the product z * w is stored.
    assert peak(fn, matrix).temporaries == 3 * A
    stored = peak(lambda x: jnp.exp(x @ x) @ x, matrix)  # a product reads exp
    assert stored.temporaries == 2 * A


def test_a_loop_counts_its_body_once_beside_what_it_stacks():
    def fn(x, w):
        return jax.lax.scan(lambda c, w: ((c @ w) @ w, None), x, w)[0]

    stack = jax.ShapeDtypeStruct((5, N, N), jnp.float32)
    found = peak(fn, matrix, stack)
    assert found.inputs == 6 * A
    # The loop's result, and in a turn both products.
    assert found.temporaries == 3 * A

    def kept(x, w):
        return jax.lax.scan(lambda c, w: (c @ w, c), x, w)

    # Carry and stack of five, and the new carry in a turn: old ones only pass through.
    assert peak(kept, matrix, stack).temporaries == 7 * A


def loss(policy):
    def block(x, w):
        return jnp.tanh((x @ w) @ w) @ w

    def fn(x, w):
        apply = jax.checkpoint(block) if policy else block
        return jnp.sum(jax.lax.scan(lambda c, w: (apply(c, w), None), x, w)[0])

    return jax.grad(fn, argnums=1)


def test_remat_keeps_the_blocks_inputs_alone():
    depth = 20
    stack = jax.ShapeDtypeStruct((depth, N, N), jnp.float32)
    kept = peak(loss(False), matrix, stack).temporaries
    again = peak(loss(True), matrix, stack).temporaries
    # Kept by remat: inputs (20) beside the gradient (20), and what one block needs.
    assert 2 * depth * A < again <= (2 * depth + 8) * A
    assert kept >= (4 * depth) * A  # and two products of each block more


def test_donated_inputs_make_room_for_outputs():
    def step(w, m, x):
        g = x @ w
        m = 0.9 * m + g
        return w - m, m, x @ x

    kept = peak(step, matrix, matrix, matrix)
    given = peak(step, matrix, matrix, matrix, donated=2)
    assert kept.temporaries == 3 * A  # the outputs; g is gone
    assert given.temporaries == A  # the output that nothing was given for, or g
    assert given.inputs == kept.inputs == 3 * A


def test_a_mesh_divides_what_devices_share():
    mesh = AbstractMesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)

    def placed(*spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=sharding)

    def fn(x, w):
        def of_device(x, w):
            return jnp.sin(x) @ jax.lax.all_gather(w, "b", axis=0, tiled=True)

        rows = PartitionSpec(("a", "b"))
        split = (rows, PartitionSpec("b"))
        return jax.shard_map(of_device, in_specs=split, out_specs=rows)(x, w)

    with jax.sharding.use_abstract_mesh(mesh):
        found = peak(fn, placed(("a", "b")), placed("b"))
    assert found.inputs == A // 8 + A // 4
    assert found.temporaries == A // 8 + A + A // 8  # sin(x), the whole w, the product


def test_a_kernel_of_another_compiler_stores_its_outputs_alone():
    from jax.experimental import pallas as pl

    def kernel(x_ref, y_ref):
        y_ref[...] = jnp.exp(x_ref[...] @ x_ref[...])

    def fn(x):
        shape = jax.ShapeDtypeStruct((N, N), jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape)(x)

    assert peak(fn, matrix).temporaries == A


@pytest.mark.parametrize(
    ("shape", "itemsize", "padded"),
    [
        ((864, 1728), 4, 864 * 1792 * 4),
        ((27, 64, 216), 4, 27 * 64 * 256 * 4),  # 64 rows, 216 columns: 256
        ((27, 334, 334), 2, 27 * 336 * 384 * 2),  # rows of bfloat16 by sixteen
        ((8, 128), 4, 8 * 128 * 4),
        ((5,), 4, 20),
        ((0, 3), 4, 0),
    ],
)
def test_arrays_are_padded_to_tiles(shape, itemsize, padded):
    assert lifetimes.padded_bytes(shape, itemsize, (8, 128)) == padded


def stacked(x, w):
    def block(c, w):
        return c @ w.astype(jnp.bfloat16), None

    return jax.lax.scan(block, x, w)[0]


def test_a_loop_that_casts_its_stack_gets_it_cast():
    x = jax.ShapeDtypeStruct((N, N), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((9, N, N), jnp.float32)
    without = peak(stacked, x, w)
    casting = memory.Compiler(casts_before_loops=True)
    found = peak(stacked, x, w, compiler=casting)
    assert found.temporaries - without.temporaries == 9 * A // 2


def test_two_loops_share_the_cast_of_a_stack():
    x = jax.ShapeDtypeStruct((N, N), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((9, N, N), jnp.float32)
    wide = jax.ShapeDtypeStruct((N, 40 * N), jnp.bfloat16)

    def fn(x, w, wide):
        between = stacked(x, w) @ wide  # 20 A, between the loops
        return stacked(jnp.einsum("nm,km->nk", between, wide), w)

    casting = memory.Compiler(casts_before_loops=True)
    found = peak(fn, x, w, wide, compiler=casting)
    assert found.temporaries == 20 * A + 9 * A // 2 + A // 2


def test_a_stack_of_one_loop_is_copied_for_another():
    x = jax.ShapeDtypeStruct((2, N, N), jnp.float32)

    def fn(x):
        _, kept = jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, length=7)
        return jax.lax.scan(lambda c, k: (c + k, None), x, kept)[0]

    copying = memory.Compiler(copies_stacks=True)
    assert peak(fn, x, compiler=copying).temporaries == 2 * 7 * 2 * A
    assert peak(fn, x).temporaries < 2 * 7 * 2 * A


def test_a_stack_that_was_copied_is_gone_in_the_loop_that_reads_the_copy():
    x = jax.ShapeDtypeStruct((2, N, N), jnp.float32)
    wide = jax.ShapeDtypeStruct((N, 40 * N), jnp.float32)

    def fn(x, wide):
        _, kept = jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, length=7)

        def turn(c, k):
            return c + jnp.einsum("bnm,bmk->bnk", k @ wide, (k @ wide).mT), None

        return jax.lax.scan(turn, x, kept)[0]

    copying = memory.Compiler(copies_stacks=True)
    found = peak(fn, x, wide, compiler=copying).temporaries
    assert found == peak(fn, x, wide).temporaries
    assert found > 3 * 7 * 2 * A  # so a second stack would be seen


def test_results_of_one_kernel_exist_at_once():
    def fn(x):
        y = x @ x
        one = jnp.exp(y) @ x  # exp(y) could die before sin(y) is made
        two = jnp.sin(y) @ x
        return jnp.sum(one) + jnp.sum(two)

    merging = memory.Compiler(merges=True)
    more = peak(fn, matrix, compiler=merging).temporaries - peak(fn, matrix).temporaries
    assert more == A

    def chain(x):
        y = x @ x
        one = jnp.exp(y) @ x
        return (jnp.sin(y) + one) @ x  # follows from exp(y): never of its kernel

    assert (
        peak(chain, matrix, compiler=merging).temporaries
        == peak(chain, matrix).temporaries
    )


def test_results_that_share_no_more_than_a_bias_are_not_of_one_kernel():
    bias = jax.ShapeDtypeStruct((1, N), jnp.float32)

    def fn(x, b):
        one = jnp.exp(x @ x + b) @ x
        return jnp.sin(one @ x + b) @ x  # exp(x @ x + b) is gone

    merging = memory.Compiler(merges=True)
    found = peak(fn, matrix, bias, compiler=merging).temporaries
    assert found == peak(fn, matrix, bias).temporaries

    def shared(x, b):  # in the forward pass and once more, as remat does
        one = jnp.exp(x @ x + b) @ x
        return (one @ jnp.sin(x @ x.T + b)) @ x

    found = peak(shared, matrix, bias, compiler=merging).temporaries
    assert found == peak(shared, matrix, bias).temporaries


def test_collectives_beside_arithmetic_hold_two_turns_of_a_loop():
    mesh = AbstractMesh((4,), ("b",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "b"))
    w = jax.ShapeDtypeStruct((6, N, N), jnp.float32, sharding=sharding)

    def of_device(w):
        def turn(c, w):
            return c @ jax.lax.all_gather(w, "b", axis=0, tiled=True), None

        x = jax.lax.pcast(jnp.zeros((N, N)), "b", to="varying")
        return jax.lax.scan(turn, x, w)[0]

    def fn(w):
        specs = PartitionSpec(None, "b"), PartitionSpec("b")
        return jax.shard_map(of_device, in_specs=specs[0], out_specs=specs[1])(w)

    with jax.sharding.use_abstract_mesh(mesh):
        plain = peak(fn, w)
        found = peak(fn, w, compiler=memory.Compiler(overlaps=True))
    assert found.temporaries - plain.temporaries == A


def masked(x, mask):
    def turn(c, _):
        return jnp.where(mask, c @ c, -1e30), None

    return jax.lax.scan(turn, x, length=5)[0]


def test_masks_of_a_loop_are_stored_in_front_of_it():
    mask = jax.ShapeDtypeStruct((1, N), jnp.bool_)
    hoisting = memory.Compiler(hoists=True)
    more = peak(masked, matrix, mask, compiler=hoisting).temporaries
    more -= peak(masked, matrix, mask).temporaries
    assert more == A + A // 4  # the value of masked scores, and the mask itself


def test_a_later_loops_first_turn_is_computed_during_the_loop_before():
    stack = jax.ShapeDtypeStruct((5, N, N), jnp.float32)

    def loop(c, w):
        def turn(c, w):
            again = w @ w  # follows from the stack alone
            return c @ again, None

        return jax.lax.scan(turn, c, w)[0]

    def fn(c, w):
        return loop(loop(c, w), w)

    peeling = memory.Compiler(peels=True)
    one = peak(loop, matrix, stack, compiler=peeling).temporaries
    assert one == peak(loop, matrix, stack).temporaries == 3 * A
    # During the first loop, w @ w of the second one lives. During the second one, the
    # first one's result does.
    plain = peak(fn, matrix, stack).temporaries
    assert plain == 4 * A
    assert peak(fn, matrix, stack, compiler=peeling).temporaries == 4 * A

    def wide(c, w):
        return jnp.sum(loop(loop(c, w)[:1], w))

    assert peak(wide, matrix, stack, compiler=peeling).temporaries == 4 * A
    assert peak(wide, matrix, stack).temporaries == 3 * A


def on_mesh(fn, replicas, *args, compiler=PLAIN):
    """The peak of a function of one device's arrays; all are the same everywhere."""
    axes = ("replica", "fsdp")
    mesh = AbstractMesh((replicas, 4), axes, axis_types=(AxisType.Explicit,) * 2)

    def of_device(*args):
        return fn(*(jax.lax.pcast(one, axes, to="varying") for one in args))

    def whole(*args):
        specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(axes)}
        return jax.shard_map(of_device, **specs)(*args)

    with jax.sharding.use_abstract_mesh(mesh):
        return peak(whole, *args, compiler=compiler).temporaries


POSTPONING = memory.Compiler(postpones=True)


def test_products_that_only_a_reduce_scatter_waits_for_wait_for_the_next_loop():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    def fn(x, then=loop):
        parts = []
        for _ in range(3):
            x = x @ x
            parts.append(jax.lax.psum_scatter(x @ x, "fsdp", tiled=True))
        return then(x), parts

    # In order: the loop's input, its result and a product in it, three parts.
    assert on_mesh(fn, 1, matrix) == 3 * A + 3 * A // 4
    # All three results of the products live in the loop.
    assert on_mesh(fn, 1, matrix, compiler=POSTPONING) == 5 * A

    def without(x):
        return fn(x, then=lambda x: x)

    assert on_mesh(without, 1, matrix, compiler=POSTPONING) == on_mesh(
        without, 1, matrix
    )

    def read_elsewhere(x):
        x = x @ x
        product = x @ x
        part = jax.lax.psum_scatter(product, "fsdp", tiled=True)
        return part, loop(product)

    assert on_mesh(read_elsewhere, 1, matrix, compiler=POSTPONING) == on_mesh(
        read_elsewhere, 1, matrix
    )


@pytest.mark.parametrize(("replicas", "more"), [(1, A), (2, 0)])
def test_a_loop_that_scatters_gradients_holds_what_those_of_one_more_turn_read(
    replicas, more
):
    def fn(x, w):
        def turn(c, w):
            new = c @ w
            part = jax.lax.psum_scatter(c @ new, "fsdp", tiled=True)
            return new, jax.lax.psum(part, "replica")

        return jax.lax.scan(turn, x, w)

    stack = jax.ShapeDtypeStruct((5, N, N), jnp.float32)
    held = on_mesh(fn, replicas, matrix, stack, compiler=POSTPONING)
    assert held - on_mesh(fn, replicas, matrix, stack) == more
