"""CLIP's towers in the layouts of transformers.

A file may hold both towers (`CLIPModel`) or one. The names of one have the prefix
"text_model." or "vision_model." or, since transformers 5.6, none.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm.models.encoders import clip, clip_score, tokenizers
from scaling_ldm.models.weights import blocks, files, layout
from scaling_ldm.models.weights.transformers_keys import IGNORED
from scaling_ldm.records.errors import WeightsError

_TYPES = ("clip", "clip_text_model", "clip_vision_model")  # in config.json
_BLOCK = {
    "attention/qkv": [f"self_attn.{n}_proj" for n in "qkv"],
    "attention/out": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "mlp_up": "mlp.fc1",
    "mlp_down": "mlp.fc2",
    "mlp_norm": "layer_norm2",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tower:
    """Names of one tower; tensors of the other are left out when it is read."""

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


def _tower(config: clip.ClipConfig) -> _Tower:
    return _TEXT if isinstance(config, clip.ClipTextConfig) else _VISION


def _own(published: Mapping[str, Any], tower: _Tower) -> dict[str, Any]:
    """The part of a config.json that describes one tower.

    A whole CLIP states the width of the shared space beside the towers.
    """
    blocks.check_model_type(published, *_TYPES)
    if published.get("model_type", "clip") != "clip":
        return dict(published)
    if not {"text_config", "vision_config"} & set(published):
        return dict(published)
    # Where a tower is stated twice, the "_dict" counts.
    own = published.get(f"{tower.section}_dict") or published.get(tower.section) or {}
    return {**own, "projection_dim": published.get("projection_dim", 512)}


_TOWER_DEFAULTS = {
    "num_hidden_layers": 12,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT_DEFAULTS = _TOWER_DEFAULTS | {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_VISION_DEFAULTS = _TOWER_DEFAULTS | {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
# The mask of a tower is its own.
_IGNORED = IGNORED | {"is_decoder"}


def from_config(published: Mapping[str, Any], **changes: Any) -> clip.ClipTextConfig:
    """The config of the text tower, from a config.json of one tower or of both.

    The defaults are those of transformers.

    Args:
      changes: to fields of the config.

    Raises:
      WeightsError: another network, several ids for the end of text, or settings that
        are not known.
    """
    own = _own(published, _TEXT)
    ignored = _IGNORED - {"eos_token_id"}
    c = blocks.settings(own, _TEXT_DEFAULTS, {}, "a CLIP text tower's", ignored)
    end = c["eos_token_id"]
    if not isinstance(end, int):
        raise WeightsError(f"eos_token_id is {end!r}; wanted one id")
    found = clip.ClipTextConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        max_tokens=c["max_position_embeddings"],
        projection=c["projection_dim"],
        end_token=end,
        activation=c["hidden_act"],
        epsilon=c["layer_norm_eps"],
    )
    return dataclasses.replace(found, **changes)


def vision_from_config(
    published: Mapping[str, Any], **changes: Any
) -> clip.ClipVisionConfig:
    """The config of the image tower, as `from_config`."""
    own = _own(published, _VISION)
    c = blocks.settings(own, _VISION_DEFAULTS, {}, "a CLIP image tower's", _IGNORED)
    found = clip.ClipVisionConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        projection=c["projection_dim"],
        channels=c["num_channels"],
        activation=c["hidden_act"],
        epsilon=c["layer_norm_eps"],
    )
    return dataclasses.replace(found, **changes)


def pairs(config: clip.ClipConfig) -> list[layout.Pair]:
    """Every leaf of a tower and its tensor, without the tower's prefix."""
    tower = _tower(config)
    if isinstance(config, clip.ClipVisionConfig):
        init = functools.partial(clip.init_vision, config)
    else:
        init = functools.partial(clip.init, config)
    found = blocks.Pairs(jax.eval_shape(init, jax.random.key(0)))
    places = "embeddings.position_embedding.weight"
    found.table("entry/position_embedding", places)
    if isinstance(config, clip.ClipVisionConfig):
        found.vector("entry/class_embedding", "embeddings.class_embedding")
        patches = "embeddings.patch_embedding"
        found.patches_in("entry/patch", patches, config.patch_size)
        found.module("entry/norm", "pre_layrnorm")  # their spelling
    else:
        found.table("entry/word_embedding", "embeddings.token_embedding.weight")
    for i in range(config.depth):
        found.block("blocks", _BLOCK, f"encoder.layers.{i}", i)
    found.module("exit/norm", tower.norm)
    if config.projection:
        name = tower.projection.removesuffix(".weight")
        found.module("pooled/projection", name)
    return found.done()


