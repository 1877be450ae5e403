"""Peak memory of a JAX function on one device, estimated by walking its jaxpr.

Nothing is compiled. The operations are taken in the order of the jaxpr, and every array
lives from the operation that makes it to the last one that reads it. The rest is what
XLA is known to do:

- Calls (jit, remat, custom derivatives, shard_map) are part of their caller.
- A loop's body is counted once, on top of what lives around the loop. Slices of stacked
  inputs are read where they are.
- Elementwise operations are fused: an array is not stored if only elementwise
  operations and reductions read it. Its inputs then live until those operations have
  run.
- Outputs take the place of donated inputs of the same shape and type.
- A kernel of another compiler (`pallas_call`, custom calls) stores its outputs.
- Under an explicit mesh the bytes are those of one device: shapes are divided as their
  shardings say, and the body of a `shard_map` has the shapes of one device.

`COMPILERS` has what differs between backends, with the reason for each. Not counted:
workspaces of kernels, constants and fragmentation. Also assumed: operations run in the
order of the jaxpr.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core as jex_core

from scaling_ldm.flops.lifetimes import (
    Largest,
    Operation,
    Value,
    lives,
    merge,
    needed,
    padded_bytes,
    postponed,
    waits_alone,
)
from scaling_ldm.flops.operations import inner_jaxprs, open_jaxpr

# They give the same array another shape or name.
_VIEWS = frozenset(
    """expand_dims name optimization_barrier pcast pvary reshape reshard
    sharding_constraint squeeze stop_gradient""".split()
)
_SUMS = frozenset(("psum", "psum_invariant"))
_LARGEST = 8  # arrays that a result names
_TRANSPOSED = "transposed_stack"


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """What a backend of XLA does that takes memory.

    Attributes:
      tile: rows of float32 and columns that two axes of an array are padded to: the
        two axes for which padding adds fewest bytes. (1, 1): nothing is padded.
      casts_before_loops: whether a loop that casts its slices of a stacked input to a
        smaller type gets the whole stack in that type.
      overlaps: whether collectives in a loop run beside its arithmetic. Then the
        gathered arrays of two blocks exist at once, and arrays to be scattered live
        until the body ends.
      copies_stacks: whether an array stacked by one loop is copied, with its axes
        reordered, for the loop that reads it. Both exist while it is copied.
      merges: whether stored elementwise results of one array come from one kernel, and
        so exist at once.
      hoists: whether the conditions and values of `where` that are the same in every
        turn of a loop are stored in front of it, as large as the result: masks of
        attention, and what stands in place of masked scores.
      peels: whether the compiler moves the first turn out, before the loop. What that
        turn computes again from stacked inputs alone is then computed early, and lives
        during the loops before.
      postpones: whether products that only a reduce-scatter waits for, gradients of
        weights, wait while a loop runs: those in front of a loop, and those in the
        first turn of a loop whose reduce-scatters nothing else follows. Of such a loop
        a second turn is moved out, and what these products read lives during it.
    """

    tile: tuple[int, int] = (1, 1)
    casts_before_loops: bool = False
    overlaps: bool = False
    copies_stacks: bool = False
    merges: bool = False
    hoists: bool = False
    peels: bool = False
    postpones: bool = False


COMPILERS = {
    "tpu": Compiler(tile=(8, 128), casts_before_loops=True, overlaps=True),
    "gpu": Compiler(
        copies_stacks=True, merges=True, hoists=True, peels=True, postpones=True
    ),
}


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
    largest: Largest = ()

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
    walker = _Flattener(compiler)
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


@dataclass(eq=False)
class _Body:
    """A loop's body: what runs in it, its inputs, and its peak."""

    operations: list[Operation]
    inputs: list[Value]
    held: int
    largest: Largest


