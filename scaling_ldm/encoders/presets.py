"""Published autoencoders by name, each with what it should measure; jax only.

All four share channels, blocks and groups. Parameters are exact; forward FLOPs are of
one 256 x 256 picture, 2 x MAC, every tap counted. Scale and shift are those of the
weights' published configurations.
"""

from __future__ import annotations

import dataclasses

from scaling_ldm.encoders import autoencoder_kl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A network and what counting it should give."""

    shape: autoencoder_kl.Shape
    params: int
    encode_gflops: float
    decode_gflops: float
    source: str


def _four(scale: float, source: str) -> Preset:
    return Preset(
        shape=autoencoder_kl.Shape(latent_channels=4, scale=scale),
        params=83_653_863,
        encode_gflops=272.72,
        decode_gflops=622.19,
        source=source,
    )


def _sixteen(scale: float, shift: float, source: str) -> Preset:
    return Preset(
        shape=autoencoder_kl.Shape(
            latent_channels=16, quant_conv=False, scale=scale, shift=shift
        ),
        params=83_819_683,
        encode_gflops=272.95,
        decode_gflops=622.30,
        source=source,
    )


AUTOENCODERS = {
    "sd": _four(0.18215, "arXiv 2112.10752; Stable Diffusion 1 and 2"),
    "sdxl": _four(0.13025, "arXiv 2307.01952, section 2.4"),
    "sd3": _sixteen(1.5305, 0.0609, "arXiv 2403.03206; Stable Diffusion 3"),
    "flux": _sixteen(0.3611, 0.1159, "FLUX.1, Black Forest Labs 2024"),
}
