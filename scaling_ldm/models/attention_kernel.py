"""Softmax attention for TPUs that keeps no array of scores in memory.

Tiles of scores stay in the memory of a core. The forward pass holds a running maximum
and a running sum for each query. The backward pass computes the scores of a tile again
(Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691). The kernels are written
in Pallas. Features stand before positions in all arrays: a TPU pads the last axis to a
multiple of 128, and so heads of 40 or 72 features take no more memory than they need.

A masked key has the score MASKED, a padded one PADDED. So a query whose keys are all
masked sees all of them alike, as in `attention.attend`, and none of the padded ones.

Each kernel states the FLOPs of the attention without padding, as `flops` counts them.
Of the work that the backward pass repeats, the scores are counted, once.

Letters: B batch, T queries, S keys, K heads, H features of a head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float

from scaling_ldm.models.shapes import Array

MASKED = -1e30
PADDED = -3e38  # still far below MASKED
_LANES = 128
_LARGEST_TILE = 512
# An axis may be padded to this many times its length to allow a larger tile.
_MOST_PADDING = 1.125
# The last axis is a sum, so its tiles run in order.
_ORDER = (*("parallel",) * 3, "arbitrary")


def tile(length: int) -> tuple[int, int]:
    """(positions of a tile, length of the axis with padding)."""
    least = -(-length // _LANES) * _LANES
    if least <= _LARGEST_TILE:
        return least, least
    for size in (_LARGEST_TILE, _LARGEST_TILE // 2):
        padded = -(-length // size) * size
        if padded <= _MOST_PADDING * length:
            return size, padded
    return _LANES, least


def attend(
    q_BKHT: Float[Array, "B K H T"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKHS: Float[Array, "B K H S"],
    mask_BS: Bool[Array, "B S"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B K H T"]:
    """softmax(q k) v, with the softmax in float32; q has its scale already.

    It has first-order reverse-mode derivatives only.

    Args:
      mask_BS: true where a key is seen; None: all are.
      interpret: runs the kernels in Pallas' interpreter: slow, on any device.

    Raises:
      NotImplementedError: where a derivative of the derivative is taken.
    """
    mask_B1S = None if mask_BS is None else mask_BS[:, None].astype(jnp.float32)
    return _attend(q_BKHT, k_BKHS, v_BKHS, mask_B1S, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Any, k: Any, v: Any, mask: Any, interpret: bool) -> jax.Array:
    return _forward(q, k, v, mask, interpret)[0]


def _attend_forward(
    q: Any, k: Any, v: Any, mask: Any, interpret: bool
) -> tuple[jax.Array, Any]:
    out, stats = _forward_once(q, k, v, mask, interpret)
    return out, (q, k, v, mask, out, stats)


def _attend_backward(interpret: bool, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    mask = saved[3]
    no_gradient = None if mask is None else jnp.zeros_like(mask)
    return *_pull_back(saved, g, interpret), no_gradient


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pull_back(saved: Any, g: jax.Array, interpret: bool) -> Any:
    """`_gradients`; its derivative is refused."""
    return _gradients(saved, g, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _forward_once(q: Any, k: Any, v: Any, mask: Any, interpret: bool) -> Any:
    """`_forward`; its derivative is refused."""
    return _forward(q, k, v, mask, interpret)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "the TPU kernel of attention has no second derivative; "
        "config.model.attention = 'plain' has one"
    )


for _once in (_forward_once, _pull_back):
    _once.defvjp(_refuse, _refuse)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Sizes of one attention, and its tiles."""

    B: int
    K: int
    H: int
    T: int
    S: int

    @property
    def queries(self) -> tuple[int, int]:
        """(positions of a tile, all with padding)."""
        return tile(self.T)

    @property
    def keys(self) -> tuple[int, int]:
        """As `queries`."""
        return tile(self.S)

    def grid(self, keys_last: bool) -> tuple[int, ...]:
        """Tiles along B, K, and the two axes of positions."""
        tiles = [padded // size for size, padded in (self.queries, self.keys)]
        return self.B, self.K, *(tiles if keys_last else reversed(tiles))

    def block(self, x: Any, of_keys: bool, keys_last: bool) -> pl.BlockSpec:
        """The tile of [B, K, rows, positions] or, of a mask, [B, 1, positions]."""
        size = (self.keys if of_keys else self.queries)[0]
        last = of_keys == keys_last
        if len(x.shape) == 3:
            return pl.BlockSpec(
                (None, 1, size), lambda b, k, i, j: (b, 0, j if last else i)
            )
        return pl.BlockSpec(
            (None, None, x.shape[-2], size),
            lambda b, k, i, j: (b, k, 0, j if last else i),
        )


def _sizes(q: jax.Array, k: jax.Array) -> _Sizes:
    B, K, H, T = q.shape
    return _Sizes(B=B, K=K, H=H, T=T, S=k.shape[-1])


def _call(
    kernel: Callable[..., None],
    sizes: _Sizes,
    of_queries: tuple[Any, ...],
    of_keys: tuple[Any, ...],
    results: tuple[tuple[bool, int, Any], ...],
    *,
    products: int,
    scratch: tuple[int, ...],
    recomputed: str = "0",
    interpret: bool,
) -> Sequence[jax.Array]:
    """Runs a kernel over all tiles, and gives its results with their padding.

    Args:
      kernel: (references to the arrays, the results and the scratch arrays) -> None; it
        reads its tile number from `pl.program_id`.
      of_queries, of_keys: arrays that end in T or S; None is left out.
      results: (whether it ends in S, its rows, its type) of each result.
      products: matrix products that count, each of 2 B K T S H FLOPs.
      scratch: rows of each float32 array that the inner tiles share.
      recomputed: share of the products that is recomputation.
    """
    keys_last = not results[0][0]
    held = (sizes.queries if keys_last else sizes.keys)[0]
    given = [(x, False) for x in of_queries] + [(x, True) for x in of_keys]
    given = [(x, keys) for x, keys in given if x is not None]
    padded = [
        _padded(x, (sizes.keys if keys else sizes.queries)[1]) for x, keys in given
    ]
    varying = frozenset().union(*(_varying(x) for x in padded))
    padded = [_vary(x, varying) for x in padded]
    place = jax.typeof(padded[0]).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct(
            (sizes.B, sizes.K, rows, (sizes.keys if keys else sizes.queries)[1]),
            dtype,
            manual_axis_type=place,
        )
        for keys, rows, dtype in results
    ]
    nbytes = sum(x.size * x.dtype.itemsize for x in (*padded, *shapes))
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=sizes.grid(keys_last),
        in_specs=[
            sizes.block(x, keys, keys_last)
            for x, (_, keys) in zip(padded, given, strict=True)
        ],
        out_specs=[
            sizes.block(x, keys, keys_last)
            for x, (keys, _, _) in zip(shapes, results, strict=True)
        ],
        scratch_shapes=[pltpu.VMEM((rows, held), jnp.float32) for rows in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=_ORDER),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * sizes.B * sizes.K * sizes.T * sizes.S * sizes.H,
            transcendentals=sizes.B * sizes.K * sizes.T * sizes.S,
            bytes_accessed=nbytes,
        ),
        metadata={"recomputed": recomputed},
        interpret=interpret,
    )(*padded)


