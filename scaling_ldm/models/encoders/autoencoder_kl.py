"""The autoencoder of latent diffusion models, from pictures to latents and back.

Rombach et al. 2022 (arXiv 2112.10752, appendix G): residual blocks and one attention in
the middle, on both sides of a Gaussian bottleneck. Stable Diffusion 1 to 3, SDXL and
FLUX publish this layout with other weights, bottlenecks and scales (presets.py).
weights/autoencoder_kl.py reads and writes them. Pictures are in [-1, 1].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from scaling_ldm.models import attention, layers, remat, sharded
from scaling_ldm.models.shapes import Array, LatentBHWC, Params

EPSILON = 1e-6  # of every norm
LOG_VARIANCES = (-30.0, 20.0)  # the encoder's are clipped to these


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What decides an autoencoder's parameters and arithmetic.

    Attributes:
      channels: widths of the resolutions; each but the last halves height and width.
      blocks: residual blocks at each on the way down; one more on the way up.
      latent_channels: Z; the encoder gives a mean and a log-variance of each.
      groups: of every norm.
      middle_attention: whether the lowest resolution attends over all its pixels.
      quant_conv: whether 1 x 1 convolutions surround the bottleneck.
      scale, shift: a denoiser's latents are (z - shift) scale, of about unit variance.
      dtype: of the arithmetic; norms' statistics and the softmax are float32.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    groups: int = 32
    middle_attention: bool = True
    quant_conv: bool = True
    scale: float = 1.0
    shift: float = 0.0
    dtype: Any = jnp.float32

    @property
    def factor(self) -> int:
        """Pixels of a picture along one side of a latent pixel."""
        return 2 ** (len(self.channels) - 1)


def _conv(features: int, dtype: Any, name: str) -> nn.Conv:
    """3 x 3 with a border of zeros on all sides."""
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, name=name)


def _halve(features: int, dtype: Any, name: str) -> nn.Conv:
    """3 x 3 at every second pixel, with zeros only below and to the right."""
    padding = ((0, 1), (0, 1))
    return nn.Conv(features, (3, 3), strides=2, padding=padding, dtype=dtype, name=name)


class AutoencoderResidual(nn.Module):
    """Two convolutions around a residual."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: LatentBHWC) -> Float[Array, "B H W width"]:
        h = x_BHWC
        for i in (1, 2):
            norm = layers.GroupNorm(self.groups, EPSILON, self.dtype, name=f"norm{i}")
            h = _conv(self.width, self.dtype, f"conv{i}")(nn.silu(norm(h)))
        if x_BHWC.shape[-1] != self.width:
            x_BHWC = nn.Dense(self.width, dtype=self.dtype, name="shortcut")(x_BHWC)
        return x_BHWC + h


class AutoencoderAttention(nn.Module):
    """Self-attention with one head over all pixels."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: LatentBHWC) -> LatentBHWC:
        B, H, W, C = x_BHWC.shape
        h = layers.GroupNorm(self.groups, EPSILON, self.dtype, name="norm")(x_BHWC)
        h_BTC = h.reshape(B, H * W, C)
        q, k, v = (
            nn.Dense(C, dtype=self.dtype, name=name)(h_BTC)[:, :, None]
            for name in ("q", "k", "v")
        )
        out = attention.attend(q, k, v, None)[:, :, 0]
        out = nn.Dense(C, dtype=self.dtype, name="out")(out)
        return x_BHWC + out.reshape(B, H, W, C)


class AutoencoderBlock(nn.Module):
    """A residual or attention that gathers its parameters, and again for its gradient.

    Its initial values are zeros, which stand for shapes: `init` draws the values.
    """

    kind: type[nn.Module]
    settings: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: LatentBHWC) -> Float[Array, "B H W out"]:
        module = self.kind(*self.settings, self.dtype, parent=None)
        if not self.is_initializing():
            block = remat.block(
                lambda x, params: layers.apply_module(module, params, x),
                "none",
                self.dtype,
            )
            return block(x_BHWC, self.variables["params"])
        key = jax.eval_shape(lambda: jax.random.key(0))
        shapes = jax.eval_shape(module.init_with_output, key, x_BHWC)
        output, variables = jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes
        )
        for name, params in variables["params"].items():
            self.put_variable("params", name, params)
        return output


def _residual(config: AutoencoderConfig, level: int, name: str) -> nn.Module:
    settings = config.channels[level], config.groups
    return AutoencoderBlock(AutoencoderResidual, settings, config.dtype, name=name)


def _middle(config: AutoencoderConfig, x_BHWC: LatentBHWC) -> LatentBHWC:
    x = _residual(config, -1, "middle_residual0")(x_BHWC)
    if config.middle_attention:
        settings = (config.groups,)
        x = AutoencoderBlock(
            AutoencoderAttention, settings, config.dtype, name="middle_attention"
        )(x)
    return _residual(config, -1, "middle_residual1")(x)


def _exit(
    config: AutoencoderConfig, x_BHWC: LatentBHWC, features: int
) -> Float[Array, "B H W features"]:
    norm = layers.GroupNorm(config.groups, EPSILON, config.dtype, name="exit_norm")
    return _conv(features, config.dtype, "exit")(nn.silu(norm(x_BHWC)))


class Encoder(nn.Module):
    """Pictures to means and log-variances, which are not clipped here."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x_BHWC: LatentBHWC) -> Float[Array, "B h w moments"]:
        cfg = self.config
        x = _conv(cfg.channels[0], cfg.dtype, "enter")(x_BHWC.astype(cfg.dtype))
        for level, width in enumerate(cfg.channels):
            for i in range(cfg.blocks):
                x = _residual(cfg, level, f"down{level}_{i}_residual")(x)
            if level < len(cfg.channels) - 1:
                x = _halve(width, cfg.dtype, f"down{level}_halve")(x)
        x = _exit(cfg, _middle(cfg, x), 2 * cfg.latent_channels)
        if cfg.quant_conv:
            x = nn.Dense(2 * cfg.latent_channels, dtype=cfg.dtype, name="quant")(x)
        return x.astype(jnp.float32)


