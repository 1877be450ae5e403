"""Networks of the papers by name, each with what it should measure; jax and flax only.

Parameters and forward FLOPs of paper A's U-Nets (arXiv 2404.01367, table 1) are those
of its layout at a 64 x 64 x 4 latent and 77 text tokens, 2 x MAC, every tap counted.
The paper prints these parameters, rounded, and FLOPs that leave out taps on padding and
add elementwise ones; its 25.3 GFLOP of the smallest contradicts its own cost column.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from scaling_ldm.denoisers import unet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A network and what counting it should give."""

    shape: unet.Shape
    params: int
    forward_gflops: float
    relative_cost: float  # as printed: of one evaluation, the 866M network's being 1
    source: str


def _unet(base: int, params: int, gflops: float, relative_cost: float) -> Preset:
    return Preset(
        shape=unet.Shape(
            base=base,
            heads=8,
            image_shape=(64, 64, 4),
            extra_channels=0,
            text_tokens=77,
            text_width=1024,
            vocab_size=0,
            dtype=jnp.float32,
            remat=False,
        ),
        params=params,
        forward_gflops=gflops,
        relative_cost=relative_cost,
        source="arXiv 2404.01367, table 1",
    )


UNETS = {
    "unet_39m": _unet(64, 38_800_580, 53.0, 0.07),
    "unet_83m": _unet(96, 83_397_412, 99.7, 0.13),
    "unet_145m": _unet(128, 144_791_940, 159.9, 0.20),
    "unet_223m": _unet(160, 222_984_164, 233.6, 0.30),
    "unet_318m": _unet(192, 317_974_084, 320.8, 0.40),
    "unet_430m": _unet(224, 429_761_700, 421.4, 0.53),
    "unet_558m": _unet(256, 558_347_012, 535.6, 0.67),
    "unet_704m": _unet(288, 703_730_020, 663.2, 0.83),
    "unet_866m": _unet(320, 865_910_724, 804.3, 1.00),
    "unet_2b": _unet(512, 2_191_746_564, 1933.9, 2.39),
    "unet_5b": _unet(768, 4_900_198_660, 4195.1, 5.17),
}
