"""Costs of single jaxpr equations, and the constants and trip counts around them.

`counter` adds them up and states the conventions.

Convolutions. In a convolution, input position `i`, kernel tap `t` and output position
`o` obey `o * stride + t * rhs_dilation - pad = i * lhs_dilation`. Forward pass, input
gradient and kernel gradient are the same set of products, each summed over another
index. So each costs what the forward pass costs. The shapes of a gradient do not tell
how many taps on padding its forward pass had: the input gradient of a convolution with
stride 1 and no padding looks like a forward pass with much padding. So a gradient is
mapped back to its forward pass, and one rule counts that. Per spatial dimension with
`I` inputs, `K` taps and `O` outputs it is:

  no input dilation    O * K          every tap of every output, on padding or not
  input dilation       I * K          every tap of every input; inserted zeros are free
  both, with a stride  O * K / d      rounded up: taps not on an inserted zero

An equation is a gradient if the transformations around it say `transpose`. What JAX's
transpose rules write shows which gradient it is:

  input gradient    convolves the output's gradient with the reversed kernel: the right
                    operand comes from a `rev`. Stride and input dilation trade places.
  kernel gradient   convolves the inputs with the output's gradient, which is now the
                    right operand (the window): batch and feature dimensions are
                    swapped. Stride and kernel dilation trade places, and so do window
                    and output.

Flipped activations, feature-first layouts and hand-written rules may have both marks
(the `rev` and the swapped dimensions) or neither. Then the sizes decide: if the window
is larger than the output, it is taken for an output's gradient, and the equation for a
kernel gradient. Otherwise the equation is taken for an input gradient.

With these rules, forward + backward is exactly 3 x forward for every stride, dilation,
padding and grouping. Second derivatives are exact up to padding. JAX writes a
transposed convolution of stride 1 as a plain one; it is counted as such.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from jax.extend import core as jex_core
from jax.extend import source_info_util

from scaling_ldm.records.errors import UncountedPrimitive

# Operations with matrix work for which no convention is agreed, or whose work cannot be
# read from the jaxpr. To count them as 0 would silently give a wrong number.
UNCOUNTED = frozenset(
    """call_hi_primitive cholesky cholesky_update custom_call eig eigh ffi_call geqp3
    geqrf hessenberg householder_product lu ormqr qr scaled_dot scaled_matmul
    scaled_matmul_wrapper schur svd symmetric_product triangular_solve tridiagonal
    tridiagonal_solve dot_product_attention_fp8_fwd_wrapper
    dot_product_attention_fp8_bwd_wrapper bcoo_dot_general bcoo_dot_general_sampled
    bcoo_spdot_general bcsr_dot_general coo_matmat coo_matvec coo_spmm coo_spmv
    csr_matmat csr_matvec csr_spmm csr_spmv spsolve""".split()
)

# Code that a jaxpr names but does not hold: a host function that gives a result, an
# exported function, a kernel of another compiler. (`debug_callback` gives no result.)
OPAQUE = frozenset(
    """call_exported cudnn_fusion io_callback mosaic_gpu_p mpmd_map pure_callback
    tpu_custom_call triton_kernel_call""".split()
)

# Operations that pass a convolution kernel on; the search for its `rev` goes through.
_CARRIERS = frozenset(
    """broadcast_in_dim convert_element_type copy reduce_precision reshape
    sharding_constraint squeeze transpose""".split()
)


# The class of a name in a name stack; the other items are transformations.
_Scope: type[Any] = type(source_info_util.new_name_stack("name").stack[0])
# Queries x keys of an attention without its padding; see `_attention_flops`.
_LENGTHS = re.compile(r"attention_of_(\d+)x(\d+)")
_REMAT_SCOPE = "rematted_computation"  # pushed by jax.checkpoint


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the program an equation stands.

    Attributes:
      scope: names of the modules (`jax.named_scope`) around it, outermost first.
      recomputed: whether remat runs it a second time.
      in_gradient: whether it comes from transposing another equation.
      path: the equation, after those whose inner jaxprs it is in.
    """

    scope: tuple[str, ...] = ()
    recomputed: bool = False
    in_gradient: bool = False
    path: tuple[Any, ...] = ()

    def line(self) -> str:
        """The line of the user's source that leads to the equation."""
        for eqn in reversed(self.path):
            if summary := source_info_util.summarize(eqn.source_info):
                return summary
        return "an unknown line"

    def of(self, eqn: Any) -> "Place":
        """The place of `eqn` in a jaxpr that stands at this place.

        The name stack starts anew inside every inner jaxpr, so the two are joined.
        """
        scope: list[str] = []
        run: list[str] = []  # scopes since the last transformation
        recomputed, in_gradient = self.recomputed, self.in_gradient
        for item in (*eqn.source_info.name_stack.stack, None):
            if isinstance(item, _Scope):
                if item.name == _REMAT_SCOPE:
                    recomputed, in_gradient = True, False
                else:
                    run.extend(item.name.split("/"))
                continue
            # A remat equation in a gradient carries its path twice: jvp(M)/jvp(M).
            if run != scope:
                scope.extend(run)
            run = []
            if item is not None and item.name == "transpose":
                in_gradient = True
        return Place(
            scope=(*self.scope, *scope),
            recomputed=recomputed,
            in_gradient=in_gradient,
            path=(*self.path, eqn),
        )


