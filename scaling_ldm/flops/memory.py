"""Peak memory of a JAX function on one device, estimated by walking its jaxpr.

Nothing is compiled. The operations are taken in the order of the jaxpr, and every array
lives from the operation that makes it to the last one that reads it. The rest is what
XLA is known to do:

- Calls (jit, remat, custom derivatives, shard_map) are part of their caller.
- A loop's body is counted once, on top of what lives around the loop. Slices of stacked
  inputs are read where they are.
- Elementwise operations are fused: an array is not stored if only elementwise
  operations and reductions read it. What it is made of then lives until they have.
- Outputs take the place of donated inputs of the same shape and type.
- A kernel of another compiler (`pallas_call`, custom calls) stores its outputs.
- Under an explicit mesh the bytes are those of one device: shapes are divided as their
  shardings say, and the body of a `shard_map` has the shapes of one device.

`COMPILERS` has what differs between backends, with the reason for each. Not counted:
workspaces of kernels, constants, fragmentation, and another order than the jaxpr's.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core as jex_core
from jax.sharding import AxisType

from scaling_ldm.flops.operations import inner_jaxprs, open_jaxpr

# Operations that XLA computes inside of the kernels that read them.
_FUSED = frozenset(
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
# They read an array in the kernel that makes it, and store something smaller.
_REDUCTIONS = frozenset(
    """argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max
    reduce_min reduce_or reduce_prod reduce_sum reduce_xor""".split()
)
# They give the same array another shape or name.
_VIEWS = frozenset(
    """expand_dims name optimization_barrier pcast pvary reshape reshard
    sharding_constraint squeeze stop_gradient""".split()
)
_LARGEST = 8  # arrays that a result names


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """What a backend of XLA does that takes memory.

    Attributes:
      tile: rows of float32 and columns that two axes of an array are padded to; the
        axes are those that lose least. (1, 1): nothing is padded.
      casts_before_loops: whether a loop that casts its slices of a stacked input to a
        smaller type gets the whole stack in that type.
      overlaps: whether collectives in a loop run beside its arithmetic. Then two
        blocks' gathered arrays exist at once, and what is scattered until the body
        ends.
      copies_stacks: whether what one loop stacked is copied to another order of axes
        for the loop that reads it.
      merges: whether stored elementwise results of one array come from one kernel, and
        so exist at once.
      hoists: whether the conditions and values of `where` that are the same in every
        turn of a loop are stored in front of it, as large as the result: masks of
        attention, and what stands in place of masked scores.
    """

    tile: tuple[int, int] = (1, 1)
    casts_before_loops: bool = False
    overlaps: bool = False
    copies_stacks: bool = False
    merges: bool = False
    hoists: bool = False


COMPILERS = {
    "tpu": Compiler(tile=(8, 128), casts_before_loops=True, overlaps=True),
    "gpu": Compiler(copies_stacks=True, merges=True, hoists=True),
}


_Largest = tuple[tuple[int, str, tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """What one call of a function holds on one device; bytes.

    Attributes:
      inputs: all inputs, which live as long as the call.
      temporaries: the most that is held beside them at once.
      largest: bytes, operation and shape of the largest arrays at that time.
    """

    inputs: int
    temporaries: int
    largest: _Largest = ()

    @property
    def total(self) -> int:
        return self.inputs + self.temporaries


def peak(jaxpr: Any, compiler: Compiler, donated: int = 0) -> PeakMemory:
    """The peak memory of a function on one device.

    Args:
      jaxpr: of `jax.make_jaxpr`, traced under the mesh, if there is one.
      compiler: one of `COMPILERS`.
      donated: how many of the inputs, from the first, may be overwritten by outputs.
    """
    opened, _ = open_jaxpr(jaxpr)
    walker = _Walker(compiler)
    env = walker.inputs(opened)
    given = [env[v].nbytes for v in opened.invars]
    operations = walker.flat(opened, env)
    outputs = [env[v] for v in opened.outvars if isinstance(v, jex_core.Var)]
    free = [env[v].kind for v in opened.invars[:donated]]
    for value in dict.fromkeys(outputs):
        if value.kind in free:
            free.remove(value.kind)
            value.nbytes = 0
    temporaries, largest = walker.most(operations, outputs, in_loop=False)
    return PeakMemory(inputs=sum(given), temporaries=temporaries, largest=largest)


class _Value:
    """An array of the flat program, with its shape and bytes on one device."""

    def __init__(self, aval: Any, tile: tuple[int, int]) -> None:
        dtype = getattr(aval, "dtype", None)  # a token has none
        self.kind = getattr(aval, "shape", ()), str(dtype)
        self.shape = shape_on_device(aval)
        self.itemsize = getattr(dtype, "itemsize", 8) if dtype is not None else 0
        self.nbytes = padded_bytes(self.shape, self.itemsize, tile)


@dataclass(eq=False)
class _Operation:
    """An operation of the flat program.

    held: bytes inside of it, while it runs, beside its outputs.
    """

    name: str
    inputs: list[_Value]
    outputs: list[_Value]
    held: int = 0
    inside: _Largest = ()


@dataclass(eq=False)
class _Body:
    """A loop's body: what runs in it, its inputs, and its peak."""

    operations: list[_Operation]
    inputs: list[_Value]
    held: int
    largest: _Largest


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

    The minor axes are the two of which padding adds least.

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


