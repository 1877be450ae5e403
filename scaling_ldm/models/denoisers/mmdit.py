"""Transformers with a stream of tokens each for picture and text; jax and flax only.

MMDiT     (SD3: Esser et al. 2024, arXiv 2403.03206, section 4): two streams with
          weights of their own that meet in one attention, both modulated by time and
          pooled text. The last block drops its text after the attention.
FLUX      (Black Forest Labs 2024, as its published code has it): such double-stream
          blocks, whose text goes on, then single-stream blocks over both kinds of
          token, the perceptron beside the attention; rotary positions over three axes
          (index, row, column), queries and keys with an RMSNorm, the guidance scale
          as a third condition.

Published networks know no padding; with every word of a caption real, these are they.
This library's assumptions: padding is hidden from all attention; without pooled
features (`pooled_width` 0) the mean of the caption's features stands in; words looked
up here (`vocab_size` > 0) get sinusoids of their order, which features of a text
encoder tell already; every modulation starts at zero, as in DiT.

A study's (width, depth, heads): an MMDiT has `depth` blocks, a FLUX of that depth
`split(depth)` double and single ones. In both, heads divide width (64 wide each in SD3,
128 in FLUX) and the published SD3 has width = 64 depth, heads = depth.

Parameters: "entry", "blocks" (double-stream, stacked), "last" (MMDiT's, without a layer
axis), "single_blocks" (FLUX's, stacked), "exit". Where text is dropped, its queries are
dead parameters, kept because the published weights have them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling_ldm.models import attention, layers, positions
from scaling_ldm.models.positions import PositionGrid
from scaling_ldm.models.shapes import LatentBHWC, TimeB, TokensBTD

Params = dict[str, Any]
Streams = tuple[TokensBTD, TokensBTD]  # image, text


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """What decides a two-stream transformer's parameters and arithmetic.

    Attributes:
      depth: double-stream blocks, the last one's text dropped if single_depth is 0.
      single_depth: single-stream blocks; 0: an MMDiT, more: FLUX.
      pooled_width: of the pooled text features; 0: the mean of the text features.
      guidance: whether cond["guidance"], a scale for each example, is a condition.
      rope_axes: features of a head per axis (index, row, column); (): FLUX's shares.
      grid: of sinusoidal positions; SD3's is the middle of a larger table.
      out_channels: 0: as many as come in.
    """

    width: int
    depth: int
    heads: int
    image_shape: tuple[int, int, int]  # H, W, C
    patch_size: int
    mlp_ratio: int
    activation: str
    text_tokens: int
    text_width: int
    time_width: int
    vocab_size: int  # 0: text arrives as features, not ids
    dtype: Any
    remat: bool
    unroll: bool
    single_depth: int = 0
    pooled_width: int = 0
    guidance: bool = False
    norm: str = "layer"
    qk_norm: str = "none"
    positions: str = "sinusoidal"
    rope_axes: tuple[int, ...] = ()
    grid: PositionGrid = PositionGrid()
    out_channels: int = 0

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """H, W and the channels of the prediction."""
        H, W, C = self.image_shape
        return H, W, self.out_channels or C

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        H, W, _ = self.image_shape
        return H // self.patch_size, W // self.patch_size


def split(depth: int) -> tuple[int, int]:
    """(double, single) blocks of a FLUX of this depth, as its 19 + 38 of 57.

    Raises:
      ValueError: a depth below 2, too few for one of each.
    """
    if depth < 2:
        raise ValueError(f"a FLUX has 2 blocks or more, not {depth}")
    double = round(depth / 3)
    return double, depth - double


def _rope(config: MMDiTConfig) -> Any:
    """The turns of all tokens, text (which does not turn) first; None without."""
    if config.positions != "rope":
        return None
    axes = config.rope_axes or positions.rope_axes(config.width // config.heads, 3)
    return positions.image_rope(*config.patches, axes, config.text_tokens)


def _modulation(
    config: MMDiTConfig, parts: int, condition_BD: jax.Array, name: str
) -> Any:
    """`parts` vectors [B, 1, D] from the condition, zero at initialisation."""
    dense = nn.Dense(
        parts * config.width,
        dtype=config.dtype,
        kernel_init=nn.initializers.zeros,
        name=name,
    )
    return jnp.split(dense(condition_BD)[:, None, :], parts, axis=-1)


def _qkv(config: MMDiTConfig, x_BTD: TokensBTD, name: str) -> list[jax.Array]:
    """Queries, keys and values [B, T, K, H], the first two normalised."""
    head = (config.heads, config.width // config.heads)
    qkv = nn.DenseGeneral((3, *head), dtype=config.dtype, name=f"{name}qkv")(x_BTD)
    q, k, v = (jnp.squeeze(a, 2) for a in jnp.split(qkv, 3, axis=2))
    q = layers.head_norm(config.qk_norm, q, config.dtype, f"{name}q_norm")
    k = layers.head_norm(config.qk_norm, k, config.dtype, f"{name}k_norm")
    return [q, k, v]


class Double(nn.Module):
    """One block over two streams; without `keeps_text` the text ends here."""

    config: MMDiTConfig
    keeps_text: bool = True

    @nn.compact
    def __call__(self, x: Streams, side: dict[str, jax.Array]) -> Streams:
        cfg = self.config
        image, text = x
        condition, S = side["condition"], text.shape[1]

        def norm(x: TokensBTD, name: str) -> TokensBTD:
            return layers.norm(cfg.norm, cfg.dtype, name, False)(x)

        image_by = _modulation(cfg, 6, condition, "image_modulation")
        if self.keeps_text:
            text_by = _modulation(cfg, 6, condition, "text_modulation")
            shift, scale = text_by[:2]
        else:  # scale first, as published
            scale, shift = _modulation(cfg, 2, condition, "text_modulation")
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
        out = attention.attend(q, k, v, side.get("mask"))

        def after(x: TokensBTD, out: jax.Array, by: Any, name: str) -> TokensBTD:
            """The rest of a stream's block: output, then the perceptron."""
            h = nn.DenseGeneral(
                cfg.width, axis=(-2, -1), dtype=cfg.dtype, name=f"{name}_out"
            )(out)
            x = x + by[2] * h
            h = norm(x, f"{name}_norm2") * (1 + by[4]) + by[3]
            h = nn.Dense(cfg.mlp_ratio * cfg.width, dtype=cfg.dtype, name=f"{name}_up")(
                h
            )
            h = layers.ACTIVATIONS[cfg.activation](h)
            return x + by[5] * nn.Dense(
                cfg.width, dtype=cfg.dtype, name=f"{name}_down"
            )(h)

        if not self.keeps_text:
            return after(image, out, image_by, "image"), text
        image = after(image, out[:, S:], image_by, "image")
        return image, after(text, out[:, :S], text_by, "text")