def leaf_flops(eqn: Any, makers: Mapping[Any, Any], place: Place) -> tuple[int, int]:
    """FLOPs of an equation without inner jaxprs.

    Args:
      eqn: a jaxpr equation.
      makers: the equations of the same jaxpr before it, by their output variables.
      place: where the equation stands.

    Returns:
      (FLOPs of the operation, FLOPs that it computes a second time to save memory).

    Raises:
      UncountedPrimitive: for an operation in `UNCOUNTED` or `OPAQUE`, or a
        `pallas_call` without a `cost_estimate`.
    """
    name = eqn.primitive.name
    if name in OPAQUE:
        raise UncountedPrimitive(
            f"{name} at {place.line()} runs code whose work cannot be seen; keep it "
            "out of the counted function and account for it by hand"
        )
    if name in UNCOUNTED:
        raise UncountedPrimitive(
            f"{name} at {place.line()} does matrix work that has no agreed count; keep "
            "it out of the counted function and account for it by hand"
        )
    match name:
        case "dot_general":
            return _dot_flops(eqn), 0
        case "ragged_dot_general":
            return _ragged_dot_flops(eqn), 0
        case "conv_general_dilated":
            return _conv_flops(eqn, makers, place.in_gradient), 0
        case "dot_product_attention_fwd_wrapper" | "dot_product_attention_bwd_wrapper":
            return _attention_flops(eqn, place)
        case "pallas_call":
            return _pallas_flops(eqn, place)
    return 0, 0


def _dot_flops(eqn: Any) -> int:
    (_, rhs_contract), (_, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
    return 2 * math.prod(lhs) * _product_except(rhs, (*rhs_contract, *rhs_batch))


def _ragged_dot_flops(eqn: Any) -> int:
    # Each row of lhs is multiplied with the matrix of one group only.
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, rhs_contract), (_, rhs_batch) = numbers.dot_dimension_numbers
    lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
    seen = (*rhs_contract, *rhs_batch, *numbers.rhs_group_dimensions)
    return 2 * math.prod(lhs) * _product_except(rhs, seen)


def _conv_flops(eqn: Any, makers: Mapping[Any, Any], in_gradient: bool) -> int:
    params = eqn.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
    out = eqn.outvars[0].aval.shape
    # Channels per group are in the kernel's shape; batch groups divide out's batch.
    macs = out[out_spec[0]] * out[out_spec[1]] * rhs[rhs_spec[1]]
    inputs = [lhs[dim] for dim in lhs_spec[2:]]
    window = [rhs[dim] for dim in rhs_spec[2:]]
    outputs = [out[dim] for dim in out_spec[2:]]
    strides, dilations = params["window_strides"], params["lhs_dilation"]
    if in_gradient:
        reversed_kernel = _is_reversed(eqn.invars[1], makers)
        kernel_gradient = lhs_spec[0] > lhs_spec[1]
        if kernel_gradient == reversed_kernel:
            kernel_gradient = math.prod(window) > math.prod(outputs)
        if kernel_gradient:
            window, outputs = outputs, window
            strides = params["rhs_dilation"]
        else:
            inputs, outputs = outputs, inputs
            strides, dilations = dilations, strides
    for sizes in zip(inputs, window, outputs, strides, dilations, strict=True):
        macs *= _taps(*sizes)
    return 2 * macs


