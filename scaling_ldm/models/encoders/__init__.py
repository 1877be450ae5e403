"""Networks around a denoiser, most of them pretrained, as pure functions.

Autoencoders (autoencoder_kl), text encoders (t5, clip, bert) and their tokenizers, and
the networks that judge pictures (inception, dinov2, clip_features, efficientnet_lite,
lpips, clip_score). May import: records, config, models above this folder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax

from scaling_ldm.models.encoders import autoencoder_kl, bert, blocks, clip, t5
from scaling_ldm.models.shapes import Array, LatentBHWC, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """An autoencoder as pure functions: pictures in [-1, 1] to latents and back.

    init(key) -> params: float32, nested dicts of arrays.
    encode(params, x_BHWC) -> moments, float32: means and log-variances along channels,
      from which `autoencoder_kl.sample` draws.
    decode(params, z_BHWC) -> x_BHWC, float32.
    factor: pixels of a picture along one side of a latent pixel.
    scale, shift: a denoiser reads (z - shift) scale.
    """

    init: Callable[[jax.Array], Params]
    encode: Callable[..., jax.Array]
    decode: Callable[..., jax.Array]
    factor: int
    latent_channels: int
    scale: float
    shift: float

    def to_latent(self, z_BHWC: LatentBHWC) -> LatentBHWC:
        """From what `encode` gives to what a denoiser reads."""
        return (z_BHWC - self.shift) * self.scale

    def from_latent(self, z_BHWC: LatentBHWC) -> LatentBHWC:
        """From what a denoiser made to what `decode` reads."""
        return z_BHWC / self.scale + self.shift


def autoencoder(config: autoencoder_kl.AutoencoderConfig) -> Autoencoder:
    """The autoencoder of a config.

    Raises:
      ValueError: no resolutions, widths that the groups do not divide, or a scale of 0.
    """
    if not config.channels or any(width % config.groups for width in config.channels):
        raise ValueError(
            f"channels {config.channels}: one or more widths are needed, each "
            f"divisible by {config.groups} groups"
        )
    if config.scale == 0:
        raise ValueError("latents cannot be scaled by 0")
    return Autoencoder(
        init=functools.partial(autoencoder_kl.init, config),
        encode=functools.partial(autoencoder_kl.encode, config),
        decode=functools.partial(autoencoder_kl.decode, config),
        factor=config.factor,
        latent_channels=config.latent_channels,
        scale=config.scale,
        shift=config.shift,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder as two pure functions.

    init(key) -> params: random, float32; the folder weights reads trained ones.
    apply(params, ids_BS, mask_BS) -> features [B, S, width], float32; mask_BS is true
      where there is text, or None where padding is read like text.
    max_tokens: S is at most this.
    vector(params, ids_BS, mask_BS) -> a CLIP's vector of a text [B, P]; else None.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Array]
    width: int
    max_tokens: int
    vector: Callable[..., jax.Array] | None = None


def text_encoder(
    config: t5.T5Config | clip.ClipTextConfig | bert.BertConfig,
) -> TextEncoder:
    """The text encoder of a config.

    Raises:
      ValueError: no network can be made of it; see `blocks.check`.
    """
    module = {t5.T5Config: t5, clip.ClipTextConfig: clip, bert.BertConfig: bert}[
        type(config)
    ]
    blocks.check(config)
    return TextEncoder(
        init=functools.partial(module.init, config),
        apply=functools.partial(module.apply, config),
        width=config.width,
        max_tokens=config.max_tokens,
        vector=functools.partial(clip.embed_text, config)
        if isinstance(config, clip.ClipTextConfig)
        else None,
    )