class Single(nn.Module):
    """One block over text and image tokens alike, attention beside perceptron."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD, side: dict[str, jax.Array]) -> TokensBTD:
        cfg = self.config
        B, T, D = x_BTD.shape
        shift, scale, gate = _modulation(cfg, 3, side["condition"], "modulation")
        h = layers.norm(cfg.norm, cfg.dtype, "norm", False)(x_BTD) * (1 + scale) + shift
        q, k, v = _qkv(cfg, h, "")
        rope = _rope(cfg)
        q, k = positions.rotate(q, rope), positions.rotate(k, rope)
        seen = attention.attend(q, k, v, side.get("mask")).reshape(B, T, D)
        h = nn.Dense(cfg.mlp_ratio * D, dtype=cfg.dtype, name="up")(h)
        h = layers.ACTIVATIONS[cfg.activation](h)
        h = jnp.concatenate([seen, h], axis=-1)
        return x_BTD + gate * nn.Dense(D, dtype=cfg.dtype, name="out")(h)


class MMDiTEmbed(nn.Module):
    """Inputs -> both streams, and the side inputs every block sees."""

    config: MMDiTConfig

    @nn.compact
    def __call__(
        self, x_BHWC: LatentBHWC, t_B: TimeB, cond: dict[str, jax.Array]
    ) -> tuple[Streams, dict[str, jax.Array]]:
        cfg = self.config
        x = layers.patchify(x_BHWC.astype(cfg.dtype), cfg.patch_size)
        x = nn.Dense(cfg.width, dtype=cfg.dtype, name="patch")(x)
        if cfg.positions == "sinusoidal":
            position = positions.grid_positions(cfg.grid, *cfg.patches, cfg.width)
            x = x + position.astype(cfg.dtype)[None]
        elif cfg.positions == "learned":
            x = x + self.param(
                "position_table",
                nn.initializers.normal(0.02),
                (1, x.shape[1], cfg.width),
            ).astype(cfg.dtype)

        text, mask = cond["text"], cond.get("mask")
        if cfg.vocab_size:
            table = self.param(
                "word_embedding",
                nn.initializers.normal(1.0),
                (cfg.vocab_size, cfg.text_width),
            )
            text = layers.embed(table, text)
        text = text.astype(cfg.dtype)
        pooled = (
            cond["pooled"].astype(cfg.dtype) if cfg.pooled_width else _mean(text, mask)
        )
        text = nn.Dense(cfg.width, dtype=cfg.dtype, name="text")(text)
        if cfg.vocab_size:
            words = positions.sinusoid(jnp.arange(cfg.text_tokens), cfg.width, 10_000.0)
            text = text + words.astype(cfg.dtype)[None]

        def sinusoids(name: str, value_B: jax.Array) -> jax.Array:
            return layers.TimeEmbedding(
                cfg.width, cfg.time_width, cfg.dtype, name=name
            )(value_B)

        condition = sinusoids("time", t_B)
        if cfg.guidance:
            condition = condition + sinusoids("guidance", cond["guidance"])
        pooled = nn.Dense(cfg.width, dtype=cfg.dtype, name="pooled_up")(pooled)
        condition = condition + nn.Dense(cfg.width, dtype=cfg.dtype, name="pooled_out")(
            jax.nn.silu(pooled)
        )
        side = {"condition": jax.nn.silu(condition)}
        if mask is not None:
            seen = jnp.pad(mask, ((0, 0), (0, x.shape[1])), constant_values=True)
            side["mask"] = seen[:, None, None, :]
        return (x, text), side


def _mean(text_BSE: jax.Array, mask_BS: jax.Array | None) -> jax.Array:
    """The mean of a caption's features in float32; 0 where there is no word."""
    if mask_BS is None:
        return jnp.mean(text_BSE, axis=1, dtype=jnp.float32).astype(text_BSE.dtype)
    seen = mask_BS.astype(jnp.float32)[:, :, None]
    total = jnp.sum(text_BSE.astype(jnp.float32) * seen, axis=1)
    count = jnp.maximum(jnp.sum(seen, axis=1), 1.0)
    return (total / count).astype(text_BSE.dtype)


