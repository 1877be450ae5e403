"""CLIP's towers in the layouts of transformers; jax for shapes only.

One file may hold both towers (`CLIPModel`) or one, whose names have the prefix
"text_model." or "vision_model." or, since transformers 5.6, none.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models.encoders import clip, clip_score, tokenizers
from scaling_ldm.models.weights import files, layout, stacks

ClipConfig = clip.ClipTextConfig | clip.ClipVisionConfig

_BLOCK = {
    "attention/qkv": tuple(f"self_attn.{n}_proj" for n in "qkv"),
    "attention/out": ("self_attn.out_proj",),
    "attention_norm": ("layer_norm1",),
    "mlp_up": ("mlp.fc1",),
    "mlp_down": ("mlp.fc2",),
    "mlp_norm": ("layer_norm2",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tower:
    """Names of one tower; those of the other are left out when this one is read."""

    prefix: str
    projection: str
    norm: str  # the last one
    others: tuple[str, ...]
    section: str  # of the config.json of a whole CLIP


_TEXT = _Tower(
    prefix="text_model.",
    projection="text_projection.weight",
    norm="final_layer_norm",
    others=("vision_model.", "visual_projection.", "logit_scale"),
    section="text_config",
)
_VISION = _Tower(
    prefix="vision_model.",
    projection="visual_projection.weight",
    norm="post_layernorm",
    others=("text_model.", "text_projection.", "logit_scale"),
    section="vision_config",
)


def _tower(config: ClipConfig) -> _Tower:
    return _TEXT if isinstance(config, clip.ClipTextConfig) else _VISION


def _own(published: Mapping[str, Any], tower: _Tower) -> dict[str, Any]:
    """The part of a config.json that describes one tower.

    Of a whole CLIP, the width of the shared space is stated beside the towers.
    """
    if published.get("model_type", "clip") != "clip":
        return dict(published)
    if not {"text_config", "vision_config"} & set(published):
        return dict(published)
    # Where both are, the second one counts and has the defaults besides.
    own = published.get(f"{tower.section}_dict") or published.get(tower.section) or {}
    return {**own, "projection_dim": published.get("projection_dim", 512)}


def from_config(published: Mapping[str, Any], **changes: Any) -> clip.ClipTextConfig:
    """The text tower of a config.json, of one or of both; defaults as transformers'.

    Raises:
      layout.WeightsError: several ids for the end of text.
    """
    own = _own(published, _TEXT)
    end = own.get("eos_token_id", 49407)
    if not isinstance(end, int):
        raise layout.WeightsError(f"eos_token_id is {end!r}; wanted one id")
    found = clip.ClipTextConfig(
        width=own.get("hidden_size", 512),
        depth=own.get("num_hidden_layers", 12),
        heads=own.get("num_attention_heads", 8),
        hidden=own.get("intermediate_size", 2048),
        vocab_size=own.get("vocab_size", 49408),
        max_tokens=own.get("max_position_embeddings", 77),
        projection=own.get("projection_dim", 512),
        end_token=end,
        activation=own.get("hidden_act", "quick_gelu"),
        epsilon=own.get("layer_norm_eps", 1e-5),
    )
    return dataclasses.replace(found, **changes)


def vision_from_config(
    published: Mapping[str, Any], **changes: Any
) -> clip.ClipVisionConfig:
    """The image tower of a config.json, of one or of both."""
    own = _own(published, _VISION)
    found = clip.ClipVisionConfig(
        width=own.get("hidden_size", 768),
        depth=own.get("num_hidden_layers", 12),
        heads=own.get("num_attention_heads", 12),
        hidden=own.get("intermediate_size", 3072),
        image_size=own.get("image_size", 224),
        patch_size=own.get("patch_size", 32),
        projection=own.get("projection_dim", 512),
        channels=own.get("num_channels", 3),
        activation=own.get("hidden_act", "quick_gelu"),
        epsilon=own.get("layer_norm_eps", 1e-5),
    )
    return dataclasses.replace(found, **changes)


def _norm(path: layout.Path, name: str, width: int) -> list[layout.Pair]:
    return [
        layout.vector((*path, ours), f"{name}.{theirs}", (width,))
        for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    ]


def pairs(config: ClipConfig) -> list[layout.Pair]:
    """Every leaf of a tower and its tensor, without the tower's prefix."""
    vision, tower = isinstance(config, clip.ClipVisionConfig), _tower(config)
    init = clip.init_vision if vision else clip.init
    tree: Any = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    entry, found = tree["entry"], []

    def table(ours: str, theirs: str) -> None:
        path, name = ("entry", ours), f"embeddings.{theirs}"
        found.append(layout.vector(path, name, entry[ours].shape))

    table("position_embedding", "position_embedding.weight")
    if vision:
        table("class_embedding", "class_embedding")
        path, patch = ("entry", "patch", "kernel"), entry["patch"]["kernel"].shape
        name = "embeddings.patch_embedding.weight"
        found.append(layout.patches(path, name, patch, config.patch_size))
        found += _norm(("entry", "norm"), "pre_layrnorm", config.width)
    else:
        table("word_embedding", "token_embedding.weight")
    found += stacks.pairs(tree["blocks"], _BLOCK, "encoder.layers.{}")
    found += _norm(("exit", "norm"), tower.norm, config.width)
    if config.projection:
        path = ("pooled", "projection", "kernel")
        size = (config.width, config.projection)
        found.append(layout.dense(path, tower.projection, size))
    return found


