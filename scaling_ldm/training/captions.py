"""Turns captions into the arrays that a denoiser reads: word ids or features."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from scaling_ldm import config
from scaling_ldm.data.vocabulary import PADDING, Vocabulary
from scaling_ldm.models import pretrained

Text = dict[str, np.ndarray]  # "text" and "mask", [n, S, ...] or [S, ...]


@runtime_checkable
class CaptionReader(Protocol):
    """Captions -> "text" and "mask".

    read(captions): "text" int32 [n, S] or float32 [n, S, E], "mask" bool [n, S].
    uncond: the same of the empty caption, without the first axis.
    """

    def read(self, captions: Sequence[str]) -> Text: ...

    @property
    def uncond(self) -> Text: ...


class WordReader:
    """Ids of words.

    Args:
      vocabulary: that the network learnt.
      length: of a caption, in words.
    """

    def __init__(self, vocabulary: Vocabulary, length: int) -> None:
        self._vocabulary, self._length = vocabulary, length
        null = vocabulary.uncond(length)
        self.uncond: Text = {"text": null, "mask": null != PADDING}

    def read(self, captions: Sequence[str]) -> Text:
        """Captions to ids; a caption without a word is the empty one.

        Raises:
          ValueError: no word of a caption is known. One known word is enough; then the
            unknown ones give a warning.
        """
        rows = []
        for caption in captions:
            ids = self._vocabulary.encode(caption, self._length)
            unknown = self._vocabulary.unknown(caption)
            known = set(ids.tolist()) & set(self._vocabulary.ids.values())
            if unknown and not known:
                raise ValueError(
                    f"{caption!r}: the network has learnt none of its words; it knows "
                    f"{len(self._vocabulary.ids):,}, among them "
                    f"{', '.join(list(self._vocabulary.ids)[:8])}"
                )
            if unknown:
                warnings.warn(
                    f"{caption!r}: the network has not learnt {', '.join(unknown)}",
                    stacklevel=4,
                )
            rows.append(ids if (ids != PADDING).any() else self.uncond["text"])
        text = np.stack(rows)
        return {"text": text, "mask": text != PADDING}


class FeatureReader:
    """Features of a text encoder, rounded as the encode stage stores them.

    Args:
      load: gives the encoder; it is called once, when the first caption is read.
      length: tokens of a caption.
      dtype: in which features are stored.
      reads_padding: whether the features of padding are read like those of text, as
        Stable Diffusion does.
    """

    def __init__(
        self,
        load: Callable[[], pretrained.PretrainedTextEncoder],
        length: int,
        dtype: str,
        reads_padding: bool = False,
    ) -> None:
        self._load, self._length, self._dtype = load, length, dtype
        self._reads_padding = reads_padding

    @functools.cached_property
    def _encoder(self) -> tuple[pretrained.PretrainedTextEncoder, Callable]:
        found = self._load()
        return found, jax.jit(found.network.apply)

    def read(self, captions: Sequence[str]) -> Text:
        """Raises ConfigError if the encoder cannot be loaded."""
        encoder, apply = self._encoder
        ids, mask = encoder.tokenizer.encode(captions, self._length)
        if self._reads_padding:
            mask = np.ones_like(mask)
        features = apply(encoder.params, ids, None if self._reads_padding else mask)
        stored = np.asarray(features.astype(self._dtype).astype("float32"))
        return {"text": np.where(mask[..., None], stored, np.float32(0)), "mask": mask}

    @functools.cached_property
    def uncond(self) -> Text:
        return {name: value[0] for name, value in self.read([""]).items()}


def reader(
    experiment: config.Experiment,
    vocabulary: Vocabulary | None,
    load: Callable[[], pretrained.PretrainedTextEncoder] | None = None,
) -> CaptionReader:
    """The reader of captions for the networks of an experiment.

    Args:
      vocabulary: of words; None if captions are features.
      load: gives their text encoder; None: that of config.encode.
    """
    length, cfg = experiment.data.text_tokens, experiment.encode
    if vocabulary is not None:
        return WordReader(vocabulary, length)
    given = cfg.text_encoder, cfg.compute_dtype
    load = load or functools.partial(pretrained.text_encoder, *given)
    return FeatureReader(load, length, cfg.dtype)
