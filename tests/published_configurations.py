"""Configurations of the networks that the docs name, as their publishers wrote them.

Each is a config.json without its version numbers. `NARROW` has smaller widths for where
the published ones take too long.
"""

import pathlib
from typing import Any

from scaling_ldm.models.denoisers import presets
from scaling_ldm.models.encoders import clip
from scaling_ldm.models.encoders import presets as encoder_presets
from scaling_ldm.models.weights import bert as bert_weights
from scaling_ldm.models.weights import clip as clip_weights
from scaling_ldm.models.weights import dinov2 as dinov2_weights
from scaling_ldm.models.weights import published
from scaling_ldm.models.weights import t5 as t5_weights

_SD = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_SD2 = _SD | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
# Older versions of diffusers wrote both under this name.
_TRANSFORMER = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "upcast_attention": False,
    "use_linear_projection": False,
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SIXTEEN = {
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_kv": 64,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}
_BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
_CLIP = {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
}
_DINOV2 = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "image_size": 518,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "num_channels": 3,
    "patch_size": 14,
    "qkv_bias": True,
}
CONFIGURATIONS = {
    "stable-diffusion-1": _SD
    | {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
    "stable-diffusion-2-base": _SD2 | {"sample_size": 64},
    "stable-diffusion-2": _SD2 | {"sample_size": 96},
    "stable-diffusion-2-1": _SD2 | {"sample_size": 96, "upcast_attention": True},
    "DiT-XL-2-256": _TRANSFORMER
    | {
        "attention_type": "default",
        "cross_attention_dim": None,
        "norm_type": "ada_norm_zero",
        "sample_size": 32,
    },
    "PixArt-XL-2-512x512": _TRANSFORMER
    | {
        "attention_type": "default",
        "caption_channels": 4096,
        "cross_attention_dim": 1152,
        "double_self_attention": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_single",
        "sample_size": 64,
    },
    "stable-diffusion-3-medium": {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 24,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "sample_size": 128,
    },
    "FLUX.1-dev": {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    },
    "sd-vae": _VAE,  # without a scaling factor: that of Stable Diffusion
    "sdxl-vae": _VAE
    | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "sd3-vae": _VAE | _SIXTEEN | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux-vae": _VAE
    | _SIXTEEN
    | {
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "mid_block_add_attention": True,
    },
    "t5-v1_1-small": _T5
    | {"d_ff": 1024, "d_model": 512, "num_heads": 6, "num_layers": 8},
    "t5-v1_1-xxl": _T5
    | {"d_ff": 10240, "d_model": 4096, "num_heads": 64, "num_layers": 24},
    "bert-base-uncased": _BERT
    | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    "all-MiniLM-L6-v2": _BERT
    | {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
    "clip-vit-large-patch14, text": _CLIP
    | {
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    "clip-vit-large-patch14, vision": _CLIP
    | {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": 1024,
        "image_size": 224,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "stable-diffusion-2-1, text_encoder": _CLIP
    | {
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "max_position_embeddings": 77,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "pad_token_id": 1,
        "projection_dim": 512,
        "vocab_size": 49408,
    },
    "dinov2-small": _DINOV2
    | {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "num_hidden_layers": 12,
        "use_swiglu_ffn": False,
    },
    "dinov2-base": _DINOV2
    | {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "use_swiglu_ffn": False,
    },
    "dinov2-large": _DINOV2
    | {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "use_swiglu_ffn": False,
    },
    "dinov2-giant": _DINOV2
    | {
        "hidden_size": 1536,
        "num_attention_heads": 24,
        "num_hidden_layers": 40,
        "use_swiglu_ffn": True,
    },
}
# Smaller than published, because the published size takes longer than a minute. The
# width of a head and the number of layers are as published.
_NARROW_UNET = {"block_out_channels": [160, 320, 640, 640]}  # 5 divides 160
NARROW = {
    "stable-diffusion-2-base": _NARROW_UNET,
    "stable-diffusion-2-1": _NARROW_UNET,
    "PixArt-XL-2-512x512": {"num_attention_heads": 4, "cross_attention_dim": 288},
    "stable-diffusion-3-medium": {
        "num_attention_heads": 4,
        "caption_projection_dim": 256,
    },
    "FLUX.1-dev": {"num_attention_heads": 2},
    "t5-v1_1-xxl": {"d_ff": 1280, "d_model": 512, "num_heads": 8},
    "dinov2-large": {"hidden_size": 256, "num_attention_heads": 4},
    "dinov2-giant": {"hidden_size": 256, "num_attention_heads": 4},
}
# What each is read as: a preset, and the fields in which the publisher's file differs.
UNET = presets.UNETS["unet_866m"]
ENCODERS = encoder_presets.PRESETS
READ_AS = {
    "stable-diffusion-1": (UNET, {"text_width": 768}),
    "stable-diffusion-2-base": (UNET, {"heads": (5, 10, 20, 20)}),
    "stable-diffusion-2": (
        UNET,
        {"heads": (5, 10, 20, 20), "image_shape": (96, 96, 4)},
    ),
    "stable-diffusion-2-1": (
        UNET,
        {"heads": (5, 10, 20, 20), "image_shape": (96, 96, 4)},
    ),
    "DiT-XL-2-256": (presets.DITS["dit_xl_2"], {"mlp_epsilon": 1e-5, "time_ends": 1}),
    "PixArt-XL-2-512x512": (presets.PIXARTS["pixart_alpha_xl_2"], {}),
    "stable-diffusion-3-medium": (
        presets.MMDITS["sd3_medium"],
        {"out_channels": 16},
    ),
    "FLUX.1-dev": (presets.MMDITS["flux_1_dev"], {"out_channels": 16}),
    "sd-vae": (encoder_presets.AUTOENCODERS["sd"], {}),
    "sdxl-vae": (encoder_presets.AUTOENCODERS["sdxl"], {}),
    "sd3-vae": (encoder_presets.AUTOENCODERS["sd3"], {}),
    "flux-vae": (encoder_presets.AUTOENCODERS["flux"], {}),
    "t5-v1_1-small": (ENCODERS["t5_v1_1_small"], {}),
    "t5-v1_1-xxl": (ENCODERS["t5_v1_1_xxl"], {}),
    "bert-base-uncased": (ENCODERS["bert_base"], {}),
    "all-MiniLM-L6-v2": (ENCODERS["minilm_l6"], {}),
    "clip-vit-large-patch14, text": (
        ENCODERS["clip_l14_text"],
        {"end_token": clip.LEGACY_END},
    ),
    "clip-vit-large-patch14, vision": (ENCODERS["clip_l14_vision"], {}),
    "stable-diffusion-2-1, text_encoder": (
        ENCODERS["openclip_h_text"],
        {"projection": 512},  # whose weights the file does not have
    ),
    "dinov2-small": (encoder_presets.DINOV2["dinov2_s14"], {}),
    "dinov2-base": (encoder_presets.DINOV2["dinov2_b14"], {}),
    "dinov2-large": (encoder_presets.DINOV2["dinov2_l14"], {}),
    "dinov2-giant": (encoder_presets.DINOV2["dinov2_g14"], {}),
}


def read(config: dict[str, Any], like: Any) -> Any:
    """The config of our network, by what the publisher's file says.

    Args:
      like: has text_tokens and image_shape, for what such a file does not say.
    """
    if "_class_name" in config:
        layout = published.LAYOUTS[config["_class_name"]]
        return layout(pathlib.Path(), config, like).network
    return {
        "t5": t5_weights.from_config,
        "bert": bert_weights.from_config,
        "clip_text_model": clip_weights.from_config,
        "clip_vision_model": clip_weights.vision_from_config,
        "dinov2": dinov2_weights.from_config,
    }[config["model_type"]](config)