@dataclass
class _Flattener:
    """Turns jaxprs into flat programs, and finds their peaks."""

    compiler: Compiler
    # (array, what for) -> the copy that loops read in its place.
    copies: dict[tuple[Value, str], Value] = field(default_factory=dict)
    stacked: set[Value] = field(default_factory=set)  # arrays that a loop has made
    seen: dict[Any, Value] = field(default_factory=dict)
    # Shape and type -> what loops read in every turn, stored once.
    constants: dict[tuple[Any, ...], Value] = field(default_factory=dict)

    def inputs(self, jaxpr: Any) -> dict[Any, Value]:
        return {v: self._value(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars)}

    def _value(self, aval: Any) -> Value:
        # Each array has its own value, with what is known of its kind.
        if aval not in self.seen:
            self.seen[aval] = Value(aval, self.compiler.tile)
        return copy.copy(self.seen[aval])

    def flat(self, jaxpr: Any, env: dict[Any, Value]) -> list[Operation]:
        """The operations of a jaxpr with those of its calls; fills `env`."""
        found: list[Operation] = []
        for eqn in jaxpr.eqns:
            called = _called(eqn)
            if _is_view(eqn):
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

    def _read(self, env: dict[Any, Value], atom: Any) -> Value:
        if isinstance(atom, jex_core.Var):
            return env[atom]
        return self._value(atom.aval)

    def _operation(self, eqn: Any, env: dict[Any, Value]) -> list[Operation]:
        """One equation that is no call, after the copies that a loop needs."""
        params = eqn.params
        inputs = [env[v] for v in eqn.invars if isinstance(v, jex_core.Var)]
        outputs = [self._value(v.aval) for v in eqn.outvars]
        env.update(zip(eqn.outvars, outputs, strict=True))
        one = Operation(eqn.primitive.name, inputs, outputs)
        before: list[Operation] = []
        bodies: list[_Body] = []
        if one.name == "scan":
            (body,) = bodies = [self._body(params["jaxpr"])]
            first = params["num_consts"] + params["num_carry"]
            for atom, part in zip(eqn.invars[first:], body.inputs[first:], strict=True):
                whole = self._read(env, atom)
                for what, size in self._wanted(whole, part, body):
                    if (whole, what) not in self.copies:
                        made = copy.copy(whole)
                        made.nbytes = size
                        self.copies[whole, what] = made
                        before.append(Operation(what, [whole], [made]))
                    if what == _TRANSPOSED:  # nothing reads the stack itself
                        inputs[:] = [v for v in inputs if v is not whole]
                    inputs.append(self.copies[whole, what])
            begin = params["num_consts"]
            one.early = self._early(body, set(body.inputs[begin:first]))
            fixed = set(body.inputs[params["num_consts"] :])
            for constant in self._hoisted(body.operations, fixed):
                key = constant.kind
                if key not in self.constants:
                    self.constants[key] = constant
                    before.append(Operation("before_loop", [], [constant]))
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
        self, whole: Value, part: Value, body: _Body
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
                yield _TRANSPOSED, whole.nbytes

    def _hoisted(
        self, operations: list[Operation], changing: set[Value]
    ) -> Iterator[Value]:
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

    def _early(self, body: _Body, changing: set[Value]) -> int:
        """`Operation.early` of a loop; `changing` are its carried inputs."""
        if not self.compiler.peels:
            return 0
        stored, _ = lives(body.operations, [])
        found: set[Value] = set()
        for one in body.operations:
            if changing.isdisjoint(one.inputs):
                continue
            changing.update(one.outputs)
            found.update(v for v in one.inputs if v not in changing)
        return sum(v.nbytes for v in found & stored - set(body.inputs))

    def _body(self, jaxpr: Any) -> _Body:
        opened, _ = open_jaxpr(jaxpr)
        env = self.inputs(opened)
        operations = self.flat(opened, env)
        outputs = [env[v] for v in opened.outvars if isinstance(v, jex_core.Var)]
        given = [env[v] for v in opened.invars]
        held, largest = self.most(operations, outputs, in_loop=True)
        held += self._waiting(operations, outputs, set(given))
        return _Body(operations, given, held, largest)

    def _waiting(
        self, operations: list[Operation], outputs: list[Value], given: set[Value]
    ) -> int:
        """What the postponed products of a turn read, beside the body's inputs."""
        scattered = {
            value
            for one in operations
            if one.name == "reduce_scatter"
            for value in one.outputs
        }
        if not self.compiler.postpones or not scattered:
            return 0
        if any(not scattered.isdisjoint(one.inputs) for one in operations):
            return 0  # they are added up once more, among copies of the parameters
        late = waits_alone(operations, outputs)
        read = {value for one in late for value in one.inputs}
        return sum(value.nbytes for value in read - given)

    def most(
        self, operations: list[Operation], outputs: list[Value], in_loop: bool
    ) -> tuple[int, Largest]:
        """The most that a flat program holds at once beside its inputs, and of what."""
        operations = needed(operations, outputs)
        if self.compiler.postpones and not in_loop:
            operations = postponed(operations, outputs)
        early = sum(one.early for one in operations)
        for one in operations:  # what later loops need is there already
            early -= one.early
            one.held += early if one.name == "scan" else 0
        stored, last = lives(operations, outputs)
        end = len(operations)
        if self.compiler.merges:
            merge(operations, stored, last)
        overlaps = in_loop and self.compiler.overlaps
        if overlaps:
            for one in operations:
                if one.name == "reduce_scatter":
                    last.update(dict.fromkeys(one.inputs, end))
        ends: dict[int, list[Value]] = defaultdict(list)
        alive: dict[Value, tuple[int, str]] = {}
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


def _is_view(eqn: Any) -> bool:
    """Whether an equation gives the same array another shape or name."""
    if eqn.primitive.name in _SUMS:  # over an axis of one device it is no sum
        mesh = getattr(eqn.invars[0].aval.sharding, "mesh", None)
        axes = eqn.params.get("axes", ())
        if mesh is None or any(mesh.shape.get(axis, 2) > 1 for axis in axes):
            return False
    elif eqn.primitive.name not in _VIEWS:
        return False
    return len(eqn.invars) == len(eqn.outvars)


def _called(eqn: Any) -> Any:
    """The jaxpr that an equation calls; None: it is no call."""
    if eqn.primitive.name in ("scan", "while", "cond", "pallas_call"):
        return None
    found = [open_jaxpr(one)[0] for one in inner_jaxprs(eqn.params)]
    if len(found) != 1 or len(found[0].invars) != len(eqn.invars):
        return None
    same = len(found[0].outvars) == len(eqn.outvars)
    return found[0] if same and not eqn.primitive.name.startswith("reduce") else None


def _casts(part: Value, operations: list[Operation]) -> list[Value]:
    """What a slice is cast to; [] if anything reads it as it is."""
    readers = [one for one in operations if part in one.inputs]
    if any(one.name != "convert_element_type" for one in readers):
        return []
    return [value for one in readers for value in one.outputs]
