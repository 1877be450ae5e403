"""T5's encoder, original and 1.1; jax and flax only.

Raffel et al. 2019 (arXiv 1910.10683): no absolute positions but a bias on the scores,
learnt per head and bucket of distance and shared by all layers (section 2.1); RMSNorm;
no biases anywhere; scores are not divided by sqrt(H). Version 1.1 gates its perceptrons
with a GELU (Shazeer 2020, arXiv 2002.05202). Imagen, PixArt, SD3 and Flux read its
largest encoder.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm.models import layers
from scaling_ldm.models.encoders import blocks
from scaling_ldm.models.shapes import MaskBS, TextBS, TextBSE, TokensBTD

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """What decides a T5 encoder's parameters and arithmetic.

    Attributes:
      head_width: of each head; heads * head_width need not be the width.
      hidden: width of the perceptrons.
      gated: whether they are gated, as in version 1.1.
      max_tokens: as trained; positions being relative, more would run as well.
      buckets, max_distance: of the bias: distances from max_distance on share a bucket.
    """

    width: int
    depth: int
    heads: int
    head_width: int
    hidden: int
    vocab_size: int
    gated: bool
    activation: str
    max_tokens: int = 512
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    unroll: bool = False


def distance_buckets(tokens: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each (query, key), [T, T]: section 2.1.

    Half of the buckets are for keys after the query. Of each half, half are single
    distances and the rest grow geometrically up to max_distance.
    """
    half = buckets // 2
    exact = half // 2
    position = np.arange(tokens, dtype=np.int32)
    ahead = position[None, :] - position[:, None]
    distance = np.abs(ahead)
    # In float32, where it was trained: this decides on which side of a bound it falls.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    near = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return near + half * (ahead > 0)


def _attend(
    q_BTKH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    bias_1KTS: jax.Array,
    mask_B11S: jax.Array | None,
) -> jax.Array:
    """softmax(q k + bias) v, the softmax in float32."""
    scores_BKTS = jnp.einsum(
        "BTKH,BSKH->BKTS", q_BTKH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKTS = scores_BKTS + bias_1KTS
    if mask_B11S is not None:
        scores_BKTS = jnp.where(mask_B11S, scores_BKTS, -1e30)
    weights_BKTS = jax.nn.softmax(scores_BKTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKTS,BSKH->BTKH", weights_BKTS, v_BSKH)


def _norm(config: T5Config, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.epsilon, dtype=config.dtype, name=name)


class T5Block(nn.Module):
    """Attention and a perceptron, each normalised before and around a residual."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x_BTD: TokensBTD, bias_1KTS: jax.Array, mask_B11S: jax.Array | None
    ) -> TokensBTD:
        cfg = self.config

        def dense(features: Any, name: str, axis: Any = -1) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features, axis=axis, use_bias=False, dtype=cfg.dtype, name=name
            )

        h = _norm(cfg, "attention_norm")(x_BTD)
        qkv = dense((3, cfg.heads, cfg.head_width), "qkv")(h)
        q, k, v = (jnp.squeeze(a, 2) for a in jnp.split(qkv, 3, axis=2))
        h = _attend(q, k, v, bias_1KTS, mask_B11S)
        x = x_BTD + dense(cfg.width, "out", (-2, -1))(h)
        h = _norm(cfg, "mlp_norm")(x)
        act = blocks.ACTIVATIONS[cfg.activation]
        if cfg.gated:
            h = dense((2, cfg.hidden), "mlp_up")(h)
            gate, value = (jnp.squeeze(a, 2) for a in jnp.split(h, 2, axis=2))
            h = act(gate) * value
        else:
            h = act(dense(cfg.hidden, "mlp_up")(h))
        return x + dense(cfg.width, "mlp_down")(h)


def init(config: T5Config, key: jax.Array) -> Params:
    """Random float32 parameters; leaves of "blocks" have a leading axis of `depth`."""
    word_key, bias_key, block_key = jax.random.split(key, 3)
    table = (config.buckets, config.heads)
    x = jnp.zeros((1, 1, config.width))
    bias = jnp.zeros((1, config.heads, 1, 1))
    return {
        "entry": {
            "word_embedding": jax.random.normal(
                word_key, (config.vocab_size, config.width)
            ),
            "relative_bias": config.width**-0.5 * jax.random.normal(bias_key, table),
        },
        "blocks": blocks.init(T5Block(config), config.depth, block_key, x, bias, None),
        "exit": _norm(config, None).init(key, x)["params"],
    }


def apply(
    config: T5Config, params: Params, ids_BS: TextBS, mask_BS: MaskBS | None
) -> TextBSE:
    """Features [B, S, width] in float32 of every token; padding is not attended to."""
    with jax.named_scope("entry"):
        entry = layers.gather(params["entry"])
        x = layers.embed(entry["word_embedding"], ids_BS).astype(config.dtype)
        where = distance_buckets(ids_BS.shape[1], config.buckets, config.max_distance)
        bias = entry["relative_bias"][where].transpose(2, 0, 1)[None]  # 1, K, T, S
        bias = bias.astype(jnp.float32)
        mask = blocks.key_mask(mask_BS)

    def layer(x: TokensBTD, block: Params) -> TokensBTD:
        return T5Block(config).apply({"params": layers.gather(block)}, x, bias, mask)

    with jax.named_scope("blocks"):
        x = blocks.run(layer, x, params["blocks"], config.unroll)
    with jax.named_scope("exit"):
        x = _norm(config, None).apply({"params": layers.gather(params["exit"])}, x)
    return x.astype(jnp.float32)
