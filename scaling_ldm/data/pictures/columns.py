"""Chooses the columns of a table: named by the user, or with a usual name."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from scaling_ldm import config
from scaling_ldm.data.pictures.record import BadRecord

CAPTION = ("caption", "captions", "text", "prompt")
IMAGE = ("image", "img", "picture", "jpg", "png", "image/encoded", "image_bytes")
LARGEST_LABEL = 2**31 - 2  # the records have 4 bytes, and classes are one more
FILE = ("file_name", "filename", "file", "image", "path")
LABEL = ("label", "labels", "class", "category")


def choose(
    found: Iterable[str], wanted: str, usual: Sequence[str], option: str, where: str
) -> str:
    """The column for a purpose.

    Args:
      found: the names of all columns; a name that occurs twice cannot be chosen.
      wanted: the user's choice; "" for the column with a usual name, in upper or lower
        case.
      option: the name of the option that holds the user's choice.
      where: the file, for messages.

    Raises:
      ConfigError: no column fits, or several do.
    """
    found = list(found)
    hits = [name for name in found if name.lower() in usual]
    if wanted:
        hits = [name for name in found if name == wanted]
        if not hits:  # one letter may be written in two ways, as e + accent
            form = unicodedata.normalize("NFC", wanted)
            hits = [n for n in found if unicodedata.normalize("NFC", n) == form]
    if len(hits) > 1 and len(set(hits)) == 1:
        raise config.ConfigError(
            f"{where}: {len(hits)} columns are called {hits[0]!r}, and only one can be "
            f"the {option}; rename the others"
        )
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


def json_object(data: bytes, name: str) -> dict[str, object]:
    """The entries of a sample's .json.

    Raises:
      BadRecord: it is no JSON object.
    """
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as e:  # no JSON, or not UTF-8
        raise BadRecord(name, f"its .json cannot be read: {e}") from e
    if not isinstance(entries, dict):
        raise BadRecord(name, "its .json is no object")
    return entries


def caption_in(entries: dict[str, object], wanted: str, name: str) -> object:
    """The caption among the entries of a sample's .json; of several, the first.

    Args:
      wanted: the entry; "" for one with a usual name.

    Raises:
      BadRecord: there is no such entry, or several could be meant.
    """
    try:
        return first(entries[choose(entries, wanted, CAPTION, "caption", ".json")])
    except config.ConfigError as e:
        raise BadRecord(name, str(e)) from e


def class_caption(name: str) -> str:
    """The caption that the name of a class is: "grey wolf" of "grey_wolf"."""
    return name.replace("_", " ").replace("-", " ")


def first(value: object) -> object:
    """The first element of a list, None if it is empty; other values as they are."""
    if isinstance(value, list | tuple):
        return value[0] if value else None
    return value


def whole(value: object, name: str) -> int:
    """A label as an integer: 7, 7.0, "7" or b"7.0".

    Raises:
      BadRecord: it is missing or no whole number, or not in 0..LARGEST_LABEL.
    """
    if isinstance(value, bytes):
        value = value.decode("ascii", "backslashreplace")
    if value is None or isinstance(value, str) and not value.strip():
        raise BadRecord(name, "it has no label")
    if isinstance(value, str):
        number = re.fullmatch(r"\s*([+-]?\d{1,20})(?:\.0*)?\s*", value, re.ASCII)
        found = int(number[1]) if number else None
    elif isinstance(value, float | np.floating):
        found = int(value) if float(value).is_integer() else None
    else:
        found = int(value) if isinstance(value, int | np.integer | np.bool_) else None
    if found is None:
        raise BadRecord(name, f"its label is {_shown(value)}, no whole number")
    if not 0 <= found <= LARGEST_LABEL:
        told = f"below 0 or above {LARGEST_LABEL:,}"
        raise BadRecord(name, f"its label is {_shown(found)}, {told}")
    return found


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        text = "a number of thousands of digits"
    return text if len(text) <= 50 else f"{text[:50]}..."
