"""Transformers with one stream of tokens for the picture and one for the text.

MMDiT     (SD3: Esser et al. 2024, arXiv 2403.03206, section 4): the two streams have
          weights of their own and meet in one attention. Time and pooled text modulate
          both. The last block drops its text after the attention.
FLUX      (Black Forest Labs 2024, as in its published code): such double-stream blocks,
          whose text goes on, then single-stream blocks over both kinds of token, with
          the perceptron beside the attention. Positions are rotary over three axes
          (index, row, column), queries and keys have an RMSNorm, and the guidance
          scale is a third condition.

The published networks have no mask for padding. For captions without padding, these
networks compute the same. Assumptions of this library:
- Padding is hidden from all attention.
- Without pooled features (`pooled_width` 0), the mean of the caption's features
  replaces them.
- Words that are looked up here (`vocab_size` > 0) get sinusoids of their order. The
  features of a text encoder need none.
- Every modulation starts at zero, as in DiT.

A study states (width, depth, heads). An MMDiT has `depth` blocks; a FLUX of that depth
has `split(depth)` double and single ones. Heads divide the width; they are 64 wide in
SD3 and 128 in FLUX. The published SD3 has width = 64 depth and heads = depth.

Parameters: "entry", "blocks" (double-stream, stacked), "last" (MMDiT's last block,
without an axis of layers), "single_blocks" (FLUX's, stacked), "exit". Where the text is
dropped, its queries are parameters that nothing reads. They are kept because the
published weights have them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from scaling_ldm.models import (
    attention_backends,
    layers,
    positions,
    remat,
    sharded,
)
from scaling_ldm.models.denoisers import transformer_parts
from scaling_ldm.models.shapes import (
    Array,
    LatentBHWC,
    MaskBS,
    Params,
    TextBSE,
    TimeB,
    TokensBTD,
)

# Image and text tokens.
Streams = tuple[Float[Array, "B N D"], Float[Array, "B S D"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDiTConfig(transformer_parts.TransformerConfig):
    """What decides a two-stream transformer's parameters and arithmetic.

    Attributes:
      depth: double-stream blocks; the last one drops its text if single_depth is 0.
      single_depth: single-stream blocks; 0 makes an MMDiT, more make a FLUX.
      pooled_width: of the pooled text features; 0: the mean of the text features.
      guidance: whether cond["guidance"], a scale for each example, is a condition.
      rope_axes: features of a head per axis (index, row, column); (): FLUX's shares.
    """

    single_depth: int = 0
    pooled_width: int = 0
    guidance: bool = False
    rope_axes: tuple[int, ...] = ()


def split(depth: int) -> tuple[int, int]:
    """(double, single) blocks of a FLUX of this depth; FLUX.1 has 19 + 38 of 57.

    Raises:
      ValueError: a depth below 2, too few for one of each.
    """
    if depth < 2:
        raise ValueError(f"a FLUX needs at least 2 blocks, got {depth}")
    double = round(depth / 3)
    return double, depth - double


def _rope(config: MMDiTConfig) -> Any:
    """The rotations of all tokens, text first, which does not rotate.

    None without rotary positions.
    """
    if config.positions != "rope":
        return None
    axes = config.rope_axes or positions.rope_axes(config.width // config.heads, 3)
    return positions.image_rope(*config.patches, axes, config.text_tokens)


def _modulation(
    config: MMDiTConfig, parts: int, condition_BD: jax.Array, name: str
) -> Any:
    """`parts` vectors [B, 1, D] from the condition, zero before training."""
    dense = nn.Dense(
        parts * config.width,
        dtype=config.dtype,
        kernel_init=nn.initializers.zeros,
        name=name,
    )
    return jnp.split(dense(condition_BD)[:, None, :], parts, axis=-1)


def _qkv(
    config: MMDiTConfig, x_BTD: TokensBTD, name: str
) -> list[Float[Array, "B T K H"]]:
    """Queries, keys and values, the first two normalised."""
    head = (config.heads, config.width // config.heads)
    q, k, v = layers.project(x_BTD, 3, head, config.dtype, f"{name}qkv")
    q = layers.head_norm(config.qk_norm, q, config.dtype, f"{name}q_norm")
    k = layers.head_norm(config.qk_norm, k, config.dtype, f"{name}k_norm")
    return [q, k, v]


class DoubleBlock(nn.Module):
    """One block over two streams; without `keeps_text`, the text ends here."""

    config: MMDiTConfig
    keeps_text: bool = True

    @nn.compact
    def __call__(self, x: Streams, side: dict[str, Any]) -> Streams:
        cfg = self.config
        image, text = x
        condition, S = side["condition"], text.shape[1]

        def norm(x: TokensBTD, name: str) -> TokensBTD:
            return layers.norm(cfg.norm, cfg.dtype, name, False)(x)

        image_by = _modulation(cfg, 6, condition, "image_modulation")
        text_by = _modulation(
            cfg, 6 if self.keeps_text else 2, condition, "text_modulation"
        )
        shift, scale = text_by[:2]
        if not self.keeps_text:  # scale first, as published
            scale, shift = shift, scale
        h_image = norm(image, "image_norm1") * (1 + image_by[1]) + image_by[0]
        h_text = norm(text, "text_norm1") * (1 + scale) + shift
        q, k, v = (
            jnp.concatenate(both, axis=1)
            for both in zip(
                _qkv(cfg, h_text, "text_"), _qkv(cfg, h_image, "image_"), strict=True
            )
        )
        rope = _rope(cfg)
        q, k = positions.rotate(q, rope), positions.rotate(k, rope)
        if not self.keeps_text:
            q = q[:, S:]
        out = attention_backends.attend(q, k, v, side.get("mask"), cfg.attention)

        def after(x: TokensBTD, out: Array, by: Any, name: str) -> TokensBTD:
            """The rest of a stream's block: output projection, then perceptron."""
            h = layers.join_heads(out, cfg.width, cfg.dtype, f"{name}_out")
            x = x + by[2] * h
            h = norm(x, f"{name}_norm2") * (1 + by[4]) + by[3]
            activation = layers.ACTIVATIONS[cfg.activation]
            hidden = cfg.mlp_ratio * cfg.width
            return x + by[5] * layers.perceptron(
                h, hidden, activation, cfg.dtype, f"{name}_"
            )

        if not self.keeps_text:
            return after(image, out, image_by, "image"), text
        image = after(image, out[:, S:], image_by, "image")
        return image, after(text, out[:, :S], text_by, "text")


