"""DINOv2's vision transformers without registers.

Oquab et al. 2023 (arXiv 2304.07193): a pre-norm transformer with a learned scale on
each residual (LayerScale, Touvron et al. 2021, arXiv 2103.17239), trained without
labels. Stein et al. 2023 (arXiv 2306.04675) find that Frechet distances on its class
token agree best with what people see. They use ViT-L/14 on pictures of 224 x 224.

The table of positions is for 518 x 518 pixels; it is interpolated for other sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scaling_ldm.models import layers, sharded
from scaling_ldm.models.encoders import blocks
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.models.shapes import Array, Params, PictureBHWC, TokensBTD

SIZE = 224  # side in pixels of the pictures that distances are measured on

# Of ImageNet's pictures in [0, 1]. The network reads (x - MEAN) / STD.
MEAN = np.asarray([0.485, 0.456, 0.406], np.float32)
STD = np.asarray([0.229, 0.224, 0.225], np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """What decides the parameters and the arithmetic.

    Attributes:
      hidden: width of the perceptrons; of each half where they are gated.
      gated: silu(gate) * up instead of `activation`, as the giant has it.
      image_size: side in pixels of the pictures that the table of positions is for.
      offset: patches added to the sides of a picture when the table is interpolated: 0
        as in transformers, 0.1 as in the code that the weights were published with.
      mask_token: whether there are parameters for masked patches. The published weights
        have them, but only training reads them.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    gated: bool = False
    image_size: int = 518
    patch_size: int = 14
    channels: int = 3
    activation: str = "gelu"
    epsilon: float = 1e-6
    offset: float = 0.0
    mask_token: bool = True
    dtype: Any = jnp.float32
    unroll: bool = False

    @property
    def grid(self) -> int:
        """Patches along a side of the table of positions."""
        return self.image_size // self.patch_size


class DinoMlp(nn.Module):
    """A perceptron, gated or not."""

    config: DinoConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD) -> TokensBTD:
        cfg = self.config
        if not cfg.gated:
            activation = blocks.PUBLISHED_ACTIVATIONS[cfg.activation]
            return layers.perceptron(x_BTD, cfg.hidden, activation, cfg.dtype, "")
        gate, up = layers.project(x_BTD, 2, (cfg.hidden,), cfg.dtype, "up")
        down = nn.Dense(cfg.width, dtype=cfg.dtype, name="down")
        return down(jax.nn.silu(gate) * up)


class DinoBlock(nn.Module):
    """Attention and a perceptron, each normalised before and scaled after."""

    config: DinoConfig

    @nn.compact
    def __call__(self, x_BTD: TokensBTD) -> TokensBTD:
        cfg = self.config

        def scaled(x_BTD: TokensBTD, name: str) -> TokensBTD:
            scale = self.param(name, nn.initializers.ones, (cfg.width,))
            return x_BTD * scale.astype(cfg.dtype)[None, None]

        h = blocks.norm(cfg.epsilon, cfg.dtype, "attention_norm")(x_BTD)
        h = blocks.EncoderAttention(cfg.heads, cfg.dtype, name="attention")(h, None)
        x = x_BTD + scaled(h, "attention_scale")
        h = blocks.norm(cfg.epsilon, cfg.dtype, "mlp_norm")(x)
        return x + scaled(DinoMlp(cfg, name="mlp")(h), "mlp_scale")


