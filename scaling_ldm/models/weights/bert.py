"""BERT (and MiniLM) in the layout of transformers' `BertModel`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models.encoders import bert
from scaling_ldm.models.weights import blocks, files, layout
from scaling_ldm.models.weights.transformers_keys import IGNORED

_TYPES = ("bert",)  # as config.json calls it
_BLOCK = {
    "attention/qkv": [f"attention.self.{n}" for n in ("query", "key", "value")],
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_up": "intermediate.dense",
    "mlp_down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_ENTRY = {
    "word_embedding": "embeddings.word_embeddings.weight",
    "position_embedding": "embeddings.position_embeddings.weight",
    "type_embedding": "embeddings.token_type_embeddings.weight",
}
_POOLER = "pooler.dense"


_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
_ONLY = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


def from_config(published: Mapping[str, Any], **changes: Any) -> bert.BertConfig:
    """The config of a config.json of a BERT, with the defaults of transformers.

    Args:
      changes: to fields of the config.

    Raises:
      WeightsError: another network, relative positions, a decoder, or settings that
        are not known.
    """
    blocks.check_model_type(published, *_TYPES)
    c = blocks.settings(published, _DEFAULTS, _ONLY, "a BERT encoder's", IGNORED)
    found = bert.BertConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        max_tokens=c["max_position_embeddings"],
        types=c["type_vocab_size"],
        activation=c["hidden_act"],
        epsilon=c["layer_norm_eps"],
    )
    return dataclasses.replace(found, **changes)


def pairs(config: bert.BertConfig) -> list[layout.Pair]:
    """Every leaf and its tensor."""
    tree = jax.eval_shape(lambda: bert.init(config, jax.random.key(0)))
    found = blocks.Pairs(tree)
    for ours, theirs in _ENTRY.items():
        found.table(f"entry/{ours}", theirs)
    found.module("entry/norm", "embeddings.LayerNorm")
    for i in range(config.depth):
        found.block("blocks", _BLOCK, f"encoder.layer.{i}", i)
    if config.pooler:
        found.module("pooler", _POOLER)
    return found.done()


def _rename(name: str) -> str | None:
    """Leaves out heads and counters; the first checkpoints had other names."""
    if name.startswith("cls.") or name.endswith("embeddings.position_ids"):
        return None
    name = name.removeprefix("bert.")
    return name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")


def _tensors(path: str | pathlib.Path) -> dict[str, Any]:
    return layout.named(files.stored(path), _rename, str(path))


def load(
    path: str | pathlib.Path, config: bert.BertConfig, dtype: Any = np.float32
) -> dict[str, Any]:
    """Reads parameters from a checkpoint's file or directory.

    Args:
      dtype: of the parameters; None: as stored.

    Raises:
      WeightsError: the file belongs to another network, all of whose differences are
        listed, or the config.json beside it has other settings.
    """
    params = layout.read(pairs(config), _tensors(path), "this BERT's", dtype)
    blocks.agree(path, config, _TYPES, from_config)
    return params


def open_directory(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> tuple[bert.BertConfig, dict[str, Any]]:
    """Reads config and parameters from a checkpoint's directory.

    Args:
      changes: to fields of the config, such as dtype or unroll.
    """
    pooler = f"{_POOLER}.weight" in _tensors(directory)
    config = from_config(files.config(directory), pooler=pooler)
    params = load(directory, config, dtype)
    return dataclasses.replace(config, **changes), params


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: bert.BertConfig
) -> None:
    """Writes parameters so that transformers' `BertModel` reads them.

    Args:
      path: a .safetensors file, which is replaced if it exists.
    """
    layout.save(layout.write(pairs(config), params), path)
