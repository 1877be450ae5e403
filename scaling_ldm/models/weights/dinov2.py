"""DINOv2 in the layouts of transformers' `Dinov2Model`.

Two layouts are read. One is the published layout, which every version of transformers
reads and which is written here. The other has the names of the modules since version 5.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models.encoders import dinov2
from scaling_ldm.models.weights import blocks, files, layout
from scaling_ldm.models.weights.transformers_keys import IGNORED
from scaling_ldm.records.errors import WeightsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Names:
    """Modules of a block that the layouts name differently.

    `gated` is one name where both halves are one tensor, else two names.
    """

    qkv: list[str]
    out: str
    gated: str | list[str]
    gated_down: str


_PUBLISHED = _Names(
    qkv=[f"attention.attention.{n}" for n in ("query", "key", "value")],
    out="attention.output.dense",
    gated="mlp.weights_in",
    gated_down="mlp.weights_out",
)
_MODULES = _Names(
    qkv=[f"attention.{n}_proj" for n in "qkv"],
    out="attention.o_proj",
    gated=["mlp.gate_proj", "mlp.up_proj"],
    gated_down="mlp.down_proj",
)
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "use_mask_token": True,
}
_TYPES = ("dinov2",)  # as config.json calls it
_IGNORED = IGNORED | {"is_decoder"}  # which it is not


def hidden_width(width: int, ratio: float, gated: bool) -> int:
    """The width of a perceptron; gated ones have two thirds, up to a multiple of 8."""
    whole = int(width * ratio)
    return (int(whole * 2 / 3) + 7) // 8 * 8 if gated else whole


def from_config(published: Mapping[str, Any], **changes: Any) -> dinov2.DinoConfig:
    """The config of a config.json, with the defaults of transformers.

    Args:
      changes: to fields of the config.

    Raises:
      WeightsError: another network, or one whose queries have no bias.
    """
    blocks.check_model_type(published, *_TYPES)
    only = {"qkv_bias": (True,)}
    c = blocks.settings(published, _DEFAULTS, only, "a DINOv2's", _IGNORED)
    for key in ("image_size", "patch_size"):
        if not isinstance(c[key], int):
            raise WeightsError(f"{key} is {c[key]!r}; wanted one number")
    gated = c["use_swiglu_ffn"]
    found = dinov2.DinoConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        hidden=hidden_width(c["hidden_size"], c["mlp_ratio"], gated),
        gated=gated,
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        channels=c["num_channels"],
        activation=c["hidden_act"],
        epsilon=c["layer_norm_eps"],
        mask_token=c["use_mask_token"],
    )
    return dataclasses.replace(found, **changes)


def pairs(config: dinov2.DinoConfig, names: _Names = _PUBLISHED) -> list[layout.Pair]:
    """Every leaf and its tensor."""
    tree = jax.eval_shape(lambda: dinov2.init(config, jax.random.key(0)))
    found = blocks.Pairs(tree)

    first, count = "embeddings", 1 + config.grid**2
    row = (1, config.width)
    patches = f"{first}.patch_embeddings.projection"
    found.patches_in("entry/patch", patches, config.patch_size)
    found.vector("entry/class_embedding", f"{first}.cls_token", theirs=(1, *row))
    found.vector(
        "entry/position_embedding",
        f"{first}.position_embeddings",
        theirs=(1, count, config.width),
    )
    if config.mask_token:
        found.vector("entry/mask_embedding", f"{first}.mask_token", theirs=row)
    table = {
        "attention_norm": "norm1",
        "mlp_norm": "norm2",
        "attention/qkv": names.qkv,
        "attention/out": names.out,
        "mlp/up": names.gated if config.gated else "mlp.fc1",
        "mlp/down": names.gated_down if config.gated else "mlp.fc2",
    }
    for layer in range(config.depth):
        block = f"encoder.layer.{layer}"
        found.block("blocks", table, block, layer)
        found.vector("blocks/attention_scale", f"{block}.layer_scale1.lambda1", layer)
        found.vector("blocks/mlp_scale", f"{block}.layer_scale2.lambda1", layer)
    found.module("exit/norm", "layernorm")
    return found.done()


def _tensors(path: str | pathlib.Path) -> dict[str, Any]:
    """The tensors without the head of a classifier and without its prefix."""

    def rename(name: str) -> str | None:
        if name.startswith("classifier."):
            return None
        return name.removeprefix("dinov2.")

    return layout.named(files.stored(path), rename, str(path))


def load(
    path: str | pathlib.Path, config: dinov2.DinoConfig, dtype: Any = np.float32
) -> dict[str, Any]:
    """Reads parameters from a checkpoint's file or directory.

    Args:
      dtype: of the parameters; None: as stored.

    Raises:
      WeightsError: the file belongs to another network, all of whose differences are
        listed, or the config.json beside it has other settings.
    """
    tensors = _tensors(path)
    new = any(f".{_MODULES.out}." in name for name in tensors)
    found = pairs(config, _MODULES if new else _PUBLISHED)
    params = layout.read(found, tensors, "this DINOv2's", dtype)
    blocks.agree(path, config, _TYPES, from_config)
    return params


def open_directory(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> tuple[dinov2.DinoConfig, dict[str, Any]]:
    """Reads config and parameters from a checkpoint's directory.

    Args:
      changes: to fields of the config, such as dtype, unroll or offset.
    """
    config = from_config(files.config(directory))
    blocks.check_pixels(directory, dinov2.MEAN, dinov2.STD)
    params = load(directory, config, dtype)
    return dataclasses.replace(config, **changes), params


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: dinov2.DinoConfig
) -> None:
    """Writes parameters so that transformers' `Dinov2Model` reads them.

    Args:
      path: a .safetensors file, which is replaced if it exists.
    """
    layout.save(layout.write(pairs(config), params), path)
