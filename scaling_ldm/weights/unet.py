"""Stable Diffusion's U-Net (1.x, 2.x) in the layout of diffusers; jax for shapes only.

diffusers' `UNet2DConditionModel` with four resolutions, two blocks each, transformers
in the first three: what denoisers/unet.py is at any width. Stable Diffusion 1 writes
the projections around a transformer as 1 x 1 convolutions, 2 as matrices.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax
import numpy as np

from scaling_ldm.denoisers import unet
from scaling_ldm.weights import layout

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
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _stage(name: str, last: int) -> str:
    """Ours: down0_1, middle, up3_2; theirs counts the way up from the middle."""
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
    first, *rest, leaf = path
    if first == "time":
        theirs = ["time_embedding", {"up": "linear_1", "out": "linear_2"}[rest[0]]]
    else:
        theirs = [_stage(first, last)]
        if "_residual" in first:
            theirs.append(_RESIDUAL[rest[0]])
        elif "_transformer" in first:
            theirs.append(_TRANSFORMER[rest[0]])
            theirs += [_PROJECTIONS[part] for part in rest[1:]]
    return ".".join([*theirs, _LEAVES[leaf]])


def pairs(shape: unet.Shape, linear_projection: bool = True) -> list[layout.Pair]:
    """Every leaf of a U-Net and its tensor.

    Args:
      linear_projection: True for Stable Diffusion 2, False for 1.
    """
    if shape.vocab_size:
        raise ValueError("published U-Nets read text features: vocab_size must be 0")
    tree = jax.eval_shape(lambda: unet.init(shape, jax.random.key(0)))
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = tuple(key.key for key in keys)
        name = _name(path, len(shape.multiples) - 1)
        if path[-1] != "kernel":
            found.append(layout.vector(path, name, leaf.shape))
        elif leaf.ndim == 4:
            found.append(layout.convolution(path, name, leaf.shape))
        else:
            around = path[-2] in ("enter", "leave") and not linear_projection
            found.append(
                layout.dense(
                    path,
                    name,
                    leaf.shape,
                    inputs=2 if path[-2] == "out" and leaf.ndim == 3 else 1,
                    as_convolution=path[-2] == "shortcut" or around,
                )
            )
    return found


def load(
    path: str | pathlib.Path, shape: unet.Shape, linear_projection: bool = True
) -> dict[str, Any]:
    """Parameters from a diffusers safetensors file.

    Raises:
      layout.WeightsError: the file is another network's; all differences are listed.
    """
    tensors = layout.load(path)
    return layout.read(
        pairs(shape, linear_projection), tensors, "this U-Net's", np.float32
    )


def save(
    params: dict[str, Any],
    path: str | pathlib.Path,
    shape: unet.Shape,
    linear_projection: bool = True,
) -> None:
    """Writes parameters as diffusers reads them."""
    layout.save(layout.write(pairs(shape, linear_projection), params), path)