class MMDiTHead(nn.Module):
    """Image tokens -> the prediction, float32, zero at initialisation."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, x_BND: TokensBTD, side: dict[str, jax.Array]) -> LatentBHWC:
        cfg = self.config
        scale, shift = _modulation(cfg, 2, side["condition"], "modulation")
        x = layers.norm(cfg.norm, cfg.dtype, "norm", False)(x_BND) * (1 + scale) + shift
        x = nn.Dense(
            cfg.patch_size**2 * cfg.out_shape[-1],
            dtype=cfg.dtype,
            kernel_init=nn.initializers.zeros,
            name="patch",
        )(x)
        return layers.unpatchify(x.astype(jnp.float32), cfg.patch_size, cfg.out_shape)


def init(config: MMDiTConfig, key: jax.Array) -> Params:
    """Float32 parameters; leaves of the "blocks" have a leading axis of layers."""
    keys = jax.random.split(key, 5)
    x, t = jnp.zeros((1, *config.image_shape)), jnp.zeros((1,))
    kind = jnp.int32 if config.vocab_size else jnp.float32
    width = () if config.vocab_size else (config.text_width,)
    cond = {
        "text": jnp.zeros((1, config.text_tokens, *width), kind),
        "mask": jnp.ones((1, config.text_tokens), bool),
        "pooled": jnp.zeros((1, config.pooled_width)),
        "guidance": jnp.zeros((1,)),
    }
    entry = MMDiTEmbed(config)
    params = {"entry": entry.init(keys[0], x, t, cond)["params"]}
    (image, text), side = entry.apply({"params": params["entry"]}, x, t, cond)

    def stack(module: nn.Module, x: Any, key: jax.Array, depth: int) -> Params:
        return jax.vmap(lambda key: module.init(key, x, side)["params"])(
            jax.random.split(key, depth)
        )

    if config.single_depth:
        both = jnp.concatenate([text, image], axis=1)
        params["blocks"] = stack(Double(config), (image, text), keys[1], config.depth)
        params["single_blocks"] = stack(
            Single(config), both, keys[2], config.single_depth
        )
    else:
        params["blocks"] = stack(
            Double(config), (image, text), keys[1], config.depth - 1
        )
        last = Double(config, keeps_text=False)
        params["last"] = last.init(keys[3], (image, text), side)["params"]
    params["exit"] = MMDiTHead(config).init(keys[4], image, side)["params"]
    return params


def apply(
    config: MMDiTConfig,
    params: Params,
    x_BHWC: LatentBHWC,
    t_B: TimeB,
    cond: dict[str, jax.Array],
) -> LatentBHWC:
    """The prediction [B, H, W, C] in float32 for x at times t in [0, 1].

    Args:
      cond: "text" (features [B, S, E], or ids [B, S] with a vocabulary); "mask" [B, S],
        true where there is text, may be left out; "pooled" [B, P] with a pooled_width;
        "guidance" [B] with guidance.
    """
    with jax.named_scope("entry"):
        entry = layers.gather(params["entry"])
        x, side = MMDiTEmbed(config).apply({"params": entry}, x_BHWC, t_B, cond)

    def double(x: Streams, block: Params, side: Any) -> Streams:
        return Double(config).apply({"params": block}, x, side)

    def last(x: Streams, block: Params, side: Any) -> Streams:
        block = layers.gather(block)
        return Double(config, keeps_text=False).apply({"params": block}, x, side)

    def single(x: TokensBTD, block: Params, side: Any) -> TokensBTD:
        return Single(config).apply({"params": block}, x, side)

    how = {"remat": config.remat, "unroll": config.unroll}
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
            image, _ = (jax.checkpoint(last) if config.remat else last)(
                x, params["last"], side
            )
    with jax.named_scope("exit"):
        exit_params = layers.gather(params["exit"])
        return MMDiTHead(config).apply({"params": exit_params}, image, side)