def _tensors(path: str | pathlib.Path, tower: _Tower) -> dict[str, Any]:
    def rename(name: str) -> str | None:
        if name.startswith(tower.others) or name.endswith("embeddings.position_ids"):
            return None
        return name.removeprefix(tower.prefix)

    return layout.named(files.stored(path), rename, str(path))


def load(
    path: str | pathlib.Path, config: clip.ClipConfig, dtype: Any = np.float32
) -> dict[str, Any]:
    """Reads the parameters of a tower from a checkpoint's file or directory.

    Args:
      dtype: of the parameters; None: as stored.

    Raises:
      WeightsError: the file belongs to another network, all of whose differences are
        listed, or the config.json beside it has other settings.
    """
    what = f"this CLIP's {_tower(config).prefix.removesuffix('_model.')} tower's"
    params = layout.read(pairs(config), _tensors(path, _tower(config)), what, dtype)
    vision = isinstance(config, clip.ClipVisionConfig)
    read = vision_from_config if vision else from_config
    blocks.agree(path, config, _TYPES, read)
    return params


def open_directory(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> tuple[clip.ClipTextConfig, dict[str, Any]]:
    """Reads config and parameters of the text tower from a checkpoint's directory.

    A checkpoint without the projection is read without it.

    Args:
      changes: to fields of the config, such as dtype, skip or final_norm.
    """
    config = from_config(files.config(directory))
    if _TEXT.projection not in _tensors(directory, _TEXT):
        config = dataclasses.replace(config, projection=0)
    params = load(directory, config, dtype)
    return dataclasses.replace(config, **changes), params


def open_vision_directory(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> tuple[clip.ClipVisionConfig, dict[str, Any]]:
    """Reads config and parameters of the image tower, as `open_directory`."""
    config = vision_from_config(files.config(directory))
    blocks.check_pixels(directory, clip.MEAN, clip.STD)
    if _VISION.projection not in _tensors(directory, _VISION):
        config = dataclasses.replace(config, projection=0)
    params = load(directory, config, dtype)
    return dataclasses.replace(config, **changes), params


def open_both(
    directory: str | pathlib.Path, dtype: Any = np.float32, **changes: Any
) -> clip_score.Clip:
    """Reads both towers and the tokenizer from a directory, to score pictures.

    Args:
      changes: to fields of both configs, such as dtype or unroll.

    Raises:
      WeightsError: a tower belongs to another network.
      ValueError: there is no tokenizer, or the towers cannot be compared.
    """
    image, image_params = open_vision_directory(directory, dtype, **changes)
    text, text_params = open_directory(directory, dtype, **changes)
    return clip_score.Clip(
        image=image,
        text=text,
        params={"image": image_params, "text": text_params},
        tokenizer=tokenizers.Tokenizer.load(directory),
    )


def tensors(params: dict[str, Any], config: clip.ClipConfig) -> dict[str, np.ndarray]:
    """The tensors of a tower, with the names of transformers' `CLIPModel`."""
    tower = _tower(config)
    return {
        name if name == tower.projection else f"{tower.prefix}{name}": value
        for name, value in layout.write(pairs(config), params).items()
    }


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: clip.ClipConfig
) -> None:
    """Writes a tower so that transformers reads it.

    Its classes are `CLIPTextModel`, `CLIPVisionModel`, and both "WithProjection".

    Args:
      path: a .safetensors file, which is replaced if it exists.
    """
    layout.save(tensors(params, config), path)