def _tensors(path: str | pathlib.Path, tower: _Tower) -> dict[str, Any]:
    def rename(name: str) -> str | None:
        if name.startswith(tower.others) or name.endswith("embeddings.position_ids"):
            return None
        return name.removeprefix(tower.prefix)

    return layout.named(files.stored(path), rename, str(path))


def load(
    path: str | pathlib.Path, config: ClipConfig, dtype: Any = np.float32
) -> dict[str, Any]:
    """A tower's parameters from a checkpoint's file or directory.

    Args:
      dtype: of the parameters; None: as stored.

    Raises:
      layout.WeightsError: the file is another network's; all differences are listed.
    """
    what = f"this CLIP's {_tower(config).prefix.removesuffix('_model.')} tower's"
    return layout.read(pairs(config), _tensors(path, _tower(config)), what, dtype)


def open_directory(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> tuple[clip.ClipTextConfig, dict[str, Any]]:
    """The text tower of a checkpoint's directory: its shape and parameters.

    A checkpoint without the projection is read without it.

    Args:
      changes: to fields of the shape, such as dtype, skip or final_norm.
    """
    config = from_config(files.config(directory))
    if _TEXT.projection not in _tensors(directory, _TEXT):
        config = dataclasses.replace(config, projection=0)
    params = load(directory, config, dtype)
    return dataclasses.replace(config, **changes), params


def open_vision_directory(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> tuple[clip.ClipVisionConfig, dict[str, Any]]:
    """The image tower, as `open_directory`."""
    config = vision_from_config(files.config(directory))
    if _VISION.projection not in _tensors(directory, _VISION):
        config = dataclasses.replace(config, projection=0)
    params = load(directory, config, dtype)
    return dataclasses.replace(config, **changes), params


def open_both(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> clip_score.Clip:
    """Both towers and the tokenizer of a checkpoint's directory, to score pictures.

    Args:
      changes: to fields of both shapes, such as dtype or unroll.

    Raises:
      layout.WeightsError: one of the towers is another network's.
      ValueError: no tokenizer there, or towers that cannot be compared.
    """
    image, image_params = open_vision_directory(directory, dtype, **changes)
    text, text_params = open_directory(directory, dtype, **changes)
    return clip_score.Clip(
        image=image,
        text=text,
        params={"image": image_params, "text": text_params},
        tokenizer=tokenizers.Tokenizer.load(directory),
    )


def tensors(params: dict[str, Any], config: ClipConfig) -> dict[str, np.ndarray]:
    """A tower under the names of transformers' `CLIPModel`."""
    tower = _tower(config)
    return {
        name if name == tower.projection else f"{tower.prefix}{name}": value
        for name, value in layout.write(pairs(config), params).items()
    }


def save(params: dict[str, Any], path: str | pathlib.Path, config: ClipConfig) -> None:
    """Writes a tower as transformers' `CLIPTextModel`, `CLIPVisionModel` or their
    relatives "WithProjection" read it."""
    layout.save(tensors(params, config), path)