@dataclass
class _Walker:
    """Turns jaxprs into flat programs, and finds their peaks."""

    compiler: Compiler
    # (array, what for) -> the copy that loops read in its place.
    copies: dict[tuple[_Value, str], _Value] = field(default_factory=dict)
    stacked: set[_Value] = field(default_factory=set)  # arrays that a loop has made
    seen: dict[Any, _Value] = field(default_factory=dict)
    # Shape and type -> what loops read in every turn, stored once.
    constants: dict[tuple[Any, ...], _Value] = field(default_factory=dict)

    def inputs(self, jaxpr: Any) -> dict[Any, _Value]:
        return {v: self._value(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars)}

    def _value(self, aval: Any) -> _Value:
        if aval not in self.seen:  # an array's own value, with what is known of its kind
            self.seen[aval] = _Value(aval, self.compiler.tile)
        return copy.copy(self.seen[aval])

    def flat(self, jaxpr: Any, env: dict[Any, _Value]) -> list[_Operation]:
        """The operations of a jaxpr with those of its calls; fills `env`."""
        found: list[_Operation] = []
        for eqn in jaxpr.eqns:
            called = _called(eqn)
            if eqn.primitive.name in _VIEWS and len(eqn.invars) == len(eqn.outvars):
                seen = [self._read(env, atom) for atom in eqn.invars]
                env.update(zip(eqn.outvars, seen, strict=True))
                continue
            if called is None:
                found += self._operation(eqn, env)
                continue
            own = {v: self._value(v.aval) for v in called.constvars}
            for variable, atom in zip(called.invars, eqn.invars, strict=True):
                own[variable] = self._read(env, atom)
            found += self.flat(called, own)
            for variable, atom in zip(eqn.outvars, called.outvars, strict=True):
                env[variable] = self._read(own, atom)
        return found

    def _read(self, env: dict[Any, _Value], atom: Any) -> _Value:
        if isinstance(atom, jex_core.Var):
            return env[atom]
        return self._value(atom.aval)

    def _operation(self, eqn: Any, env: dict[Any, _Value]) -> list[_Operation]:
        """One equation that is no call, after the copies that a loop needs."""
        params = eqn.params
        inputs = [env[v] for v in eqn.invars if isinstance(v, jex_core.Var)]
        outputs = [self._value(v.aval) for v in eqn.outvars]
        env.update(zip(eqn.outvars, outputs, strict=True))
        one = _Operation(eqn.primitive.name, inputs, outputs)
        before: list[_Operation] = []
        bodies: list[_Body] = []
        if one.name == "scan":
            (body,) = bodies = [self._body(params["jaxpr"])]
            first = params["num_consts"] + params["num_carry"]
            for atom, part in zip(
                eqn.invars[first:], body.inputs[first:], strict=True
            ):
                whole = self._read(env, atom)
                for what, size in self._wanted(whole, part, body):
                    if (whole, what) not in self.copies:
                        made = copy.copy(whole)
                        made.nbytes = size
                        self.copies[whole, what] = made
                        before.append(_Operation(what, [whole], [made]))
                    inputs.append(self.copies[whole, what])
            fixed = set(body.inputs[params["num_consts"] :])
            for constant in self._hoisted(body.operations, fixed):
                key = constant.kind
                if key not in self.constants:
                    self.constants[key] = constant
                    before.append(_Operation("before_loop", [], [constant]))
                inputs.append(self.constants[key])
            self.stacked.update(outputs[params["num_carry"] :])
        elif one.name == "while":
            bodies = [self._body(params["body_jaxpr"])]
        elif one.name == "cond":
            bodies = [self._body(branch) for branch in params["branches"]]
        if bodies:
            most = max(bodies, key=lambda body: body.held)
            one.held, one.inside = most.held, most.largest
        return [*before, one]

    def _wanted(
        self, whole: _Value, part: _Value, body: _Body
    ) -> Iterator[tuple[str, int]]:
        """The copies of a stacked array for its loop: (what it is, bytes).

        Args:
          part: the array's slice in the body.
        """
        if self.compiler.casts_before_loops:
            kinds = _casts(part, body.operations)
            smallest = min((one.itemsize for one in kinds), default=part.itemsize)
            if smallest < part.itemsize:
                size = padded_bytes(whole.shape, smallest, self.compiler.tile)
                yield "cast_of_stack", size
        if self.compiler.copies_stacks and whole in self.stacked:
            if len(whole.shape) >= 4:  # loop, rows, tokens and features
                yield "transposed_stack", whole.nbytes

    def _hoisted(
        self, operations: list[_Operation], changing: set[_Value]
    ) -> Iterator[_Value]:
        """Operands of `where` in a body that follow from no carried or stacked input.

        Args:
          changing: the inputs of the body that change; it is extended.
        """
        if not self.compiler.hoists:
            return
        for one in operations:
            moves = not changing.isdisjoint(one.inputs)
            if moves:
                changing.update(one.outputs)
            if moves and one.name == "select_n":
                for value in one.inputs:
                    if value not in changing and value.shape:
                        yield copy.copy(value)

    def _body(self, jaxpr: Any) -> _Body:
        opened, _ = open_jaxpr(jaxpr)
        env = self.inputs(opened)
        operations = self.flat(opened, env)
        outputs = [env[v] for v in opened.outvars if isinstance(v, jex_core.Var)]
        given = [env[v] for v in opened.invars]
        # What only passes through takes no more room than the loop's own inputs.
        outputs = [value for value in outputs if value not in given]
        held, largest = self.most(operations, outputs, in_loop=True)
        return _Body(operations, given, held, largest)

    def most(
        self, operations: list[_Operation], outputs: list[_Value], in_loop: bool
    ) -> tuple[int, _Largest]:
        """The most that a flat program holds at once beside its inputs, and of what."""
        operations = _needed(operations, outputs)
        stored, last = _lives(operations, outputs)
        end = len(operations)
        if self.compiler.merges:
            _merge(operations, stored, last)
        overlaps = in_loop and self.compiler.overlaps
        if overlaps:
            for one in operations:
                if one.name == "reduce_scatter":
                    last.update(dict.fromkeys(one.inputs, end))
        ends: dict[int, list[_Value]] = defaultdict(list)
        alive: dict[_Value, tuple[int, str]] = {}
        most, largest = 0, ()
        now = 0
        if overlaps:  # the arrays that the next turn of the loop gathers
            gathered = (one for one in operations if one.name == "all_gather")
            now = sum(v.nbytes for one in gathered for v in one.outputs)
        for place, one in enumerate(operations):
            for value in one.outputs:
                if value in stored:
                    now += value.nbytes
                    ends[last.get(value, place)].append(value)
                    alive[value] = value.nbytes, one.name
            if now + one.held > most:
                most = now + one.held
                held = [(size, name, v.shape) for v, (size, name) in alive.items()]
                held += one.inside
                largest = tuple(sorted(held, reverse=True)[:_LARGEST])
            for value in ends.pop(place, ()):
                now -= value.nbytes
                del alive[value]
        return most, largest


