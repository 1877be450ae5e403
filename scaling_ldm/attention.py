"""Softmax attention with a gradient of its own. jax only."""

from typing import Any

import jax
import jax.numpy as jnp


def attend(
    q_BTKH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_B11S: jax.Array | None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v, the softmax in float32.

    What `jax.nn.dot_product_attention` computes, with the scale on the queries, which
    are fewer than the scores. It has a reverse derivative only.
    """
    q_BKTH = (q_BTKH * q_BTKH.shape[-1] ** -0.5).transpose(0, 2, 1, 3)
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    return _attend(q_BKTH, k_BKHS, v_BKSH, mask_B11S).transpose(0, 2, 1, 3)


@jax.custom_vjp
def _attend(q_BKTH: Any, k_BKHS: Any, v_BKSH: Any, mask_B11S: Any) -> jax.Array:
    return _attend_forward(q_BKTH, k_BKHS, v_BKSH, mask_B11S)[0]


def _attend_forward(
    q_BKTH: Any, k_BKHS: Any, v_BKSH: Any, mask_B11S: Any
) -> tuple[jax.Array, Any]:
    scores_BKTS = jnp.einsum(
        "BKTH,BKHS->BKTS", q_BKTH, k_BKHS, preferred_element_type=jnp.float32
    )
    if mask_B11S is not None:
        scores_BKTS = jnp.where(mask_B11S, scores_BKTS, -1e30)
    weights_BKTS = jax.nn.softmax(scores_BKTS, axis=-1)
    out_BKTH = jnp.einsum("BKTS,BKSH->BKTH", weights_BKTS.astype(v_BKSH.dtype), v_BKSH)
    return out_BKTH, (q_BKTH, k_BKHS, v_BKSH, weights_BKTS, out_BKTH)


def _attend_backward(kept: Any, g_BKTH: jax.Array) -> tuple[Any, ...]:
    """Gradients that leave the T x S arrays as they lie in memory.

    The automatic ones transpose two of them, which takes a CPU longer than all the
    arithmetic. The sum over S in the softmax's gradient is one over H (Dao et al. 2022,
    arXiv 2205.14135, appendix B.2). A masked weight is zero, and so is its gradient.
    """
    q_BKTH, k_BKHS, v_BKSH, weights_BKTS, out_BKTH = kept
    dtype = v_BKSH.dtype
    dv_BKHS = jnp.einsum(
        "BKHT,BKTS->BKHS", g_BKTH.swapaxes(2, 3), weights_BKTS.astype(dtype)
    )
    dweights_BKTS = jnp.einsum(
        "BKTH,BKHS->BKTS",
        g_BKTH,
        v_BKSH.swapaxes(2, 3),
        preferred_element_type=jnp.float32,
    )
    dot_BKT1 = jnp.sum(
        g_BKTH.astype(jnp.float32) * out_BKTH.astype(jnp.float32), -1, keepdims=True
    )
    dscores_BKTS = (weights_BKTS * (dweights_BKTS - dot_BKT1)).astype(dtype)
    dq_BKTH = jnp.einsum("BKTS,BKSH->BKTH", dscores_BKTS, k_BKHS.swapaxes(2, 3))
    dk_BKHS = jnp.einsum("BKHT,BKTS->BKHS", q_BKTH.swapaxes(2, 3), dscores_BKTS)
    return dq_BKTH, dk_BKHS, dv_BKHS.swapaxes(2, 3), None


_attend.defvjp(_attend_forward, _attend_backward)
