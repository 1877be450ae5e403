"""What the two families of diffusion transformers share: fields, inputs, output.

The functions are called inside a compact flax module. Parameters and submodules that
they create belong to that module.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from scaling_ldm.models import layers
from scaling_ldm.models import positions as positions_lib
from scaling_ldm.models.positions import PositionGrid
from scaling_ldm.models.shapes import Array, LatentBHWC, TextBSE, TokensBTD


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What decides a transformer's parameters and arithmetic; defaults as published.

    Attributes:
      image_shape: H, W, C.
      text_tokens, text_width: S and E of a caption; 0 where none is read.
      vocab_size: 0: text arrives as features, not as ids.
      time_width: sinusoidal features of t.
      dtype: of the arithmetic; parameters are float32.
      remat: what the backward pass computes again: "none", or one of `remat.POLICIES`.
      unroll: a Python loop over the blocks instead of `lax.scan`.
      attention: a name of ATTENTION in config.names; see `attention_backends`.
      norm, qk_norm, positions: a name of NORMS, QK_NORMS, POSITIONS in config.names.
      grid: of sinusoidal positions.
      out_channels: 0: as many as come in; DiT has 2 C, to predict a variance too.
    """

    width: int
    depth: int
    heads: int
    image_shape: tuple[int, int, int]
    patch_size: int
    text_tokens: int = 0
    text_width: int = 0
    vocab_size: int = 0
    mlp_ratio: int = 4
    activation: str = "gelu"
    time_width: int = 256
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: bool = False
    attention: str = "auto"
    norm: str = "layer"
    qk_norm: str = "none"
    positions: str = "sinusoidal"
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


def image_tokens(module: Any, x_BHWC: LatentBHWC) -> TokensBTD:
    """Embeds patches and adds their positions; rotary ones are left to the blocks."""
    cfg: TransformerConfig = module.config
    x = layers.patchify(x_BHWC.astype(cfg.dtype), cfg.patch_size)
    x = nn.Dense(cfg.width, dtype=cfg.dtype, name="patch")(x)
    if cfg.positions == "sinusoidal":
        table = positions_lib.grid_positions(cfg.grid, *cfg.patches, cfg.width)
        x = x + table.astype(cfg.dtype)[None]
    elif cfg.positions == "learned":
        small = nn.initializers.normal(0.02)
        table = module.param("position_table", small, (1, x.shape[1], cfg.width))
        x = x + table.astype(cfg.dtype)
    return x


def text_features(module: Any, text: Any) -> TextBSE:
    """Features of a caption; ids of words are looked up in a table."""
    cfg: TransformerConfig = module.config
    if cfg.vocab_size:
        size = (cfg.vocab_size, cfg.text_width)
        table = module.param("word_embedding", nn.initializers.normal(1.0), size)
        text = layers.embed(table, text)
    return text.astype(cfg.dtype)


def word_positions(config: TransformerConfig) -> Float[Array, "1 S D"]:
    """Sinusoids that tell the order of a caption's words."""
    places = jnp.arange(config.text_tokens)
    table = positions_lib.sinusoid(places, config.width, 10_000.0)
    return table.astype(config.dtype)[None]


def prediction(config: TransformerConfig, x_BTD: TokensBTD) -> LatentBHWC:
    """Image tokens to a picture in float32, zero before training."""
    H, W, C = config.out_shape
    x = nn.Dense(
        config.patch_size**2 * C,
        dtype=config.dtype,
        kernel_init=nn.initializers.zeros,
        name="patch",
    )(x_BTD)
    return layers.unpatchify(x.astype(jnp.float32), config.patch_size, (H, W, C))


def example_inputs(
    config: TransformerConfig,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """x, t and the caption of a batch of one, for initialising parameters."""
    if config.vocab_size:
        text = jnp.zeros((1, config.text_tokens), jnp.int32)
    else:
        text = jnp.zeros((1, config.text_tokens, config.text_width))
    mask = jnp.ones((1, config.text_tokens), bool)
    x = jnp.zeros((1, *config.image_shape))
    return x, jnp.zeros((1,)), {"text": text, "mask": mask}
