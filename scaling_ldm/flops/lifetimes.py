"""Which arrays of a flat program are stored, and until when.

A flat program is a list of operations without calls, in the order in which they run.
`memory` makes it of a jaxpr.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import AxisType

# Operations that XLA computes inside of the kernels that read them.
FUSED = frozenset(
    """abs acos add add_any and argsort_keys asin atan atan2 bitcast_convert_type
    broadcast_in_dim cbrt ceil clamp concatenate convert_element_type copy copy_p cos
    cosh div dynamic_slice eq erf erf_inv erfc exp exp2 expand_dims expm1 floor gather
    ge gt imag integer_pow iota is_finite le log log1p logistic lt max min mul name ne
    neg nextafter not optimization_barrier or pad pcast pow pvary random_bits
    random_fold_in random_seed random_unwrap random_wrap real reduce_precision rem
    reshape reshard rev round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sharding_constraint sign sin sinh slice split sqrt square
    squeeze stop_gradient sub tan tanh threefry2x32 transpose xor""".split()
)
# They run in the kernel that makes their input and store a smaller result.
REDUCTIONS = frozenset(
    """argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max
    reduce_min reduce_or reduce_prod reduce_sum reduce_xor""".split()
)

# Bytes, operation and shape of arrays, the largest first.
Largest = tuple[tuple[int, str, tuple[int, ...]], ...]


class Value:
    """An array of the flat program, with its shape and bytes on one device."""

    def __init__(self, aval: Any, tile: tuple[int, int]) -> None:
        dtype = getattr(aval, "dtype", None)  # a token has none
        self.kind = getattr(aval, "shape", ()), str(dtype)
        self.shape = shape_on_device(aval)
        self.itemsize = getattr(dtype, "itemsize", 8) if dtype is not None else 0
        self.nbytes = padded_bytes(self.shape, self.itemsize, tile)


@dataclass(eq=False)
class Operation:
    """An operation of the flat program.

    held: bytes inside of it, while it runs, beside its outputs.
    early: of a loop, the part of `held` that depends on constants and stacked inputs
      only, and is read by operations that depend on the carry.
    """

    name: str
    inputs: list[Value]
    outputs: list[Value]
    held: int = 0
    early: int = 0
    inside: Largest = ()


def shape_on_device(aval: Any) -> tuple[int, ...]:
    """The shape of an abstract array on one device of its explicit mesh."""
    shape = list(getattr(aval, "shape", ()))
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return tuple(shape)
    mesh = sharding.mesh
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    # Inside of a shard_map shapes are those of a device, and its axes are manual.
    sizes = {name: size for name, size, kind in axes if kind != AxisType.Manual}
    for i, names in enumerate(sharding.spec):
        for name in names if isinstance(names, tuple) else (names,):
            shape[i] = -(-shape[i] // sizes.get(name, 1))
    return tuple(shape)


def padded_bytes(shape: Sequence[int], itemsize: int, tile: tuple[int, int]) -> int:
    """Bytes of an array whose two minor axes are padded to a tile.

    The minor axes are the two for which padding adds fewest bytes.

    Args:
      tile: rows of four bytes each, and columns; smaller types have more rows.
    """
    plain = math.prod(shape) * itemsize
    if tile == (1, 1) or len(shape) < 2 or plain == 0:
        return plain
    rows, columns = tile[0] * max(4 // itemsize, 1), tile[1]

    def with_minor(row: int, column: int) -> int:
        padded = list(shape)
        padded[row] = -(-shape[row] // rows) * rows
        padded[column] = -(-shape[column] // columns) * columns
        return math.prod(padded) * itemsize

    pairs = itertools.permutations(range(len(shape)), 2)
    return min(with_minor(row, column) for row, column in pairs)


def needed(operations: list[Operation], outputs: list[Value]) -> list[Operation]:
    """The operations on which the outputs depend."""
    wanted, found = set(outputs), []
    for one in reversed(operations):
        if not wanted.isdisjoint(one.outputs):
            wanted.update(one.inputs)
            found.append(one)
    return found[::-1]


def waits_alone(operations: list[Operation], outputs: list[Value]) -> set[Operation]:
    """The products that nothing but a reduce-scatter waits for."""
    readers: dict[Value, list[Operation]] = defaultdict(list)
    for one in operations:
        for value in one.inputs:
            readers[value].append(one)
    wanted = set(outputs)
    found: set[Operation] = set()
    for one in reversed(operations):
        read = [reader for value in one.outputs for reader in readers[value]]
        alone = read and found.issuperset(read) and wanted.isdisjoint(one.outputs)
        if alone or one.name == "reduce_scatter":
            found.add(one)
    return {one for one in found if one.name == "dot_general"}


def postponed(operations: list[Operation], outputs: list[Value]) -> list[Operation]:
    """The operations with `waits_alone`, and what follows, behind the next loop."""
    late = waits_alone(operations, outputs)
    loops = sum(one.name == "scan" for one in operations)  # that are still to come
    found: list[Operation] = []
    waiting: list[Operation] = []
    made: set[Value] = set()
    for one in operations:
        if loops and (one in late or not made.isdisjoint(one.inputs)):
            waiting.append(one)
            made.update(one.outputs)
            continue
        found.append(one)
        if one.name == "scan":
            found += waiting
            waiting, made, loops = [], set(), loops - 1
    return found + waiting


def lives(
    operations: list[Operation], outputs: list[Value]
) -> tuple[set[Value], dict[Value, int]]:
    """Which arrays are stored, and the place of the last operation that reads each."""
    readers: dict[Value, list[Operation]] = defaultdict(list)
    for one in operations:
        for value in one.inputs:
            readers[value].append(one)
    kept, stored = set(outputs), set()
    for one in operations:
        for value in one.outputs:
            fused = one.name in FUSED and value not in kept
            if not fused or any(
                reader.name not in FUSED and reader.name not in REDUCTIONS
                for reader in readers[value]
            ):
                stored.add(value)
    last: dict[Value, int] = dict.fromkeys(outputs, len(operations))
    for place in range(len(operations) - 1, -1, -1):
        one = operations[place]
        until = [last.get(v, place) for v in one.outputs if v not in stored]
        for value in one.inputs:
            last[value] = max(last.get(value, place), place, *until)
    return stored, last


def merge(
    operations: list[Operation], stored: set[Value], last: dict[Value, int]
) -> None:
    """Lets elementwise results of one stored array live until the last is made.

    One kernel makes all elementwise results of an array, except where one depends on
    another. So each lives until the last is made. An array that is broadcast to a
    result, such as a bias, does not put it into a kernel with others: blocks read the
    same bias in the forward pass and again in the backward pass.
    """
    sources: dict[Value, set[Value]] = {}  # fused, not stored -> stored arrays
    results: dict[Value, list[tuple[int, Value]]] = defaultdict(list)
    for place, one in enumerate(operations):
        if one.name not in FUSED:
            continue
        read: set[Value] = set()
        for value in one.inputs:
            read |= sources.get(value, {value})
        for value in one.outputs:
            if value not in stored:
                sources[value] = read
            else:
                for source in read:
                    if math.prod(source.shape) >= math.prod(value.shape):
                        results[source].append((place, value))
    follows = _follows(operations)
    largest = max((value.nbytes for value in stored), default=0)
    for made in results.values():
        made = [(p, value) for p, value in made if value.nbytes >= largest / 100]
        for place, value in made:
            later = (p for p, _ in made if p > place and not follows[p] >> place & 1)
            last[value] = max(last.get(value, place), *later, place)


def _follows(operations: list[Operation]) -> list[int]:
    """For each operation the places of those it follows from, as bits."""
    makers: dict[Value, int] = {}
    found: list[int] = []
    for place, one in enumerate(operations):
        bits = 0
        for value in one.inputs:
            if value in makers:
                bits |= found[makers[value]] | 1 << makers[value]
        found.append(bits)
        makers.update(dict.fromkeys(one.outputs, place))
    return found
