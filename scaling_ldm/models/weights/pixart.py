"""PixArt-alpha (Chen et al. 2023, arXiv 2310.00426) in the layout of diffusers.

This is diffusers' `PixArtTransformer2DModel` without the extra conditions (resolution
and aspect ratio) of the 1024-pixel weights. denoisers/dit.py computes the same with
"cross_attention". Our t is their timestep / 1000.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models import positions
from scaling_ldm.models.denoisers import dit
from scaling_ldm.models.weights import blocks, files, layout
from scaling_ldm.records.errors import WeightsError

# In config.json. The first is what older versions of diffusers wrote.
NAMES = ("Transformer2DModel", "PixArtTransformer2DModel")
_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,  # of a norm that this network does not have
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,  # a table that this network does not have
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
    "attention_type": "default",
}
_BLOCK = {
    "attention/qkv": [f"attn1.to_{name}" for name in "qkv"],
    "attention/out": "attn1.to_out.0",
    "cross_attention/q": "attn2.to_q",
    "cross_attention/kv": [f"attn2.to_{name}" for name in "kv"],
    "cross_attention/out": "attn2.to_out.0",
    "mlp_up": "ff.net.0.proj",
    "mlp_down": "ff.net.2",
}
_ONLY = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_single",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "attention_type": ("default",),
}


def from_config(published: Mapping[str, Any], text_tokens: int) -> dit.DiTConfig:
    """The config, in float32, of diffusers' config.json.

    Args:
      text_tokens: of a caption; PixArt-alpha has 120.

    Raises:
      WeightsError: a setting that denoisers/dit.py does not have.
    """
    c = blocks.settings(published, _DEFAULTS, _ONLY, "a PixArt-alpha's")
    width = c["num_attention_heads"] * c["attention_head_dim"]
    side = c["sample_size"]
    extra = c["use_additional_conditions"]
    problems = []
    if side == 128 if extra is None else extra:
        problems.append("resolution and aspect ratio as conditions (1024 pixels)")
    if not c["caption_channels"]:
        problems.append("no projection of captions (caption_channels)")
    if c["cross_attention_dim"] != width:
        problems.append(f"cross_attention_dim other than the width {width}")
    if problems:
        raise WeightsError(f"not supported: {'; '.join(problems)}")
    return dit.DiTConfig(
        architecture="cross_attention",
        width=width,
        depth=c["num_layers"],
        heads=c["num_attention_heads"],
        image_shape=(side, side, c["in_channels"]),
        patch_size=c["patch_size"],
        text_tokens=text_tokens,
        text_width=c["caption_channels"],
        grid=positions.PositionGrid(
            columns_first=True,
            step=1 / (c["interpolation_scale"] or max(side // 64, 1)),
        ),
        out_channels=c["out_channels"] or c["in_channels"],
    )


def to_config(config: dit.DiTConfig) -> dict[str, Any]:
    """The content of diffusers' config.json for a network.

    Raises:
      ValueError: a network that diffusers' PixArt cannot be.
    """
    _check(config)
    H, W, C = config.image_shape
    if H != W:
        raise ValueError(f"diffusers' PixArt is square, this one {H} x {W}")
    scale = 1 / config.grid.step
    return {
        "_class_name": "PixArtTransformer2DModel",
        **_DEFAULTS,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": C,
        "out_channels": config.out_shape[-1],
        "num_layers": config.depth,
        "cross_attention_dim": config.width,
        "sample_size": H,
        "patch_size": config.patch_size,
        "interpolation_scale": int(scale) if scale == int(scale) else scale,
        "use_additional_conditions": False,
        "caption_channels": config.text_width,
    }


def _check(config: dit.DiTConfig) -> None:
    wanted = {
        "architecture": "cross_attention",
        "norm": "layer",
        "qk_norm": "none",
        "positions": "sinusoidal",
        "grid": positions.PositionGrid(columns_first=True, step=config.grid.step),
        "mlp_ratio": 4,
        "activation": "gelu",
        "time_width": 256,
        "time_ends": 0,
        "mlp_epsilon": 1e-6,
        "vocab_size": 0,
    }
    blocks.require(config, wanted, "PixArt-alpha")


def pairs(config: dit.DiTConfig) -> list[layout.Pair]:
    """Every leaf of a PixArt-alpha and its tensors.

    Raises:
      ValueError: a config that gives other numbers than the published network.
    """
    _check(config)
    found = blocks.Pairs(jax.eval_shape(lambda: dit.init(config, jax.random.key(0))))
    found.patches_in("entry/patch", "pos_embed.proj", config.patch_size)
    found.module("entry/time/up", "adaln_single.emb.timestep_embedder.linear_1")
    found.module("entry/time/out", "adaln_single.emb.timestep_embedder.linear_2")
    found.module("entry/modulation", "adaln_single.linear")
    found.module("entry/text_up", "caption_projection.linear_1")
    found.module("entry/text_out", "caption_projection.linear_2")
    for i in range(config.depth):
        block = f"transformer_blocks.{i}"
        found.vector(
            "blocks/modulation_table",
            f"{block}.scale_shift_table",
            i,
            theirs=(6, config.width),
        )
        found.block("blocks", _BLOCK, block, i)
    found.vector("exit/modulation_table", "scale_shift_table", theirs=(2, config.width))
    found.module("exit/patch", "proj_out")
    return found.done()


def load(path: str | pathlib.Path, config: dit.DiTConfig) -> dict[str, Any]:
    """Reads parameters from safetensors that diffusers wrote.

    Raises:
      WeightsError: the file belongs to another network, all of whose differences are
        listed, or the config.json beside it has other settings.
    """
    params = layout.read(
        pairs(config), files.stored(path), "this PixArt-alpha's", np.float32
    )
    blocks.agree(path, config, NAMES, lambda c: from_config(c, config.text_tokens))
    return params


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: dit.DiTConfig
) -> None:
    """Writes parameters so that diffusers reads them.

    Args:
      path: a .safetensors file, which is replaced if it exists.
    """
    layout.save(layout.write(pairs(config), params), path)
