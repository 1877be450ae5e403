"""Parts that networks share: gathering, patches, positions, time; jax and flax only.

Explicit meshes refuse a reshape that splits and merges at once, so patches are cut and
joined one axis at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from scaling_ldm.shapes import LatentBHWC, TextBS, TextBSE, TimeB, TokensBTD

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def gather(tree: Any) -> Any:
    """Whole copies of sharded parameters, at the place where they are used.

    Under an explicit mesh each leaf is resharded to full replication (its gradient is
    reduced and scattered back); without a mesh this is the identity.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.reshard(leaf, PartitionSpec()), tree)


def embed(table_VE: jax.Array, ids_BS: TextBS) -> TextBSE:
    """Rows of a replicated table; the result is sharded as the ids are."""
    if jax.sharding.get_abstract_mesh().empty:
        return table_VE[ids_BS]
    spec = jax.typeof(ids_BS).sharding.spec
    return table_VE.at[ids_BS].get(out_sharding=PartitionSpec(*spec, None))


def attend(
    q_BTKH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_B11S: jax.Array | None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v, the softmax in float32.

    What `jax.nn.dot_product_attention` computes, with the scale on the queries, which
    are fewer than the scores.
    """
    q_BTKH = q_BTKH * q_BTKH.shape[-1] ** -0.5
    scores_BKTS = jnp.einsum(
        "BTKH,BSKH->BKTS", q_BTKH, k_BSKH, preferred_element_type=jnp.float32
    )
    if mask_B11S is not None:
        scores_BKTS = jnp.where(mask_B11S, scores_BKTS, -1e30)
    weights_BKTS = jax.nn.softmax(scores_BKTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKTS,BSKH->BTKH", weights_BKTS, v_BSKH)


def patchify(x_BHWC: LatentBHWC, patch: int) -> TokensBTD:
    """Non-overlapping patches in raster order: [B, H/p * W/p, p * p * C]."""
    B, H, W, C = x_BHWC.shape
    h, w = H // patch, W // patch
    x = x_BHWC.reshape(B, h, patch, W, C).reshape(B, h, patch, w, patch, C)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * w, patch, patch, C).reshape(B, h * w, patch * patch * C)


def unpatchify(x_BND: TokensBTD, patch: int, shape: tuple[int, ...]) -> LatentBHWC:
    """The inverse of `patchify` for pictures of `shape` = (H, W, C)."""
    H, W, C = shape
    h, w = H // patch, W // patch
    B = x_BND.shape[0]
    x = x_BND.reshape(B, h, w, patch * patch * C).reshape(B, h, w, patch, patch * C)
    x = x.reshape(B, h, w, patch, patch, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H, w, patch, C).reshape(B, H, W, C)


def sinusoid(position: np.ndarray | jax.Array, width: int, longest: float) -> jax.Array:
    """cos and sin of a position at geometric wavelengths from 2 pi to `longest` 2 pi.

    Vaswani et al. 2017, section 3.5; an odd width leaves one zero column.
    """
    half = width // 2
    frequency = jnp.exp(-math.log(longest) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.multiply.outer(jnp.asarray(position, jnp.float32), frequency)
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    if width % 2:
        padding = [(0, 0)] * (features.ndim - 1) + [(0, 1)]
        features = jnp.pad(features, padding)
    return features


def image_positions(height: int, width: int, features: int) -> jax.Array:
    """Fixed 2-D positions [height * width, features]: half for the row, half column."""
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    half = features // 2
    return jnp.concatenate(
        [
            sinusoid(row.reshape(-1), half, 10_000.0),
            sinusoid(column.reshape(-1), features - half, 10_000.0),
        ],
        axis=-1,
    )


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> [B, width]: sinusoids of 1000 t, then a two-layer perceptron.

    The sinusoids are float32 whatever the compute type: bfloat16 rounds 750 to 752.
    """

    width: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, t_B: TimeB) -> jax.Array:
        h = sinusoid(1000.0 * t_B.astype(jnp.float32), self.features, 10_000.0)
        h = nn.Dense(self.width, dtype=self.dtype, name="up")(h)
        return nn.Dense(self.width, dtype=self.dtype, name="out")(jax.nn.silu(h))