def _called(eqn: Any) -> Any:
    """The jaxpr that an equation calls; None: it is no call."""
    if eqn.primitive.name in ("scan", "while", "cond", "pallas_call"):
        return None
    found = [open_jaxpr(one)[0] for one in inner_jaxprs(eqn.params)]
    if len(found) != 1 or len(found[0].invars) != len(eqn.invars):
        return None
    same = len(found[0].outvars) == len(eqn.outvars)
    return found[0] if same and not eqn.primitive.name.startswith("reduce") else None


def _casts(part: _Value, operations: list[_Operation]) -> list[_Value]:
    """What a slice is cast to; [] if anything reads it as it is."""
    readers = [one for one in operations if part in one.inputs]
    if any(one.name != "convert_element_type" for one in readers):
        return []
    return [value for one in readers for value in one.outputs]


def _needed(
    operations: list[_Operation], outputs: list[_Value]
) -> list[_Operation]:
    """The operations that the outputs follow from."""
    wanted, found = set(outputs), []
    for one in reversed(operations):
        if not wanted.isdisjoint(one.outputs):
            wanted.update(one.inputs)
            found.append(one)
    return found[::-1]


def _lives(
    operations: list[_Operation], outputs: list[_Value]
) -> tuple[set[_Value], dict[_Value, int]]:
    """Which arrays are stored, and the place of the last operation that reads each."""
    readers: dict[_Value, list[_Operation]] = defaultdict(list)
    for one in operations:
        for value in one.inputs:
            readers[value].append(one)
    kept, stored = set(outputs), set()
    for one in operations:
        for value in one.outputs:
            fused = one.name in _FUSED and value not in kept
            if not fused or any(
                reader.name not in _FUSED and reader.name not in _REDUCTIONS
                for reader in readers[value]
            ):
                stored.add(value)
    last: dict[_Value, int] = dict.fromkeys(outputs, len(operations))
    for place in range(len(operations) - 1, -1, -1):
        one = operations[place]
        until = [last.get(v, place) for v in one.outputs if v not in stored]
        for value in one.inputs:
            last[value] = max(last.get(value, place), place, *until)
    return stored, last


