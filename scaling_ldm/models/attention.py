"""Softmax attention with its own reverse derivative.

Letters: B batch, T queries, S keys, K heads, H features of a head.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Bool, Float

from scaling_ldm.models import sharded
from scaling_ldm.models.shapes import Array

# From this many scores of one head on, the gradient computes them again.
LONG = 512 * 512


def attend(
    q_BTKH: Float[Array, "B T K H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Bool[Array, "_ 1 _ S"] | None,
) -> Float[Array, "B T K H"]:
    """softmax(q k / sqrt(H)) v, with the softmax in float32.

    This computes what `jax.nn.dot_product_attention` does. The scale is applied to the
    queries, which are fewer than the scores. Only reverse derivatives exist. From
    `LONG` scores per head on, the derivative computes the scores again instead of
    storing B x K x T x S of them (Dao et al. 2022, arXiv 2205.14135). A single CPU
    device then computes one head at a time, so that the scores stay in its cache.

    Args:
      mask: true where a query attends to a key, [B or 1, 1, 1 or T, S]; None: all do.
        A query that attends to none weighs all keys alike, and its gradient is wrong.
        Conditions of this library have a token at least.
    """
    q_BKTH = (q_BTKH * q_BTKH.shape[-1] ** -0.5).transpose(0, 2, 1, 3)
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    long = q_BKTH.shape[2] * v_BKSH.shape[2] >= LONG
    of_heads = _attend_long if long else _attend
    return of_heads(q_BKTH, k_BKHS, v_BKSH, mask).transpose(0, 2, 1, 3)


def _scores(q_BKTH: Any, k_BKHS: Any, mask: Any) -> jax.Array:
    scores_BKTS = jnp.einsum(
        "...TH,...HS->...TS", q_BKTH, k_BKHS, preferred_element_type=jnp.float32
    )
    return scores_BKTS if mask is None else jnp.where(mask, scores_BKTS, -1e30)


def _pull_back(
    q_BKTH: Any, k_BKHS: Any, v_BKSH: Any, weights_BKTS: Any, dot_BKT1: Any, g_BKTH: Any
) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v that do not transpose the T x S arrays.

    The automatic gradients transpose two of them, which takes a CPU longer than all the
    arithmetic. A masked weight is zero, so its gradient is zero too.
    """
    dtype = v_BKSH.dtype
    dv_BKHS = jnp.einsum(
        "...HT,...TS->...HS", g_BKTH.swapaxes(-1, -2), weights_BKTS.astype(dtype)
    )
    dweights_BKTS = jnp.einsum(
        "...TH,...HS->...TS",
        g_BKTH,
        v_BKSH.swapaxes(-1, -2),
        preferred_element_type=jnp.float32,
    )
    dscores_BKTS = (weights_BKTS * (dweights_BKTS - dot_BKT1)).astype(dtype)
    dq_BKTH = jnp.einsum("...TS,...SH->...TH", dscores_BKTS, k_BKHS.swapaxes(-1, -2))
    dk_BKHS = jnp.einsum("...HT,...TS->...HS", q_BKTH.swapaxes(-1, -2), dscores_BKTS)
    return dq_BKTH, dk_BKHS, dv_BKHS.swapaxes(-1, -2)


def _dot(g_BKTH: jax.Array, out_BKTH: jax.Array) -> jax.Array:
    """The sum over S in the softmax's gradient, computed over H (Dao, appendix B.2)."""
    product = g_BKTH.astype(jnp.float32) * out_BKTH.astype(jnp.float32)
    return jnp.sum(product, -1, keepdims=True)


@jax.custom_vjp
def _attend(q_BKTH: Any, k_BKHS: Any, v_BKSH: Any, mask: Any) -> jax.Array:
    return _attend_forward(q_BKTH, k_BKHS, v_BKSH, mask)[0]


def _attend_forward(
    q_BKTH: Any, k_BKHS: Any, v_BKSH: Any, mask: Any
) -> tuple[jax.Array, Any]:
    weights_BKTS = jax.nn.softmax(_scores(q_BKTH, k_BKHS, mask), axis=-1)
    out_BKTH = jnp.einsum("BKTS,BKSH->BKTH", weights_BKTS.astype(v_BKSH.dtype), v_BKSH)
    return out_BKTH, (q_BKTH, k_BKHS, v_BKSH, weights_BKTS, out_BKTH)


