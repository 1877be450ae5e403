"""What an experiment trains on: painted icons, encoded records, or a mix of them."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from scaling_ldm import config
from scaling_ldm.config import mix
from scaling_ldm.data import (
    encoded,
    icon_set,
    icons,
    label_names,
    mixture,
    vocabulary,
)
from scaling_ldm.data.pipeline import Rows, Source
from scaling_ldm.data.vocabulary import NULL, PADDING


class Icons:
    """The painted icons (see `icons`), with the foreground colour as the label."""

    label_names = tuple(icons.PALETTE)
    classes = len(label_names)

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
        self.vocabulary = icons.build_vocabulary(
            cfg.vocab_size, cfg.validation_fraction
        )
        self._painted = icons.PaintedIcons(
            split,
            seed=cfg.seed,
            size=side,
            validation_fraction=cfg.validation_fraction,
            vocabulary=self.vocabulary,
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
        self.identity = getattr(source, "identity", None)
        self.vocabulary = vocabulary.of(source)
        self.label_names = label_names.of(source)

    def rows(self, positions: np.ndarray) -> Rows:
        rows = self._source.rows(positions)
        H, W, C = self.shape
        k = self._factor
        small = rows["x"].reshape(-1, H // k, k, W // k, k, C).mean((2, 4))
        return rows | {"image": small.repeat(k, axis=1).repeat(k, axis=2)}

    def captions(self, positions: np.ndarray) -> list[str]:
        return self._source.captions(positions)


def records_folder(
    experiment: config.Experiment, workdir: pathlib.Path, part: str = ""
) -> str:
    """The folder that encode writes and training reads; it may be a URL.

    Args:
      experiment: of the part, if there is a mix.
      part: its name.
    """
    return experiment.encode.path or str(workdir / "encoded" / part)


def parts(
    experiment: config.Experiment, workdir: pathlib.Path
) -> dict[str, tuple[config.Experiment, str]]:
    """{name of a part: (experiment, folder of records)}; {"": ...} without a mix."""
    return {
        name: (part, records_folder(part, workdir, name))
        for name, part in mix.parts(experiment).items()
    }


@contextlib.contextmanager
def naming(part: str) -> Iterator[None]:
    """A context that adds the part of the mix to a ConfigError; "": there is no mix."""
    try:
        yield
    except config.ConfigError as e:
        if not part:
            raise
        raise config.ConfigError(f"part {part!r} of config.data.mix: {e}") from e


def sources(
    experiment: config.Experiment, workdir: pathlib.Path
) -> tuple[Source, Source]:
    """The training source and the validation source of an experiment.

    Raises:
      ConfigError: files, shape, text or labels do not fit the experiment.
    """
    if experiment.data.mix:
        train, validation = _mixed(experiment, workdir)
    elif experiment.encoded:
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
        which = f"the {experiment.data.source} source"
        if experiment.data.mix:
            which = "config.data.mix, whose parts have to have the same labels,"
        raise config.ConfigError(
            f"config.model.classes = {classes}, but {which} {have}; set model.classes "
            f"= {train.classes}, or use another source"
        )
    k = experiment.data.coarse
    return (Coarse(train, k), Coarse(validation, k)) if k else (train, validation)


def training_pictures(
    experiment: config.Experiment, workdir: pathlib.Path
) -> dict[str, int]:
    """Pictures in the training split of each part whose records are finished.

    A part that is painted while it is read is left out, because its number of pictures
    is unlimited. So is a part whose records are missing or are another experiment's.
    """
    found = {}
    for name, (part, folder) in parts(experiment, workdir).items():
        if experiment.encoded:
            with contextlib.suppress(config.ConfigError):
                found[name] = encoded.training_pictures(folder, part)
    return found


def _mixed(
    experiment: config.Experiment, workdir: pathlib.Path
) -> tuple[mixture.Mixture, mixture.Mixture]:
    """The training source and the validation source of a mix; all of it is encoded."""
    found, measured = parts(experiment, workdir), mix.held_out_parts(experiment)
    vocabularies = []
    for name, (part, folder) in found.items():
        with naming(name):
            vocabularies.append(encoded.read_manifest(folder, part)["vocabulary"])
    words, seed = mixture.ranked(vocabularies), experiment.data.seed
    splits: dict[str, dict[str, encoded.Encoded]] = {"train": {}, "validation": {}}
    for number, (name, (part, folder)) in enumerate(found.items()):
        for split, opened in splits.items():
            if split == "train" or name in measured:
                with naming(name):
                    opened[name] = encoded.Encoded(
                        folder,
                        part,
                        split,
                        words=words,
                        seed=mixture.seed_of_part(seed, number),
                    )
    _check_alike(splits["train"])
    if experiment.model.classes:
        _check_classes(splits["train"])
    weights = dict(experiment.data.mix)
    numbers = {name: number for number, name in enumerate(found)}
    train, validation = (
        mixture.Mixture(
            list(opened.values()),
            [weights[name] for name in opened],
            seed,
            numbers=[numbers[name] for name in opened],
            identity={"parts": {name: one.identity for name, one in opened.items()}},
        )
        for opened in splits.values()
    )
    return train, validation


def _check_classes(opened: Mapping[str, Source]) -> None:
    """Checks that a label means the same class in all parts.

    Raises:
      ConfigError: their names differ; it names the parts.
    """
    (first, source), *others = opened.items()
    for name, other in others:
        with naming(name):
            what = f"a network that reads labels of part {first!r}"
            label_names.refuse_others(
                label_names.of(source), label_names.of(other), what
            )


def _check_alike(opened: Mapping[str, encoded.Encoded]) -> None:
    """Checks that the records of all parts can be in one batch.

    Raises:
      ConfigError: their layouts differ; it names the parts.
    """
    (first, source), *others = opened.items()
    for name, other in others:
        for what, held in vars(source.layout).items():
            if vars(other.layout)[what] != held:
                raise config.ConfigError(
                    f"the records of parts {first!r} and {name!r} of config.data.mix "
                    f"differ in {what}: {held} and {vars(other.layout)[what]}"
                )


def null_words(text_tokens: int, classes: int) -> Rows:
    """The empty condition of a source whose text is word ids."""
    text = np.full(text_tokens, PADDING, np.int32)
    text[0] = NULL
    return {"text": text, "mask": text != PADDING, "label": np.array(classes, np.int32)}
