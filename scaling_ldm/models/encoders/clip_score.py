"""How well pictures fit their captions, or other pictures, by CLIP.

Published scores differ by constant factors, so each convention has its own name here.
Scores also differ between CLIPs (ViT-B/32, L/14, OpenCLIP): always say which.

All scores are functions of vectors. `weights.clip.open_both` reads towers, configs and
tokenizer from a checkpoint's folder as transformers saves it (model.safetensors,
config.json, the files of the tokenizer). `Clip` makes vectors of captions and of
pictures (RGB from 0 to 255, of the tower's size: see `scaling_ldm.metrics.resize`).

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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scaling_ldm.models.encoders import clip, clip_features
from scaling_ldm.models.encoders.tokenizers import Tokenizer
from scaling_ldm.models.shapes import Array, MaskBS, Params, PictureBHWC, Scalar, TextBS

VectorsBD = Float[Array, "B D"]
ScoresB = Float[Array, "B"]


def cosine(a_BD: VectorsBD, b_BD: VectorsBD) -> ScoresB:
    """Float32 cosines of the angles between rows; not a number for a row of zeros."""
    return jnp.sum(_unit(a_BD) * _unit(b_BD), axis=-1)


def _unit(x_BD: VectorsBD) -> VectorsBD:
    x = jnp.asarray(x_BD, jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def clip_score(images_BD: VectorsBD, texts_BD: VectorsBD) -> ScoresB:
    """100 x cosine, as most papers print it; some leave out the 100 and print 0.31.

    Negative cosines stay negative. Hessel et al. replace them by zero: see `clip_s`.
    """
    return 100 * cosine(images_BD, texts_BD)


def clip_s(images_BD: VectorsBD, texts_BD: VectorsBD) -> ScoresB:
    """2.5 x max(cosine, 0): Hessel et al. 2021 (arXiv 2104.08718), section 3.

    Their captions begin with "A photo depicts", which is not added here.
    """
    return 2.5 * jnp.maximum(cosine(images_BD, texts_BD), 0)


def clip_t(images_BD: VectorsBD, texts_BD: VectorsBD) -> Scalar:
    """CLIP-T: mean cosine of pictures and their prompts (arXiv 2208.12242, 4.2)."""
    return jnp.mean(cosine(images_BD, texts_BD))


def clip_i(images_BD: VectorsBD, references_RD: Float[Array, "R D"]) -> Scalar:
    """CLIP-I: mean cosine over all pairs of a picture and a photo of its subject.

    Ruiz et al. 2023 (arXiv 2208.12242, section 4.2). Where each picture has one
    reference of its own, take the mean of `cosine`.
    """
    images_D, references_D = (
        jnp.mean(_unit(x), axis=0) for x in (images_BD, references_RD)
    )
    return jnp.sum(images_D * references_D)  # the mean over all pairs


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

    def pictures(self, x_BHWC: PictureBHWC) -> VectorsBD:
        """Vectors [B, projection] of pictures: see `clip_features.apply`."""
        return _pictures(self.image, self.params["image"], x_BHWC)

    def captions(self, captions: Sequence[str]) -> jax.Array:
        """Vectors [B, projection] of captions; captions that are too long are cut."""
        return embed_captions(self.text, self.params["text"], *self.encode(captions))

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask [B, tokens] of captions, which `embed_captions` reads."""
        return self.tokenizer.encode(captions, self.text.max_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _pictures(
    config: clip.ClipVisionConfig, params: Params, x_BHWC: PictureBHWC
) -> VectorsBD:
    return clip_features.apply(config, params, x_BHWC).features


@functools.partial(jax.jit, static_argnums=0)
def embed_captions(
    config: clip.ClipTextConfig, params: Params, ids_BS: TextBS, mask_BS: MaskBS
) -> jax.Array:
    """Vectors of captions, float32 [B, projection].

    Args:
      ids_BS, mask_BS: what `Clip.encode` gives.
    """
    with jax.default_matmul_precision("highest"):
        return clip.embed_text(config, params, ids_BS, mask_BS)
