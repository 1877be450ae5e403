"""The mutable form of an experiment: what an experiment file changes."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Generator, Mapping
from typing import Any

import ml_collections

from scaling_ldm.config import axes, names
from scaling_ldm.config.fields import Experiment
from scaling_ldm.config.identity import FIRST_NAMES, current
from scaling_ldm.records.errors import UnknownKey


@contextlib.contextmanager
def _as_unknown_key() -> Generator[None, None, None]:
    """A context in which UnknownKey stays itself: ml_collections wraps KeyErrors."""
    try:
        yield
    except AttributeError as e:
        if e.args and isinstance(e.args[0], UnknownKey):
            raise e.args[0] from None
        raise


class ExperimentDict(ml_collections.ConfigDict):
    """A ConfigDict that explains an unknown field and accepts a renamed one.

    An experiment file is stopped at the line that sets or reads a field that does not
    exist, with the nearest one. The first name of a renamed field stands for its
    current name. A mapping for a field that holds a tuple becomes pairs, so that its
    keys may have dots.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        if self.is_locked and (renamed := self._renamed(key)):
            for name, current_value in given_as(*renamed, value).items():
                super().__setitem__(name, current_value)
            return
        if self.is_locked and key not in self:
            raise UnknownKey(unknown(key, self.keys()))
        if isinstance(value, Mapping) and isinstance(self.get(key), tuple):
            value = axes.pairs(value)
        super().__setitem__(key, value)

    def __getitem__(self, key: str) -> Any:
        if renamed := self._renamed(key):
            say_renamed(*renamed)
            key = renamed[1]
        if key not in self:
            raise UnknownKey(unknown(key, self.keys()))
        return super().__getitem__(key)

    def __setattr__(self, attribute: str, value: Any) -> None:
        with _as_unknown_key():
            super().__setattr__(attribute, value)

    def __getattr__(self, attribute: str) -> Any:
        with _as_unknown_key():
            return super().__getattr__(attribute)

    def _renamed(self, key: str) -> tuple[str, str] | None:
        """Section and current name of a field under its first name."""
        for (section, field), first in FIRST_NAMES.items():
            if key == first and key not in self and field in self:
                return section, field
        return None


def unknown(key: str, known: list[str], section: str = "") -> str:
    """One line about a field that does not exist: the nearest one, and all of them."""
    close = names.nearest(key, known, cutoff=0.5)
    hint = f"did you mean {section}{close}? " if close else ""
    return f"unknown key {section}{key}: {hint}known: {', '.join(known)}"


def say_renamed(section: str, field: str) -> None:
    """Tells the user, on standard error, that a field has a new name."""
    first = FIRST_NAMES[section, field]
    print(
        f"config.{section}.{first} is now config.{section}.{field}",
        file=sys.stderr,
        flush=True,
    )


def given_as(section: str, field: str, value: Any) -> dict[str, Any]:
    """As `identity.current`; tells the user the current fields and values."""
    found = current(section, field, value)
    if found == {field: value}:
        say_renamed(section, field)
        return found
    first = FIRST_NAMES[section, field]
    said = ", ".join(f"config.{section}.{n} = {v!r}" for n, v in found.items())
    said = f"config.{section}.{first} = {value!r} is now {said}"
    print(said, file=sys.stderr, flush=True)
    return found


def default() -> ExperimentDict:
    """The default experiment (paper B's settings at 1e18 FLOPs), to be changed."""
    return to_config_dict(Experiment())


def to_config_dict(experiment: Experiment) -> ExperimentDict:
    """The inverse of `resolve`."""
    found = ExperimentDict()
    for name, value in dataclasses.asdict(experiment).items():
        found[name] = ExperimentDict(value) if isinstance(value, dict) else value
    found.lock()
    return found
