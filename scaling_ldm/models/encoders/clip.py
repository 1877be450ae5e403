"""CLIP's text and image towers (OpenAI's and OpenCLIP's).

Radford et al. 2021 (arXiv 2103.00020): two pre-norm transformers. Their projected
vectors of a text and of its picture have similar directions. The text tower is causal,
and its vector is that of the end-of-text token. Stable Diffusion reads the features of
all 77 tokens, padding too, so it passes no mask. Stable Diffusion 1 reads the last
layer; 2 (OpenCLIP-H) and SDXL read the last but one, SDXL without the final norm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm.models import layers, sharded
from scaling_ldm.models.encoders import blocks
from scaling_ldm.models.shapes import (
    Array,
    LatentBHWC,
    MaskBS,
    Params,
    TextBS,
    TextBSE,
    TokensBTD,
)

# Of the pictures in [0, 1] that CLIP was trained on. It reads (x - MEAN) / STD.
MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)
LEGACY_END = 2  # in old configurations, which mean the largest id of each text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """What decides a text tower's parameters and arithmetic.

    Attributes:
      hidden: width of the perceptrons.
      projection: width of the space shared with pictures; 0: there is no projection.
      end_token: id of the end of text; LEGACY_END means the largest id of each text.
      skip: how many of the last blocks `apply` leaves out.
      final_norm: whether `apply` normalises what it returns.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    vocab_size: int
    max_tokens: int
    projection: int
    end_token: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    skip: int = 0
    final_norm: bool = True
    dtype: Any = jnp.float32
    unroll: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """What decides an image tower's parameters and arithmetic: see `ClipTextConfig`."""

    width: int
    depth: int
    heads: int
    hidden: int
    image_size: int
    patch_size: int
    projection: int
    channels: int = 3
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    unroll: bool = False


ClipConfig = ClipTextConfig | ClipVisionConfig


class ClipBlock(nn.Module):
    """Attention and a perceptron, each normalised before and around a residual."""

    config: ClipConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD, mask: Array | None) -> TokensBTD:
        cfg = self.config
        h = blocks.norm(cfg.epsilon, cfg.dtype, "attention_norm")(x_BTD)
        x = x_BTD + blocks.EncoderAttention(cfg.heads, cfg.dtype, name="attention")(
            h, mask
        )
        h = blocks.norm(cfg.epsilon, cfg.dtype, "mlp_norm")(x)
        activation = blocks.PUBLISHED_ACTIVATIONS[cfg.activation]
        return x + layers.perceptron(h, cfg.hidden, activation, cfg.dtype, "mlp_")


class Projection(nn.Module):
    """To the shared space, without a bias; the identity where there is none."""

    config: ClipConfig

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        cfg = self.config
        if not cfg.projection:
            return x_BD
        return nn.Dense(
            cfg.projection, use_bias=False, dtype=cfg.dtype, name="projection"
        )(x_BD)


class ClipHead(nn.Module):
    """The norm at the end."""

    config: ClipConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return blocks.norm(self.config.epsilon, self.config.dtype, "norm")(x)


class ClipVisionEmbed(nn.Module):
    """Patches after a class token, with positions, then a norm."""

    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x_BHWC: LatentBHWC) -> TokensBTD:
        cfg = self.config
        small = nn.initializers.normal(0.02)
        count = 1 + (cfg.image_size // cfg.patch_size) ** 2
        patches = layers.patchify(x_BHWC.astype(cfg.dtype), cfg.patch_size)
        x = nn.Dense(cfg.width, use_bias=False, dtype=cfg.dtype, name="patch")(patches)
        first = self.param("class_embedding", small, (cfg.width,))
        places = self.param("position_embedding", small, (count, cfg.width))
        places = jnp.concatenate([places[:1] + first[None], places[1:]])
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0))) + places.astype(cfg.dtype)[None]
        return blocks.norm(cfg.epsilon, cfg.dtype, "norm")(x)


def _run(
    config: ClipConfig,
    params: Params,
    x: TokensBTD,
    mask: Array | None,
) -> TokensBTD:
    def layer(x: TokensBTD, block: Params) -> TokensBTD:
        return layers.apply_module(ClipBlock(config), sharded.gather(block), x, mask)

    with jax.named_scope("blocks"):
        return blocks.run(layer, x, params["blocks"], config.unroll)


def _normed(config: ClipConfig, params: Params, x: Array) -> jax.Array:
    return layers.apply_module(ClipHead(config), sharded.gather(params["exit"]), x)


def _projected(config: ClipConfig, params: Params, x_BD: jax.Array) -> jax.Array:
    projection = sharded.gather(params.get("pooled", {}))
    return layers.apply_module(Projection(config), projection, x_BD).astype(jnp.float32)