class SingleBlock(nn.Module):
    """One block over text and image tokens alike, attention beside perceptron."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD, side: dict[str, Any]) -> TokensBTD:
        cfg = self.config
        B, T, D = x_BTD.shape
        shift, scale, gate = _modulation(cfg, 3, side["condition"], "modulation")
        h = layers.norm(cfg.norm, cfg.dtype, "norm", False)(x_BTD) * (1 + scale) + shift
        q, k, v = _qkv(cfg, h, "")
        rope = _rope(cfg)
        q, k = positions.rotate(q, rope), positions.rotate(k, rope)
        seen = attention_backends.attend(q, k, v, side.get("mask"), cfg.attention)
        seen = seen.reshape(B, T, D)
        h = nn.Dense(cfg.mlp_ratio * D, dtype=cfg.dtype, name="up")(h)
        h = layers.ACTIVATIONS[cfg.activation](h)
        h = jnp.concatenate([seen, h], axis=-1)
        return x_BTD + gate * nn.Dense(D, dtype=cfg.dtype, name="out")(h)


class MMDiTEmbed(nn.Module):
    """Inputs to both streams, and the side inputs that every block reads.

    Its key in the tree of parameters is "entry", and that of `MMDiTHead` is "exit".
    """

    config: MMDiTConfig

    @nn.compact
    def __call__(
        self, x_BHWC: LatentBHWC, t_B: TimeB, cond: dict[str, Any]
    ) -> tuple[Streams, dict[str, Any]]:
        cfg = self.config
        x = transformer_parts.image_tokens(self, x_BHWC)
        text = transformer_parts.text_features(self, cond["text"])
        mask = cond.get("mask")
        pooled = (
            cond["pooled"].astype(cfg.dtype) if cfg.pooled_width else _mean(text, mask)
        )
        text = nn.Dense(cfg.width, dtype=cfg.dtype, name="text")(text)
        if cfg.vocab_size:
            text = text + transformer_parts.word_positions(cfg)

        def embedded(name: str, value_B: TimeB) -> Float[Array, "B D"]:
            return layers.TimeEmbedding(
                cfg.width, cfg.time_width, cfg.dtype, name=name
            )(value_B)

        condition = embedded("time", t_B)
        if cfg.guidance:
            condition = condition + embedded("guidance", cond["guidance"])
        pooled = nn.Dense(cfg.width, dtype=cfg.dtype, name="pooled_up")(pooled)
        condition = condition + nn.Dense(cfg.width, dtype=cfg.dtype, name="pooled_out")(
            jax.nn.silu(pooled)
        )
        side = {"condition": jax.nn.silu(condition)}
        if mask is not None:
            seen = jnp.pad(mask, ((0, 0), (0, x.shape[1])), constant_values=True)
            side["mask"] = seen[:, None, None, :]
        return (x, text), side


def _mean(text_BSE: TextBSE, mask_BS: MaskBS | None) -> Float[Array, "B E"]:
    """The mean of a caption's features in float32; 0 where there is no word."""
    if mask_BS is None:
        return jnp.mean(text_BSE, axis=1, dtype=jnp.float32).astype(text_BSE.dtype)
    seen = mask_BS.astype(jnp.float32)[:, :, None]
    total = jnp.sum(text_BSE.astype(jnp.float32) * seen, axis=1)
    count = jnp.maximum(jnp.sum(seen, axis=1), 1.0)
    return (total / count).astype(text_BSE.dtype)


