"""Collectives read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scaling_ldm import records
from scaling_ldm.flops.collectives import collectives

ROWS, LAYERS = 64, 5


@pytest.fixture(scope="module")
def compiled_text():
    """Five turns of a loop, each with a gathering and a scattered sum."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    shape = jax.ShapeDtypeStruct(
        (ROWS, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x"))
    )

    def turn(x, _):
        whole = jax.lax.all_gather(x, "x", tiled=True)
        return jax.lax.psum_scatter(jnp.sin(whole), "x", tiled=True), None

    def loop(x):
        return jax.lax.scan(turn, x, None, length=LAYERS)[0]

    with jax.set_mesh(mesh):
        spec = PartitionSpec("x")
        mapped = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec)
        return jax.jit(mapped).lower(shape).compile().as_text()


def test_a_loop_counts_as_often_as_it_turns(compiled_text):
    found = {one.kind: one for one in collectives(compiled_text)}
    assert set(found) == {"all-gather", "reduce-scatter"}
    for one in found.values():
        assert (one.dtype, one.count) == ("f32", LAYERS)
        assert one.nbytes == LAYERS * ROWS * 8 * 4  # of the whole array
        assert not one.at_least


# As libtpu writes a loop of 24 turns: the number stands in the condition alone.
TPU = """
HloModule jit_step

%sum.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body.1 (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%part), dimensions={0}
  %scatter.1 = f32[2,16]{1,0} reduce-scatter(%g), replica_groups=GROUPS, to_apply=%sum.1
}

%condition.1 (p: (s32[], bf16[8,16])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(24)
  %constant.44 = s32[] constant(7)
  ROOT %lt = pred[] compare(%counter, %LIMIT), direction=LT
}

ENTRY %main.1 (p: bf16[8,16]) -> bf16[8,16] {
  %w = (s32[], bf16[8,16]) while(%t), condition=%condition.1, body=%body.1
  %r = (f32[4]{0}, f32[], s32[2]) all-reduce(%a, %b, %c), to_apply=%sum.1
  %s = (bf16[2,2], bf16[8,2]) all-gather-start(%x), dimensions={0}
  %d = bf16[8,2] all-gather-done(%s)
}
"""


def text(groups="{{0,1,2,3}}", limit="constant.4"):
    return TPU.replace("GROUPS", groups).replace("LIMIT", limit)


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1,2,3}}",
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[8]",
        "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}",
    ],
)
def test_each_array_is_counted_whole(groups):
    found = {(one.kind, one.dtype): one for one in collectives(text(groups))}
    counts = {key: (one.count, one.nbytes) for key, one in found.items()}
    assert counts == {
        ("all-gather", "bf16"): (25, 24 * 8 * 16 * 2 + 8 * 2 * 2),
        ("reduce-scatter", "f32"): (24, 24 * 2 * 16 * 4 * 4),
        ("all-reduce", "f32"): (2, 5 * 4),
        ("all-reduce", "s32"): (1, 8),
    }
    assert not any(one.at_least for one in found.values())


def test_gathers_that_the_compiler_has_joined_are_all_counted():
    """Its form where one start has several arrays: (what goes in), (what comes out)."""
    joined = (
        "((bf16[4]{0:T(128)}, f32[8,2]{1,0}), (bf16[32]{0}, /*index=1*/f32[64,2]{1,0}),"
        " u32[], u32[]) all-gather-start(%x, %y), dimensions={0}"
    )
    single = "(bf16[2,2], bf16[8,2]) all-gather-start(%x), dimensions={0}"
    assert single in TPU
    found = collectives(text().replace(single, joined))
    counts = {one.dtype: one for one in found if one.kind == "all-gather"}
    assert counts["f32"].nbytes == 64 * 2 * 4 and counts["f32"].count == 1
    assert counts["bf16"].nbytes == 24 * 8 * 16 * 2 + 32 * 2


SPREAD = """
%start.1 (param.1: bf16[2,2]) -> (bf16[2,2], bf16[8,2], u32[]) {
  %gather.1 = bf16[8,2]{1,0} all-gather(%param.1), channel_id=1, dimensions={0}
  ROOT %c = bf16[2,2] custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (param.2: bf16[2,2]) -> (f32[4], bf16[2,2], bf16[8,2]) {
  %gather.2 = bf16[8,2]{1,0} all-gather(%param.2), channel_id=1, dimensions={0}
  ROOT %tuple.2 = (f32[4], bf16[2,2], bf16[8,2]) tuple(%work, %param.2, %gather.2)
}

%end.1 (param.3: bf16[2,2]) -> bf16[8,2] {
  %gather.3 = bf16[8,2]{1,0} all-gather(%param.3), channel_id=1, dimensions={0}
  ROOT %c = bf16[8,2] custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main.1 (p: bf16[2,2]) -> bf16[8,2] {
  %f1 = (bf16[2,2], bf16[8,2]) fusion(%p), kind=kCustom, calls=%start.1
  %f2 = (f32[4], bf16[2,2], bf16[8,2]) fusion(%f1), calls=%async_collective_fusion.7
  %f3 = (f32[4], bf16[2,2], bf16[8,2]) fusion(%f2), calls=%async_collective_fusion.7
  %f4 = bf16[8,2] fusion(%f3), kind=kCustom, calls=%end.1
  %other = bf16[4] all-gather(%q), channel_id=1, dimensions={0}
}
"""


def test_a_gather_that_is_spread_over_other_work_is_counted_once():
    """Its form on TPUs, where each operation beside it repeats its text."""
    (found,) = collectives(SPREAD)
    assert (found.count, found.nbytes) == (2, 8 * 2 * 2 + 4 * 2)
    # One that starts beside other work.
    beside = SPREAD.replace("%start.1", "%async_collective_fusion.1")
    assert collectives(beside) == [found]


def test_turns_that_are_not_known_are_said():
    found = {(one.kind, one.dtype): one for one in collectives(text(limit="data"))}
    assert found["reduce-scatter", "f32"].at_least
    assert found["reduce-scatter", "f32"].count == 1
    assert not found["all-reduce", "f32"].at_least


def test_most_bytes_first_and_kinds_are_known():
    found = collectives(text())
    assert [one.nbytes for one in found] == sorted(
        (one.nbytes for one in found), reverse=True
    )
    assert {one.kind for one in found} <= set(records.COLLECTIVES)


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule nothing")
    with pytest.raises(ValueError, match="no groups"):
        collectives(text(groups="?"))
