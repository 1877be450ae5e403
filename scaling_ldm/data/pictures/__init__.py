"""Sets of pictures with captions behind one interface, and the table of their names.

    pictures = open_pictures("webdataset", "gs://bucket/shard-{00000..00099}.tar")
    pictures.read(17)  # Picture(image=uint8 [h, w, 3], caption=..., name=...)

See `record` for the interface and each source's module for its files and options.
May import: records, config, and the rest of data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np

from scaling_ldm import config
from scaling_ldm.data import hashing, label_names
from scaling_ldm.data.pictures.examples import ArrayRecords
from scaling_ldm.data.pictures.folder import ImageFolder
from scaling_ldm.data.pictures.joined import Joined
from scaling_ldm.data.pictures.memory import memory, registered
from scaling_ldm.data.pictures.painted import Painted
from scaling_ldm.data.pictures.read import read_ahead
from scaling_ldm.data.pictures.record import (
    BadRecord,
    Picture,
    Pictures,
    decode,
    digest,
    fit,
)
from scaling_ldm.data.pictures.tables import Tables
from scaling_ldm.data.pictures.tally import Tally
from scaling_ldm.data.pictures.tar_shards import TarShards
from scaling_ldm.data.pictures.tfds import Tfds
from scaling_ldm.data.split import held_out

__all__ = [
    "PICTURES",
    "BadRecord",
    "Picture",
    "Pictures",
    "Tally",
    "chosen",
    "decode",
    "digest",
    "examples_of",
    "fit",
    "held_out",
    "is_held_out",
    "memory",
    "of_experiment",
    "open_pictures",
    "options_of",
    "read_ahead",
]

_CHOICE = 103  # stream of the hash, see data/encoded.py
# Each takes the path and, by keyword, the options that its signature names.
PICTURES: dict[str, Callable[..., Pictures]] = {
    "image_folder": ImageFolder,
    "webdataset": TarShards,
    "array_record": ArrayRecords,
    "tfds": Tfds,
    "huggingface": Tables,
    "icons": Painted,
    "memory": registered,
}
# The options that an experiment gives each of them.
_OPTIONS: dict[str, Callable[[config.Experiment], dict[str, object]]] = {
    "image_folder": lambda e: {
        "captions": e.data.captions or "auto",
        "label": e.data.label,
    },
    "webdataset": lambda e: {"caption": e.data.captions},
    "array_record": lambda e: _columns(e),
    "tfds": lambda e: {"split": e.data.split} | _columns(e),
    "huggingface": lambda e: {"split": e.data.split} | _columns(e),
    "icons": lambda e: {
        "count": e.encode.pictures,
        "validation_fraction": e.data.validation_fraction,
        "seed": e.data.seed,
    },
    "memory": lambda e: {},
}


def _columns(experiment: config.Experiment) -> dict[str, object]:
    return {"caption": experiment.data.captions, "label": experiment.data.label}


def open_pictures(source: str, path: str = "", **options: object) -> Pictures:
    """Opens the set of pictures of a source at a path.

    Args:
      source: a name in PICTURES.
      path: folder, file, pattern or URL, as the source says.
      options: of the source.

    Raises:
      ConfigError: an unknown source or option, or a path that does not hold such a set.
    """
    if source not in PICTURES:
        raise config.ConfigError(
            f"unknown source of pictures {source!r}; known: {', '.join(PICTURES)}"
        )
    known = options_of(source)
    if unknown := sorted(options.keys() - set(known)):
        raise config.ConfigError(
            f"the {source} source has no option {', '.join(unknown)}; "
            f"it has: {', '.join(known) or 'none'}"
        )
    return PICTURES[source](path, **options)


def of_experiment(experiment: config.Experiment, held_out: int = 0) -> Pictures:
    """The pictures of an experiment, before `encode.pictures` chooses some of them.

    With config.data.validation_path or validation_split, they are a `Joined`.

    Args:
      held_out: for an endless source, the number of pictures of its validation split
        to give instead; 0: those of training.

    Raises:
      ConfigError: there is no such set.
    """
    cfg = experiment.data
    options = _OPTIONS[cfg.source](experiment)
    if held_out and cfg.source in config.ENDLESS:
        options |= {"count": held_out, "split": "validation"}
    found = open_pictures(cfg.source, cfg.path, **options)
    if not (cfg.validation_path or cfg.validation_split):
        return found
    if "split" in options:
        same = cfg.split if cfg.source == "tfds" else ""  # it has to name one
        options["split"] = cfg.validation_split or same
    if isinstance(found, ImageFolder):
        options["classes"] = found.label_names  # so that labels are the same
    path = cfg.validation_path or cfg.path
    return Joined(found, open_pictures(cfg.source, path, **options), path)


def chosen(experiment: config.Experiment, found: Pictures) -> np.ndarray:
    """The positions that are encoded: int64 [n], ascending.

    All pictures, or `encode.pictures` of those to train on: the first ones, or random
    ones by `data.seed`. A separate held-out set is always encoded as a whole.
    """
    cfg = experiment.encode
    count = found.train if isinstance(found, Joined) else len(found)
    taken = np.arange(count, dtype=np.int64)
    if 0 < cfg.pictures < count:
        taken = taken[: cfg.pictures]
        if cfg.choose == "random" and experiment.data.source not in config.ENDLESS:
            key = hashing.draw(experiment.data.seed, _CHOICE, np.zeros(1, np.uint64))
            keys = np.repeat(key, cfg.pictures)
            taken = np.sort(hashing.permute(taken, keys, count))
    return np.concatenate([taken, np.arange(count, len(found), dtype=np.int64)])


def is_held_out(picture: Picture, cfg: config.DataConfig) -> bool:
    """Whether a picture is held out by the rule "caption_alone"; see data/split.py.

    An endless source has a split of its own.
    """
    if cfg.source in config.ENDLESS and picture.held_out is not None:
        return picture.held_out
    return held_out(picture.caption, cfg.validation_fraction)


def examples_of(found: Pictures, count: int = 3) -> list[str]:
    """Lines that say where a set has its captions, with examples from all over it."""
    where = getattr(found, "captions_from", "the set itself")
    lines, tried = [], len(found)
    places = [tried * i // (10 * count) for i in range(10 * count)]
    # Only readable pictures; after a bad one, the next one is tried.
    for first in range(0, len(places), 10):
        for place in dict.fromkeys(places[first : first + 10]):
            try:
                picture = found.read(place)
            except BadRecord:
                continue
            lines.append(f"  {picture.name}: {picture.caption[:100]!r}")
            break
    first = f"captions are from {where}" + (", for example" if lines else "")
    return [first, *dict.fromkeys(lines), *_labels_of(found)]


def _labels_of(found: Pictures, shown: int = 10) -> list[str]:
    """A line that says which class each label is, where folders are classes."""
    classes = label_names.of(found)
    if not classes:
        return []
    named = [f"{k} {name}" for k, name in enumerate(classes[:shown])]
    more = [f"... {len(classes) - 1} {classes[-1]}"] if len(classes) > shown else []
    return [f"labels: {', '.join(named + more)}"]


def options_of(source: str) -> list[str]:
    """The options that a source in PICTURES has."""
    return [n for n in inspect.signature(PICTURES[source]).parameters if n != "path"]
