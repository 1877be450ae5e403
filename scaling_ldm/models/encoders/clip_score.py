"""How well pictures fit their captions, or other pictures, by CLIP; jax only.

Conventions differ by factors, so each has its name here. Scores differ between CLIPs
too (ViT-B/32, L/14, OpenCLIP): always say which.

All are functions of vectors. `scaling_ldm.models.weights.clip.open_both` reads towers,
configs and tokenizer from a checkpoint's folder as transformers saves it
(model.safetensors, config.json, the tokenizer's files). `Clip` makes vectors of
pictures (RGB from 0 to 255, of the tower's size: `scaling_ldm.metrics.resize`) and of
captions.

Example:
  >>> from scaling_ldm.models.encoders import clip_score
  >>> from scaling_ldm.models.weights import clip as weights
  >>> network = weights.open_both("clip-vit-large-patch14")
  >>> images = network.pictures(x_BHWC)
  >>> clip_t = clip_score.clip_t(images, network.captions(captions))
  >>> clip_i = clip_score.clip_i(images, network.pictures(references_RHWC))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm.models.encoders import clip, clip_features
from scaling_ldm.models.encoders.tokenizers import Tokenizer
from scaling_ldm.models.shapes import LatentBHWC, MaskBS, TextBS

Params = dict[str, Any]


def cosine(a_BD: jax.Array, b_BD: jax.Array) -> jax.Array:
    """Cosines [B] in float32 of the angles between rows; not a number for zeros."""
    return jnp.sum(_unit(a_BD) * _unit(b_BD), axis=-1)


def _unit(x_BD: jax.Array) -> jax.Array:
    x = jnp.asarray(x_BD, jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def clip_score(images_BD: jax.Array, texts_BD: jax.Array) -> jax.Array:
    """100 x cosine [B], as most papers print it (some leave out the 100: 0.31).

    Cosines below zero stay below; Hessel et al. cut them off, see `clip_s`.
    """
    return 100 * cosine(images_BD, texts_BD)


def clip_s(images_BD: jax.Array, texts_BD: jax.Array) -> jax.Array:
    """2.5 x max(cosine, 0) [B]: Hessel et al. 2021 (arXiv 2104.08718), section 3.

    Their captions begin with "A photo depicts", which is not added here.
    """
    return 2.5 * jnp.maximum(cosine(images_BD, texts_BD), 0)


def clip_t(images_BD: jax.Array, texts_BD: jax.Array) -> jax.Array:
    """CLIP-T: mean cosine of pictures and their prompts (arXiv 2208.12242, 4.2)."""
    return jnp.mean(cosine(images_BD, texts_BD))


def clip_i(images_BD: jax.Array, references_RD: jax.Array) -> jax.Array:
    """CLIP-I: mean cosine over all pairs of a picture and a real one of its subject.

    Ruiz et al. 2023 (arXiv 2208.12242, section 4.2). For pictures that have one
    reference each, take the mean of `cosine`.
    """
    images_D, references_D = (
        jnp.mean(_unit(x), axis=0) for x in (images_BD, references_RD)
    )
    return jnp.sum(images_D * references_D)  # the mean of products of all pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """Both towers and the tokenizer of one CLIP; weights/clip.py opens one.

    params: {"image", "text"}, on the devices where they are used.
    """

    image: clip.ClipVisionConfig
    text: clip.ClipTextConfig
    params: Params
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if not self.image.projection == self.text.projection > 0:
            raise ValueError(
                "pictures and texts are compared where both towers project to one "
                f"space; these project to {self.image.projection} and "
                f"{self.text.projection} features (0: to none)"
            )
        if self.tokenizer.vocab_size > self.text.vocab_size:
            raise ValueError(
                f"a tokenizer of {self.tokenizer.vocab_size} words for a network of "
                f"{self.text.vocab_size}"
            )

    def pictures(self, x_BHWC: LatentBHWC) -> jax.Array:
        """Vectors [B, projection] of pictures: see `clip_features.apply`."""
        return _pictures(self.image, self.params["image"], x_BHWC)

    def captions(self, captions: Sequence[str]) -> jax.Array:
        """Vectors [B, projection] of captions; what exceeds the tokens is cut off."""
        return embed_captions(self.text, self.params["text"], *self.encode(captions))

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What `embed_captions` reads of them: ids and mask [B, tokens]."""
        return self.tokenizer.encode(captions, self.text.max_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _pictures(
    config: clip.ClipVisionConfig, params: Params, x_BHWC: LatentBHWC
) -> jax.Array:
    return clip_features.apply(config, params, x_BHWC).features


@functools.partial(jax.jit, static_argnums=0)
def embed_captions(
    config: clip.ClipTextConfig, params: Params, ids_BS: TextBS, mask_BS: MaskBS
) -> jax.Array:
    """Vectors [B, projection] in float32 of what `Clip.encode` gives."""
    with jax.default_matmul_precision("highest"):
        return clip.embed_text(config, params, ids_BS, mask_BS)
