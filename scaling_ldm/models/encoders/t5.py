"""T5's encoder, original and version 1.1.

Raffel et al. 2019 (arXiv 1910.10683). There are no absolute positions. Instead a bias
is added to the scores; it is learnt per head and bucket of distance, and shared by all
layers (section 2.1). Norms are RMSNorms, no layer has a bias, and scores are not
divided by sqrt(H). Version 1.1 gates its perceptrons with a GELU (Shazeer 2020, arXiv
2002.05202). Imagen, PixArt, SD3 and FLUX read its largest encoder.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from scaling_ldm.models import layers, sharded
from scaling_ldm.models.encoders import blocks
from scaling_ldm.models.shapes import (
    Array,
    MaskBS,
    Params,
    TextBS,
    TextBSE,
    TokensBTD,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """What decides a T5 encoder's parameters and arithmetic.

    Attributes:
      head_width: of each head; heads * head_width need not be the width.
      hidden: width of the perceptrons.
      gated: whether they are gated, as in version 1.1.
      max_tokens: as trained; more would run too, because positions are relative.
      buckets, max_distance: of the bias; all distances from max_distance on share one
        bucket.
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


def distance_buckets(
    tokens: int, buckets: int, max_distance: int
) -> Int[np.ndarray, "T T"]:
    """The bucket of each (query, key): section 2.1.

    Half of the buckets are for keys after the query. In each half, half of the buckets
    hold one distance each, and the others grow geometrically up to max_distance.
    """
    half = buckets // 2
    exact = half // 2
    position = np.arange(tokens, dtype=np.int32)
    ahead = position[None, :] - position[:, None]
    distance = np.abs(ahead)
    # In float32, as it was trained: rounding decides the bucket at a boundary.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    near = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return near + half * (ahead > 0)


def _attend(
    q_BTKH: Float[Array, "B T K H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    bias_1KTS: Float[Array, "1 K T S"],
    mask_B11S: Bool[Array, "B 1 1 S"] | None,
) -> Float[Array, "B T K H"]:
    """softmax(q k + bias) v, the softmax in float32."""
    scores_BKTS = jnp.einsum(
        "BTKH,BSKH->BKTS", q_BTKH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKTS = scores_BKTS + bias_1KTS
    if mask_B11S is not None:
        scores_BKTS = jnp.where(mask_B11S, scores_BKTS, -1e30)
    weights_BKTS = jax.nn.softmax(scores_BKTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKTS,BSKH->BTKH", weights_BKTS, v_BSKH)


def _norm(config: T5Config, name: str | None) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.epsilon, dtype=config.dtype, name=name)


class T5Block(nn.Module):
    """Attention and a perceptron, each normalised before and around a residual."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x_BTD: TokensBTD, bias_1KTS: Array, mask_B11S: Array | None
    ) -> TokensBTD:
        cfg = self.config

        def up(x_BTD: TokensBTD, parts: int, features: tuple[int, ...], name: str):
            return layers.project(x_BTD, parts, features, cfg.dtype, name, False)

        h = _norm(cfg, "attention_norm")(x_BTD)
        q, k, v = up(h, 3, (cfg.heads, cfg.head_width), "qkv")
        h = _attend(q, k, v, bias_1KTS, mask_B11S)
        x = x_BTD + layers.join_heads(h, cfg.width, cfg.dtype, "out", use_bias=False)
        h = _norm(cfg, "mlp_norm")(x)
        activation = blocks.PUBLISHED_ACTIVATIONS[cfg.activation]

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=cfg.dtype, name=name)

        if cfg.gated:
            gate, value = up(h, 2, (cfg.hidden,), "mlp_up")
            h = activation(gate) * value
        else:
            h = activation(dense(cfg.hidden, "mlp_up")(h))
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
        "exit": layers.init_module(_norm(config, None), key, x),
    }


def apply(
    config: T5Config, params: Params, ids_BS: TextBS, mask_BS: MaskBS | None
) -> TextBSE:
    """Float32 features of every token, [B, S, width]; no token attends to padding.

    Args:
      ids_BS: ids of words, [B, S].
      mask_BS: [B, S], true where there is text; None: every token is text.
    """
    with jax.named_scope("entry"):
        entry = sharded.gather(params["entry"])
        x = layers.embed(entry["word_embedding"], ids_BS).astype(config.dtype)
        where = distance_buckets(ids_BS.shape[1], config.buckets, config.max_distance)
        bias = entry["relative_bias"][where].transpose(2, 0, 1)[None]  # 1, K, T, S
        bias = bias.astype(jnp.float32)
        mask = blocks.key_mask(mask_BS)

    def layer(x: TokensBTD, block: Params) -> TokensBTD:
        block = sharded.gather(block)
        return layers.apply_module(T5Block(config), block, x, bias, mask)

    with jax.named_scope("blocks"):
        x = blocks.run(layer, x, params["blocks"], config.unroll)
    with jax.named_scope("exit"):
        exit_params = sharded.gather(params["exit"])
        x = layers.apply_module(_norm(config, None), exit_params, x)
    return x.astype(jnp.float32)
