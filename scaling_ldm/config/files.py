"""An experiment file -> a ConfigDict -> a checked, frozen Experiment."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from scaling_ldm.config import checks, fields, names
from scaling_ldm.config.fields import Experiment
from scaling_ldm.records.errors import ConfigError


def default() -> ml_collections.ConfigDict:
    """The default experiment (paper B's settings at 1e18 FLOPs) as a ConfigDict."""
    return to_config_dict(Experiment())


def to_config_dict(experiment: Experiment) -> ml_collections.ConfigDict:
    """The inverse of `resolve`."""
    return ml_collections.ConfigDict(dataclasses.asdict(experiment))


def check_file(path: str | os.PathLike) -> pathlib.Path:
    """The path of an experiment file that is there.

    Raises:
      ConfigError: no such file; names the nearest one.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py"))
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise ConfigError(f"no experiment file {path}{hint}")
    return path


def check_flag(arguments: Sequence[str]) -> None:
    """Checks the file of `--config FILE` or `--config=FILE`; see `check_file`."""
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag == "--config" or flag.startswith("--config="):
            path = check_file(flag.partition("=")[2] or following)
            # Its neighbours are found from any working directory, as by `load`.
            sys.path.append(str(path.resolve().parent.parent))


def load(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """Runs an experiment file's `get_config()`.

    Experiment files may import their neighbours (`from experiments import base`)
    wherever the working directory is.

    Raises:
      ConfigError: no such file, or no `get_config` in it.
    """
    path = check_file(path)
    spec = importlib.util.spec_from_file_location(f"_experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    root = str(path.resolve().parent.parent)
    sys.path.insert(0, root)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(root)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config()")
    return module.get_config()


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Experiment:
    """Checks a ConfigDict and freezes it.

    Raises:
      ConfigError: unknown keys (with the nearest known one), wrong types, values out
        of range, parts that do not fit together; all in one message.
    """
    given = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    problems: list[str] = []
    experiment = _build(Experiment, given, "config", problems)
    if not problems:
        experiment = _choose_text_encoder(experiment)
        problems = checks.problems_of(experiment)
    if problems:
        raise ConfigError(
            "this experiment cannot run:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return experiment


def _choose_text_encoder(experiment: Experiment) -> Experiment:
    """What "auto" is here; frozen features bring their width along."""
    encode, model = experiment.encode, experiment.model
    if encode.text_encoder != "auto":
        return experiment
    reads_text = model.architecture not in ("autoencoder_kl", "adaln_zero")
    features = (
        reads_text
        and experiment.encoded
        and any(importlib.util.find_spec(name) for name in names.MINILM_PACKAGES)
    )
    chosen = "minilm" if features else "vocabulary"
    if features and model.text_width == fields.ModelConfig().text_width:
        model = dataclasses.replace(model, text_width=names.MINILM_WIDTH)
    return dataclasses.replace(
        experiment,
        encode=dataclasses.replace(encode, text_encoder=chosen),
        model=model,
    )


def _build(cls: type, given: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    defaults = cls()
    known = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(cls)}
    values = {}
    for key, value in _today(given, where).items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {where}.{close[0]}? " if close else ""
            problems.append(
                f"unknown key {where}.{key}: {hint}known: {', '.join(known)}"
            )
        elif dataclasses.is_dataclass(known[key]):
            if isinstance(value, Mapping):
                values[key] = _build(
                    type(known[key]), value, f"{where}.{key}", problems
                )
            else:
                problems.append(f"{where}.{key} is a section, got {value!r}")
        else:
            values[key] = _coerce(value, known[key], f"{where}.{key}", problems)
    return cls(**values)


def _today(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given fields under today's names; says which names are old."""
    found = dict(given)
    for (section, field), old in fields.FIRST_NAMES.items():
        if where == f"config.{section}" and old in found:
            print(f"config.{section}.{old} is now config.{section}.{field}")
            found[field] = found.pop(old)
    return found


def today_flags(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with old names of fields replaced; says which they are."""
    found = list(arguments)
    for (section, field), old in fields.FIRST_NAMES.items():
        before, after = f"--config.{section}.{old}", f"--config.{section}.{field}"
        for i, argument in enumerate(found):
            if argument == before or argument.startswith(f"{before}="):
                print(f"{before} is now {after}")
                found[i] = after + argument[len(before) :]
    return found


# Tuples that may be empty, and what their elements are like.
_MAY_BE_EMPTY = {"config.plan.budgets_flops": 1.0, "config.train.checkpoint_flops": 1.0}


def _coerce(value: Any, like: Any, where: str, problems: list[str]) -> Any:
    """Checks `value` against the default's type; ints become floats, lists tuples."""
    kind = type(like)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple:
        if isinstance(value, (list, tuple)) and (value or where in _MAY_BE_EMPTY):
            element = like[0] if like else _MAY_BE_EMPTY[where]
            return tuple(_coerce(v, element, where, problems) for v in value)
        problems.append(f"{where} must be a non-empty tuple like {like!r}: {value!r}")
        return like
    if type(value) is not kind:
        problems.append(
            f"{where} must be {kind.__name__} like {like!r}, "
            f"got {type(value).__name__} {value!r}"
        )
        return like
    return value
