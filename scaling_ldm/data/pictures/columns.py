"""Chooses the columns of a table: named by the user, or with a usual name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scaling_ldm import config
from scaling_ldm.data.pictures.record import BadRecord

CAPTION = ("caption", "captions", "text", "prompt")
IMAGE = ("image", "img", "picture", "jpg", "png", "image/encoded", "image_bytes")
FILE = ("file_name", "filename", "file", "image", "path")


def choose(
    found: Iterable[str], wanted: str, usual: Sequence[str], option: str, where: str
) -> str:
    """The column for a purpose.

    Args:
      found: the columns there are.
      wanted: the user's choice; "" for the column with a usual name, in any case.
      option: how the user names it.
      where: the file, for messages.

    Raises:
      ConfigError: no such column, or several that could be meant.
    """
    found = list(found)
    hits = [name for name in found if name.lower() in usual]
    if wanted:
        hits = [name for name in found if name == wanted]
    if len(hits) == 1:
        return hits[0]
    listed = ", ".join(map(repr, found)) or "none"
    if wanted:
        raise config.ConfigError(
            f"{where}: no column {wanted!r} ({option}=); it has: {listed}"
        )
    if hits:
        raise config.ConfigError(
            f"{where}: its columns {', '.join(map(repr, hits))} could each be the "
            f"{option}; name one with {option}="
        )
    raise config.ConfigError(
        f"{where}: no column with a usual name for the {option} ({', '.join(usual)}); "
        f"it has: {listed}; name one with {option}="
    )


def optional(found: Iterable[str], wanted: str, option: str, where: str) -> str:
    """The column that the user has named, or ""; ConfigError if it is not there."""
    return choose(found, wanted, (), option, where) if wanted else ""


def first(value: object) -> object:
    """The first of several captions; None if there is none."""
    if isinstance(value, list | tuple):
        return value[0] if value else None
    return value


def whole(value: object, name: str) -> int:
    """A label as an integer.

    Raises:
      BadRecord: it is not a whole number, or it is below 0.
    """
    try:
        label = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError) as e:
        raise BadRecord(name, f"its label is {value!r}, no whole number") from e
    if label < 0:
        raise BadRecord(name, f"its label is {label}, below 0")
    return label