class DinoEmbed(nn.Module):
    """Patches after a class token, with positions."""

    config: DinoConfig

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> TokensBTD:
        cfg = self.config
        small = nn.initializers.normal(0.02)
        height, width = (side // cfg.patch_size for side in x_BHWC.shape[1:3])
        patches = layers.patchify(x_BHWC.astype(cfg.dtype), cfg.patch_size)
        x = nn.Dense(cfg.width, dtype=cfg.dtype, name="patch")(patches)
        first = self.param("class_embedding", small, (cfg.width,))
        table = self.param("position_embedding", small, (1 + cfg.grid**2, cfg.width))
        if cfg.mask_token:
            self.param("mask_embedding", nn.initializers.zeros, (cfg.width,))
        places = positions(cfg, table, height, width)
        places = jnp.concatenate([places[:1] + first[None], places[1:]])
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
        return x + places.astype(cfg.dtype)[None]


class DinoHead(nn.Module):
    """The norm at the end."""

    config: DinoConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return blocks.norm(self.config.epsilon, self.config.dtype, "norm")(x)


def positions(
    config: DinoConfig, table_ND: Float[Array, "N D"], height: int, width: int
) -> Float[Array, "M D"]:
    """Positions [1 + height * width, D] of a class token and of the patches.

    The interpolation is torch's bicubic one: it always reads four rows and columns
    (Keys 1981 with a = -0.75) and repeats the edge of the table.

    Args:
      table_ND: the learned table, [1 + grid * grid, D], the class token first.
      height, width: patches of the picture.
    """
    if (height, width) == (config.grid, config.grid):
        return table_ND
    features = table_ND.shape[-1]
    x_HWD = table_ND[1:].reshape(config.grid, config.grid, features)
    for axis, count in enumerate((height, width)):
        index, weight = _cubic(config.grid, count, config.offset)
        side = [1, 1, 1]
        side[axis] = count
        taps = [
            jnp.take(x_HWD, i, axis=axis) * w.reshape(side)
            for i, w in zip(index, weight, strict=True)
        ]
        x_HWD = functools.reduce(jnp.add, taps)
    return jnp.concatenate([table_ND[:1], x_HWD.reshape(height * width, features)])


def _cubic(table: int, count: int, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of a table `count` places read, and their weights: both [4, count].

    Places share the table's extent equally; with an offset, they end before it does.
    """
    place = (np.arange(count) + 0.5) * table / (count + offset) - 0.5
    tap = np.floor(place) + np.arange(-1, 3)[:, None]
    far, a = np.abs(place - tap), -0.75
    near = ((a + 2) * far - (a + 3)) * far**2 + 1
    outer = a * (((far - 5) * far + 8) * far - 4)
    weight = np.where(far <= 1, near, outer).astype(np.float32)
    return np.clip(tap, 0, table - 1).astype(np.int32), weight


def init(config: DinoConfig, key: jax.Array) -> Params:
    """Random float32 parameters; leaves of "blocks" have a leading axis of `depth`.

    Raises:
      ValueError: no network can be made of the config; see `blocks.check`.
    """
    blocks.check(config)
    if config.image_size % config.patch_size:
        raise ValueError(
            f"image_size {config.image_size} is not divisible by patch_size "
            f"{config.patch_size}"
        )
    entry_key, block_key, exit_key = jax.random.split(key, 3)
    side = config.image_size
    x = jnp.zeros((1, 1, config.width))
    pictures = jnp.zeros((1, side, side, config.channels))
    return {
        "entry": layers.init_module(DinoEmbed(config), entry_key, pictures),
        "blocks": blocks.init(DinoBlock(config), config.depth, block_key, x),
        "exit": layers.init_module(DinoHead(config), exit_key, x),
    }


def tokens(config: DinoConfig, params: Params, x_BHWC: PictureBHWC) -> TokensBTD:
    """Float32 features [B, 1 + patches, width]: class token, then patches by row.

    Args:
      x_BHWC: RGB from 0 to 255, already of the wanted size.

    Raises:
      ValueError: sides that the patches do not divide, or other channels.
    """
    *sides, channels = x_BHWC.shape[1:]
    if channels != config.channels or any(side % config.patch_size for side in sides):
        raise ValueError(
            f"pictures of {x_BHWC.shape[1:]}; this network reads {config.channels} "
            f"channels and sides that {config.patch_size} divides, such as {SIZE}"
        )

    with jax.default_matmul_precision("highest"):  # of float32, on every device
        return _tokens(config, params, x_BHWC)


def _tokens(config: DinoConfig, params: Params, x_BHWC: PictureBHWC) -> TokensBTD:
    def layer(x: TokensBTD, block: Params) -> TokensBTD:
        return layers.apply_module(DinoBlock(config), sharded.gather(block), x)

    with jax.named_scope("entry"):
        mean, std = (v[None, None, None] for v in (MEAN, STD))
        x = (x_BHWC.astype(jnp.float32) / 255 - mean) / std
        x = layers.apply_module(DinoEmbed(config), sharded.gather(params["entry"]), x)
    with jax.named_scope("blocks"):
        x = blocks.run(layer, x, params["blocks"], config.unroll)
    x = layers.apply_module(DinoHead(config), sharded.gather(params["exit"]), x)
    return x.astype(jnp.float32)


def apply(config: DinoConfig, params: Params, x_BHWC: PictureBHWC) -> Features:
    """The features [B, width] of the class token after the last norm.

    Args:
      x_BHWC: as for `tokens`.

    Raises:
      ValueError: as `tokens`.
    """
    return Features(tokens(config, params, x_BHWC)[:, 0], None)