def _merge(
    operations: list[_Operation], stored: set[_Value], last: dict[_Value, int]
) -> None:
    """Lets elementwise results of one stored array live until the last is made.

    One kernel makes them, unless one follows from another.
    """
    sources: dict[_Value, set[_Value]] = {}  # fused, not stored -> stored arrays
    results: dict[_Value, list[tuple[int, _Value]]] = defaultdict(list)
    for place, one in enumerate(operations):
        if one.name not in _FUSED:
            continue
        read: set[_Value] = set()
        for value in one.inputs:
            read |= sources.get(value, {value})
        for value in one.outputs:
            if value not in stored:
                sources[value] = read
            else:
                for source in read:
                    results[source].append((place, value))
    follows = _follows(operations)
    largest = max((value.nbytes for value in stored), default=0)
    for made in results.values():
        made = [(p, value) for p, value in made if value.nbytes >= largest / 100]
        for place, value in made:
            later = (p for p, _ in made if p > place and not follows[p] >> place & 1)
            last[value] = max(last.get(value, place), *later, place)


def _follows(operations: list[_Operation]) -> list[int]:
    """For each operation the places of those it follows from, as bits."""
    makers: dict[_Value, int] = {}
    found: list[int] = []
    for place, one in enumerate(operations):
        bits = 0
        for value in one.inputs:
            if value in makers:
                bits |= found[makers[value]] | 1 << makers[value]
        found.append(bits)
        makers.update(dict.fromkeys(one.outputs, place))
    return found
