"""T5's encoder in the layout of transformers' `T5EncoderModel`.

Whole T5s are read too. Their decoder is left out, by name.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models.encoders import t5
from scaling_ldm.models.weights import blocks, files, layout
from scaling_ldm.models.weights.transformers_keys import IGNORED
from scaling_ldm.records.errors import WeightsError

_TYPES = ("t5", "mt5")  # as config.json calls it
_ATTENTION, _MLP = "layer.0", "layer.1"
_BLOCK = {
    "attention_norm": f"{_ATTENTION}.layer_norm",
    "qkv": [f"{_ATTENTION}.SelfAttention.{n}" for n in "qkv"],
    "out": f"{_ATTENTION}.SelfAttention.o",
    "mlp_norm": f"{_MLP}.layer_norm",
    "mlp_down": f"{_MLP}.DenseReluDense.wo",
}
_UP = {
    True: [f"{_MLP}.DenseReluDense.{n}" for n in ("wi_0", "wi_1")],
    False: f"{_MLP}.DenseReluDense.wi",
}
_WORDS = "shared.weight"
_BIAS = f"block.0.{_ATTENTION}.SelfAttention.relative_attention_bias.weight"
_OUT = "final_layer_norm.weight"


_DEFAULTS = {
    "d_model": 512,
    "num_layers": 6,
    "num_heads": 8,
    "d_kv": 64,
    "d_ff": 2048,
    "vocab_size": 32128,
    "feed_forward_proj": "relu",
    "dense_act_fn": None,  # these two repeat feed_forward_proj
    "is_gated_act": None,
    "n_positions": 512,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
_IGNORED = IGNORED | {"is_decoder"}  # which an encoder is not, whatever it says


def from_config(published: Mapping[str, Any], **changes: Any) -> t5.T5Config:
    """The config of a config.json of a T5, with the defaults of transformers.

    Args:
      changes: to fields of the config.

    Raises:
      WeightsError: another network, or settings that this one does not have.
    """
    blocks.check_model_type(published, *_TYPES)
    *gated, activation = published.get("feed_forward_proj", "relu").split("-")
    if gated not in ([], ["gated"]):
        raise WeightsError(
            f"feed_forward_proj is {published['feed_forward_proj']!r}; known are an "
            "activation, and gated-<activation>"
        )
    # Version 1.1 writes gelu where it means the tanh form.
    known = {"gelu": "gelu_new"} if gated else {}
    activation = known.get(activation, activation)
    only = {"dense_act_fn": (activation, None), "is_gated_act": (bool(gated), None)}
    c = blocks.settings(published, _DEFAULTS, only, "a T5's", _IGNORED)
    found = t5.T5Config(
        width=c["d_model"],
        depth=c["num_layers"],
        heads=c["num_heads"],
        head_width=c["d_kv"],
        hidden=c["d_ff"],
        vocab_size=c["vocab_size"],
        gated=bool(gated),
        activation=activation,
        max_tokens=c["n_positions"],
        buckets=c["relative_attention_num_buckets"],
        max_distance=c["relative_attention_max_distance"],
        epsilon=c["layer_norm_epsilon"],
    )
    return dataclasses.replace(found, **changes)


def pairs(config: t5.T5Config) -> list[layout.Pair]:
    """Every leaf and its tensor, without the prefix "encoder."."""
    tree = jax.eval_shape(lambda: t5.init(config, jax.random.key(0)))
    found = blocks.Pairs(tree)
    found.table("entry/word_embedding", _WORDS)
    found.table("entry/relative_bias", _BIAS)
    names = {**_BLOCK, "mlp_up": _UP[config.gated]}
    for i in range(config.depth):
        found.block("blocks", names, f"block.{i}", i)
    found.vector("exit/scale", _OUT)
    return found.done()


def _rename(name: str) -> str | None:
    if name.startswith(("decoder.", "lm_head.")):
        return None
    name = name.removeprefix("transformer.").removeprefix("encoder.")
    return _WORDS if name == "embed_tokens.weight" else name


def load(
    path: str | pathlib.Path, config: t5.T5Config, dtype: Any = np.float32
) -> dict[str, Any]:
    """Reads parameters from a file or directory, of an encoder or of a whole T5.

    Args:
      dtype: of the parameters; None: as stored.

    Raises:
      WeightsError: the file belongs to another network, all of whose differences are
        listed, or the config.json beside it has other settings.
    """
    tensors = layout.named(files.stored(path), _rename, str(path))
    params = layout.read(pairs(config), tensors, "this T5 encoder's", dtype)
    blocks.agree(path, config, _TYPES, from_config)
    return params


def open_directory(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> tuple[t5.T5Config, dict[str, Any]]:
    """Reads config and parameters from a checkpoint's directory.

    Args:
      changes: to fields of the config, such as dtype or unroll.
    """
    config = from_config(files.config(directory))
    params = load(directory, config, dtype)
    return dataclasses.replace(config, **changes), params


def save(params: dict[str, Any], path: str | pathlib.Path, config: t5.T5Config) -> None:
    """Writes parameters so that transformers' `T5EncoderModel` reads them.

    Args:
      path: a .safetensors file, which is replaced if it exists.
    """
    tensors = layout.write(pairs(config), params)
    layout.save(
        {
            name if name == _WORDS else f"encoder.{name}": value
            for name, value in tensors.items()
        },
        path,
    )
