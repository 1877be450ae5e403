"""Stable Diffusion's U-Net (1.x, 2.x) in the layout of diffusers.

This is diffusers' `UNet2DConditionModel` with four resolutions, two blocks each, and
transformers in the first three. denoisers/unet.py is the same at any width. Stable
Diffusion 1 stores the projections around a transformer as 1 x 1 convolutions, 2 stores
them as matrices.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models.denoisers import unet
from scaling_ldm.models.weights import blocks, files, layout
from scaling_ldm.records.errors import WeightsError

NAMES = ("UNet2DConditionModel",)  # in config.json
_RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
_BLOCK = "transformer_blocks.0"
_TRANSFORMER = {
    "norm": "norm",
    "enter": "proj_in",
    "norm1": f"{_BLOCK}.norm1",
    "self_attention": f"{_BLOCK}.attn1",
    "norm2": f"{_BLOCK}.norm2",
    "cross_attention": f"{_BLOCK}.attn2",
    "norm3": f"{_BLOCK}.norm3",
    "up": f"{_BLOCK}.ff.net.0.proj",
    "down": f"{_BLOCK}.ff.net.2",
    "leave": "proj_out",
}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def _stage(name: str, last: int) -> str:
    """Ours are down0_1, middle, up3_2; theirs count the way up from the middle."""
    if found := re.fullmatch(r"down(\d)_(\d)_(residual|transformer)", name):
        level, block, kind = found.groups()
        return f"down_blocks.{level}.{_list(kind)}.{block}"
    if found := re.fullmatch(r"up(\d)_(\d)_(residual|transformer)", name):
        level, block, kind = found.groups()
        return f"up_blocks.{last - int(level)}.{_list(kind)}.{block}"
    if found := re.fullmatch(r"middle_(residual|transformer)(\d?)", name):
        return f"mid_block.{_list(found[1])}.{found[2] or 0}"
    if found := re.fullmatch(r"down(\d)_halve", name):
        return f"down_blocks.{found[1]}.downsamplers.0.conv"
    if found := re.fullmatch(r"up(\d)_double", name):
        return f"up_blocks.{last - int(found[1])}.upsamplers.0.conv"
    return {"enter": "conv_in", "exit_norm": "conv_norm_out", "exit": "conv_out"}[name]


def _list(kind: str) -> str:
    return {"residual": "resnets", "transformer": "attentions"}[kind]


def _name(path: layout.Path, last: int) -> str:
    first, *rest = path
    if first == "time":
        theirs = ["time_embedding", {"up": "linear_1", "out": "linear_2"}[rest[0]]]
    else:
        theirs = [_stage(first, last)]
        if "_residual" in first:
            theirs.append(_RESIDUAL[rest[0]])
        elif "_transformer" in first:
            theirs.append(_TRANSFORMER[rest[0]])
            theirs += [_PROJECTIONS[part] for part in rest[1:]]
    return ".".join(theirs)


def pairs(config: unet.UNetConfig, linear_projection: bool = True) -> list[layout.Pair]:
    """Every leaf of a U-Net and its tensor.

    Args:
      linear_projection: true for Stable Diffusion 2, false for 1.

    Raises:
      ValueError: a U-Net with a vocabulary of its own, which no published one has.
    """
    if config.vocab_size:
        raise ValueError("published U-Nets read text features: vocab_size must be 0")
    tree = jax.eval_shape(lambda: unet.init(config, jax.random.key(0)))
    around = () if linear_projection else ("enter", "leave")
    return layout.leaves(
        tree,
        lambda path: _name(path, len(config.multiples) - 1),
        lambda path: path[-1] in ("shortcut", *around),
    )


# The defaults of diffusers for keys that a configuration lacks.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,  # diffusers calls the number of heads so
    "num_attention_heads": None,  # and refuses this one
    "use_linear_projection": False,
    "down_block_types": None,
    "up_block_types": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "transformer_layers_per_block": 1,
    "dropout": 0.0,
    "addition_embed_type_num_heads": 64,  # of an embedding that is not there
    # How training code once ran the network.
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "upcast_attention": False,
}


_AS_THERE = (  # our network has no other value
    "mid_block_type",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "center_input_sample",
    "flip_sin_to_cos",
    "freq_shift",
    "downsample_padding",
    "mid_block_scale_factor",
    "resnet_time_scale_shift",
    "resnet_out_scale_factor",
    "time_embedding_type",
    "conv_in_kernel",
    "conv_out_kernel",
    "attention_type",
    "num_attention_heads",
    "transformer_layers_per_block",
    "dual_cross_attention",
    "only_cross_attention",
)


def _blocks(levels: int) -> dict[str, list[str]]:
    """Transformers everywhere but at the lowest resolution."""
    return {
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
    }


def to_config(
    config: unet.UNetConfig, linear_projection: bool = True
) -> dict[str, Any]:
    """The content of diffusers' config.json for a network."""
    H, W, C = config.image_shape
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": H if H == W else [H, W],
        "in_channels": C + config.extra_channels,
        "out_channels": C,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "cross_attention_dim": config.text_width,
        "attention_head_dim": config.heads
        if isinstance(config.heads, int)
        else list(config.heads),
        "use_linear_projection": linear_projection,
        **_blocks(len(config.multiples)),
    }


