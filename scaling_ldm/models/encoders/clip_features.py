"""CLIP's image tower as a feature network.

The features are the projected vector of a picture before it is scaled to length 1, as
CLIP's `encode_image` gives it: 768 numbers of ViT-L/14. A Frechet distance between them
is not an FID. `weights.clip.open_vision_directory` reads the config and the parameters
from a checkpoint's folder. For scores of pictures and captions see clip_score.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scaling_ldm.models.encoders import clip
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.models.shapes import Params, PictureBHWC

SIZE = 224  # of ViT-L/14's pictures; that of others is in their config


def init(config: clip.ClipVisionConfig, key: jax.Array) -> Params:
    """Random float32 parameters."""
    return clip.init_vision(config, key)


def apply(
    config: clip.ClipVisionConfig, params: Params, x_BHWC: PictureBHWC
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
