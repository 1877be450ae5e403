"""Turns captions into the arrays that a denoiser reads: word ids or features."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from scaling_ldm import config
from scaling_ldm.data.vocabulary import PADDING, Vocabulary
from scaling_ldm.models import pretrained

# "text" and "mask", [n, S, ...] or [S, ...]; of some networks "pooled", [n, P] or [P].
Text = dict[str, np.ndarray]
Loader = Callable[[], pretrained.PretrainedTextEncoder]


@runtime_checkable
class CaptionReader(Protocol):
    """Captions -> "text" and "mask", and what else a network reads of them.

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
        load: Loader,
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


class SeveralReader:
    """What SD3 and FLUX read: features of CLIPs and a T5, and the CLIPs' vectors.

    No encoder hides padding. "pooled" are the vectors of the CLIPs, side by side.
    "text" are the features of the T5. Where features of the CLIPs are read too, they
    stand side by side before them, with zeros up to the width of the T5's.

    Args:
      clips: load the CLIPs.
      t5: loads the T5; None: its features are zero.
      lengths: tokens of a caption for the CLIPs and for the T5.
      width: of the features that the network reads.
      features: whether it reads those of the CLIPs.
    """

    def __init__(
        self,
        clips: Sequence[Loader],
        t5: Loader | None,
        lengths: tuple[int, int],
        width: int,
        features: bool,
    ) -> None:
        self._load = [*clips, *([] if t5 is None else [t5])]
        self._clips, self._lengths = len(clips), lengths
        self._width, self._features = width, features

    @functools.cached_property
    def _encoders(self) -> list[tuple[pretrained.PretrainedTextEncoder, Callable]]:
        def both(network: Any, params: Any, ids: Any) -> tuple[Any, Any]:
            vector = network.vector
            return (
                network.apply(params, ids, None),
                None if vector is None else vector(params, ids, None),
            )

        return [
            (found, jax.jit(functools.partial(both, found.network)))
            for found in (load() for load in self._load)
        ]

    def read(self, captions: Sequence[str]) -> Text:
        """Raises ConfigError if an encoder cannot be loaded."""
        short, long = self._lengths
        read = []
        for i, (encoder, run) in enumerate(self._encoders):
            length = short if i < self._clips else long
            ids, _ = encoder.tokenizer.encode(captions, length)
            read.append(run(encoder.params, ids))
        clips, rest = read[: self._clips], read[self._clips :]
        rows = len(captions)
        text = np.zeros((rows, long, self._width), "f")
        if rest:
            text = np.asarray(rest[0][0])
        if self._features:
            joined = np.concatenate([features for features, _ in clips], axis=-1)
            more = self._width - joined.shape[-1]
            joined = np.pad(joined, ((0, 0), (0, 0), (0, more)))
            text = np.concatenate([joined, text], axis=1)
        return {
            "text": text,
            "mask": np.ones(text.shape[:2], bool),
            "pooled": np.concatenate([vector for _, vector in clips], axis=-1),
        }

    @functools.cached_property
    def uncond(self) -> Text:
        return {name: value[0] for name, value in self.read([""]).items()}


def reader(
    experiment: config.Experiment,
    vocabulary: Vocabulary | None,
    load: Loader | None = None,
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
