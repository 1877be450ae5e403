"""DINOv2 in the layouts of transformers' `Dinov2Model`; jax for shapes only.

Two are read: the published one, which all versions of transformers read too and which
is written, and the names that its modules have since version 5.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Names:
    """Of modules in a block; `gated` has one name where both halves are one tensor."""

    qkv: tuple[str, ...]
    out: str
    gated: tuple[str, ...]
    gated_down: str


_PUBLISHED = _Names(
    qkv=tuple(f"attention.attention.{n}" for n in ("query", "key", "value")),
    out="attention.output.dense",
    gated=("mlp.weights_in",),
    gated_down="mlp.weights_out",
)
_MODULES = _Names(
    qkv=tuple(f"attention.{n}_proj" for n in "qkv"),
    out="attention.o_proj",
    gated=("mlp.gate_proj", "mlp.up_proj"),
    gated_down="mlp.down_proj",
)
_DEFAULTS = {
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
    "model_type": "dinov2",
}


def hidden_width(width: int, ratio: float, gated: bool) -> int:
    """Of the perceptrons: gated ones have two thirds, up to a multiple of 8."""
    whole = int(width * ratio)
    return (int(whole * 2 / 3) + 7) // 8 * 8 if gated else whole


def from_config(published: Mapping[str, Any], **changes: Any) -> dinov2.DinoConfig:
    """The shape that a config.json states, defaults as in transformers.

    Raises:
      layout.WeightsError: another network, or one without biases on its queries.
    """
    c = {**_DEFAULTS, **published}
    problems = [
        f"{key} = {c[key]!r}, wanted {wanted}"
        for key, wanted in (("model_type", "dinov2"), ("qkv_bias", True))
        if c[key] != wanted
    ]
    problems += [
        f"{key} = {c[key]!r}, wanted one number"
        for key in ("image_size", "patch_size")
        if not isinstance(c[key], int)
    ]
    if problems:
        raise layout.WeightsError(f"not a known DINOv2: {'; '.join(problems)}")
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

    def norm(path: str, name: str, layer: int | None = None) -> None:
        found.vector(f"{path}/scale", f"{name}.weight", layer)
        found.vector(f"{path}/bias", f"{name}.bias", layer)

    first, count = "embeddings", 1 + config.grid**2
    row = (1, config.width)
    found.patches_in(
        "entry/patch", f"{first}.patch_embeddings.projection", config.patch_size
    )
    found.vector("entry/class_embedding", f"{first}.cls_token", theirs=(1, *row))
    found.vector(
        "entry/position_embedding",
        f"{first}.position_embeddings",
        theirs=(1, count, config.width),
    )
    if config.mask_token:
        found.vector("entry/mask_embedding", f"{first}.mask_token", theirs=row)
    for layer in range(config.depth):
        block = f"encoder.layer.{layer}."
        norm("blocks/attention_norm", f"{block}norm1", layer)
        norm("blocks/mlp_norm", f"{block}norm2", layer)
        found.vector("blocks/attention_scale", f"{block}layer_scale1.lambda1", layer)
        found.vector("blocks/mlp_scale", f"{block}layer_scale2.lambda1", layer)
        qkv = [block + name for name in names.qkv]
        found.fused("blocks/attention/qkv", qkv, layer)
        found.linear("blocks/attention/out", block + names.out, layer, inputs=2)
        up, down = ("mlp.fc1",), "mlp.fc2"
        if config.gated:
            up, down = names.gated, names.gated_down
        if len(up) == 1:
            found.linear("blocks/mlp/up", block + up[0], layer)
        else:
            found.fused("blocks/mlp/up", [block + name for name in up], layer)
        found.linear("blocks/mlp/down", block + down, layer)
    norm("exit/norm", "layernorm")
    return found.done()


def _tensors(path: str | pathlib.Path) -> dict[str, Any]:
    """Without a classifier's head; its network has a prefix."""

    def rename(name: str) -> str | None:
        if name.startswith("classifier."):
            return None
        return name.removeprefix("dinov2.")

    return layout.named(files.stored(path), rename, str(path))


def load(
    path: str | pathlib.Path, config: dinov2.DinoConfig, dtype: Any = np.float32
) -> dict[str, Any]:
    """Parameters from a checkpoint's file or directory.

    Args:
      dtype: of the parameters; None: as stored.

    Raises:
      layout.WeightsError: the file is another network's; all differences are listed.
    """
    tensors = _tensors(path)
    new = any(f".{_MODULES.out}." in name for name in tensors)
    found = pairs(config, _MODULES if new else _PUBLISHED)
    return layout.read(found, tensors, "this DINOv2's", dtype)


def open_directory(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> tuple[dinov2.DinoConfig, dict[str, Any]]:
    """The shape and parameters of a checkpoint's directory.

    Args:
      changes: to fields of the shape, such as dtype, unroll or offset.
    """
    config = from_config(files.config(directory))
    params = load(directory, config, dtype)
    return dataclasses.replace(config, **changes), params


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: dinov2.DinoConfig
) -> None:
    """Writes parameters as transformers' `Dinov2Model` reads them."""
    layout.save(layout.write(pairs(config), params), path)
