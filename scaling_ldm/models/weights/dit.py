"""DiT (Peebles and Xie 2022) in two layouts: that of its authors and diffusers'.

"official" has the names of facebookresearch/DiT, in its .pt files (which torch_file
reads) or in safetensors. "diffusers" is `DiTTransformer2DModel`. There each block holds
a copy of the embeddings of time and label. The copies must be equal, as in the official
weights, and they are written to each block again.

Both layouts have the same parameters and compute the same but for two numbers:
diffusers spaces the sinusoids of time wider (`time_ends` 1), and its config may ask for
another epsilon before the perceptron. The config says which numbers are wanted. Our t
is their timestep / 1000.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models import positions
from scaling_ldm.models.denoisers import dit
from scaling_ldm.models.weights import blocks, layout, torch_file

LAYOUTS = ("official", "diffusers")
# In config.json. The first is what older versions of diffusers wrote.
NAMES = ("Transformer2DModel", "DiTTransformer2DModel")
GRID = positions.PositionGrid(columns_first=True)

_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,  # of a norm that this network does not have
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
_OLDER = {"attention_type": "default"}  # of diffusers' class before this one
_OFFICIAL_BLOCK = {
    "modulation": "adaLN_modulation.1",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "mlp_up": "mlp.fc1",
    "mlp_down": "mlp.fc2",
}
_DIFFUSERS_BLOCK = {
    "modulation": "norm1.linear",
    "attention/qkv": [f"attn1.to_{name}" for name in "qkv"],
    "attention/out": "attn1.to_out.0",
    "mlp_up": "ff.net.0.proj",
    "mlp_down": "ff.net.2",
}
_ONLY = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "attention_type": ("default",),
}


def from_config(published: Mapping[str, Any]) -> dit.DiTConfig:
    """The config, in float32, of diffusers' config.json of a `DiTTransformer2DModel`.

    Raises:
      WeightsError: a setting that denoisers/dit.py does not have.
    """
    c = blocks.settings(published, _DEFAULTS | _OLDER, _ONLY, "a DiT's")
    side, channels = c["sample_size"], c["in_channels"]
    return dit.DiTConfig(
        architecture="adaln_zero",
        width=c["num_attention_heads"] * c["attention_head_dim"],
        depth=c["num_layers"],
        heads=c["num_attention_heads"],
        image_shape=(side, side, channels),
        patch_size=c["patch_size"],
        classes=c["num_embeds_ada_norm"],
        grid=GRID,
        out_channels=c["out_channels"] or channels,
        mlp_epsilon=c["norm_eps"],
        time_ends=1,
    )


def to_config(config: dit.DiTConfig) -> dict[str, Any]:
    """The content of diffusers' config.json for a network.

    Raises:
      ValueError: a network that diffusers' DiT cannot be.
    """
    _check(config, "diffusers")
    H, W, C = config.image_shape
    if H != W:
        raise ValueError(f"diffusers' DiT is square, this one {H} x {W}")
    return {
        "_class_name": "DiTTransformer2DModel",
        **_DEFAULTS,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": C,
        "out_channels": config.out_shape[-1],
        "num_layers": config.depth,
        "sample_size": H,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.classes,
        "norm_eps": config.mlp_epsilon,
    }


def _check(config: dit.DiTConfig, kind: str) -> None:
    if kind not in LAYOUTS:
        raise ValueError(f"layout {kind!r}; known: {', '.join(LAYOUTS)}")
    wanted: dict[str, Any] = {
        "architecture": "adaln_zero",
        "norm": "layer",
        "qk_norm": "none",
        "positions": "sinusoidal",
        "grid": GRID,
        "mlp_ratio": 4,
        "activation": "gelu",
        "time_width": 256,
        "time_ends": 1 if kind == "diffusers" else 0,
    }
    if kind == "official":
        wanted["mlp_epsilon"] = 1e-6
    blocks.require(config, wanted, f"{kind} DiT")


def pairs(config: dit.DiTConfig, kind: str) -> list[layout.Pair]:
    """Every leaf of a DiT and its tensors.

    Args:
      kind: one of LAYOUTS.

    Raises:
      ValueError: a config that gives other numbers than the network of that layout.
    """
    _check(config, kind)
    tree = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    found = blocks.Pairs(tree)
    return _official(found, config) if kind == "official" else _diffusers(found, config)


def _official(found: blocks.Pairs, config: dit.DiTConfig) -> list[layout.Pair]:
    found.patches_in("entry/patch", "x_embedder.proj", config.patch_size)
    found.module("entry/time/up", "t_embedder.mlp.0")
    found.module("entry/time/out", "t_embedder.mlp.2")
    found.table("entry/label_embedding", "y_embedder.embedding_table.weight")
    for i in range(config.depth):
        found.block("blocks", _OFFICIAL_BLOCK, f"blocks.{i}", i)
    found.module("exit/modulation", "final_layer.adaLN_modulation.1")
    found.module("exit/patch", "final_layer.linear")
    return found.done()


def _diffusers(found: blocks.Pairs, config: dit.DiTConfig) -> list[layout.Pair]:
    found.patches_in("entry/patch", "pos_embed.proj", config.patch_size)
    for i in range(config.depth):
        block = f"transformer_blocks.{i}"
        embedder = f"{block}.norm1.emb"
        found.module("entry/time/up", f"{embedder}.timestep_embedder.linear_1")
        found.module("entry/time/out", f"{embedder}.timestep_embedder.linear_2")
        labels = f"{embedder}.class_embedder.embedding_table.weight"
        found.table("entry/label_embedding", labels)
        found.block("blocks", _DIFFUSERS_BLOCK, block, i)
    found.module("exit/modulation", "proj_out_1")
    found.module("exit/patch", "proj_out_2")
    return found.done()


def fixed(config: dit.DiTConfig, kind: str) -> list[layout.FixedTensor]:
    """The table of positions that the official layout stores; diffusers has none."""
    if kind == "diffusers":
        return []
    table = positions.grid_positions(GRID, *config.patches, config.width)
    return [layout.FixedTensor("pos_embed", np.asarray(table)[None])]


def load(path: str | pathlib.Path, config: dit.DiTConfig, kind: str) -> dict[str, Any]:
    """Reads parameters from safetensors or from an official .pt file.

    Args:
      path: a file, or a directory as `files.stored` takes it.
      kind: one of LAYOUTS.

    Raises:
      WeightsError: the file belongs to another network, holds more than weights, or
        the config.json of diffusers beside it has other settings.
    """
    tensors = torch_file.tensors(path)
    params = layout.read(
        pairs(config, kind), tensors, "this DiT's", np.float32, fixed(config, kind)
    )
    if kind == "diffusers":
        blocks.agree(path, config, NAMES, from_config)
    return params


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: dit.DiTConfig, kind: str
) -> None:
    """Writes parameters as safetensors, with the names of a layout.

    Args:
      path: a .safetensors file, which is replaced if it exists.
      kind: one of LAYOUTS.

    Raises:
      ValueError: as `pairs`.
    """
    layout.save(layout.write(pairs(config, kind), params, fixed(config, kind)), path)
