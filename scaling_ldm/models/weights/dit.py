"""DiT (Peebles and Xie 2022) in two layouts: its authors' and diffusers'.

"official": facebookresearch/DiT's names, as in its .pt files (weights/torch_file.py
reads those) or in safetensors. "diffusers": `DiTTransformer2DModel`, whose blocks each
hold a copy of the embeddings of time and label; they must be equal, as in the official
weights, and are copied on the way out.

Both compute the same but for two numbers: diffusers spaces the sinusoids of time wider
(`time_ends` 1) and its config may ask for another epsilon before the perceptron. The
parameters are the same; which numbers are wanted is the shape's to say. Ours take
t = their timestep / 1000.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm.models import positions
from scaling_ldm.models.denoisers import dit
from scaling_ldm.models.weights import blocks, layout, torch_file

LAYOUTS = ("official", "diffusers")
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
_ONLY = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
}


def from_config(published: Mapping[str, Any]) -> dit.DiTConfig:
    """The float32 shape of a diffusers `DiTTransformer2DModel` config.

    Raises:
      layout.WeightsError: a setting that denoisers/dit.py has not.
    """
    c = blocks.settings(published, _DEFAULTS, _ONLY, "a DiT's")
    side, channels = c["sample_size"], c["in_channels"]
    return dit.DiTConfig(
        architecture="adaln_zero",
        width=c["num_attention_heads"] * c["attention_head_dim"],
        depth=c["num_layers"],
        heads=c["num_attention_heads"],
        image_shape=(side, side, channels),
        patch_size=c["patch_size"],
        mlp_ratio=4,
        activation="gelu",
        text_tokens=0,
        text_width=0,
        time_width=256,
        vocab_size=0,
        classes=c["num_embeds_ada_norm"],
        dtype=jnp.float32,
        remat=False,
        unroll=False,
        grid=GRID,
        out_channels=c["out_channels"] or channels,
        mlp_epsilon=c["norm_eps"],
        time_ends=1,
    )


def to_config(config: dit.DiTConfig) -> dict[str, Any]:
    """The diffusers config of a shape.

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
    wanted = {
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
    have = {name: getattr(config, name) for name in wanted}
    wrong = [f"{k} = {have[k]!r}, not {v!r}" for k, v in wanted.items() if have[k] != v]
    if wrong:
        raise ValueError(f"{kind} DiT computes otherwise: {'; '.join(wrong)}")


def pairs(config: dit.DiTConfig, kind: str) -> list[layout.Pair]:
    """Every leaf of a DiT and its tensors.

    Args:
      kind: one of LAYOUTS.

    Raises:
      ValueError: a shape that gives other numbers than that layout's network.
    """
    _check(config, kind)
    tree = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    found = blocks.Pairs(tree)
    return _official(found, config) if kind == "official" else _diffusers(found, config)


def _official(found: blocks.Pairs, config: dit.DiTConfig) -> list[layout.Pair]:
    found.patches_in("entry/patch", "x_embedder.proj", config.patch_size)
    found.linear("entry/time/up", "t_embedder.mlp.0")
    found.linear("entry/time/out", "t_embedder.mlp.2")
    found.table("entry/label_embedding", "y_embedder.embedding_table.weight")
    for i in range(config.depth):
        block = f"blocks.{i}"
        found.linear("blocks/modulation", f"{block}.adaLN_modulation.1", i)
        found.linear("blocks/attention/qkv", f"{block}.attn.qkv", i)
        found.linear("blocks/attention/out", f"{block}.attn.proj", i, inputs=2)
        found.linear("blocks/mlp_up", f"{block}.mlp.fc1", i)
        found.linear("blocks/mlp_down", f"{block}.mlp.fc2", i)
    found.linear("exit/modulation", "final_layer.adaLN_modulation.1")
    found.linear("exit/patch", "final_layer.linear")
    return found.done()


def _diffusers(found: blocks.Pairs, config: dit.DiTConfig) -> list[layout.Pair]:
    found.patches_in("entry/patch", "pos_embed.proj", config.patch_size)
    for i in range(config.depth):
        block = f"transformer_blocks.{i}"
        found.linear("entry/time/up", f"{block}.norm1.emb.timestep_embedder.linear_1")
        found.linear("entry/time/out", f"{block}.norm1.emb.timestep_embedder.linear_2")
        found.table(
            "entry/label_embedding",
            f"{block}.norm1.emb.class_embedder.embedding_table.weight",
        )
        found.linear("blocks/modulation", f"{block}.norm1.linear", i)
        attention = f"{block}.attn1"
        found.fused(
            "blocks/attention/qkv", [f"{attention}.to_{name}" for name in "qkv"], i
        )
        found.linear("blocks/attention/out", f"{attention}.to_out.0", i, inputs=2)
        found.linear("blocks/mlp_up", f"{block}.ff.net.0.proj", i)
        found.linear("blocks/mlp_down", f"{block}.ff.net.2", i)
    found.linear("exit/modulation", "proj_out_1")
    found.linear("exit/patch", "proj_out_2")
    return found.done()


def fixed(config: dit.DiTConfig, kind: str) -> list[layout.FixedTensor]:
    """The official layout's table of positions; diffusers stores none."""
    if kind == "diffusers":
        return []
    table = positions.grid_positions(GRID, *config.patches, config.width)
    return [layout.FixedTensor("pos_embed", np.asarray(table)[None])]


def load(path: str | pathlib.Path, config: dit.DiTConfig, kind: str) -> dict[str, Any]:
    """Parameters from a safetensors file or an official .pt file.

    Raises:
      layout.WeightsError: the file is another network's, or holds more than weights.
    """
    path = pathlib.Path(path)
    if path.suffix in (".pt", ".pth"):
        tensors = torch_file.load(path)
    else:
        tensors = layout.load(path)
    return layout.read(
        pairs(config, kind), tensors, "this DiT's", np.float32, fixed(config, kind)
    )


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: dit.DiTConfig, kind: str
) -> None:
    """Writes parameters as safetensors with the names of a layout."""
    layout.save(layout.write(pairs(config, kind), params, fixed(config, kind)), path)
