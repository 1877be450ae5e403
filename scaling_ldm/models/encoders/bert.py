"""BERT and its small relatives such as MiniLM.

Devlin et al. 2018 (arXiv 1810.04805): embeddings of word, position and type are summed
and normalised; blocks normalise after each residual. For all-MiniLM-L6-v2 (Wang et al.
2020, arXiv 2002.10957, tuned by sentence-transformers), the vector of a sentence is the
mean over its tokens, scaled to length one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

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
class BertConfig:
    """What decides a BERT's parameters and arithmetic.

    Attributes:
      hidden: width of the perceptrons.
      types: of segments; every token of a caption has type 0.
      pooler: whether there are parameters for `first_token`.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    vocab_size: int
    max_tokens: int
    types: int = 2
    activation: str = "gelu"
    epsilon: float = 1e-12
    pooler: bool = True
    dtype: Any = jnp.float32
    unroll: bool = False


class BertBlock(nn.Module):
    """Attention, then a perceptron, each normalised after its residual."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD, mask: Array | None) -> TokensBTD:
        cfg = self.config
        h = blocks.EncoderAttention(cfg.heads, cfg.dtype, name="attention")(x_BTD, mask)
        x = blocks.norm(cfg.epsilon, cfg.dtype, "attention_norm")(x_BTD + h)
        activation = blocks.PUBLISHED_ACTIVATIONS[cfg.activation]
        h = layers.perceptron(x, cfg.hidden, activation, cfg.dtype, "mlp_")
        return blocks.norm(cfg.epsilon, cfg.dtype, "mlp_norm")(x + h)


class BertEmbed(nn.Module):
    """Embeddings of words, positions and type 0, summed and normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, ids_BS: TextBS) -> TokensBTD:
        cfg = self.config
        small = nn.initializers.normal(0.02)
        words = self.param("word_embedding", small, (cfg.vocab_size, cfg.width))
        places = self.param("position_embedding", small, (cfg.max_tokens, cfg.width))
        types = self.param("type_embedding", small, (cfg.types, cfg.width))
        rest = places[: ids_BS.shape[1]] + types[:1]
        x = layers.embed(words, ids_BS) + rest[None]
        return blocks.norm(cfg.epsilon, cfg.dtype, "norm")(x)


def init(config: BertConfig, key: jax.Array) -> Params:
    """Random float32 parameters; leaves of "blocks" have a leading axis of `depth`."""
    entry_key, block_key, exit_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.width))
    params = {
        "entry": layers.init_module(
            BertEmbed(config), entry_key, jnp.zeros((1, 1), jnp.int32)
        ),
        "blocks": blocks.init(BertBlock(config), config.depth, block_key, x, None),
    }
    if config.pooler:
        params["pooler"] = layers.init_module(nn.Dense(config.width), exit_key, x)
    return params


def apply(
    config: BertConfig, params: Params, ids_BS: TextBS, mask_BS: MaskBS | None
) -> TextBSE:
    """Float32 features of every token, [B, S, width]; no token attends to padding.

    Args:
      ids_BS: ids of words, [B, S].
      mask_BS: [B, S], true where there is text; None: every token is text.

    Raises:
      ValueError: more tokens than positions.
    """
    blocks.check_length(ids_BS.shape[1], config.max_tokens)
    mask = blocks.key_mask(mask_BS)
    with jax.named_scope("entry"):
        entry = sharded.gather(params["entry"])
        x = layers.apply_module(BertEmbed(config), entry, ids_BS)

    def layer(x: TokensBTD, block: Params) -> TokensBTD:
        return layers.apply_module(BertBlock(config), sharded.gather(block), x, mask)

    with jax.named_scope("blocks"):
        x = blocks.run(layer, x, params["blocks"], config.unroll)
    return x.astype(jnp.float32)


def first_token(
    config: BertConfig, params: Params, features_BSE: TextBSE
) -> Float[Array, "B E"]:
    """BERT's own vector of a text: a dense layer and tanh on the first token.

    Args:
      params: with "pooler", which a config with `pooler` has.
      features_BSE: what `apply` returns.

    Returns:
      [B, width].
    """
    dense = nn.Dense(config.width, dtype=config.dtype)
    pooler = sharded.gather(params["pooler"])
    return jnp.tanh(layers.apply_module(dense, pooler, features_BSE[:, 0]))


def sentence(features_BSE: TextBSE, mask_BS: MaskBS) -> Float[Array, "B E"]:
    """A unit vector for a text: the mean over its tokens, without padding.

    Args:
      features_BSE: what `apply` returns.
      mask_BS: [B, S], true where there is text.

    Returns:
      [B, width].
    """
    weight_BS1 = mask_BS.astype(features_BSE.dtype)[:, :, None]
    total = jnp.sum(features_BSE * weight_BS1, axis=1)
    mean = total / jnp.maximum(jnp.sum(weight_BS1, axis=1), 1e-9)
    length = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return mean / jnp.maximum(length, 1e-12)
