"""Diffusion transformers: one block, three ways to condition it; jax and flax only.

in_context       plain pre-norm blocks over [time, text, image] tokens (paper B: Liang
                 et al. 2024, arXiv 2410.08184; "vanilla in-context").
cross_attention  text by cross-attention, time by adaLN-single (PixArt-alpha: Chen et
                 al. 2023, arXiv 2310.00426, section 2.3).
adaln_zero       class and time by adaLN-Zero (DiT: Peebles and Xie 2022, arXiv
                 2212.09748, section 3.2); ignores text, so it needs classes > 0.

Paper B does not state heads, text tokens, positions or normalisation; here: fixed 2-D
sinusoidal positions, LayerNorm before each branch, and the caption's words after the
time token. These are this library's assumptions.

The fields of `DiTConfig` that have defaults are switches. Rotary positions turn queries
and keys of image tokens by their row and column (half of each head's features each).
Time and text tokens are not turned; words keep the sinusoids that tell their order.

adaln_zero is DiT as published but for the order of features in its table of positions
and their initialisation; `layers.Grid(columns_first=True)` has DiT's order.

Blocks are stacked along a leading layer axis and run by `lax.scan`, or by a Python
loop over `lax.split` slices where a scan is slow (CPU); the parameters are the same.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """What decides a transformer's parameters and arithmetic."""

    architecture: str
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
    classes: int
    dtype: Any
    remat: bool
    unroll: bool
    norm: str = "layer"  # one of layers.NORMS
    qk_norm: str = "none"  # one of layers.QK_NORMS
    positions: str = "sinusoidal"  # one of layers.POSITIONS
    grid: PositionGrid = PositionGrid()  # of sinusoidal positions
    out_channels: int = 0  # 0: as many as come in; DiT's 2 C also predict a variance
    mlp_epsilon: float = 1e-6  # of the norm before the perceptron
    time_ends: int = 0  # 1: the time sinusoids of diffusers' DiT

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


def _modulate(x_BTD: TokensBTD, shift_BD: jax.Array, scale_BD: jax.Array) -> TokensBTD:
    return x_BTD * (1 + scale_BD[:, None, :]) + shift_BD[:, None, :]