def _padded(x: jax.Array, length: int) -> jax.Array:
    """The array with zeros after its last axis."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


def _varying(x: jax.Array) -> frozenset[Any]:
    """Axes of the mesh over which an array differs, inside of a shard_map."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _vary(x: jax.Array, over: frozenset[Any]) -> jax.Array:
    return jax.lax.pcast(x, tuple(over - _varying(x)), to="varying")


def _scores(
    q_HT: jax.Array, k_HS: jax.Array, mask: Any, first: Any, sizes: _Sizes
) -> tuple[jax.Array, Any]:
    """Scores of a tile [S, T], and where a key is seen [S, 1]; None: everywhere.

    Args:
      mask: reference to [1, S], or None.
      first: number of the tile's first key.
    """
    scores_ST = _product(k_HS, q_HT, (0, 0))
    size, padded = sizes.keys
    seen_S1 = None
    if mask is not None:
        rows = jnp.broadcast_to(mask[...], (_LANES, size))
        seen_S1 = rows.T[:, :1] > 0
        scores_ST = jnp.where(seen_S1, scores_ST, MASKED)
    if padded > sizes.S:
        place_S1 = first + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        scores_ST = jnp.where(place_S1 < sizes.S, scores_ST, PADDED)
    return scores_ST, seen_S1


