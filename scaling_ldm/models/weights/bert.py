"""BERT (and MiniLM) in the layout of transformers' `BertModel`; jax for shapes only."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models.encoders import bert
from scaling_ldm.models.weights import files, layout, stacks

_BLOCK = {
    "attention/qkv": tuple(f"attention.self.{n}" for n in ("query", "key", "value")),
    "attention/out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "mlp_up": ("intermediate.dense",),
    "mlp_down": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
_ENTRY = {
    "word_embedding": "embeddings.word_embeddings.weight",
    "position_embedding": "embeddings.position_embeddings.weight",
    "type_embedding": "embeddings.token_type_embeddings.weight",
}
_POOLER = "pooler.dense"


def from_config(published: Mapping[str, Any], **changes: Any) -> bert.BertConfig:
    """The shape that a config.json of a BERT states, defaults as in transformers.

    Raises:
      layout.WeightsError: positions or a direction that this network does not have.
    """
    if published.get("position_embedding_type", "absolute") != "absolute":
        raise layout.WeightsError("only BERTs with absolute positions are known")
    if published.get("is_decoder", False):
        raise layout.WeightsError("this BERT is a decoder; only encoders are known")
    found = bert.BertConfig(
        width=published.get("hidden_size", 768),
        depth=published.get("num_hidden_layers", 12),
        heads=published.get("num_attention_heads", 12),
        hidden=published.get("intermediate_size", 3072),
        vocab_size=published.get("vocab_size", 30522),
        max_tokens=published.get("max_position_embeddings", 512),
        types=published.get("type_vocab_size", 2),
        activation=published.get("hidden_act", "gelu"),
        epsilon=published.get("layer_norm_eps", 1e-12),
    )
    return dataclasses.replace(found, **changes)


def pairs(config: bert.BertConfig) -> list[layout.Pair]:
    """Every leaf and its tensor."""
    tree = jax.eval_shape(lambda: bert.init(config, jax.random.key(0)))
    found = [
        layout.vector(("entry", ours), theirs, tree["entry"][ours].shape)
        for ours, theirs in _ENTRY.items()
    ]
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        name = f"embeddings.LayerNorm.{theirs}"
        found.append(layout.vector(("entry", "norm", ours), name, (config.width,)))
    found += stacks.pairs(tree["blocks"], _BLOCK, "encoder.layer.{}")
    if config.pooler:
        square = (config.width, config.width)
        found.append(layout.dense(("pooler", "kernel"), f"{_POOLER}.weight", square))
        found.append(layout.vector(("pooler", "bias"), f"{_POOLER}.bias", square[:1]))
    return found


def _rename(name: str) -> str | None:
    """Heads and counters are left out; the first checkpoints had other words."""
    if name.startswith("cls.") or name.endswith("embeddings.position_ids"):
        return None
    name = name.removeprefix("bert.")
    return name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")


def _tensors(path: str | pathlib.Path) -> dict[str, Any]:
    return layout.named(files.stored(path), _rename, str(path))


def load(
    path: str | pathlib.Path, config: bert.BertConfig, dtype: Any = np.float32
) -> dict[str, Any]:
    """Parameters from a checkpoint's file or directory.

    Args:
      dtype: of the parameters; None: as stored.

    Raises:
      layout.WeightsError: the file is another network's; all differences are listed.
    """
    return layout.read(pairs(config), _tensors(path), "this BERT's", dtype)


def open_directory(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> tuple[bert.BertConfig, dict[str, Any]]:
    """The shape and parameters of a checkpoint's directory.

    Args:
      changes: to fields of the shape, such as dtype or unroll.
    """
    pooler = f"{_POOLER}.weight" in _tensors(directory)
    config = from_config(files.config(directory), pooler=pooler)
    params = load(directory, config, dtype)
    return dataclasses.replace(config, **changes), params


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: bert.BertConfig
) -> None:
    """Writes parameters as transformers' `BertModel` reads them."""
    layout.save(layout.write(pairs(config), params), path)