class Decoder(nn.Module):
    """Latents to pictures."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, z_BHWC: LatentBHWC) -> Float[Array, "B rows columns out"]:
        cfg = self.config
        x = z_BHWC.astype(cfg.dtype)
        if cfg.quant_conv:
            x = nn.Dense(cfg.latent_channels, dtype=cfg.dtype, name="quant")(x)
        x = _conv(cfg.channels[-1], cfg.dtype, "enter")(x)
        x = _middle(cfg, x)
        for level in reversed(range(len(cfg.channels))):
            for i in range(cfg.blocks + 1):
                x = _residual(cfg, level, f"up{level}_{i}_residual")(x)
            if level:
                x = layers.double(x)
                x = _conv(cfg.channels[level], cfg.dtype, f"up{level}_double")(x)
        return _exit(cfg, x, cfg.image_channels).astype(jnp.float32)


def _gather(params: Params) -> Params:
    """Gathers the parameters that no module gathers by itself."""
    own = ("_residual", "_attention")
    return {
        name: leaves if any(part in name for part in own) else sharded.gather(leaves)
        for name, leaves in params.items()
    }


def init(config: AutoencoderConfig, key: jax.Array) -> Params:
    """Float32 parameters {"encoder", "decoder"}, named as the modules in each."""
    side = config.factor

    def modules(key: jax.Array) -> Params:
        image = jnp.zeros((1, side, side, config.image_channels))
        latent = jnp.zeros((1, 1, 1, config.latent_channels))
        return {
            "encoder": layers.init_module(Encoder(config), key, image),
            "decoder": layers.init_module(Decoder(config), key, latent),
        }

    return layers.initialise(jax.eval_shape(modules, key), key)


def encode(
    config: AutoencoderConfig, params: Params, x_BHWC: LatentBHWC
) -> Float[jax.Array, "B h w moments"]:
    """The moments of pictures, float32: means, then log-variances.

    Args:
      x_BHWC: pictures in [-1, 1].

    Returns:
      [B, H / factor, W / factor, 2 Z], the log-variances clipped to LOG_VARIANCES.

    Raises:
      ValueError: a height or width that the factor does not divide.
    """
    H, W = x_BHWC.shape[1:3]
    if H % config.factor or W % config.factor:
        raise ValueError(
            f"pictures of {H} x {W} pixels: both must be multiples of {config.factor}"
        )
    params = _gather(params["encoder"])
    moments = layers.apply_module(Encoder(config), params, x_BHWC)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, *LOG_VARIANCES)
    return jnp.concatenate([mean, log_variance], axis=-1)


def decode(
    config: AutoencoderConfig, params: Params, z_BHWC: LatentBHWC
) -> Float[jax.Array, "B rows columns out"]:
    """Pictures of latents, float32, in about [-1, 1] and not clipped.

    Args:
      z_BHWC: latents as `sample` draws them, [B, H, W, Z].

    Returns:
      [B, factor H, factor W, C].
    """
    params = _gather(params["decoder"])
    return layers.apply_module(Decoder(config), params, z_BHWC)


def sample(moments: Float[Array, "B H W moments"], noise: LatentBHWC) -> LatentBHWC:
    """Draws latents, given standard normal noise; zeros give the mean."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * log_variance) * noise