class MMDiTHead(nn.Module):
    """Image tokens to the prediction, in float32, zero before training."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, x_BND: TokensBTD, side: dict[str, Any]) -> LatentBHWC:
        cfg = self.config
        scale, shift = _modulation(cfg, 2, side["condition"], "modulation")
        x = layers.norm(cfg.norm, cfg.dtype, "norm", False)(x_BND) * (1 + scale) + shift
        return transformer_parts.prediction(cfg, x)


def init(config: MMDiTConfig, key: jax.Array) -> Params:
    """Float32 parameters; leaves of the "blocks" have a leading axis of layers."""
    keys = jax.random.split(key, 5)
    x, t, cond = transformer_parts.example_inputs(config)
    cond |= {
        "pooled": jnp.zeros((1, config.pooled_width)),
        "guidance": jnp.zeros((1,)),
    }
    entry = MMDiTEmbed(config)
    params = {"entry": layers.init_module(entry, keys[0], x, t, cond)}
    (image, text), side = layers.apply_module(entry, params["entry"], x, t, cond)

    def stack(module: nn.Module, x: Any, key: jax.Array, depth: int) -> Params:
        return jax.vmap(lambda key: layers.init_module(module, key, x, side))(
            jax.random.split(key, depth)
        )

    if config.single_depth:
        both = jnp.concatenate([text, image], axis=1)
        params["blocks"] = stack(
            DoubleBlock(config), (image, text), keys[1], config.depth
        )
        params["single_blocks"] = stack(
            SingleBlock(config), both, keys[2], config.single_depth
        )
    else:
        params["blocks"] = stack(
            DoubleBlock(config), (image, text), keys[1], config.depth - 1
        )
        last = DoubleBlock(config, keeps_text=False)
        params["last"] = layers.init_module(last, keys[3], (image, text), side)
    params["exit"] = layers.init_module(MMDiTHead(config), keys[4], image, side)
    return params


def apply(
    config: MMDiTConfig,
    params: Params,
    x_BHWC: LatentBHWC,
    t_B: TimeB,
    cond: dict[str, Any],
) -> Float[jax.Array, "B H W out"]:
    """The prediction in float32 for x at times t in [0, 1].

    Args:
      cond: "text" (features [B, S, E], or ids [B, S] with a vocabulary); "mask" [B, S],
        true where there is text, which may be left out; "pooled" [B, P] with a
        pooled_width; "guidance" [B] with guidance.
    """
    with jax.named_scope("entry"):
        entry = sharded.gather(params["entry"])
        x, side = layers.apply_module(MMDiTEmbed(config), entry, x_BHWC, t_B, cond)

    def double(x: Streams, block: Params, side: Any) -> Streams:
        return layers.apply_module(DoubleBlock(config), block, x, side)

    def last(x: Streams, block: Params, side: Any) -> Streams:
        module = DoubleBlock(config, keeps_text=False)
        return layers.apply_module(module, block, x, side)

    def single(x: TokensBTD, block: Params, side: Any) -> TokensBTD:
        return layers.apply_module(SingleBlock(config), block, x, side)

    how = {
        "remat": config.remat,
        "unroll": config.unroll,
        "dtype": config.dtype,
    }
    with jax.named_scope("blocks"):
        x = layers.scan_blocks(double, x, params["blocks"], side, **how)
    if config.single_depth:
        with jax.named_scope("single_blocks"):
            image, text = x
            x_BTD = jnp.concatenate([text, image], axis=1)
            x_BTD = layers.scan_blocks(
                single, x_BTD, params["single_blocks"], side, **how
            )
            image = x_BTD[:, text.shape[1] :]
    else:
        with jax.named_scope("last"):
            image, _ = remat.block(last, config.remat, config.dtype)(
                x, params["last"], side
            )
    with jax.named_scope("exit"):
        exit_params = sharded.gather(params["exit"])
        return layers.apply_module(MMDiTHead(config), exit_params, image, side)
