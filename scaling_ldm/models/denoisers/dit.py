"""Diffusion transformers with one stream of tokens, conditioned in one of three ways.

in_context       plain pre-norm blocks over [time, text, image] tokens (paper B: Liang
                 et al. 2024, arXiv 2410.08184; "vanilla in-context").
cross_attention  text by cross-attention, time by adaLN-single (PixArt-alpha: Chen et
                 al. 2023, arXiv 2310.00426, section 2.3).
adaln_zero       class and time by adaLN-Zero (DiT: Peebles and Xie 2022, arXiv
                 2212.09748, section 3.2). It ignores text, so it needs classes > 0.

Paper B does not state heads, text tokens, positions or normalisation. These are
assumptions of this library: fixed 2-D sinusoidal positions, LayerNorm before each
branch, and the words of the caption after the time token.

Rotary positions rotate queries and keys of image tokens: the row rotates one half of
each head's features, the column the other half. Time and text tokens are not rotated.
Words keep the sinusoids that tell their order.

adaln_zero is DiT as published, except for the initialisation and for the order of the
features in its table of positions. `PositionGrid(columns_first=True)` has DiT's order.

Blocks are stacked along a leading axis of layers. They run by `lax.scan`, or by a
Python loop over slices where a scan is slow (CPU). The parameters are the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from scaling_ldm.models import attention_backends, layers, positions, sharded
from scaling_ldm.models.denoisers import transformer_parts
from scaling_ldm.models.shapes import Array, LatentBHWC, Params, TimeB, TokensBTD


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(transformer_parts.TransformerConfig):
    """What decides a DiT's parameters and arithmetic.

    Attributes:
      architecture: "in_context", "cross_attention" or "adaln_zero".
      classes: labels of adaln_zero.
      mlp_epsilon: of the norm before the perceptron.
      time_ends: 1 makes the time sinusoids those of diffusers' DiT.
    """

    architecture: str
    classes: int = 0
    mlp_epsilon: float = 1e-6
    time_ends: int = 0


def _modulate(
    x_BTD: TokensBTD, shift_BD: Float[Array, "B D"], scale_BD: Float[Array, "B D"]
) -> TokensBTD:
    return x_BTD * (1 + scale_BD[:, None, :]) + shift_BD[:, None, :]


def _rope(config: DiTConfig) -> Any:
    """A block's rotations, image tokens last; None without rotary positions."""
    if config.positions != "rope":
        return None
    before = config.text_tokens + 1 if config.architecture == "in_context" else 0
    axes = positions.rope_axes(config.width // config.heads, 2)
    return positions.image_rope(*config.patches, axes, before)


class DiTAttention(nn.Module):
    """Multi-head attention of x over `source`; without a source, over x itself.

    Rotary positions, where given, are those of x. They serve self-attention only.
    """

    width: int
    heads: int
    dtype: Any
    qk_norm: str = "none"
    kernel: str = "auto"  # as TransformerConfig.attention

    @nn.compact
    def __call__(
        self,
        x_BTD: TokensBTD,
        mask_B11S: Bool[Array, "B 1 1 S"] | None,
        source: Float[Array, "B S D"] | None = None,
        rope: Any = None,
    ) -> TokensBTD:
        head = (self.heads, self.width // self.heads)
        if source is None:
            q, k, v = layers.project(x_BTD, 3, head, self.dtype, "qkv")
        else:
            q = nn.DenseGeneral(head, dtype=self.dtype, name="q")(x_BTD)
            k, v = layers.project(source, 2, head, self.dtype, "kv")
        q = layers.head_norm(self.qk_norm, q, self.dtype, "q_norm")
        k = layers.head_norm(self.qk_norm, k, self.dtype, "k_norm")
        q, k = positions.rotate(q, rope), positions.rotate(k, rope)
        out_BTKH = attention_backends.attend(q, k, v, mask_B11S, self.kernel)
        return layers.join_heads(out_BTKH, self.width, self.dtype, "out")


def _zero_dense(config: DiTConfig, parts: int, condition_BD: jax.Array) -> Any:
    """`parts` vectors [B, D] from the condition, zero before training."""
    dense = nn.Dense(
        parts * config.width,
        dtype=config.dtype,
        kernel_init=nn.initializers.zeros,
        name="modulation",
    )
    return jnp.split(dense(jax.nn.silu(condition_BD)), parts, axis=-1)


def _modulation_table(module: Any, parts: int) -> jax.Array:
    """adaLN-single's learned offsets [1, parts * D] of one block."""
    cfg: DiTConfig = module.config
    small = nn.initializers.normal(cfg.width**-0.5)
    table = module.param("modulation_table", small, (1, parts * cfg.width))
    return table.astype(cfg.dtype)


class DiTBlock(nn.Module):
    """One layer: attention, (cross-attention,) perceptron, each around a residual."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD, side: dict[str, Any]) -> TokensBTD:
        cfg = self.config
        plain = cfg.architecture == "in_context"

        if plain:
            modulation = None
        elif cfg.architecture == "adaln_zero":
            modulation = _zero_dense(cfg, 6, side["condition"])
        else:
            table = _modulation_table(self, 6)
            modulation = jnp.split(side["modulation"] + table, 6, axis=-1)

        def attend(name: str) -> DiTAttention:
            return DiTAttention(
                cfg.width,
                cfg.heads,
                cfg.dtype,
                cfg.qk_norm,
                cfg.attention,
                name=name,
            )

        h = layers.norm(cfg.norm, cfg.dtype, "attention_norm", plain)(x_BTD)
        if modulation is not None:
            h = _modulate(h, modulation[0], modulation[1])
        h = attend("attention")(h, side.get("mask"), rope=_rope(cfg))
        x_BTD = x_BTD + (h if modulation is None else modulation[2][:, None, :] * h)
        if cfg.architecture == "cross_attention":
            cross = attend("cross_attention")
            x_BTD = x_BTD + cross(x_BTD, side["text_mask"], side["text"])
        h = layers.norm(cfg.norm, cfg.dtype, "mlp_norm", plain, cfg.mlp_epsilon)(x_BTD)
        if modulation is not None:
            h = _modulate(h, modulation[3], modulation[4])
        activation = layers.ACTIVATIONS[cfg.activation]
        hidden = cfg.mlp_ratio * cfg.width
        h = layers.perceptron(h, hidden, activation, cfg.dtype, "mlp_")
        return x_BTD + (h if modulation is None else modulation[5][:, None, :] * h)


class DiTEmbed(nn.Module):
    """Inputs to the trunk's tokens, and the side inputs that every block reads.

    Its key in the tree of parameters is "entry", and that of `DiTHead` is "exit": these
    names stand in stored checkpoints.
    """

    config: DiTConfig

    @nn.compact
    def __call__(
        self, x_BHWC: LatentBHWC, t_B: TimeB, cond: dict[str, Any]
    ) -> tuple[TokensBTD, dict[str, Any]]:
        cfg = self.config
        x = transformer_parts.image_tokens(self, x_BHWC)
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

        text = transformer_parts.text_features(self, cond["text"])
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
        text = text + transformer_parts.word_positions(cfg)
        tokens = jnp.concatenate([time[:, None, :], text, x], axis=1)
        mask = jnp.pad(
            cond["mask"], ((0, 0), (1, x.shape[1])), constant_values=True
        )  # time and image tokens are never masked
        return tokens, {"mask": mask[:, None, None, :]}


class DiTHead(nn.Module):
    """The trunk's image tokens to the prediction, in float32, zero before training."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD, side: dict[str, Any]) -> LatentBHWC:
        cfg = self.config
        images = cfg.patches[0] * cfg.patches[1]
        x = x_BTD[:, x_BTD.shape[1] - images :, :]
        plain = cfg.architecture == "in_context"
        x = layers.norm(cfg.norm, cfg.dtype, "norm", plain)(x)
        if cfg.architecture == "adaln_zero":
            shift, scale = _zero_dense(cfg, 2, side["condition"])
            x = _modulate(x, shift, scale)
        elif cfg.architecture == "cross_attention":
            table = _modulation_table(self, 2)
            time = jnp.concatenate([side["time"], side["time"]], axis=-1)
            shift, scale = jnp.split(time + table, 2, axis=-1)
            x = _modulate(x, shift, scale)
        return transformer_parts.prediction(cfg, x)


def init(config: DiTConfig, key: jax.Array) -> Params:
    """Float32 parameters; leaves of "blocks" have a leading axis of `depth`."""
    entry_key, block_key, exit_key = jax.random.split(key, 3)
    x, t, cond = transformer_parts.example_inputs(config)
    cond["label"] = jnp.zeros((1,), jnp.int32)
    entry = DiTEmbed(config)
    entry_params = layers.init_module(entry, entry_key, x, t, cond)
    tokens, side = layers.apply_module(entry, entry_params, x, t, cond)

    def init_block(key: jax.Array) -> Params:
        return layers.init_module(DiTBlock(config), key, tokens, side)

    return {
        "entry": entry_params,
        "blocks": jax.vmap(init_block)(jax.random.split(block_key, config.depth)),
        "exit": layers.init_module(DiTHead(config), exit_key, tokens, side),
    }


def apply(
    config: DiTConfig,
    params: Params,
    x_BHWC: LatentBHWC,
    t_B: TimeB,
    cond: dict[str, Any],
) -> Float[jax.Array, "B H W out"]:
    """The prediction in float32 for x at times t in [0, 1].

    Args:
      cond: "label" [B] for adaln_zero; else "text" (ids [B, S] with a vocabulary, or
        features [B, S, E]) and "mask" [B, S], true where there is text.
    """
    with jax.named_scope("entry"):
        entry = sharded.gather(params["entry"])
        x, side = layers.apply_module(DiTEmbed(config), entry, x_BHWC, t_B, cond)

    def layer(x: TokensBTD, block: Params, side: dict[str, Any]) -> TokensBTD:
        return layers.apply_module(DiTBlock(config), block, x, side)

    with jax.named_scope("blocks"):
        x = layers.scan_blocks(
            layer,
            x,
            params["blocks"],
            side,
            remat=config.remat,
            unroll=config.unroll,
            dtype=config.dtype,
        )
    with jax.named_scope("exit"):
        exit_params = sharded.gather(params["exit"])
        return layers.apply_module(DiTHead(config), exit_params, x, side)
