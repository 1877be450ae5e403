"""SD3 and FLUX in the layout of diffusers.

These are `SD3Transformer2DModel`, without the second attention of SD3.5-medium, and
`FluxTransformer2DModel`. denoisers/mmdit.py is the first with single_depth 0 and the
second with more. Our t is SD3's timestep / 1000, and FLUX's timestep. Our network cuts
FLUX's 2 x 2 patches of the 16-channel latents itself, where diffusers' pipeline does.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models import positions
from scaling_ldm.models.denoisers import mmdit
from scaling_ldm.models.weights import blocks, files, layout
from scaling_ldm.records.errors import WeightsError

_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
_FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
_QK_NORMS = {None: "none", "rms_norm": "rms", "layer_norm": "layer"}
FLUX_PATCH = 2
_DOUBLE_BLOCK = {
    "image_modulation": "norm1.linear",
    "text_modulation": "norm1_context.linear",
    "image_qkv": [f"attn.to_{n}" for n in "qkv"],
    "text_qkv": [f"attn.add_{n}_proj" for n in "qkv"],
    "image_out": "attn.to_out.0",
    "image_up": "ff.net.0.proj",
    "image_down": "ff.net.2",
}
_DOUBLE_TEXT = {  # which the last block of an MMDiT does not have
    "text_out": "attn.to_add_out",
    "text_up": "ff_context.net.0.proj",
    "text_down": "ff_context.net.2",
}
_DOUBLE_NORMS = {
    "image_q_norm": "attn.norm_q",
    "image_k_norm": "attn.norm_k",
    "text_q_norm": "attn.norm_added_q",
    "text_k_norm": "attn.norm_added_k",
}
_SINGLE_BLOCK = {
    "modulation": "norm.linear",
    "qkv": [f"attn.to_{n}" for n in "qkv"],
    "up": "proj_mlp",
    "out": "proj_out",
}
_SINGLE_NORMS = {"q_norm": "attn.norm_q", "k_norm": "attn.norm_k"}


def _config(c: dict[str, Any], **more: Any) -> mmdit.MMDiTConfig:
    return mmdit.MMDiTConfig(
        width=c["num_attention_heads"] * c["attention_head_dim"],
        depth=c["num_layers"],
        heads=c["num_attention_heads"],
        text_width=c["joint_attention_dim"],
        pooled_width=c["pooled_projection_dim"],
        **more,
    )


def sd3_from_config(
    published: Mapping[str, Any], text_tokens: int, side: int = 0
) -> mmdit.MMDiTConfig:
    """The config, in float32, of diffusers' config.json of an SD3.

    Args:
      text_tokens: of a caption; 77 of CLIP and 77 or 256 of T5.
      side: of the latents; 0: the published sample_size.

    Raises:
      WeightsError: a setting that denoisers/mmdit.py does not have.
    """
    only = {"qk_norm": tuple(_QK_NORMS), "dual_attention_layers": ((), [])}
    c = blocks.settings(published, _SD3, only, "an SD3's")
    config = _config(
        c,
        image_shape=(*(side or c["sample_size"],) * 2, c["in_channels"]),
        patch_size=c["patch_size"],
        text_tokens=text_tokens,
        qk_norm=_QK_NORMS[c["qk_norm"]],
        grid=positions.PositionGrid(
            columns_first=True,
            step=c["sample_size"] // c["patch_size"] / c["pos_embed_max_size"],
            table=c["pos_embed_max_size"],
        ),
        out_channels=c["out_channels"] or c["in_channels"],
    )
    if c["caption_projection_dim"] != config.width:
        raise WeightsError(
            f"caption_projection_dim {c['caption_projection_dim']} is not the width "
            f"{config.width}"
        )
    return config


def flux_from_config(
    published: Mapping[str, Any], text_tokens: int, image_size: tuple[int, int]
) -> mmdit.MMDiTConfig:
    """The config, in float32, of diffusers' config.json of a FLUX.

    Args:
      text_tokens: of a caption; FLUX.1-dev has 512.
      image_size: height and width of the latents.

    Raises:
      WeightsError: a setting that denoisers/mmdit.py does not have.
    """
    c = blocks.settings(published, _FLUX, {"patch_size": (1,)}, "a FLUX's")
    return _config(
        c,
        image_shape=(*image_size, c["in_channels"] // FLUX_PATCH**2),
        patch_size=FLUX_PATCH,
        text_tokens=text_tokens,
        single_depth=c["num_single_layers"],
        guidance=c["guidance_embeds"],
        qk_norm="rms",
        positions="rope",
        rope_axes=tuple(c["axes_dims_rope"]),
        out_channels=(c["out_channels"] or c["in_channels"]) // FLUX_PATCH**2,
    )


def to_config(config: mmdit.MMDiTConfig) -> dict[str, Any]:
    """The content of diffusers' config.json for a FLUX; without single blocks, an SD3.

    Raises:
      ValueError: a network that neither can be.
    """
    _check(config)
    common = {
        "num_layers": config.depth,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
    }
    C, out = config.image_shape[-1], config.out_shape[-1]
    if config.single_depth:
        return {
            "_class_name": "FluxTransformer2DModel",
            **_FLUX,
            **common,
            "in_channels": C * FLUX_PATCH**2,
            "out_channels": out * FLUX_PATCH**2,
            "num_single_layers": config.single_depth,
            "guidance_embeds": config.guidance,
            "axes_dims_rope": list(_axes(config)),
        }
    theirs = {ours: name for name, ours in _QK_NORMS.items()}
    grid = config.grid
    return {
        "_class_name": "SD3Transformer2DModel",
        **common,
        "sample_size": round(grid.step * grid.table) * config.patch_size,
        "patch_size": config.patch_size,
        "in_channels": C,
        "out_channels": out,
        "caption_projection_dim": config.width,
        "pos_embed_max_size": grid.table,
        "dual_attention_layers": [],
        "qk_norm": theirs[config.qk_norm],
    }


def _axes(config: mmdit.MMDiTConfig) -> tuple[int, ...]:
    return config.rope_axes or positions.rope_axes(config.width // config.heads, 3)


def _check(config: mmdit.MMDiTConfig) -> None:
    flux = config.single_depth > 0
    wanted: dict[str, Any] = {
        "mlp_ratio": 4,
        "activation": "gelu",
        "time_width": 256,
        "vocab_size": 0,
        "norm": "layer",
        "positions": "rope" if flux else "sinusoidal",
    }
    if flux:
        wanted |= {"qk_norm": "rms", "patch_size": FLUX_PATCH}
    else:
        wanted["guidance"] = False
        step, table = config.grid.step, config.grid.table or -1
        wanted["grid"] = positions.PositionGrid(
            columns_first=True, step=step, table=table
        )
    pooled = () if config.pooled_width else ("pooled_width = 0",)
    blocks.require(config, wanted, "FLUX" if flux else "SD3", *pooled)


def pairs(config: mmdit.MMDiTConfig) -> list[layout.Pair]:
    """Every leaf of an SD3 or a FLUX and its tensors.

    Raises:
      ValueError: a config that gives other numbers than the published network.
    """
    _check(config)
    found = blocks.Pairs(jax.eval_shape(lambda: mmdit.init(config, jax.random.key(0))))
    flux = config.single_depth > 0
    if flux:
        found.patches_in("entry/patch", "x_embedder", config.patch_size, flat=True)
        found.patches_out("exit/patch", "proj_out", config.patch_size)
    else:
        found.patches_in("entry/patch", "pos_embed.proj", config.patch_size)
        found.module("exit/patch", "proj_out")
    embedders = {"time": "timestep_embedder"}
    if config.guidance:
        embedders["guidance"] = "guidance_embedder"
    for ours, name in embedders.items():
        found.module(f"entry/{ours}/up", f"time_text_embed.{name}.linear_1")
        found.module(f"entry/{ours}/out", f"time_text_embed.{name}.linear_2")
    found.module("entry/pooled_up", "time_text_embed.text_embedder.linear_1")
    found.module("entry/pooled_out", "time_text_embed.text_embedder.linear_2")
    found.module("entry/text", "context_embedder")
    found.module("exit/modulation", "norm_out.linear")
    qk_norms = config.qk_norm != "none"
    double = _DOUBLE_BLOCK | (_DOUBLE_NORMS if qk_norms else {})
    single = _SINGLE_BLOCK | (_SINGLE_NORMS if qk_norms else {})
    stacked = config.depth if flux else config.depth - 1
    for i in range(stacked):
        found.block("blocks", double | _DOUBLE_TEXT, f"transformer_blocks.{i}", i)
    if not flux:
        found.block("last", double, f"transformer_blocks.{stacked}", None)
    for i in range(config.single_depth):
        found.block("single_blocks", single, f"single_transformer_blocks.{i}", i)
    return found.done()


def fixed(config: mmdit.MMDiTConfig) -> list[layout.FixedTensor]:
    """SD3's whole table of positions, whose middle our network computes."""
    if config.single_depth:
        return []
    side = config.grid.table
    whole = positions.grid_positions(config.grid, side, side, config.width)
    return [layout.FixedTensor("pos_embed.pos_embed", np.asarray(whole)[None])]


def load(path: str | pathlib.Path, config: mmdit.MMDiTConfig) -> dict[str, Any]:
    """Reads parameters from safetensors that diffusers wrote: a file or an index.

    Raises:
      WeightsError: the file belongs to another network, all of whose differences are
        listed, or the config.json beside it has other settings.
    """
    tensors = files.stored(path)
    params = layout.read(
        pairs(config), tensors, "this MMDiT's", np.float32, fixed(config)
    )
    H, W, _ = config.image_shape
    if config.single_depth:
        blocks.agree(
            path,
            dataclasses.replace(config, rope_axes=_axes(config)),
            ("FluxTransformer2DModel",),
            lambda c: flux_from_config(c, config.text_tokens, (H, W)),
        )
    else:
        blocks.agree(
            path,
            config,
            ("SD3Transformer2DModel",),
            lambda c: sd3_from_config(c, config.text_tokens),
        )
    return params


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: mmdit.MMDiTConfig
) -> None:
    """Writes parameters so that diffusers reads them.

    Args:
      path: a .safetensors file, which is replaced if it exists.
    """
    layout.save(layout.write(pairs(config), params, fixed(config)), path)