def from_config(
    published: Mapping[str, Any], text_tokens: int = 77
) -> tuple[unet.UNetConfig, bool]:
    """The config, in float32, of diffusers' config.json, and `linear_projection`.

    Args:
      text_tokens: of a caption, which config.json does not say.

    Returns:
      The config, and `linear_projection` of the other functions here.

    Raises:
      WeightsError: another kind of network; every reason is listed.
    """
    published = {
        k: list(v) if isinstance(v, tuple) else v for k, v in published.items()
    }
    given = published.get("block_out_channels", _DEFAULTS["block_out_channels"])
    types = _blocks(len(given))
    only = {key: (_DEFAULTS[key],) for key in _AS_THERE}
    only |= {key: (value, None) for key, value in types.items()}
    c = blocks.settings(published, _DEFAULTS, only, "a U-Net's that can be built here")
    heads = c["attention_head_dim"]
    each = [heads] * len(given) if isinstance(heads, int) else heads
    base, rest = given[0], [width % given[0] for width in given]
    if len(each) != len(given) or any(rest):
        raise WeightsError(
            f"heads {heads} and widths {given}: one number of heads or one for each "
            "width, and widths that are multiples of the first, can be built here"
        )
    side = c["sample_size"] or 64
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    config = unet.UNetConfig(
        base=base,
        heads=unet.one_or_each(each),
        image_shape=(height, width, c["out_channels"]),
        extra_channels=c["in_channels"] - c["out_channels"],
        text_tokens=text_tokens,
        text_width=c["cross_attention_dim"],
        multiples=tuple(width // base for width in given),
        blocks=c["layers_per_block"],
    )
    return config, c["use_linear_projection"]


def load(
    path: str | pathlib.Path, config: unet.UNetConfig, linear_projection: bool = True
) -> dict[str, Any]:
    """Reads parameters from safetensors that diffusers wrote.

    Args:
      path: a file, or a directory as `files.stored` takes it.
      linear_projection: as for `pairs`.

    Raises:
      WeightsError: the file belongs to another network, all of whose differences are
        listed, or the config.json beside it has other settings, such as heads.
    """
    tensors = files.stored(path)
    params = layout.read(
        pairs(config, linear_projection), tensors, "this U-Net's", np.float32
    )
    blocks.agree(path, config, NAMES, lambda published: from_config(published)[0])
    return params


def save(
    params: dict[str, Any],
    path: str | pathlib.Path,
    config: unet.UNetConfig,
    linear_projection: bool = True,
) -> None:
    """Writes parameters so that diffusers reads them.

    Args:
      path: a .safetensors file, which is replaced if it exists.
      linear_projection: as for `pairs`.
    """
    layout.save(layout.write(pairs(config, linear_projection), params), path)
