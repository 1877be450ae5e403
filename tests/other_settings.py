"""Another legal value of every setting of a published config.json.

`OTHER` has each key that the publisher's library knows, by `_class_name` or
`model_type`. `SAME` names those that do not change what the network computes, each with
its reason; every other one must be read or refused.
"""

from typing import Any

_TRANSFORMER = {
    "activation_fn": "geglu",
    "attention_bias": False,
    "attention_head_dim": 36,
    "dropout": 0.5,
    "in_channels": 8,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-3,
    "norm_num_groups": 16,
    "num_attention_heads": 8,
    "num_embeds_ada_norm": 10,
    "num_layers": 3,
    "out_channels": 12,
    "patch_size": 4,
    "sample_size": 16,
    "upcast_attention": True,
    "attention_type": "gated",
    # Of the class before, which was several networks in one.
    "cross_attention_dim": 64,
    "num_vector_embeds": 100,
    "only_cross_attention": True,
    "use_linear_projection": True,
    "double_self_attention": True,
}
_TOKENS = {
    "attention_head_dim": 32,
    "in_channels": 32,
    "joint_attention_dim": 96,
    "num_attention_heads": 12,
    "num_layers": 3,
    "out_channels": 32,
    "patch_size": 4,
    "pooled_projection_dim": 96,
}
_TOWER = {
    "attention_dropout": 0.5,
    "dropout": 0.5,
    "hidden_act": "relu",
    "hidden_size": 96,
    "initializer_factor": 0.5,
    "initializer_range": 0.5,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-3,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "projection_dim": 96,
}
_ANY = {
    "architectures": ["Other"],
    "chunk_size_feed_forward": 2,
    "is_decoder": True,
    "use_cache": False,
    "pad_token_id": 7,
    "torch_dtype": "float16",
    "transformers_version": "9",
}
OTHER: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {
        "act_fn": "gelu",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 32,
        "addition_time_embed_dim": 256,
        "attention_head_dim": 4,
        "attention_type": "gated",
        "block_out_channels": [320, 640, 640, 640],
        "center_input_sample": True,
        "class_embed_type": "timestep",
        "class_embeddings_concat": True,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "cross_attention_dim": 96,
        "cross_attention_norm": "layer_norm",
        "down_block_types": ["DownBlock2D"] * 4,
        "downsample_padding": 0,
        "dropout": 0.5,
        "dual_cross_attention": True,
        "encoder_hid_dim": 96,
        "encoder_hid_dim_type": "text_proj",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 9,
        "layers_per_block": 1,
        "mid_block_only_cross_attention": True,
        "mid_block_scale_factor": 2,
        "mid_block_type": "UNetMidBlock2D",
        "norm_eps": 1e-3,
        "norm_num_groups": 16,
        "num_attention_heads": 4,
        "num_class_embeds": 10,
        "only_cross_attention": True,
        "out_channels": 3,
        "projection_class_embeddings_input_dim": 96,
        "resnet_out_scale_factor": 2.0,
        "resnet_skip_time_act": True,
        "resnet_time_scale_shift": "scale_shift",
        "reverse_transformer_layers_per_block": [1, 1, 1, 1],
        "sample_size": 32,
        "time_cond_proj_dim": 256,
        "time_embedding_act_fn": "silu",
        "time_embedding_dim": 96,
        "time_embedding_type": "fourier",
        "timestep_post_act": "silu",
        "transformer_layers_per_block": [1, 2, 10, 10],
        "up_block_types": ["UpBlock2D"] * 4,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "DiTTransformer2DModel": _TRANSFORMER | {"norm_type": "ada_norm_single"},
    "PixArtTransformer2DModel": _TRANSFORMER
    | {
        "caption_channels": 96,
        "interpolation_scale": 2,
        "norm_type": "ada_norm_zero",
        "use_additional_conditions": True,
    },
    "SD3Transformer2DModel": _TOKENS
    | {
        "caption_projection_dim": 96,
        "dual_attention_layers": [0],
        "pos_embed_max_size": 96,
        "qk_norm": "rms_norm",
        "sample_size": 64,
    },
    "FluxTransformer2DModel": _TOKENS
    | {
        "axes_dims_rope": [32, 48, 48],
        "guidance_embeds": False,
        "num_single_layers": 3,
        "patch_size": 2,
    },
    "AutoencoderKL": {
        "act_fn": "gelu",
        "block_out_channels": [64, 64, 64, 64],
        "down_block_types": ["AttnDownEncoderBlock2D"] * 4,
        "force_upcast": False,
        "in_channels": 4,
        "latent_channels": 8,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "norm_num_groups": 16,
        "out_channels": 4,
        "sample_size": 64,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        "up_block_types": ["AttnUpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    "t5": _ANY
    | {
        "classifier_dropout": 0.5,
        "d_ff": 96,
        "d_kv": 32,
        "d_model": 96,
        "decoder_start_token_id": 7,
        "dense_act_fn": "relu",
        "dropout_rate": 0.5,
        "eos_token_id": 7,
        "feed_forward_proj": "gated-silu",
        "hidden_size": 96,  # transformers takes these for d_model, ...
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "head_dim": 32,
        "initializer_factor": 0.5,
        "is_encoder_decoder": False,
        "is_gated_act": False,
        "layer_norm_epsilon": 1e-3,
        "n_positions": 256,
        "num_decoder_layers": 3,
        "num_heads": 3,
        "num_layers": 3,
        "output_past": False,
        "relative_attention_max_distance": 64,
        "relative_attention_num_buckets": 16,
        "scale_decoder_outputs": True,
        "tie_word_embeddings": True,
        "vocab_size": 96,
    },
    "bert": _ANY
    | {
        "add_cross_attention": True,
        "attention_probs_dropout_prob": 0.5,
        "bos_token_id": 7,
        "classifier_dropout": 0.5,
        "eos_token_id": 7,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.5,
        "hidden_size": 96,
        "initializer_range": 0.5,
        "intermediate_size": 96,
        "layer_norm_eps": 1e-3,
        "max_position_embeddings": 128,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "position_embedding_type": "relative_key",
        "tie_word_embeddings": False,
        "type_vocab_size": 1,
        "vocab_size": 96,
    },
    "clip_text_model": _ANY
    | _TOWER
    | {
        "bos_token_id": 7,
        "eos_token_id": 7,
        "max_position_embeddings": 128,
        "vocab_size": 96,
    },
    "clip_vision_model": {k: v for k, v in _ANY.items() if k != "pad_token_id"}
    | _TOWER
    | {"image_size": 112, "num_channels": 4, "patch_size": 28},
    "dinov2": _ANY
    | {
        "apply_layernorm": False,
        "attention_probs_dropout_prob": 0.5,
        "drop_path_rate": 0.5,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.5,
        "hidden_size": 96,
        "image_size": 112,
        "initializer_range": 0.5,
        "layer_norm_eps": 1e-3,
        "layerscale_value": 0.5,
        "mlp_ratio": 2,
        "num_attention_heads": 3,
        "num_channels": 4,
        "num_hidden_layers": 3,
        "out_features": ["stage1"],
        "out_indices": [1],
        "patch_size": 7,
        "qkv_bias": False,
        "reshape_hidden_states": False,
        "stage_names": ["stem"],
        "use_mask_token": False,
        "use_swiglu_ffn": True,
    },
}
_TRAINING = "only while it is trained"
_START = "how random weights are drawn"
_NUMBERS = "float32 is computed in float32 either way"
_GENERAL = {
    "architectures": "a name",
    "chunk_size_feed_forward": "the same numbers in several parts",
    "use_cache": "of decoders",
    "pad_token_id": "the tokenizer pads; a mask hides it",
    "torch_dtype": "how a file was stored; parameters are read in float32",
    "transformers_version": "a name",
}
_DROPOUTS = {"attention_dropout": _TRAINING, "dropout": _TRAINING}
_BLOCKS = {
    "dropout": _TRAINING,
    "norm_num_groups": "of a norm that this network does not have",
    "upcast_attention": _NUMBERS,
}
_TOWER_SAME = (
    _GENERAL
    | _DROPOUTS
    | {
        "initializer_factor": _START,
        "initializer_range": _START,
        "is_decoder": "a tower is none; its own mask is always causal, or none",
    }
)
SAME: dict[str, dict[str, str]] = {
    "UNet2DConditionModel": {
        "addition_embed_type_num_heads": "of an embedding that is not there",
        "dropout": _TRAINING,
        "upcast_attention": _NUMBERS,
    },
    "DiTTransformer2DModel": _BLOCKS,
    "PixArtTransformer2DModel": _BLOCKS
    | {"num_embeds_ada_norm": "of a table that this network does not have"},
    "SD3Transformer2DModel": {},
    "FluxTransformer2DModel": {},
    "AutoencoderKL": {
        "force_upcast": _NUMBERS,
        "sample_size": "from which side on pictures are cut into tiles, if asked",
    },
    "t5": _GENERAL
    | {
        "classifier_dropout": _TRAINING,
        "decoder_start_token_id": "of the decoder",
        "dropout_rate": _TRAINING,
        "eos_token_id": "the tokenizer writes it",
        "initializer_factor": _START,
        "is_decoder": "the encoder is none",
        "is_encoder_decoder": "the encoder alone is read",
        "num_decoder_layers": "of the decoder",
        "output_past": "of the decoder",
        "scale_decoder_outputs": "of the decoder",
        "tie_word_embeddings": "scales what the decoder gives",
    },
    "bert": _GENERAL
    | {
        "attention_probs_dropout_prob": _TRAINING,
        "bos_token_id": "the tokenizer writes it",
        "classifier_dropout": _TRAINING,
        "eos_token_id": "the tokenizer writes it",
        "hidden_dropout_prob": _TRAINING,
        "initializer_range": _START,
        "tie_word_embeddings": "of the head that is not read",
    },
    "clip_text_model": _TOWER_SAME | {"bos_token_id": "the tokenizer writes it"},
    "clip_vision_model": {k: v for k, v in _TOWER_SAME.items() if k != "pad_token_id"},
    "dinov2": _GENERAL
    | {
        "apply_layernorm": "of the backbone class",
        "attention_probs_dropout_prob": _TRAINING,
        "drop_path_rate": _TRAINING,
        "hidden_dropout_prob": _TRAINING,
        "initializer_range": _START,
        "is_decoder": "it is none",
        "layerscale_value": _START,
        "out_features": "of the backbone class",
        "out_indices": "of the backbone class",
        "reshape_hidden_states": "of the backbone class",
        "stage_names": "of the backbone class",
    },
}
# Readers that give the same network for a key although the weights do not fit it:
# stored otherwise, and found out by their shapes.
STORED = {"UNet2DConditionModel": {"use_linear_projection"}}


def kind_of(config: dict[str, Any]) -> str:
    """Whose settings a config.json has, where older versions gave another name."""
    name = config.get("_class_name") or config["model_type"]
    if name != "Transformer2DModel":
        return name
    of_norm = {"ada_norm_zero": "DiT", "ada_norm_single": "PixArt"}
    return f"{of_norm[config['norm_type']]}Transformer2DModel"
