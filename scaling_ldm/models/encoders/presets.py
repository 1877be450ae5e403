"""Published networks around a denoiser by name, and what counting them should give.

Parameters are exact. The four autoencoders share channels, blocks and groups. Their
forward FLOPs are for one 256 x 256 picture, 2 x MAC, with every tap counted. Scale and
shift are those of the published configurations.
"""

from __future__ import annotations

import dataclasses

from scaling_ldm.models.encoders import autoencoder_kl, bert, clip, dinov2, t5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderPreset:
    """An autoencoder and what counting it should give."""

    config: autoencoder_kl.AutoencoderConfig
    params: int
    encode_gflops: float
    decode_gflops: float
    source: str


def _four(scale: float, source: str) -> AutoencoderPreset:
    return AutoencoderPreset(
        config=autoencoder_kl.AutoencoderConfig(latent_channels=4, scale=scale),
        params=83_653_863,
        encode_gflops=272.72,
        decode_gflops=622.19,
        source=source,
    )


def _sixteen(scale: float, shift: float, source: str) -> AutoencoderPreset:
    return AutoencoderPreset(
        config=autoencoder_kl.AutoencoderConfig(
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderPreset:
    """An encoder, how many parameters it should have, and where it is published."""

    config: (
        t5.T5Config
        | clip.ClipTextConfig
        | clip.ClipVisionConfig
        | bert.BertConfig
        | dinov2.DinoConfig
    )
    params: int
    source: str  # id on the Hugging Face hub


def _t5(width: int, depth: int, heads: int, hidden: int) -> t5.T5Config:
    """T5 of version 1.1."""
    return t5.T5Config(
        width=width,
        depth=depth,
        heads=heads,
        head_width=64,
        hidden=hidden,
        vocab_size=32128,
        gated=True,
        activation="gelu_new",
    )


PRESETS = {
    "minilm_l6": EncoderPreset(
        config=bert.BertConfig(
            width=384,
            depth=6,
            heads=12,
            hidden=1536,
            vocab_size=30522,
            max_tokens=512,
        ),
        params=22_713_216,
        source="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "bert_base": EncoderPreset(
        config=bert.BertConfig(
            width=768,
            depth=12,
            heads=12,
            hidden=3072,
            vocab_size=30522,
            max_tokens=512,
        ),
        params=109_482_240,
        source="google-bert/bert-base-uncased",
    ),
    "clip_l14_text": EncoderPreset(
        config=clip.ClipTextConfig(
            width=768,
            depth=12,
            heads=12,
            hidden=3072,
            vocab_size=49408,
            max_tokens=77,
            projection=768,
            end_token=49407,
        ),
        params=123_650_304,
        source="openai/clip-vit-large-patch14",
    ),
    "clip_l14_vision": EncoderPreset(
        config=clip.ClipVisionConfig(
            width=1024,
            depth=24,
            heads=16,
            hidden=4096,
            image_size=224,
            patch_size=14,
            projection=768,
        ),
        params=303_966_208,
        source="openai/clip-vit-large-patch14",
    ),
    "openclip_h_text": EncoderPreset(  # Stable Diffusion 2 leaves its last layer out
        config=clip.ClipTextConfig(
            width=1024,
            depth=23,
            heads=16,
            hidden=4096,
            vocab_size=49408,
            max_tokens=77,
            projection=0,
            end_token=clip.LEGACY_END,
            activation="gelu",
        ),
        params=340_387_840,
        source="stabilityai/stable-diffusion-2-1, text_encoder",
    ),
    "t5_v1_1_small": EncoderPreset(
        config=_t5(512, 8, 6, 1024),
        params=35_332_800,
        source="google/t5-v1_1-small",
    ),
    "t5_v1_1_xxl": EncoderPreset(
        config=_t5(4096, 24, 64, 10240),
        params=4_762_310_656,
        source="google/t5-v1_1-xxl",
    ),
}


def _dinov2(
    name: str, width: int, depth: int, heads: int, params: int
) -> EncoderPreset:
    giant = name == "giant"
    return EncoderPreset(
        config=dinov2.DinoConfig(
            width=width,
            depth=depth,
            heads=heads,
            hidden=4096 if giant else 4 * width,
            gated=giant,
        ),
        params=params,
        source=f"facebook/dinov2-{name}",
    )


DINOV2 = {  # counted with the mask token's parameters
    "dinov2_s14": _dinov2("small", 384, 12, 6, 22_056_576),
    "dinov2_b14": _dinov2("base", 768, 12, 12, 86_580_480),
    "dinov2_l14": _dinov2("large", 1024, 24, 16, 304_368_640),
    "dinov2_g14": _dinov2("giant", 1536, 40, 24, 1_136_480_768),
}
