"""SD3 and FLUX in the layout of diffusers; jax for shapes only.

`SD3Transformer2DModel` (without SD3.5-medium's second attention) and
`FluxTransformer2DModel`, which denoisers/mmdit.py is with single_depth 0 and more.
Ours take t = SD3's timestep / 1000 = FLUX's timestep, and cut FLUX's 2 x 2 patches of
the 16-channel latents themselves, where diffusers' pipeline packs them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm.models import positions
from scaling_ldm.models.denoisers import mmdit
from scaling_ldm.models.weights import blocks, layout

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


def _config(c: dict[str, Any], **more: Any) -> mmdit.MMDiTConfig:
    return mmdit.MMDiTConfig(
        width=c["num_attention_heads"] * c["attention_head_dim"],
        depth=c["num_layers"],
        heads=c["num_attention_heads"],
        mlp_ratio=4,
        activation="gelu",
        text_width=c["joint_attention_dim"],
        pooled_width=c["pooled_projection_dim"],
        time_width=256,
        vocab_size=0,
        dtype=jnp.float32,
        remat=False,
        unroll=False,
        **more,
    )


def sd3_from_config(
    published: Mapping[str, Any], text_tokens: int, side: int = 0
) -> mmdit.MMDiTConfig:
    """The float32 shape of an SD3 config.

    Args:
      text_tokens: of a caption; 77 of CLIP and 77 or 256 of T5.
      side: of the latents; 0: the config's sample_size.

    Raises:
      layout.WeightsError: a setting that denoisers/mmdit.py has not.
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
        raise layout.WeightsError(
            f"caption_projection_dim {c['caption_projection_dim']} is not the width "
            f"{config.width}"
        )
    return config


def flux_from_config(
    published: Mapping[str, Any], text_tokens: int, image_size: tuple[int, int]
) -> mmdit.MMDiTConfig:
    """The float32 shape of a FLUX config, at latents of this height and width.

    Args:
      text_tokens: of a caption; FLUX.1-dev's are 512.

    Raises:
      layout.WeightsError: a setting that denoisers/mmdit.py has not.
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
    """The diffusers config of a shape: FLUX's with single-stream blocks, else SD3's.

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
    have = {name: getattr(config, name) for name in wanted}
    wrong = [f"{k} = {have[k]!r}, not {v!r}" for k, v in wanted.items() if have[k] != v]
    if not config.pooled_width:
        wrong.append("pooled_width = 0")
    if wrong:
        name = "FLUX" if flux else "SD3"
        raise ValueError(f"{name} computes otherwise: {'; '.join(wrong)}")


def pairs(config: mmdit.MMDiTConfig) -> list[layout.Pair]:
    """Every leaf of an SD3 or a FLUX and its tensors.

    Raises:
      ValueError: a shape that gives other numbers than the published network.
    """
    _check(config)
    found = blocks.Pairs(jax.eval_shape(lambda: mmdit.init(config, jax.random.key(0))))
    flux = config.single_depth > 0
    if flux:
        found.patches_in("entry/patch", "x_embedder", config.patch_size, flat=True)
        found.patches_out("exit/patch", "proj_out", config.patch_size)
    else:
        found.patches_in("entry/patch", "pos_embed.proj", config.patch_size)
        found.linear("exit/patch", "proj_out")
    embedders = {"time": "timestep_embedder"}
    if config.guidance:
        embedders["guidance"] = "guidance_embedder"
    for ours, name in embedders.items():
        found.linear(f"entry/{ours}/up", f"time_text_embed.{name}.linear_1")
        found.linear(f"entry/{ours}/out", f"time_text_embed.{name}.linear_2")
    found.linear("entry/pooled_up", "time_text_embed.text_embedder.linear_1")
    found.linear("entry/pooled_out", "time_text_embed.text_embedder.linear_2")
    found.linear("entry/text", "context_embedder")
    found.linear("exit/modulation", "norm_out.linear")
    for i in range(config.depth):
        if i == config.depth - 1 and not flux:
            _double(found, config, "last", i, None)
        else:
            _double(found, config, "blocks", i, i)
    for i in range(config.single_depth):
        _single(found, config, i)
    return found.done()


