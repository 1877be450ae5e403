"""CLIP's image tower as a network that judges pictures; jax only.

The features are a picture's projected vector before it is scaled to length 1, as
CLIP's `encode_image` gives it: of ViT-L/14, 768 numbers. A Frechet distance between
them is no FID. `scaling_ldm.models.weights.clip.open_vision_directory` reads shape and
parameters from a checkpoint's folder; for scores of pictures and captions see
clip_score.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from scaling_ldm.models.encoders import clip
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.models.shapes import LatentBHWC

Params = dict[str, Any]

SIZE = 224  # of ViT-L/14's pictures; others read `shape.image_size`


def init(config: clip.ClipVisionConfig, key: jax.Array) -> Params:
    """Random float32 parameters."""
    return clip.init_vision(config, key)


def apply(
    config: clip.ClipVisionConfig, params: Params, x_BHWC: LatentBHWC
) -> Features:
    """Features [B, projection] of pictures.

    Args:
      x_BHWC: RGB from 0 to 255, already of the network's size.

    Raises:
      ValueError: pictures of another size.
    """
    mean, std = (v[None, None, None] for v in (clip.MEAN, clip.STD))
    x = (x_BHWC.astype(jnp.float32) / 255 - mean) / std
    with jax.default_matmul_precision("highest"):  # of float32, on every device
        return Features(clip.embed_image(config, params, x), None)
