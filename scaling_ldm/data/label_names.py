"""The names of labels: those of the folders that are classes, or a set's own.

    labels.json   the names by label, beside weights that read labels

A label means nothing without its class. So the names go with the weights, as the words
of a vocabulary do, and are compared before labels are given to a network.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ldm import config, records

FILE = "labels.json"
Names = tuple[str, ...]


def of(source: Any) -> Names:
    """The names of the labels of a `data.Source`, or of `Pictures`; (): unknown."""
    return tuple(getattr(source, "label_names", ()))


def read_by(conditioning: Sequence[str], source: Any) -> Names:
    """The names of the labels that a network reads of a source; (): none, or unknown.

    Args:
      conditioning: of the network.
      source: a `data.Source`.
    """
    return of(source) if "label" in conditioning else ()


def refuse_others(there: Sequence[str], here: Sequence[str], what: str) -> None:
    """Refuses labels of other classes than those that a network learnt.

    Args:
      there: the names that it learnt; (): unknown, so that nothing is compared.
      here: those of the pictures here.
      what: what learnt them, for the message.

    Raises:
      ConfigError: they differ.
    """
    if not there or not here or tuple(there) == tuple(here):
        return
    first = next(
        (
            f"; label {i} is {a!r} there, {b!r} here"
            for i, (a, b) in enumerate(zip(there, here, strict=False))
            if a != b
        ),
        "",
    )
    raise config.ConfigError(
        f"{what} learnt other classes than these pictures have: {len(there)} there, "
        f"{len(here)} here{first}"
    )


def refuse_number(classes: int, names: Sequence[str], distinct: int) -> None:
    """Refuses pictures whose labels are not as many as the network has, if it is known.

    Args:
      classes: config.model.classes; 0: the network reads no labels.
      names: of the labels of the pictures; (): unknown.
      distinct: the number of different labels. Without names, there may be labels that
        no picture has, so only a larger number than `classes`, and 0, are refused.

    Raises:
      ConfigError: it is another number.
    """
    if not classes or classes == len(names):
        return
    if not names and 0 < distinct <= classes:
        return
    found = len(names) or distinct
    raise config.ConfigError(
        f"config.model.classes = {classes}, but the pictures have "
        f"{f'{found:,} labels' if found else 'no labels'}; set model.classes = {found}"
    )


def refuse_labels(classes: int, names: Sequence[str], labels: np.ndarray) -> None:
    """Refuses the labels of all pictures where a network of so many classes would be.

    Args:
      classes, names: as of `refuse_number`.
      labels: int64 [n]; below 0 for a picture without one.

    Raises:
      ConfigError: some pictures have no label, so that none counts; or the labels are
        of another number of classes.
    """
    if not classes:
        return
    known = labels[labels >= 0]
    refuse_number(classes, names, len(np.unique(known)))
    if len(known) < len(labels):
        raise config.ConfigError(
            f"config.model.classes = {classes}, but {len(labels) - len(known):,} of "
            f"{len(labels):,} pictures have no label; leave them out, or set "
            "model.classes = 0"
        )
    largest = int(known.max())
    wanted = max(len(names), largest + 1)
    if wanted != classes:
        raise config.ConfigError(
            f"config.model.classes = {classes}, but the largest label of the pictures "
            f"is {largest}; set model.classes = {wanted}"
        )


def write(path: pathlib.Path, names: Sequence[str], of: str = "") -> None:
    """Writes the names for `read`.

    Args:
      of: the recipe hash of the run that learns them; "": the file is of no run.
    """
    held = {"digest": records.digest(list(names)), "names": list(names)}
    records.write_json(path, ({"of": of} if of else {}) | held)


def read(path: pathlib.Path, of: str = "") -> Names:
    """The names in a file that `write` wrote; () if there is none.

    Args:
      of: the recipe hash of the run that learnt them; "": it is not compared.

    Raises:
      Damaged: it is not what was written, or is another run's.
      NewerVersion: a newer version of the library wrote it.
    """
    if not path.exists():
        return ()
    held = records.read_json(path)
    records.check_owner(held, of, path)
    names = held.get("names")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise records.Damaged(f"{path} holds no list of names")
    if records.digest(names) != held.get("digest"):
        raise records.Damaged(f"{path} does not hold the names that were written")
    return tuple(names)


def unlabelled(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A line where labels do not count, because some pictures have none; or ""."""
    labels, total = (sum(s[name] for s in summaries) for name in ("labels", "records"))
    if labels in (0, total):
        return ""
    return f"\n  labels are left out: {labels:,} of {total:,} pictures have one"