def _rope(config: DiTConfig) -> Any:
    """The turns of a block's tokens, image tokens last; None without."""
    if config.positions != "rope":
        return None
    before = config.text_tokens + 1 if config.architecture == "in_context" else 0
    axes = positions.rope_axes(config.width // config.heads, 2)
    return positions.image_rope(*config.patches, axes, before)


class DiTAttention(nn.Module):
    """Multi-head attention of x over `source` (x itself when None).

    Rotary positions, where given, are those of x, and of self-attention only.
    """

    width: int
    heads: int
    dtype: Any
    qk_norm: str = "none"

    @nn.compact
    def __call__(
        self,
        x_BTD: TokensBTD,
        mask_B11S: jax.Array | None,
        source: Any = None,
        rope: Any = None,
    ) -> TokensBTD:
        head = (self.heads, self.width // self.heads)
        if source is None:
            qkv = nn.DenseGeneral((3, *head), dtype=self.dtype, name="qkv")(x_BTD)
            q, k, v = (jnp.squeeze(a, 2) for a in jnp.split(qkv, 3, axis=2))
        else:
            q = nn.DenseGeneral(head, dtype=self.dtype, name="q")(x_BTD)
            kv = nn.DenseGeneral((2, *head), dtype=self.dtype, name="kv")(source)
            k, v = (jnp.squeeze(a, 2) for a in jnp.split(kv, 2, axis=2))
        q = layers.head_norm(self.qk_norm, q, self.dtype, "q_norm")
        k = layers.head_norm(self.qk_norm, k, self.dtype, "k_norm")
        q, k = positions.rotate(q, rope), positions.rotate(k, rope)
        out_BTKH = attention.attend(q, k, v, mask_B11S)
        return nn.DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype, name="out")(
            out_BTKH
        )


class DiTBlock(nn.Module):
    """One layer: attention, (cross-attention,) perceptron, each around a residual."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD, side: dict[str, jax.Array]) -> TokensBTD:
        cfg = self.config
        plain = cfg.architecture == "in_context"

        if plain:
            modulation = None
        elif cfg.architecture == "adaln_zero":
            modulation = nn.Dense(
                6 * cfg.width,
                dtype=cfg.dtype,
                kernel_init=nn.initializers.zeros,
                name="modulation",
            )(jax.nn.silu(side["condition"]))
            modulation = jnp.split(modulation, 6, axis=-1)
        else:
            table = self.param(
                "modulation_table",
                nn.initializers.normal(cfg.width**-0.5),
                (1, 6 * cfg.width),
            )
            modulation = jnp.split(
                side["modulation"] + table.astype(cfg.dtype), 6, axis=-1
            )

        h = layers.norm(cfg.norm, cfg.dtype, "attention_norm", plain)(x_BTD)
        if modulation is not None:
            h = _modulate(h, modulation[0], modulation[1])
        attention = DiTAttention(
            cfg.width, cfg.heads, cfg.dtype, cfg.qk_norm, name="attention"
        )
        h = attention(h, side.get("mask"), rope=_rope(cfg))
        x_BTD = x_BTD + (h if modulation is None else modulation[2][:, None, :] * h)
        if cfg.architecture == "cross_attention":
            cross = DiTAttention(
                cfg.width, cfg.heads, cfg.dtype, cfg.qk_norm, name="cross_attention"
            )
            x_BTD = x_BTD + cross(x_BTD, side["text_mask"], side["text"])
        h = layers.norm(cfg.norm, cfg.dtype, "mlp_norm", plain, cfg.mlp_epsilon)(x_BTD)
        if modulation is not None:
            h = _modulate(h, modulation[3], modulation[4])
        h = nn.Dense(cfg.mlp_ratio * cfg.width, dtype=cfg.dtype, name="mlp_up")(h)
        h = layers.ACTIVATIONS[cfg.activation](h)
        h = nn.Dense(cfg.width, dtype=cfg.dtype, name="mlp_down")(h)
        return x_BTD + (h if modulation is None else modulation[5][:, None, :] * h)


class DiTEmbed(nn.Module):
    """Inputs -> the trunk's tokens, and the side inputs every block sees."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self, x_BHWC: LatentBHWC, t_B: TimeB, cond: dict[str, jax.Array]
    ) -> tuple[TokensBTD, dict[str, jax.Array]]:
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
        time = layers.TimeEmbedding(
            cfg.width, cfg.time_width, cfg.dtype, cfg.time_ends, name="time"
        )(t_B)

        if cfg.architecture == "adaln_zero":
            # Row `classes` is the null label of classifier-free guidance.
            table = self.param(
                "label_embedding",
                nn.initializers.normal(0.02),
                (cfg.classes + 1, cfg.width),
            )
            label = layers.embed(table.astype(cfg.dtype), cond["label"])
            return x, {"condition": time + label}

        text = cond["text"]
        if cfg.vocab_size:
            table = self.param(
                "word_embedding",
                nn.initializers.normal(1.0),
                (cfg.vocab_size, cfg.text_width),
            )
            text = layers.embed(table, text)
        text = text.astype(cfg.dtype)
        if cfg.architecture == "cross_attention":
            text = nn.Dense(cfg.width, dtype=cfg.dtype, name="text_up")(text)
            text = layers.ACTIVATIONS["gelu"](text)
            text = nn.Dense(cfg.width, dtype=cfg.dtype, name="text_out")(text)
            modulation = nn.Dense(6 * cfg.width, dtype=cfg.dtype, name="modulation")(
                jax.nn.silu(time)
            )
            return x, {
                "text": text,
                "text_mask": cond["mask"][:, None, None, :],
                "modulation": modulation,
                "time": time,
            }
        text = nn.Dense(cfg.width, dtype=cfg.dtype, name="text")(text)
        words = positions.sinusoid(jnp.arange(cfg.text_tokens), cfg.width, 10_000.0)
        text = text + words.astype(cfg.dtype)[None]
        tokens = jnp.concatenate([time[:, None, :], text, x], axis=1)
        mask = jnp.pad(
            cond["mask"], ((0, 0), (1, x.shape[1])), constant_values=True
        )  # time and image tokens are always seen
        return tokens, {"mask": mask[:, None, None, :]}