def _norms(
    found: blocks.Pairs,
    config: mmdit.MMDiTConfig,
    names: Mapping[str, str],
    layer: int | None,
) -> None:
    """Scales, and biases of a LayerNorm, of queries and keys."""
    for ours, name in names.items() if config.qk_norm != "none" else ():
        found.vector(f"{ours}/scale", f"{name}.weight", layer)
        if config.qk_norm == "layer":
            found.vector(f"{ours}/bias", f"{name}.bias", layer)


def _double(
    found: blocks.Pairs, config: mmdit.MMDiTConfig, ours: str, i: int, layer: int | None
) -> None:
    block = f"transformer_blocks.{i}"
    attention = f"{block}.attn"
    found.linear(f"{ours}/image_modulation", f"{block}.norm1.linear", layer)
    found.linear(f"{ours}/text_modulation", f"{block}.norm1_context.linear", layer)
    found.fused(f"{ours}/image_qkv", [f"{attention}.to_{n}" for n in "qkv"], layer)
    found.fused(f"{ours}/text_qkv", [f"{attention}.add_{n}_proj" for n in "qkv"], layer)
    names = {
        f"{ours}/image_q_norm": f"{attention}.norm_q",
        f"{ours}/image_k_norm": f"{attention}.norm_k",
        f"{ours}/text_q_norm": f"{attention}.norm_added_q",
        f"{ours}/text_k_norm": f"{attention}.norm_added_k",
    }
    _norms(found, config, names, layer)
    found.linear(f"{ours}/image_out", f"{attention}.to_out.0", layer, inputs=2)
    found.linear(f"{ours}/image_up", f"{block}.ff.net.0.proj", layer)
    found.linear(f"{ours}/image_down", f"{block}.ff.net.2", layer)
    if ours == "blocks":
        found.linear(f"{ours}/text_out", f"{attention}.to_add_out", layer, inputs=2)
        found.linear(f"{ours}/text_up", f"{block}.ff_context.net.0.proj", layer)
        found.linear(f"{ours}/text_down", f"{block}.ff_context.net.2", layer)


def _single(found: blocks.Pairs, config: mmdit.MMDiTConfig, i: int) -> None:
    block = f"single_transformer_blocks.{i}"
    attention = f"{block}.attn"
    found.linear("single_blocks/modulation", f"{block}.norm.linear", i)
    found.fused("single_blocks/qkv", [f"{attention}.to_{n}" for n in "qkv"], i)
    names = {
        "single_blocks/q_norm": f"{attention}.norm_q",
        "single_blocks/k_norm": f"{attention}.norm_k",
    }
    _norms(found, config, names, i)
    found.linear("single_blocks/up", f"{block}.proj_mlp", i)
    found.linear("single_blocks/out", f"{block}.proj_out", i)


def fixed(config: mmdit.MMDiTConfig) -> list[layout.FixedTensor]:
    """SD3's whole table of positions, of which ours computes the middle."""
    if config.single_depth:
        return []
    side = config.grid.table
    whole = positions.grid_positions(config.grid, side, side, config.width)
    return [layout.FixedTensor("pos_embed.pos_embed", np.asarray(whole)[None])]


def load(path: str | pathlib.Path, config: mmdit.MMDiTConfig) -> dict[str, Any]:
    """Parameters from diffusers' safetensors: a file, or the index of several.

    Raises:
      layout.WeightsError: the file is another network's; all differences are listed.
    """
    tensors = layout.load(path)
    return layout.read(
        pairs(config), tensors, "this MMDiT's", np.float32, fixed(config)
    )


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: mmdit.MMDiTConfig
) -> None:
    """Writes parameters as diffusers reads them."""
    layout.save(layout.write(pairs(config), params, fixed(config)), path)