def _taps(inputs: int, window: int, outputs: int, stride: int, dilation: int) -> int:
    """Products of a forward pass along one dimension: see the top of the module."""
    if dilation == 1:
        return outputs * window
    if stride == 1:
        return inputs * window
    return -(-outputs * window // dilation)


def _is_reversed(kernel: Any, makers: Mapping[Any, Any]) -> bool:
    while not isinstance(kernel, jex_core.Literal) and kernel in makers:
        eqn = makers[kernel]
        if eqn.primitive.name == "rev":
            return True
        if eqn.primitive.name not in _CARRIERS:
            return False
        kernel = eqn.invars[0]
    return False


def _attention_flops(eqn: Any, place: Place) -> tuple[int, int]:
    """cuDNN attention: q.k and p.v. Backward is twice that, and computes q.k again.

    A scope attention_of_TxS says how many of the queries and keys are no padding.
    """
    query, key, value = (var.aval.shape for var in eqn.invars[:3])
    length_axis = 1 if eqn.params["layout"] == 0 else 2  # BTNH, BNTH
    queries, keys = query[length_axis], key[length_axis]
    if stated := [m for name in place.scope if (m := _LENGTHS.fullmatch(name))]:
        queries, keys = (int(length) for length in stated[-1].groups())
    heads = math.prod(query[:-1]) // query[length_axis]
    scores = 2 * heads * queries * keys
    forward = scores * (query[-1] + value[-1])
    if eqn.primitive.name == "dot_product_attention_fwd_wrapper":
        return forward, 0
    return 2 * forward, scores * query[-1]


def _pallas_flops(eqn: Any, place: Place) -> tuple[int, int]:
    """As the kernel states them; metadata["recomputed"] is the share computed again."""
    estimate = eqn.params.get("cost_estimate")
    if estimate is None:
        raise UncountedPrimitive(
            f"pallas_call at {place.line()} has no cost_estimate; pass "
            "pl.pallas_call(..., cost_estimate=pl.CostEstimate(flops=...))"
        )
    flops = int(estimate.flops)
    stated = dict((eqn.params.get("metadata") or {}).items())
    again = flops * Fraction(stated.get("recomputed", "0"))
    return flops - int(again), int(again)


def _product_except(shape: Sequence[int], dims: Sequence[int]) -> int:
    return math.prod(size for dim, size in enumerate(shape) if dim not in dims)


def inner_jaxprs(value: Any) -> Iterator[Any]:
    """All jaxprs in an equation's parameters."""
    if isinstance(value, _JAXPRS):
        yield value
        return
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return
    for item in value:
        if type(item) not in _PLAIN:  # most are; this is what a count asks most often
            yield from inner_jaxprs(item)


_JAXPRS = jex_core.ClosedJaxpr, jex_core.Jaxpr
_PLAIN = frozenset((bool, int, float, str, type(None)))


def open_jaxpr(jaxpr: Any) -> tuple[Any, dict[Any, int]]:
    """A jaxpr without its closure, and its constants that are scalar integers."""
    if not isinstance(jaxpr, jex_core.ClosedJaxpr):
        return jaxpr, {}
    values = zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)
    return jaxpr.jaxpr, {v: n for v, c in values if (n := _as_int(c)) is not None}


def _as_int(value: Any) -> int | None:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "dtype")
    if is_scalar and np.issubdtype(value.dtype, np.integer):
        return int(value)
    return None


def constant(atom: Any, known: Mapping[Any, int]) -> int | None:
    """The integer an operand is known to be, or None."""
    if isinstance(atom, jex_core.Literal):
        return _as_int(atom.val)
    return known.get(atom)


_FOLDS: dict[str, Callable[..., int]] = {
    "convert_element_type": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": max,
    "min": min,
}


def fold(eqn: Any, inputs: Sequence[int | None]) -> int | None:
    """The value of an integer operation on constants, such as a loop bound."""
    rule = _FOLDS.get(eqn.primitive.name)
    if rule is None or None in inputs or eqn.outvars[0].aval.shape:
        return None
    if not np.issubdtype(eqn.outvars[0].aval.dtype, np.integer):
        return None
    return rule(*inputs)


def trip_count(params: Mapping[str, Any], inputs: Sequence[int | None]) -> int | None:
    """Iterations of a loop whose condition compares two integers; None if unknown.

    Each integer must be constant or change by a constant step. Both may be carried,
    constant or closed over, as in `lax.fori_loop`, or `lax.while_loop` with a counter.
    """
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    start = inputs[n_cond + n_body :]
    cond, cond_known = open_jaxpr(params["cond_jaxpr"])
    body, body_known = open_jaxpr(params["body_jaxpr"])
    body_inputs = inputs[n_cond : n_cond + n_body]
    pairs = [*zip(cond.invars, inputs[:n_cond], strict=False)]
    cond_known.update({v: n for v, n in pairs if n is not None})
    pairs = [*zip(body.invars, body_inputs, strict=False)]
    body_known.update({v: n for v, n in pairs if n is not None})

    def step(slot: int) -> int | None:
        before, after = body.invars[n_body + slot], body.outvars[slot]
        if after is before:
            return 0
        eqn = next((e for e in body.eqns if after in e.outvars), None)
        if eqn is None or eqn.primitive.name not in ("add", "sub"):
            return None
        left, right = eqn.invars
        sign = 1 if eqn.primitive.name == "add" else -1
        if left is before:
            by = constant(right, body_known)
            return None if by is None else sign * by
        return constant(left, body_known) if right is before and sign == 1 else None

    def side(atom: Any) -> tuple[int | None, int | None]:
        """The value at the first test, and the change per iteration."""
        if (value := constant(atom, cond_known)) is not None:
            return value, 0
        if atom in cond.invars[n_cond:]:
            slot = cond.invars.index(atom) - n_cond
            return start[slot], step(slot)
        return None, None

    test = next((e for e in cond.eqns if cond.outvars[0] in e.outvars), None)
    if test is None or len(test.invars) != 2:
        return None
    (left, left_step), (right, right_step) = map(side, test.invars)
    if left is None or left_step is None or right is None or right_step is None:
        return None
    # The loop goes on while gap < 0; each iteration adds `rate` to the gap.
    gap, rate = left - right, left_step - right_step
    match test.primitive.name:
        case "lt":
            pass
        case "le":
            gap -= 1
        case "gt":
            gap, rate = -gap, -rate
        case "ge":
            gap, rate = -gap - 1, -rate
        case _:
            return None
    if gap >= 0:
        return 0
    return -(gap // rate) if rate > 0 else None
