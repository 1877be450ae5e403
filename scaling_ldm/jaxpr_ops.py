"""Costs of single jaxpr equations, and the constants and trip counts around them.

`flops` adds them up and states the conventions.

Convolutions. A convolution ties three index sets together: input position `i`,
kernel tap `t` and output position `o` obey `o * stride + t * rhs_dilation - pad =
i * lhs_dilation`. Its forward pass and its two gradients are the same set of
products, each summed over a different index. Per spatial dimension, with sizes `I`,
`K` and `O` of the operation's input, window and output, the number counted is:

  =============================  =======================================================
  stride 1, no input dilation    `O * K`: every tap of every output, on padding or not
  ... and a reversed kernel      `I * K` if `K <= O`: input gradient of the row above
  stride > 1                     `O * K`
  input dilation > 1             `I * min(K, O)`: inserted zeros are never multiplied
  both > 1                       product of the two smallest of `I`, `K`, `O`
  =============================  =======================================================

so a strided convolution's input gradient (dilated by the stride) meets each of the
forward's outputs `K` times, its kernel gradient has window `O` and output `K`, and
forward + backward is exactly 3 x forward for every stride, padding, dilation and
grouping. Reversal is read from the `rev` operation that JAX's transpose rule (and
`lax.conv_transpose(transpose_kernel=True)`) puts on the kernel. A transposed
convolution of stride 1 *without* it is, to JAX, a plain convolution, and is counted
as one. The last row bounds the cost of resampling by a ratio from above.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex_core
from jax.extend import source_info_util

# Leaves that do matrix work for which no convention is agreed, or whose work cannot
# be read from the jaxpr. Counting them 0 in silence would be a wrong number.
UNCOUNTED = frozenset(
    """call_hi_primitive cholesky cholesky_update custom_call eig eigh ffi_call geqp3
    geqrf hessenberg householder_product lu ormqr qr scaled_dot scaled_matmul
    scaled_matmul_wrapper schur svd symmetric_product triangular_solve tridiagonal
    tridiagonal_solve dot_product_attention_fp8_fwd_wrapper
    dot_product_attention_fp8_bwd_wrapper""".split()
)

# Operations that hand a convolution kernel on, seen when looking for its `rev`.
_CARRIERS = frozenset(
    """broadcast_in_dim convert_element_type copy reduce_precision reshape
    sharding_constraint squeeze transpose""".split()
)


class UncountedPrimitive(ValueError):
    """An operation that does matrix work which cannot be read from the jaxpr."""


def leaf_flops(eqn: Any, makers: Mapping[Any, Any]) -> tuple[int, int]:
    """FLOPs of an equation without inner jaxprs.

    Args:
      eqn: a jaxpr equation.
      makers: the equations of the same jaxpr before it, by their output variables.

    Returns:
      What the operation computes, and what it computes a second time to save memory.

    Raises:
      UncountedPrimitive: for an operation in `UNCOUNTED`, or a `pallas_call` without a
        `cost_estimate`.
    """
    name = eqn.primitive.name
    if name in UNCOUNTED:
        raise UncountedPrimitive(
            f"{name} at {where(eqn)} does matrix work that has no agreed count; keep "
            "it out of the counted function and account for it by hand"
        )
    match name:
        case "dot_general":
            return _dot_flops(eqn), 0
        case "ragged_dot_general":
            return _ragged_dot_flops(eqn), 0
        case "conv_general_dilated":
            return _conv_flops(eqn, makers), 0
        case "dot_product_attention_fwd_wrapper" | "dot_product_attention_bwd_wrapper":
            return _attention_flops(eqn)
        case "pallas_call":
            return _pallas_flops(eqn), 0
    return 0, 0


def _dot_flops(eqn: Any) -> int:
    (_, rhs_contract), (_, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
    return 2 * math.prod(lhs) * _product_except(rhs, (*rhs_contract, *rhs_batch))


def _ragged_dot_flops(eqn: Any) -> int:
    # Each row of lhs meets one group's matrix, whichever dimension is ragged.
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, rhs_contract), (_, rhs_batch) = numbers.dot_dimension_numbers
    lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
    seen = (*rhs_contract, *rhs_batch, *numbers.rhs_group_dimensions)
    return 2 * math.prod(lhs) * _product_except(rhs, seen)


def _conv_flops(eqn: Any, makers: Mapping[Any, Any]) -> int:
    params = eqn.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
    out = eqn.outvars[0].aval.shape
    # Channels per group are in the kernel's shape; batch groups divide out's batch.
    macs = out[out_spec[0]] * out[out_spec[1]] * rhs[rhs_spec[1]]
    reversed_kernel = _is_reversed(eqn.invars[1], len(rhs_spec) - 2, makers)
    for dim in range(len(rhs_spec) - 2):
        macs *= _taps(
            lhs[lhs_spec[dim + 2]],
            rhs[rhs_spec[dim + 2]],
            out[out_spec[dim + 2]],
            stride=params["window_strides"][dim],
            dilation=params["lhs_dilation"][dim],
            reversed_kernel=reversed_kernel,
        )
    return 2 * macs


def _taps(
    size_in: int,
    size_window: int,
    size_out: int,
    *,
    stride: int,
    dilation: int,
    reversed_kernel: bool,
) -> int:
    """Products along one spatial dimension: the table in the module's docstring."""
    if stride > 1 and dilation > 1:
        smallest, second, _ = sorted((size_in, size_window, size_out))
        return smallest * second
    if dilation > 1:
        return size_in * min(size_window, size_out)
    if stride == 1 and reversed_kernel and size_window <= size_out:
        return size_in * size_window
    return size_out * size_window


