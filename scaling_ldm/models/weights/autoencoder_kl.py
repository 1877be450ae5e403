"""Autoencoders in the layout of diffusers' `AutoencoderKL`.

A directory holds config.json and diffusion_pytorch_model.safetensors. Stable Diffusion
1 and 2 were first stored with other names in the attention, and with its matrices as
1 x 1 convolutions. Both forms are read, and the current one is written.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm import records
from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.weights import files, layout
from scaling_ldm.records.errors import WeightsError

WEIGHTS = "diffusion_pytorch_model.safetensors"

_RESIDUAL = {"shortcut": "conv_shortcut"}  # other parts have the same name there
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v"}
_ATTENTION["out"] = "to_out.0"
_ENDS = {"enter": "conv_in", "exit_norm": "conv_norm_out", "exit": "conv_out"}
_QUANT = {"encoder": "quant_conv", "decoder": "post_quant_conv"}
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# The defaults of diffusers for keys that a configuration lacks.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Keys that only say how a pipeline runs the network.
_NOT_READ = {"sample_size", "force_upcast"}


def from_config(published: Mapping[str, Any]) -> autoencoder_kl.AutoencoderConfig:
    """The config, in float32, of diffusers' config.json.

    Raises:
      WeightsError: another kind of network; every reason is listed.
    """
    c = _DEFAULTS | {k: v for k, v in published.items() if not k.startswith("_")}
    levels = len(c["block_out_channels"])
    wanted = {
        "_class_name": "AutoencoderKL",
        "out_channels": c["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "use_post_quant_conv": c["use_quant_conv"],
    }
    given = c | {"_class_name": published.get("_class_name", "AutoencoderKL")}
    problems = [
        f"{name} is {given[name]!r}, wanted {value!r}"
        for name, value in wanted.items()
        if _plain(given[name]) != value
    ]
    unknown = c.keys() - _DEFAULTS.keys() - _NOT_READ
    problems += [f"{name}: not known" for name in sorted(unknown)]
    if problems:
        raise WeightsError(
            "this is not the configuration of an autoencoder that can be built here:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    return autoencoder_kl.AutoencoderConfig(
        channels=tuple(c["block_out_channels"]),
        blocks=c["layers_per_block"],
        latent_channels=c["latent_channels"],
        image_channels=c["in_channels"],
        groups=c["norm_num_groups"],
        middle_attention=c["mid_block_add_attention"],
        quant_conv=c["use_quant_conv"],
        scale=c["scaling_factor"],
        shift=c["shift_factor"] or 0.0,
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def to_config(
    config: autoencoder_kl.AutoencoderConfig, sample_size: int = 512
) -> dict[str, Any]:
    """The content of diffusers' config.json for a network.

    Args:
      sample_size: diffusers, if asked to cut pictures into tiles, does so for sides of
        this many pixels and more.
    """
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "sample_size": sample_size,
        "scaling_factor": config.scale,
        "shift_factor": config.shift or None,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.quant_conv,
        "mid_block_add_attention": config.middle_attention,
    }


def _name(path: layout.Path, last: int) -> str:
    side, first, *rest = path
    if first == "quant":
        return _QUANT[side]
    theirs = [side]
    if found := re.fullmatch(r"down(\d+)_(\d+)_residual", first):
        theirs.append(f"down_blocks.{found[1]}.resnets.{found[2]}")
    elif found := re.fullmatch(r"up(\d+)_(\d+)_residual", first):
        # Theirs count the way up from the middle.
        theirs.append(f"up_blocks.{last - int(found[1])}.resnets.{found[2]}")
    elif found := re.fullmatch(r"down(\d+)_halve", first):
        theirs.append(f"down_blocks.{found[1]}.downsamplers.0.conv")
    elif found := re.fullmatch(r"up(\d+)_double", first):
        theirs.append(f"up_blocks.{last - int(found[1])}.upsamplers.0.conv")
    elif found := re.fullmatch(r"middle_residual(\d)", first):
        theirs.append(f"mid_block.resnets.{found[1]}")
    elif first == "middle_attention":
        theirs.append("mid_block.attentions.0")
    else:
        theirs.append(_ENDS[first])
    names = _ATTENTION if first == "middle_attention" else _RESIDUAL
    theirs += [names.get(part, part) for part in rest]
    return ".".join(theirs)


def pairs(config: autoencoder_kl.AutoencoderConfig) -> list[layout.Pair]:
    """Every leaf of an autoencoder and its tensor."""
    tree = jax.eval_shape(lambda: autoencoder_kl.init(config, jax.random.key(0)))
    return layout.leaves(
        tree,
        lambda path: _name(path, len(config.channels) - 1),
        lambda path: path[-1] in ("shortcut", "quant"),
    )


def modern(tensors: layout.Tensors) -> dict[str, np.ndarray]:
    """The tensors with the current names, and with matrices in the attention.

    A tensor whose new name is taken keeps its old one, so that `read` lists it.
    """
    renamed = {}
    for name, tensor in tensors.items():
        head, found, tail = name.partition(".mid_block.attentions.0.")
        part, _, leaf = tail.rpartition(".")
        if found and f"{head}{found}{_OLD.get(part)}.{leaf}" not in tensors:
            name = f"{head}{found}{_OLD.get(part, part)}.{leaf}"
        if found and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed


def read(
    tensors: layout.Tensors, config: autoencoder_kl.AutoencoderConfig
) -> dict[str, Any]:
    """Float32 parameters from tensors; half precision is widened, which is exact.

    Raises:
      WeightsError: tensors of another network; all differences are listed.
    """
    tree = layout.read(pairs(config), modern(tensors), "this autoencoder's")
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), tree)


def load(
    directory: str | pathlib.Path,
) -> tuple[autoencoder_kl.AutoencoderConfig, dict[str, Any]]:
    """Reads config and parameters from a directory that diffusers wrote.

    Raises:
      WeightsError: a file is missing, or it describes another network.
    """
    directory = pathlib.Path(directory)
    config = from_config(files.config(directory))
    return config, read(layout.load(directory), config)


def save(
    params: Mapping[str, Any],
    directory: str | pathlib.Path,
    config: autoencoder_kl.AutoencoderConfig,
    sample_size: int = 512,
) -> None:
    """Writes a directory that diffusers reads; `sample_size` as in `to_config`."""
    directory = pathlib.Path(directory)
    tensors = layout.write(pairs(config), params)
    directory.mkdir(parents=True, exist_ok=True)
    layout.save(tensors, directory / WEIGHTS)
    text = json.dumps(to_config(config, sample_size), indent=2) + "\n"
    records.write_text(directory / files.CONFIG, text)
