"""The named data sources behind one interface; numpy, and the modules beside it.

"icons" is embedded. "latents" is a folder that the user has made:
    latents.npy    [n, H, W, C] float16 or float32, scaled to about unit variance
    captions.txt   n lines, one caption each
"""

from __future__ import annotations

import collections
import hashlib
import pathlib
from collections.abc import Callable

import numpy as np

from scaling_ldm import config
from scaling_ldm.data import icons
from scaling_ldm.data.pipeline import Rows, Source


class Icons:
    """The painted icons (see `icons`), with the foreground colour as the label."""

    classes = len(icons.PALETTE)

    def __init__(self, cfg: config.Data, split: str) -> None:
        self.shape = cfg.shape
        side, fits = cfg.shape[0], icons.SIDE
        if cfg.shape != (side, side, 3) or fits % side:
            sizes = [(s, s, 3) for s in (32, 16, 8)]
            raise config.ConfigError(
                f"config.data.shape = {cfg.shape}: the icons source has one of {sizes}"
            )
        self._length = cfg.text_tokens
        self._painted = icons.PaintedIcons(
            split,
            seed=cfg.seed,
            size=side,
            validation_fraction=cfg.validation_fraction,
            vocabulary=icons.Vocabulary.build(cfg.vocab_size, cfg.validation_fraction),
        )

    def rows(self, positions: np.ndarray) -> Rows:
        ids, mask = self._painted.token_ids(positions, self._length)
        choices = self._painted.choose(positions)
        return {
            "x": self._painted.paint(positions)["image"],
            "text": ids,
            "mask": mask,
            "label": self._painted.pairs[choices.pair][:, 0].astype(np.int32),
        }

    def captions(self, positions: np.ndarray) -> list[str]:
        return self._painted.captions(positions)


class Latents:
    """Latents of the user's own pictures, from a folder."""

    classes = 0

    def __init__(self, cfg: config.Data, split: str) -> None:
        folder = pathlib.Path(cfg.path)
        if not cfg.path:
            raise config.ConfigError(
                "config.data.path is not set: the latents source reads latents.npy and "
                "captions.txt from it; pass --config.data.path=FOLDER, or use "
                "--config.data.source=icons, which is embedded"
            )
        for name in ("latents.npy", "captions.txt"):
            if not (folder / name).is_file():
                raise config.ConfigError(
                    f"config.data.path = {cfg.path}: no {name} in it; the latents "
                    "source reads latents.npy [n, H, W, C] and captions.txt (n lines)"
                )
        self._latents = np.load(
            folder / "latents.npy", mmap_mode="r", allow_pickle=False
        )
        text = (folder / "captions.txt").read_text(encoding="utf-8")
        captions = text.splitlines()
        if self._latents.ndim != 4 or self._latents.shape[1:] != cfg.shape:
            raise config.ConfigError(
                f"{folder / 'latents.npy'} has shape {self._latents.shape}; "
                f"config.data.shape = {cfg.shape} wants (n, *{cfg.shape})"
            )
        if len(captions) != len(self._latents):
            raise config.ConfigError(
                f"{folder}: {len(captions)} captions for {len(self._latents)} latents"
            )
        self.shape = cfg.shape
        self._seed, self._length = cfg.seed, cfg.text_tokens
        held_out = np.array([_fraction(c) < cfg.validation_fraction for c in captions])
        wanted = held_out if split == "validation" else ~held_out
        self._rows = np.flatnonzero(wanted)
        if not len(self._rows):
            raise config.ConfigError(
                f"{folder}: no caption falls into the {split} split; more pictures or "
                "another config.data.validation_fraction are needed"
            )
        self._captions = captions
        counts = collections.Counter(
            word for i in np.flatnonzero(~held_out) for word in captions[i].split()
        )
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        words = (*icons.RESERVED, *ranked)[: cfg.vocab_size]
        self._vocabulary = icons.Vocabulary(words)

    def _at(self, positions: np.ndarray) -> np.ndarray:
        epoch, slot = np.divmod(np.asarray(positions, np.int64), len(self._rows))
        keys = icons.draw(self._seed, 0, epoch.astype(np.uint64))
        return self._rows[icons.permute(slot, keys, len(self._rows))]

    def rows(self, positions: np.ndarray) -> Rows:
        at = self._at(positions)
        ids = np.stack(
            [self._vocabulary.encode(self._captions[i], self._length) for i in at]
        )
        return {
            "x": self._latents[at].astype(np.float32),
            "text": ids,
            "mask": ids != icons.PADDING,
        }

    def captions(self, positions: np.ndarray) -> list[str]:
        return [self._captions[i] for i in self._at(positions)]


def _fraction(caption: str) -> float:
    """A number in [0, 1) of the caption's words, whatever their order and case."""
    key = " ".join(sorted(caption.lower().split()))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


SOURCES: dict[str, Callable[[config.Data, str], Source]] = {
    "icons": Icons,
    "latents": Latents,
}


def sources(cfg: config.Data, classes: int = 0) -> tuple[Source, Source]:
    """The train and the validation source of an experiment.

    Args:
      classes: labels that the denoiser knows; 0 when it takes none.

    Raises:
      ConfigError: an unknown source, or one whose files, shape or labels do not fit.
    """
    if cfg.source not in SOURCES:
        raise config.ConfigError(
            f"config.data.source = {cfg.source!r}; known: {', '.join(SOURCES)}"
        )
    make = SOURCES[cfg.source]
    train, validation = make(cfg, "train"), make(cfg, "validation")
    if classes not in (0, train.classes):
        have = f"has {train.classes} labels" if train.classes else "has no labels"
        raise config.ConfigError(
            f"config.model.classes = {classes}, but the {cfg.source} source {have}; "
            f"set model.classes = {train.classes}, or take another source"
        )
    return train, validation


def null_condition(cfg: config.Data, classes: int) -> Rows:
    """The condition that says nothing, for caption dropout and guidance; unbatched."""
    text = np.full(cfg.text_tokens, icons.PADDING, np.int32)
    text[0] = icons.NULL
    return {
        "text": text,
        "mask": text != icons.PADDING,
        "label": np.int32(classes),
    }
