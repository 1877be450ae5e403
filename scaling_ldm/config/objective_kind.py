"""Which objective trains the network: one of names.OBJECTIVES, or one of your own.

Your own is a function of a Python file or module: `FILE.py:FUNCTION`, where FILE is
relative to the folder of the experiment file, or `package.module:FUNCTION`. The
experiment keeps the name of the file, not its place, and a digest of its text. So the
recipe is the same on every machine, and a changed objective is another recipe. What
the file imports from elsewhere is not part of the digest.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib

from scaling_ldm import records
from scaling_ldm.config import names
from scaling_ldm.config.fields import Experiment, ObjectiveConfig
from scaling_ldm.records.errors import ConfigError

_FORMS = "FILE.py:FUNCTION beside the experiment file, or package.module:FUNCTION"


def is_own(kind: str) -> bool:
    """Whether an objective is a user's own function."""
    return ":" in kind


def source(cfg: ObjectiveConfig) -> pathlib.Path:
    """The file that holds an objective of your own.

    Raises:
      ConfigError: there is no such file or module.
    """
    place, _, function = cfg.kind.rpartition(":")
    where = f"config.objective.kind = {cfg.kind!r}"
    if not place or not function.isidentifier():
        raise ConfigError(f"{where}: must be {_FORMS}")
    if place.endswith(".py"):
        path = pathlib.Path(cfg.folder).expanduser() / pathlib.Path(place).expanduser()
        if not path.is_file():
            raise ConfigError(f"{where}: there is no file {path}")
        return path
    try:
        found = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.origin or not found.origin.endswith(".py"):
        raise ConfigError(
            f"{where}: there is no module {place!r} that can be imported; give {_FORMS}"
        )
    return pathlib.Path(found.origin)


def digest(path: pathlib.Path) -> str:
    """The digest of a file's text, which the recipe holds."""
    return records.digest(path.read_text(encoding="utf-8"))


def resolved(e: Experiment, problems: list[str]) -> Experiment:
    """The experiment with the file of its objective found and its text digested.

    Args:
      problems: gets a line for everything that is wrong.
    """
    cfg = e.objective
    if not is_own(cfg.kind):
        if cfg.digest:
            problems.append(
                f"config.objective.digest = {cfg.digest!r} is not read by "
                f"config.objective.kind = {cfg.kind!r}; its default is ''"
            )
        cfg = dataclasses.replace(cfg, folder="")
        return dataclasses.replace(e, objective=cfg)
    try:
        path = source(cfg)
        text = digest(path)
    except ConfigError as error:
        problems.append(str(error))
        return e
    if cfg.digest not in ("", text):
        problems.append(
            f"config.objective.digest = {cfg.digest!r}, but the digest of {path} is "
            f"{text}: the file has changed. Put the old one back, or remove the field"
        )
    kind, folder = cfg.kind, ""
    if kind.rpartition(":")[0].endswith(".py"):
        kind = f"{path.name}:{kind.rpartition(':')[2]}"
        folder = str(path.resolve().parent)
    cfg = dataclasses.replace(cfg, kind=kind, folder=folder, digest=text)
    return dataclasses.replace(e, objective=cfg)


def problems_of(e: Experiment) -> list[str]:
    """Why this objective cannot train this network; empty if it can."""
    kind, network = e.objective.kind, e.model.architecture
    if kind == "auto" or is_own(kind):
        return []
    if kind not in names.OBJECTIVES:
        known = ("auto", *names.OBJECTIVES)
        close = names.nearest(kind, known)
        hint = f" (did you mean {close!r}?)" if close else ""
        return [
            f"config.objective.kind = {kind!r}; known: {', '.join(known)}{hint}; or "
            f"your own: {_FORMS}"
        ]
    if network in names.ARCHITECTURES and network not in names.OBJECTIVES[kind]:
        return [
            f"config.objective.kind = {kind!r} does not train config.model."
            f"architecture = {network!r}; it trains: "
            f"{', '.join(names.OBJECTIVES[kind])}"
        ]
    return []