def _attend_backward(saved: Any, g_BKTH: jax.Array) -> tuple[Any, ...]:
    q, k, v, weights_BKTS, out_BKTH = saved
    dot_BKT1 = _dot(g_BKTH, out_BKTH)
    return *_pull_back(q, k, v, weights_BKTS, dot_BKT1, g_BKTH), None


_attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def _attend_long(q_BKTH: Any, k_BKHS: Any, v_BKSH: Any, mask: Any) -> jax.Array:
    return _long_forward(q_BKTH, k_BKHS, v_BKSH, mask)[0]


def _long_forward(
    q_BKTH: Any, k_BKHS: Any, v_BKSH: Any, mask: Any
) -> tuple[jax.Array, Any]:
    def forward(q: Any, k: Any, v: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
        scores = _scores(q, k, mask)
        highest = scores.max(-1, keepdims=True)
        parts = jnp.exp(scores - highest)
        total = parts.sum(-1, keepdims=True)
        out = jnp.einsum("...TS,...SH->...TH", parts.astype(v.dtype), v)
        return (out / total).astype(v.dtype), highest + jnp.log(total)

    if mask is not None:
        mask = jnp.broadcast_to(mask, (*q_BKTH.shape[:2], *mask.shape[2:]))
    given = (q_BKTH, k_BKHS, v_BKSH, mask)
    out_BKTH, log_total_BKT1 = _by_heads(forward, (q_BKTH, q_BKTH), *given)
    return out_BKTH, (*given, out_BKTH, log_total_BKT1)


def _long_backward(saved: Any, g_BKTH: jax.Array) -> tuple[Any, ...]:
    def backward(
        q: Any, k: Any, v: Any, mask: Any, log_total: Any, dot: Any, g: Any
    ) -> tuple[jax.Array, ...]:
        with jax.named_scope(
            "rematted_computation"
        ):  # `flops` counts it as recomputation
            weights = jnp.exp(_scores(q, k, mask) - log_total)
        return _pull_back(q, k, v, weights, dot, g)

    q, k, v, mask, out_BKTH, log_total_BKT1 = saved
    dot_BKT1 = _dot(g_BKTH, out_BKTH)
    given = (q, k, v, mask, log_total_BKT1, dot_BKT1, g_BKTH)
    return *_by_heads(backward, (q, k, v), *given), None


_attend_long.defvjp(_long_forward, _long_backward)


def _by_heads(fn: Any, like: tuple[Any, ...], *args: Any) -> tuple[jax.Array, ...]:
    """Applies `fn` to arrays [B, K, ...] at once or, on one CPU device, pair by pair.

    The results are sharded as the arrays of `like`. Several devices hold parts of B or
    K, which a loop over the pairs would gather, so there is no loop then.
    """
    B, K = args[0].shape[:2]

    def one_by_one(*args: Any) -> tuple[Any, ...]:
        # An axis of 1 stays, because XLA's batched product takes half the time.
        pairs = jax.tree.map(lambda a: a.reshape(B * K, 1, *a.shape[2:]), args)
        found = jax.lax.map(lambda pair: fn(*pair), pairs)
        return jax.tree.map(lambda a: a.reshape(B, K, *a.shape[2:]), found)

    mesh = jax.sharding.get_abstract_mesh()
    if sharded.devices() > 1:
        return fn(*args)
    explicit = AxisType.Explicit in mesh.axis_types
    if explicit:  # of one device: no axis is divided, so axes may be merged
        args = jax.tree.map(lambda a: jax.sharding.reshard(a, PartitionSpec()), args)
    found = jax.lax.platform_dependent(
        *args, cpu=one_by_one, default=lambda *args: fn(*args)
    )
    if explicit:
        found = tuple(
            jax.sharding.reshard(a, jax.typeof(b).sharding.spec)
            for a, b in zip(found, like, strict=True)
        )
    return found
