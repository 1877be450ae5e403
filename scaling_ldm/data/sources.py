"""What an experiment trains on: painted icons, or records of the encode stage."""

from __future__ import annotations

import pathlib

import numpy as np

from scaling_ldm import config
from scaling_ldm.data import encoded, icon_set, icons
from scaling_ldm.data.pipeline import Rows, Source
from scaling_ldm.data.vocabulary import NULL, PADDING


class Icons:
    """The painted icons (see `icons`), with the foreground colour as the label."""

    classes = len(icons.PALETTE)

    def __init__(self, cfg: config.DataConfig, split: str) -> None:
        side, fits = cfg.shape[0], icon_set.SIDE
        if cfg.shape != (side, side, 3) or fits % side:
            sizes = [(s, s, 3) for s in (32, 16, 8)]
            raise config.ConfigError(
                f"config.data.shape = {cfg.shape}: the icons source has one of {sizes}"
            )
        self.shape = (side, side, 3)
        self._length = cfg.text_tokens
        self.uncond = null_words(cfg.text_tokens, self.classes)
        self._painted = icons.PaintedIcons(
            split,
            seed=cfg.seed,
            size=side,
            validation_fraction=cfg.validation_fraction,
            vocabulary=icons.build_vocabulary(cfg.vocab_size, cfg.validation_fraction),
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


class Coarse:
    """A source with the condition of super-resolution (paper A, section 3.4).

    Its rows also have "image": x averaged over k x k pixels and repeated to full size.
    For latents, the mean of k x k latents stands for those of the smaller picture.
    """

    def __init__(self, source: Source, factor: int) -> None:
        self._source, self._factor = source, factor
        self.shape, self.classes, self.uncond = (
            source.shape,
            source.classes,
            source.uncond,
        )

    def rows(self, positions: np.ndarray) -> Rows:
        rows = self._source.rows(positions)
        H, W, C = self.shape
        k = self._factor
        small = rows["x"].reshape(-1, H // k, k, W // k, k, C).mean((2, 4))
        return rows | {"image": small.repeat(k, axis=1).repeat(k, axis=2)}

    def captions(self, positions: np.ndarray) -> list[str]:
        return self._source.captions(positions)


def records_folder(experiment: config.Experiment, workdir: pathlib.Path) -> str:
    """The folder that encode writes and training reads; it may be a URL."""
    return experiment.encode.path or str(workdir / "encoded")


def sources(
    experiment: config.Experiment, workdir: pathlib.Path
) -> tuple[Source, Source]:
    """The training source and the validation source of an experiment.

    Raises:
      ConfigError: files, shape, text or labels do not fit the experiment.
    """
    if experiment.encoded:
        folder = records_folder(experiment, workdir)
        train, validation = (
            encoded.Encoded(folder, experiment, split)
            for split in ("train", "validation")
        )
    else:
        train, validation = (
            Icons(experiment.data, split) for split in ("train", "validation")
        )
    classes = experiment.model.classes
    if classes not in (0, train.classes):
        have = f"has {train.classes} labels" if train.classes else "has no labels"
        raise config.ConfigError(
            f"config.model.classes = {classes}, but the {experiment.data.source} "
            f"source {have}; set model.classes = {train.classes}, or take another one"
        )
    k = experiment.data.coarse
    return (Coarse(train, k), Coarse(validation, k)) if k else (train, validation)


def null_words(text_tokens: int, classes: int) -> Rows:
    """The empty condition of a source whose text is word ids."""
    text = np.full(text_tokens, PADDING, np.int32)
    text[0] = NULL
    return {"text": text, "mask": text != PADDING, "label": np.array(classes, np.int32)}