def _is_reversed(kernel: Any, spatial: int, makers: Mapping[Any, Any]) -> bool:
    """Whether all spatial dimensions of `kernel` were reversed an odd number of times.

    In second derivatives of a reversed kernel two reversals cancel.
    """
    reversals = 0
    while not isinstance(kernel, jex_core.Literal) and kernel in makers:
        eqn = makers[kernel]
        if eqn.primitive.name == "rev":
            reversals += len(eqn.params["dimensions"])
        elif eqn.primitive.name not in _CARRIERS:
            break
        kernel = eqn.invars[0]
    return spatial > 0 and reversals % (2 * spatial) == spatial


def _attention_flops(eqn: Any) -> tuple[int, int]:
    """cuDNN attention: q.k and p.v, twice that backward, which also redoes q.k."""
    query, key, value = (var.aval.shape for var in eqn.invars[:3])
    length_axis = 1 if eqn.params["layout"] == 0 else 2  # BTNH, BNTH
    scores = 2 * math.prod(query[:-1]) * key[length_axis]
    forward = scores * (query[-1] + value[-1])
    if eqn.primitive.name == "dot_product_attention_fwd_wrapper":
        return forward, 0
    return 2 * forward, scores * query[-1]


def _pallas_flops(eqn: Any) -> int:
    estimate = eqn.params.get("cost_estimate")
    if estimate is None:
        raise UncountedPrimitive(
            f"pallas_call at {where(eqn)} has no cost_estimate; pass "
            "pl.pallas_call(..., cost_estimate=pl.CostEstimate(flops=...))"
        )
    return int(estimate.flops)


def _product_except(shape: Sequence[int], dims: Sequence[int]) -> int:
    return math.prod(size for dim, size in enumerate(shape) if dim not in dims)


def where(eqn: Any) -> str:
    """The user's source line that made an equation."""
    return source_info_util.summarize(eqn.source_info)


def scope_names(eqn: Any) -> list[str]:
    """Names of `jax.named_scope`s around an equation, without transformations."""
    stack = eqn.source_info.name_stack.stack
    return [
        part
        for item in stack
        if type(item).__name__ == "Scope"
        for part in item.name.split("/")
    ]


def inner_jaxprs(value: Any) -> Iterator[Any]:
    """All jaxprs in an equation's parameters."""
    if isinstance(value, jex_core.ClosedJaxpr | jex_core.Jaxpr):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from inner_jaxprs(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from inner_jaxprs(item)


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
    """Iterations of a loop on `i < bound`: integers moving in constant steps, or None.

    Both sides may be carried, constant or closed over, as in what `lax.fori_loop`
    makes, or `lax.while_loop` with a counter.
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
        """Value at the first test and change per iteration."""
        if (value := constant(atom, cond_known)) is not None:
            return value, 0
        if atom in cond.invars[n_cond:]:
            slot = cond.invars.index(atom) - n_cond
            return start[slot], step(slot)
        return None, None

    test = next((e for e in cond.eqns if cond.outvars[0] in e.outvars), None)
    if test is None or len(cond.eqns) != 1 or len(test.invars) != 2:
        return None
    (left, left_step), (right, right_step) = map(side, test.invars)
    if None in (left, left_step, right, right_step):
        return None
    # Continue while gap < 0, and the gap closes by `rate` an iteration.
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