class DiTHead(nn.Module):
    """The trunk's image tokens -> the prediction, float32, zero at initialisation."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD, side: dict[str, jax.Array]) -> LatentBHWC:
        cfg = self.config
        images = cfg.patches[0] * cfg.patches[1]
        x = x_BTD[:, x_BTD.shape[1] - images :, :]
        plain = cfg.architecture == "in_context"
        x = layers.norm(cfg.norm, cfg.dtype, "norm", plain)(x)
        if cfg.architecture == "adaln_zero":
            shift, scale = jnp.split(
                nn.Dense(
                    2 * cfg.width,
                    dtype=cfg.dtype,
                    kernel_init=nn.initializers.zeros,
                    name="modulation",
                )(jax.nn.silu(side["condition"])),
                2,
                axis=-1,
            )
            x = _modulate(x, shift, scale)
        elif cfg.architecture == "cross_attention":
            table = self.param(
                "modulation_table",
                nn.initializers.normal(cfg.width**-0.5),
                (1, 2 * cfg.width),
            ).astype(cfg.dtype)
            time = jnp.concatenate([side["time"], side["time"]], axis=-1)
            shift, scale = jnp.split(time + table, 2, axis=-1)
            x = _modulate(x, shift, scale)
        x = nn.Dense(
            cfg.patch_size**2 * cfg.out_shape[-1],
            dtype=cfg.dtype,
            kernel_init=nn.initializers.zeros,
            name="patch",
        )(x)
        return layers.unpatchify(x.astype(jnp.float32), cfg.patch_size, cfg.out_shape)


def init(config: DiTConfig, key: jax.Array) -> Params:
    """Float32 parameters; leaves of "blocks" have a leading axis of `depth`."""
    entry_key, block_key, exit_key = jax.random.split(key, 3)
    x = jnp.zeros((1, *config.image_shape))
    t = jnp.zeros((1,))
    if config.vocab_size:
        text = jnp.zeros((1, config.text_tokens), jnp.int32)
    else:
        text = jnp.zeros((1, config.text_tokens, config.text_width))
    cond = {
        "text": text,
        "mask": jnp.ones((1, config.text_tokens), bool),
        "label": jnp.zeros((1,), jnp.int32),
    }
    entry = DiTEmbed(config)
    entry_params = entry.init(entry_key, x, t, cond)
    tokens, side = entry.apply(entry_params, x, t, cond)

    def init_block(key: jax.Array) -> Params:
        return DiTBlock(config).init(key, tokens, side)["params"]

    return {
        "entry": entry_params["params"],
        "blocks": jax.vmap(init_block)(jax.random.split(block_key, config.depth)),
        "exit": DiTHead(config).init(exit_key, tokens, side)["params"],
    }


def apply(
    config: DiTConfig,
    params: Params,
    x_BHWC: LatentBHWC,
    t_B: TimeB,
    cond: dict[str, jax.Array],
) -> LatentBHWC:
    """The prediction [B, H, W, C] in float32 for x at times t in [0, 1]."""
    with jax.named_scope("entry"):
        entry = layers.gather(params["entry"])
        x, side = DiTEmbed(config).apply({"params": entry}, x_BHWC, t_B, cond)

    def layer(x: TokensBTD, block: Params, side: dict[str, jax.Array]) -> TokensBTD:
        return DiTBlock(config).apply({"params": block}, x, side)

    with jax.named_scope("blocks"):
        x = layers.scan_blocks(
            layer, x, params["blocks"], side, remat=config.remat, unroll=config.unroll
        )
    with jax.named_scope("exit"):
        return DiTHead(config).apply({"params": layers.gather(params["exit"])}, x, side)