def _init_common(config: ClipConfig, key: jax.Array) -> Params:
    block_key, exit_key, projection_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.width))
    params = {
        "blocks": blocks.init(ClipBlock(config), config.depth, block_key, x, None),
        "exit": layers.init_module(ClipHead(config), exit_key, x),
    }
    if config.projection:
        projection = Projection(config)
        params["pooled"] = layers.init_module(projection, projection_key, x[0])
    return params


def init(config: ClipTextConfig, key: jax.Array) -> Params:
    """Random float32 parameters; leaves of "blocks" have a leading axis of `depth`."""
    word_key, place_key, key = jax.random.split(key, 3)
    words, places = (config.vocab_size, config.width), (config.max_tokens, config.width)
    return {
        "entry": {
            "word_embedding": 0.02 * jax.random.normal(word_key, words),
            "position_embedding": 0.01 * jax.random.normal(place_key, places),
        },
        **_init_common(config, key),
    }


def apply(
    config: ClipTextConfig, params: Params, ids_BS: TextBS, mask_BS: MaskBS | None
) -> TextBSE:
    """Float32 features of every token, [B, S, width]; each attends to those before it.

    With a mask, no token attends to padding. Where padding comes last, the mask changes
    only the features of padding.

    Args:
      ids_BS: ids of words, [B, S].
      mask_BS: [B, S], true where there is text; None: every token is text.

    Raises:
      ValueError: more tokens than positions.
    """
    if config.skip:
        kept = blocks.first(params["blocks"], config.depth - config.skip)
        x = _text(config, {**params, "blocks": kept}, ids_BS, mask_BS)
    else:
        x = _text(config, params, ids_BS, mask_BS)
    return (_normed(config, params, x) if config.final_norm else x).astype(jnp.float32)


def _text(
    config: ClipTextConfig, params: Params, ids_BS: TextBS, mask_BS: MaskBS | None
) -> TokensBTD:
    """The features after all blocks in `params`."""
    tokens = ids_BS.shape[1]
    blocks.check_length(tokens, config.max_tokens)
    with jax.named_scope("entry"):
        entry = sharded.gather(params["entry"])
        x = layers.embed(entry["word_embedding"], ids_BS)
        x = (x + entry["position_embedding"][None, :tokens]).astype(config.dtype)
        mask = jnp.tri(tokens, dtype=bool)[None, None]
        if mask_BS is not None:
            mask = mask & mask_BS[:, None, None, :]
    return _run(config, params, x, mask)


def embed_text(
    config: ClipTextConfig, params: Params, ids_BS: TextBS, mask_BS: MaskBS | None
) -> jax.Array:
    """The vector of a text: that of its end-of-text token.

    It is taken after all blocks and the final norm, whatever `apply` leaves out.

    Args:
      ids_BS, mask_BS: as for `apply`.

    Returns:
      [B, projection], or [B, width] without a projection.

    Raises:
      ValueError: more tokens than positions.
    """
    x = _normed(config, params, _text(config, params, ids_BS, mask_BS))
    if config.end_token == LEGACY_END:
        end_B = jnp.argmax(ids_BS, axis=1)
    else:
        end_B = jnp.argmax(ids_BS == config.end_token, axis=1)
    chosen = jax.nn.one_hot(end_B, ids_BS.shape[1], dtype=bool)[:, :, None]
    last = jnp.sum(jnp.where(chosen, x, 0), axis=1, dtype=x.dtype)
    return _projected(config, params, last)


def init_vision(config: ClipVisionConfig, key: jax.Array) -> Params:
    """Random float32 parameters, as `init`."""
    entry_key, key = jax.random.split(key)
    side = config.image_size
    x = jnp.zeros((1, side, side, config.channels))
    entry = layers.init_module(ClipVisionEmbed(config), entry_key, x)
    return {"entry": entry, **_init_common(config, key)}


def apply_vision(
    config: ClipVisionConfig, params: Params, x_BHWC: LatentBHWC
) -> TokensBTD:
    """Float32 features [B, 1 + patches, width]: class token, then patches by row.

    Args:
      x_BHWC: pictures of the network's size; of one x in [0, 1], (x - MEAN) / STD.

    Raises:
      ValueError: pictures of another size.
    """
    wanted = (config.image_size, config.image_size, config.channels)
    if x_BHWC.shape[1:] != wanted:
        raise ValueError(f"pictures of {x_BHWC.shape[1:]}; this tower reads {wanted}")
    with jax.named_scope("entry"):
        entry = sharded.gather(params["entry"])
        x = layers.apply_module(ClipVisionEmbed(config), entry, x_BHWC)
    return _run(config, params, x, None).astype(jnp.float32)


def embed_image(
    config: ClipVisionConfig, params: Params, x_BHWC: LatentBHWC
) -> jax.Array:
    """The vector of a picture: that of its class token.

    Args:
      x_BHWC: as for `apply_vision`.

    Returns:
      [B, projection], or [B, width] without a projection.

    Raises:
      ValueError: pictures of another size.
    """
    x = apply_vision(config, params, x_BHWC)[:, 0].astype(config.dtype)
    return _projected(config, params, _normed(config, params, x))
