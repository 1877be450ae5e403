"""Keys of a config.json of transformers that change no feature of an encoder.

Every other key is read by the layout of its network, or refused where it is set.
"""

from __future__ import annotations

# How a file is stored and what classes are called.
_FILES = (
    "architectures",
    "attn_implementation",
    "dtype",
    "model_type",  # compared by `blocks.check_model_type`
    "name_or_path",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_bfloat16",
)
# Training: features are computed without dropout.
_TRAINING = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "drop_path_rate",
    "dropout",
    "dropout_rate",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "initializer_factor",
    "initializer_range",
    "layerscale_value",
    "tf_legacy_loss",
)
# Heads, decoders and what is returned.
_OUTPUTS = (
    "apply_layernorm",  # of the class of backbones, as the next ones
    "out_features",
    "out_indices",
    "reshape_hidden_states",
    "stage_names",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "directionality",
    "finetuning_task",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "num_decoder_layers",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "problem_type",
    "return_dict",
    "scale_decoder_outputs",
    "task_specific_params",
    "tie_encoder_decoder",
    "tie_word_embeddings",
)
# What tokenizers write, and the generation of text.
_TEXT = (
    "bos_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "pad_token_id",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
)
IGNORED = frozenset((*_FILES, *_TRAINING, *_OUTPUTS, *_TEXT))