def _product(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The output, and each query's highest score and sum [B, K, 2, padded T]."""
    sizes = _sizes(q, k)
    out, stats = _call(
        functools.partial(_forward_tile, sizes=sizes, masked=mask is not None),
        sizes,
        (q,),
        (k, v, mask),
        ((False, sizes.H, q.dtype), (False, 2, jnp.float32)),
        products=2,
        scratch=(1, 1, sizes.H),
        interpret=interpret,
    )
    return out[..., : sizes.T], stats


def _forward_tile(q: Any, k: Any, v: Any, *refs: Any, sizes: _Sizes, masked: bool):
    mask, out, stats, highest, total, summed = refs if masked else (None, *refs)
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _() -> None:
        highest[...] = jnp.full_like(highest, PADDED)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    scores_ST, _ = _scores(q[...], k[...], mask, j * sizes.keys[0], sizes)
    before_1T = highest[...]
    now_1T = jnp.maximum(before_1T, scores_ST.max(0, keepdims=True))
    parts_ST = jnp.exp(scores_ST - now_1T)
    shrink_1T = jnp.exp(before_1T - now_1T)
    highest[...] = now_1T
    total[...] = total[...] * shrink_1T + parts_ST.sum(0, keepdims=True)
    new_HT = _product(v[...], parts_ST.astype(v.dtype), (1, 0))
    summed[...] = summed[...] * shrink_1T + new_HT

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        out[...] = (summed[...] / total[...]).astype(out.dtype)
        stats[:1] = highest[...]
        stats[1:] = total[...]


def _gradients(saved: Any, g: jax.Array, interpret: bool) -> Any:
    """Gradients of q, k and v."""
    q, k, v, mask, out, stats = saved
    sizes = _sizes(q, k)
    product = g.astype(jnp.float32) * out.astype(jnp.float32)
    dot = jnp.sum(product, axis=-2, keepdims=True)  # [B, K, 1, T]
    of_queries, of_keys = (q, g, stats, dot), (k, v, mask)
    masked = mask is not None
    (dq,) = _call(
        functools.partial(_query_gradient_tile, sizes=sizes, masked=masked),
        sizes,
        of_queries,
        of_keys,
        ((False, sizes.H, q.dtype),),
        products=2,
        recomputed="1/2",
        scratch=(sizes.H,),
        interpret=interpret,
    )
    dk, dv = _call(
        functools.partial(_key_gradient_tile, sizes=sizes, masked=masked),
        sizes,
        of_queries,
        of_keys,
        ((True, sizes.H, k.dtype), (True, sizes.H, v.dtype)),
        products=3,
        scratch=(sizes.H, sizes.H),
        interpret=interpret,
    )
    return dq[..., : sizes.T], dk[..., : sizes.S], dv[..., : sizes.S]


def _score_gradients(
    given: Sequence[Any], first: Any, sizes: _Sizes
) -> tuple[jax.Array, jax.Array]:
    """Weights of a tile, and the gradient of its scores; both [S, T]."""
    q, g, stats, dot, k, v, mask = given
    scores_ST, seen_S1 = _scores(q[...], k[...], mask, first, sizes)
    weights_ST = jnp.exp(scores_ST - stats[:1]) / stats[1:]
    dweights_ST = _product(v[...], g[...], (0, 0))
    dscores_ST = weights_ST * (dweights_ST - dot[...])
    if seen_S1 is not None:  # masked scores are constant
        dscores_ST = jnp.where(seen_S1, dscores_ST, 0.0)
    return weights_ST, dscores_ST.astype(k.dtype)


def _query_gradient_tile(*refs: Any, sizes: _Sizes, masked: bool) -> None:
    *given, dq, summed = refs
    given = given if masked else [*given, None]
    k = given[4]
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)

    _, dscores_ST = _score_gradients(given, j * sizes.keys[0], sizes)
    summed[...] += _product(k[...], dscores_ST, (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        dq[...] = summed[...].astype(dq.dtype)


def _key_gradient_tile(*refs: Any, sizes: _Sizes, masked: bool) -> None:
    *given, dk, dv, k_summed, v_summed = refs
    given = given if masked else [*given, None]
    q, g, *_ = given
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _() -> None:
        k_summed[...] = jnp.zeros_like(k_summed)
        v_summed[...] = jnp.zeros_like(v_summed)

    weights_ST, dscores_ST = _score_gradients(given, i * sizes.keys[0], sizes)
    v_summed[...] += _product(g[...], weights_ST.astype(g.dtype), (1, 1))
    k_summed[...] += _product(q[...], dscores_ST, (1, 1))

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        dk[...] = k_summed[...].astype(dk.dtype)
        dv[...] = v_summed[...].astype(dv.dtype)
