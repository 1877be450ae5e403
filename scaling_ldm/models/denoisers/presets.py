"""Networks of the papers by name, each with what counting it should give.

Parameters and forward FLOPs of paper A's U-Nets (arXiv 2404.01367, table 1) are those
of its layout with a 64 x 64 x 4 latent and 77 text tokens, 2 x MAC, with every tap
counted. The paper prints these parameters, rounded. Its FLOPs leave out taps on padding
and add elementwise operations. The 25.3 GFLOP that it prints for the smallest network
contradict its own cost column.

Forward FLOPs of the transformers are 2 x MAC of one evaluation with the inputs given
here (DiT: 256-pixel pictures; PixArt: 512; SD3 and FLUX: 1024). The "Gflops" that DiT's
paper prints are MACs (118.64 for XL/2). Its parameters include the fixed table of
positions, `patches` x width, which is no parameter here (675.1M for XL/2). SD3's last
block computes no attention for its text here, because nothing reads it; the code of its
authors does.
"""

from __future__ import annotations

import dataclasses

from scaling_ldm.models import positions
from scaling_ldm.models.denoisers import dit, mmdit, unet


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserPreset:
    """A network and what counting it should give.

    params counts all parameters; forward_gflops is 2 x MAC of one evaluation.
    """

    config: unet.UNetConfig | dit.DiTConfig | mmdit.MMDiTConfig
    params: int
    forward_gflops: float
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetPreset(DenoiserPreset):
    """One of paper A's family."""

    config: unet.UNetConfig
    relative_cost: float  # of one evaluation, as printed; that of the 866M is 1


def _unet(base: int, params: int, gflops: float, relative_cost: float) -> UNetPreset:
    return UNetPreset(
        config=unet.UNetConfig(
            base=base,
            heads=8,
            image_shape=(64, 64, 4),
            text_tokens=77,
            text_width=1024,
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


def _dit(size: str, patch: int, params: int, gflops: float) -> DenoiserPreset:
    width, depth, heads = _DIT_SIZES[size]
    return DenoiserPreset(
        config=dit.DiTConfig(
            architecture="adaln_zero",
            width=width,
            depth=depth,
            heads=heads,
            image_shape=(32, 32, 4),
            patch_size=patch,
            classes=1000,
            grid=positions.PositionGrid(columns_first=True),
            out_channels=8,  # a variance beside the noise
        ),
        params=params,
        forward_gflops=gflops,
        source="arXiv 2212.09748, tables 1 and 4",
    )


_DIT_SIZES = {  # width, depth, heads
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
}
# (width, depth) -> heads, which shapes of tensors do not show.
DIT_HEADS = {(width, depth): heads for width, depth, heads in _DIT_SIZES.values()}

DITS = {
    "dit_s_2": _dit("s", 2, 32_865_056, 12.11),
    "dit_s_4": _dit("s", 4, 32_920_448, 2.83),
    "dit_s_8": _dit("s", 8, 33_142_016, 0.72),
    "dit_b_2": _dit("b", 2, 130_315_808, 46.01),
    "dit_b_4": _dit("b", 4, 130_426_496, 11.13),
    "dit_b_8": _dit("b", 8, 130_869_248, 2.84),
    "dit_l_2": _dit("l", 2, 457_840_672, 161.40),
    "dit_l_4": _dit("l", 4, 457_988_224, 39.39),
    "dit_l_8": _dit("l", 8, 458_578_432, 10.02),
    "dit_xl_2": _dit("xl", 2, 674_834_720, 237.24),
    "dit_xl_4": _dit("xl", 4, 675_000_704, 58.09),
    "dit_xl_8": _dit("xl", 8, 675_664_640, 14.78),
}

PIXARTS = {
    "pixart_alpha_xl_2": DenoiserPreset(
        config=dit.DiTConfig(
            architecture="cross_attention",
            width=1152,
            depth=28,
            heads=16,
            image_shape=(64, 64, 4),
            patch_size=2,
            text_tokens=120,
            text_width=4096,
            grid=positions.PositionGrid(columns_first=True),
            out_channels=8,
        ),
        params=610_856_096,
        forward_gflops=1235.99,
        source="arXiv 2310.00426, section 2.3 and table 1 (0.6B)",
    ),
}

MMDITS = {
    "sd3_medium": DenoiserPreset(
        config=mmdit.MMDiTConfig(
            width=1536,
            depth=24,
            heads=24,
            image_shape=(128, 128, 16),
            patch_size=2,
            text_tokens=154,
            text_width=4096,
            pooled_width=2048,
            grid=positions.PositionGrid(columns_first=True, step=64 / 192, table=192),
        ),
        params=2_028_328_000,
        forward_gflops=8433.33,
        source="arXiv 2403.03206, section 5; stable-diffusion-3-medium's config",
    ),
    "flux_1_dev": DenoiserPreset(
        config=mmdit.MMDiTConfig(
            width=3072,
            depth=19,
            heads=24,
            image_shape=(128, 128, 16),
            patch_size=2,
            text_tokens=512,
            text_width=4096,
            single_depth=38,
            pooled_width=768,
            guidance=True,
            qk_norm="rms",
            positions="rope",
            rope_axes=(16, 56, 56),
        ),
        params=11_901_408_320,
        forward_gflops=74_384.65,
        source="FLUX.1-dev's config",
    ),
}
