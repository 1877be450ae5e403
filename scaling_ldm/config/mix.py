"""The parts of a study's pictures, and their shares of its training stream.

    c.data.mix = {"own": 0.8, "prior": 0.2}
    c.data.parts = {
        "own": {"source": "image_folder", "path": "photos"},
        "prior": {"source": "icons", "encode.pictures": 2000},
    }

A part is the experiment with some fields changed: those that `data.parts` gives it. A
part that names its own source ignores the fields of config.data that say which pictures
there are.

An experiment keeps both as tuples of (name, value) pairs, which is also how they are
given on the command line. Everything here is a pure function of an experiment.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from scaling_ldm.config import fields, names

# Fields of config.data that say which pictures there are.
_READ = dict.fromkeys(f for t in names.DATA_SOURCES.values() for f in t)
_HOW = ("split_by", "validation_minimum")  # how they are held out: from config.data
PICTURES = ("source", *(field for field in _READ if field not in _HOW))
# Fields that a part may have of its own.
FIELDS = ("source", *_READ, "encode.path", "encode.pictures")
EVERY = "mix"  # as config.validation.part: the held-out pictures of every part
SMALLEST = 1e-6  # share of a part

Coerce = Callable[[Any, Any, str, list[str]], Any]


def read_mix(given: Any, where: str, coerce: Coerce, problems: list[str]) -> Any:
    """`data.mix` as (name, share) pairs.

    Args:
      given: pairs.
      where: the field, for messages.
      coerce: (value, one of the right type, its place, problems) -> the value.
      problems: gets a line for everything that is wrong.
    """
    if not _are_pairs(given):
        problems.append(
            f"{where} = {given!r}: must be {{name: share}}, or (name, share) pairs, as "
            'in (("own", 0.8), ("prior", 0.2))'
        )
        return ()
    return tuple(
        (name, coerce(share, 1.0, f"{where}[{name!r}]", problems))
        for name, share in given
    )


def read_parts(given: Any, where: str, coerce: Coerce, problems: list[str]) -> Any:
    """`data.parts` as pairs of a name and (field, value) pairs; see `read_mix`."""
    if not _are_pairs(given) or not all(_are_pairs(own) for _, own in given):
        problems.append(
            f"{where} = {given!r}: must be {{name: {{field: value}}}}, or pairs with a "
            'comma behind each, as in (("prior", (("path", "photos"),)),)'
        )
        return ()
    found = []
    for name, own in given:
        place, values = f"{where}[{name!r}]", []
        for field, value in own:
            if field in FIELDS:
                likes = _of(fields.Experiment(), field)
                typed = coerce(value, likes, f"{place}: {field}", problems)
                values.append((field, typed))
                continue
            close = names.nearest(field, FIELDS)
            hint = f"did you mean {close}? " if close else ""
            problems.append(
                f"{place}: {field} is no field of a part; {hint}known: "
                f"{', '.join(FIELDS)}"
            )
        found.append((name, tuple(values)))
    return tuple(found)


def _are_pairs(given: Any) -> bool:
    return isinstance(given, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in given
    )


def _of(e: fields.Experiment, field: str) -> Any:
    section, _, name = field.rpartition(".")
    return getattr(getattr(e, section or "data"), name)


def parts(e: fields.Experiment) -> dict[str, fields.Experiment]:
    """The experiment of each part, by its name; {"": e} if there is no mix.

    They keep `data.mix`, as a sign that their pictures are a part of one.
    """
    if not e.data.mix:
        return {"": e}
    return {name: _part(e, name) for name, _ in e.data.mix}


def _part(e: fields.Experiment, name: str) -> fields.Experiment:
    own = dict(dict(e.data.parts).get(name, ()))
    data: dict[str, Any] = {"parts": ()}
    if "source" in own:
        default = fields.DataConfig()
        read = names.DATA_SOURCES.get(own["source"], ())
        other = (*PICTURES, *(field for field in _HOW if field not in read))
        data |= {field: getattr(default, field) for field in other}
    encode: dict[str, Any] = {}
    if e.encode.path:
        encode["path"] = f"{e.encode.path.rstrip('/')}/{name}"
    for field, value in own.items():
        section, _, last = field.rpartition(".")
        (encode if section else data)[last] = value
    return dataclasses.replace(
        e,
        data=dataclasses.replace(e.data, **data),
        encode=dataclasses.replace(e.encode, **encode),
    )


def held_out_parts(e: fields.Experiment) -> list[str]:
    """The names of the parts whose held-out pictures are measured."""
    every, chosen = list(parts(e)), e.validation.part
    if chosen == EVERY:
        return every
    return [chosen] if chosen else every[:1]


def held_out_part(e: fields.Experiment) -> fields.Experiment:
    """The experiment of the one part whose held-out pictures are compared with."""
    (name,) = held_out_parts(e)
    return parts(e)[name]


def described(e: fields.Experiment) -> str:
    """The source and seed of the held-out pictures, in words."""
    each = parts(e)
    if "" in each:
        return f"{e.data.source} {e.data.seed}"
    chosen, shares = held_out_parts(e), dict(e.data.mix)
    said = ", ".join(f"{name} ({each[name].data.source})" for name in chosen)
    if len(chosen) > 1:
        said += " in shares " + " : ".join(f"{shares[name]:g}" for name in chosen)
    return f"{said} {e.data.seed}"


def problems_of(
    e: fields.Experiment, of_part: Callable[[fields.Experiment], list[str]]
) -> list[str]:
    """Every reason why an experiment with its parts cannot run; empty if it can.

    Args:
      of_part: what is wrong with the experiment of one part.
    """
    found = _problems_of_mix(e)
    each = {name: of_part(part) for name, part in parts(e).items()}
    shared = set.intersection(*map(set, each.values()))
    for name, problems in each.items():
        found += [p for p in problems if p in shared and p not in found]
        where = f"config.data.parts[{name!r}]: "
        found += [where + p for p in problems if p not in shared]
    return found


def _problems_of_mix(e: fields.Experiment) -> list[str]:
    """What is wrong with the names, shares and folders of the parts."""
    names_of_mix = [name for name, _ in e.data.mix]
    found = _problems_of_shares(e)
    given = [name for name, _ in e.data.parts]
    for name, own in e.data.parts:
        where = f"config.data.parts[{name!r}]"
        if name not in names_of_mix:
            listed = ", ".join(names_of_mix) or "no parts"
            found.append(f"{where}: config.data.mix has {listed}")
        fields_of_part = [field for field, _ in own]
        if given.count(name) > 1 or len(set(fields_of_part)) < len(own):
            found.append(f"{where}: the part or one of its fields is given twice")
    part = e.validation.part
    if part and part not in (*names_of_mix, *([EVERY] if names_of_mix else [])):
        known = ", ".join((*names_of_mix, EVERY)) if names_of_mix else "no parts"
        found.append(f"config.validation.part = {part!r}: config.data.mix has {known}")
    if e.data.mix:
        found += _problems_of_records(e)
    measured = e.evaluate.network != "none" and not e.evaluate.reference
    if part == EVERY and measured:
        found.append(
            f"config.validation.part = {EVERY!r} with config.evaluate.network: real "
            "pictures are those of one part; name it, or give a file of statistics in "
            "config.evaluate.reference"
        )
    return found


def _problems_of_shares(e: fields.Experiment) -> list[str]:
    mix, found = e.data.mix, []
    if not mix:
        return found
    shares = [share for _, share in mix]
    if not all(share > 0 for share in shares):
        found.append(f"config.data.mix = {mix}: shares must be positive")
    elif min(shares) < SMALLEST * math.fsum(shares):
        found.append(f"config.data.mix = {mix}: no share may be below {SMALLEST:g}")
    if len({name for name, _ in mix}) < len(mix) or len(mix) < 2:
        found.append(
            f"config.data.mix = {mix}: must have at least two parts, each once; for a "
            "single source, set config.data.source and the fields beside it"
        )
    for name, _ in mix:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or name == EVERY:
            found.append(
                f"config.data.mix: a part cannot be called {name!r}; letters, digits, "
                f"'_', '-' and '.', and not {EVERY!r}"
            )
    return found


def _problems_of_records(e: fields.Experiment) -> list[str]:
    """Folders that two parts share, and fields that no part reads."""
    found = []
    folders: dict[str, str] = {}
    for name, part in parts(e).items():
        folder = part.encode.path.rstrip("/")
        if folder and folder in folders:
            found.append(
                f"config.data.parts: {folders[folder]} and {name} have the same "
                f"encode.path, {folder}: each part has its own"
            )
        folders.setdefault(folder, name)
    own = dict(e.data.parts)
    if all("source" in dict(own.get(name, ())) for name, _ in e.data.mix):
        default = fields.DataConfig()
        for field in PICTURES:
            if getattr(e.data, field) != getattr(default, field):
                found.append(
                    f"config.data.{field} = {getattr(e.data, field)!r} is not read: "
                    "every part of config.data.mix has a source of its own"
                )
    return found
