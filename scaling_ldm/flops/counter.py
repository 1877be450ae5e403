"""FLOPs of any JAX function, counted by walking its jaxpr.

Nothing is compiled and no device is touched, so the count is the same on every backend,
batch layout and sharding. It is right under `lax.scan`, where the compiler's own cost
analysis sees the body once.

Convention: one multiply-accumulate is 2 FLOPs, everywhere. Matrix products,
convolutions and attention kernels count. Elementwise operations, reductions,
normalisation, gathers, random bits, FFTs and collectives count 0.

Model FLOPs are forward + backward. Hardware FLOPs add what `jax.checkpoint`
(`nn.remat`) computes a second time. JAX labels exactly that part of a gradient
`rematted_computation` in the name stack; the rest is the cost of the same function
without remat.

Convolutions count every tap of every output, on padding or not; forward + backward is
exactly 3 x forward. `operations` derives the rule for strides, dilation and transposes.

Control flow:
- `scan` multiplies by its length.
- `while` multiplies by its trip count if start, bound and step are constants. If they
  are not and the body has FLOPs, it raises `UnknownTripCount`.
- `cond` and `switch` count their most expensive branch, and leave a note if the
  branches differ. `platform_dependent` counts its default, so that the count is the
  same on every machine.
- `shard_map` multiplies the body of one shard by the number of devices on its manual
  axes. So work that is replicated over such an axis counts on each device.
- Attention kernels get no discount for causal masks, windows or padded sequences. What
  a kernel itself adds to fill its tiles does not count, and of what its gradient
  computes again, the scores count once, as recomputation.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from scaling_ldm.flops.operations import (
    Place,
    UncountedPrimitive,
    constant,
    fold,
    inner_jaxprs,
    leaf_flops,
    open_jaxpr,
    trip_count,
)
from scaling_ldm.records.errors import UnknownTripCount

__all__ = [
    "FlopRow",
    "FlopCount",
    "UncountedPrimitive",
    "UnknownTripCount",
    "count",
    "to_macs",
]


@dataclass(frozen=True, kw_only=True)
class FlopRow:
    """FLOPs of one kind of operation in one module.

    Attributes:
      scope: module path, outermost first; transformations (jvp, vmap, remat, ...) are
        left out, so forward and backward of a module share its scope.
      primitive: name of the JAX primitive.
      recomputed: whether remat computes it a second time.
      flops: FLOPs (2 x MAC).
    """

    scope: tuple[str, ...]
    primitive: str
    recomputed: bool
    flops: int


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """The result of `count`: totals and breakdowns in FLOPs (2 x MAC).

    Attributes:
      entries: one row per module scope, primitive and recompute flag.
      notes: remarks on choices made while counting, such as a `cond` with branches of
        different cost, each with its source line.
    """

    entries: tuple[FlopRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def hardware(self) -> int:
        """Everything executed: forward, backward and recompute."""
        return sum(entry.flops for entry in self.entries)

    @property
    def total(self) -> int:
        """Same as `hardware`."""
        return self.hardware

    @property
    def recomputed(self) -> int:
        """What remat executes a second time."""
        return sum(entry.flops for entry in self.entries if entry.recomputed)

    @property
    def model(self) -> int:
        """Forward and backward without recompute: the cost without remat."""
        return self.hardware - self.recomputed

    @property
    def by_scope(self) -> dict[str, int]:
        """Hardware FLOPs by full module path ("" where no module is named)."""
        return self._sums(lambda entry: "/".join(entry.scope))

    @property
    def by_primitive(self) -> dict[str, int]:
        """Hardware FLOPs by JAX primitive."""
        return self._sums(lambda entry: entry.primitive)

    def tree(self, depth: int = 2) -> dict[str, int]:
        """Hardware FLOPs of every module down to `depth`, with those of its children.

        Keys are paths joined by "/", parents before children; "" is the whole function.
        """
        sums: Counter[tuple[str, ...]] = Counter({(): 0})
        for entry in self.entries:
            for length in range(min(depth, len(entry.scope)) + 1):
                sums[entry.scope[:length]] += entry.flops
        return {"/".join(path): sums[path] for path in sorted(sums)}

    def table(self, depth: int = 2) -> str:
        """`tree(depth)` as aligned text, with shares of the total."""
        rows = [(path or "total", flops) for path, flops in self.tree(depth).items()]
        width = max(len(path) for path, _ in rows)
        lines = [
            f"{path:<{width}}  {flops:>12.4e}  {flops / max(self.total, 1):6.1%}"
            for path, flops in rows
        ]
        return "\n".join([f"{'module':<{width}}  {'FLOPs':>12}   share", *lines])

    def _sums(self, key: Callable[[FlopRow], str]) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for entry in self.entries:
            sums[key(entry)] += entry.flops
        return dict(sums)


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> FlopCount:
    """Counts the FLOPs of `fn(*args, **kwargs)` without running or compiling it.

    Args:
      fn: any JAX function: a loss, a gradient, a train step, a whole sampler.
      *args: pytrees of arrays, `jax.ShapeDtypeStruct`s or typed random keys. Python
        numbers are traced too; bind static arguments with `functools.partial`.
      **kwargs: likewise.

    Returns:
      A `FlopCount`.

    Raises:
      UnknownTripCount: a `while` with FLOPs in its body and no constant trip count.
      UncountedPrimitive: an operation in `operations.UNCOUNTED` or `operations.OPAQUE`,
        such as a sparse product or a callback, or a `pallas_call` without a
        `cost_estimate`.

    Example:
      >>> x = jax.ShapeDtypeStruct((8, 16), np.float32)
      >>> w = jax.ShapeDtypeStruct((16, 4), np.float32)
      >>> count(lambda x, w: x @ w, x, w).total
      1024
    """
    closed = jax.make_jaxpr(fn)(*args, **kwargs)
    walker = _Walker()
    tally, _ = walker.walk(closed, (), Place())
    rows = sorted(tally.items())
    entries = (
        FlopRow(scope=s, primitive=p, recomputed=r, flops=n) for (s, p, r), n in rows
    )
    return FlopCount(entries=tuple(entries), notes=tuple(dict.fromkeys(walker.notes)))


def to_macs(flops: int) -> int:
    """Multiply-accumulates of a FLOP count, which are half of it.

    Many published "GFLOPs" of vision models are multiply-accumulates; compare those
    with this number.

    Raises:
      ValueError: an odd count, which no sum of products gives.
    """
    if flops % 2:
        raise ValueError(f"{flops} FLOPs is odd, so it is not a count of 2 x MAC")
    return flops // 2


_Tally = Counter[tuple[tuple[str, ...], str, bool]]


class _Walker:
    """Sums FLOPs over a jaxpr and all jaxprs inside it."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def walk(
        self,
        jaxpr: Any,
        known_inputs: Sequence[int | None],
        place: Place,
    ) -> tuple[_Tally, list[int | None]]:
        """The FLOPs of a jaxpr, and its outputs that are constant integers.

        `known_inputs` may be shorter than the inputs; None means unknown.
        """
        jaxpr, known = open_jaxpr(jaxpr)
        for var, value in zip(jaxpr.invars, known_inputs, strict=False):
            if value is not None:
                known[var] = value
        makers: dict[Any, Any] = {}
        tally: _Tally = Counter()
        for eqn in jaxpr.eqns:
            inputs = [constant(atom, known) for atom in eqn.invars]
            added, outputs = self._equation(eqn, inputs, makers, place.of(eqn))
            if added:
                tally.update(added)
            for var, value in zip(eqn.outvars, outputs, strict=False):
                if value is not None:
                    known[var] = value
            for var in eqn.outvars:
                makers[var] = eqn
        return tally, [constant(atom, known) for atom in jaxpr.outvars]

    def _equation(
        self,
        eqn: Any,
        inputs: list[int | None],
        makers: Mapping[Any, Any],
        place: Place,
    ) -> tuple[_Tally, list[int | None]]:
        name, params = eqn.primitive.name, eqn.params

        def inner(jaxpr: Any, known: Sequence[int | None] = ()) -> _Tally:
            return self.walk(jaxpr, known, place)[0]

        if name == "scan":
            known = inputs[: params["num_consts"]]
            return _scaled(inner(params["jaxpr"], known), params["length"]), []
        if name == "while":
            return self._while(eqn, inputs, place), []
        if name == "cond":
            platforms = params.get("branches_platforms") or ()
            if None in platforms:  # the branch of platforms without one of their own
                default = params["branches"][platforms.index(None)]
                return inner(default, inputs[1:]), []
            branches = [inner(branch, inputs[1:]) for branch in params["branches"]]
            costs = [branch.total() for branch in branches]
            if len(set(costs)) > 1:
                self.notes.append(
                    f"branches at {place.line()} cost {costs} FLOPs; the largest counts"
                )
            return branches[int(np.argmax(costs))], []
        if name == "shard_map":
            axes = params.get("newly_manual_axes", params.get("manual_axes"))
            shards = math.prod(params["mesh"].shape[axis] for axis in axes)
            return _scaled(inner(params["jaxpr"]), shards), []
        if name == "custom_linear_solve":
            return inner(params["jaxprs"].solve), []
        jaxprs = [] if name == "pallas_call" else list(inner_jaxprs(params))
        if not jaxprs:
            flops, repeated = leaf_flops(eqn, makers, place)
            tally: _Tally = Counter()
            if flops:
                tally[place.scope, name, place.recomputed] += flops
            if repeated:
                tally[place.scope, name, True] += repeated
            return tally, [fold(eqn, inputs)]
        if len(jaxprs) == 1 and len(open_jaxpr(jaxprs[0])[0].invars) == len(inputs):
            # jit, remat, custom derivatives, ...: a call, so constants pass through.
            return self.walk(jaxprs[0], inputs, place)
        tally = Counter()
        for jaxpr in jaxprs:
            tally.update(inner(jaxpr))
        return tally, []

    def _while(self, eqn: Any, inputs: list[int | None], place: Place) -> _Tally:
        params = eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        trips = trip_count(params, inputs)
        known = inputs[n_cond : n_cond + n_body]
        body, _ = self.walk(params["body_jaxpr"], known, place)
        cond, _ = self.walk(params["cond_jaxpr"], inputs[:n_cond], place)
        if not body and not cond:
            return Counter()  # for example loops that make random bits
        if trips is None:
            raise UnknownTripCount(
                f"the while loop at {place.line()} costs {body.total()} FLOPs an "
                "iteration and its number of iterations depends on data; use lax.scan "
                "or lax.fori_loop with constant bounds, or count its body alone and "
                "multiply by the iterations measured"
            )
        tally = _scaled(body, trips)
        tally.update(_scaled(cond, trips + 1))
        return tally


def _scaled(tally: _Tally, factor: int) -> _Tally:
    return +Counter({key: factor * flops for key, flops in tally.items()})
