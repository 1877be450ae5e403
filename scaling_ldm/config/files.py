"""An experiment file -> an ExperimentDict -> a checked, frozen Experiment."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from scaling_ldm.config import (
    axes,
    checks,
    fields,
    identity,
    mix,
    names,
    objective_kind,
    reads,
)
from scaling_ldm.config.experiment_dict import given_as, unknown
from scaling_ldm.config.fields import Experiment
from scaling_ldm.records.errors import ConfigError

_LIBRARY = pathlib.Path(__file__).resolve().parents[1]
_STANDARD = {  # Python's own modules
    pathlib.Path(sysconfig.get_path(name)).resolve()
    for name in ("stdlib", "platstdlib")
}


def load(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """Runs an experiment file's `get_config()`.

    Experiment files may import their neighbours (`from experiments import base`) from
    any working directory.

    Raises:
      ConfigError: there is no such file, it defines no `get_config`, or its code fails;
        the message has the file, the line and the error.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        close = names.nearest(
            path.name, sorted(p.name for p in path.parent.glob("*.py"))
        )
        hint = f"; did you mean {path.parent / close}?" if close else ""
        raise ConfigError(f"no experiment file {path}{hint}")
    root = str(path.resolve().parent.parent)
    sys.path.insert(0, root)
    try:
        defined = runpy.run_path(str(path), run_name=f"_experiment_{path.stem}")
        get_config = defined.get("get_config")
        found = get_config() if callable(get_config) else None
    except (Exception, SystemExit) as e:
        raise ConfigError(_failure(e, path)) from e
    finally:
        with contextlib.suppress(ValueError):  # the file may change sys.path, too
            sys.path.remove(root)
    if not callable(get_config):
        raise ConfigError(f"{path} defines no get_config()")
    if not isinstance(found, ml_collections.ConfigDict):
        raise ConfigError(
            f"get_config() of {path} returns {type(found).__name__}, not a config: "
            "return scaling_ldm.config.default() with fields changed"
        )
    if "objective" in found and not found.objective.get("folder", "."):
        found.objective.folder = str(path.resolve().parent)
    return found


def _failure(error: BaseException, path: pathlib.Path) -> str:
    """What failed in an experiment file or its neighbours, and on which lines."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if _of_the_user(frame.filename, path.resolve())
    ]
    lines = [f"{path} fails:"]
    lines += [f"  {f.filename}:{f.lineno} in {f.name}: {f.line}" for f in frames[-3:]]
    said = traceback.format_exception_only(error)  # of a SyntaxError: file and line too
    return "\n".join([*lines, *(f"  {line}" for line in "".join(said).splitlines())])


def _of_the_user(filename: str, experiment: pathlib.Path) -> bool:
    """Whether a frame's file is the experiment, or neither the library nor installed.

    The library may lie in the experiment's own folder, as in a checkout's root.
    """
    if filename.startswith("<"):  # <frozen runpy> is no file
        return False
    file = pathlib.Path(filename).resolve()
    if file == experiment:
        return True
    folders = (_LIBRARY, *_STANDARD)
    return not (
        {"site-packages", "dist-packages"} & {*file.parts}
        or any(folder in file.parents for folder in folders)
    )


def resolve(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    unknown: Iterable[identity.Field] = (),
) -> Experiment:
    """Checks an experiment, as a ConfigDict or nested dicts, and freezes it.

    Args:
      unknown: fields that the continued working directory was made without; see
        `continued`.

    Raises:
      ConfigError: unknown keys (with the nearest known one), wrong types, values out
        of range, parts that do not fit together. One message has all of them.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    problems: list[str] = []
    experiment = _build(Experiment, values, "config", problems)
    if not problems:
        experiment = objective_kind.resolved(experiment, problems)
    if not problems:
        given = _choose_text_encoder(experiment)
        experiment = identity.continued(given, unknown)
        # A value that `continued` has set may be unread; that is no error.
        of_before = {*reads.unread(experiment)} - {*reads.unread(given)}
        problems = [p for p in checks.problems_of(experiment) if p not in of_before]
        problems += axes.problems_of(experiment)
    _refuse(problems)
    return experiment


def _refuse(problems: list[str]) -> None:
    """Raises ConfigError if there are reasons why an experiment cannot run."""
    if problems:
        raise ConfigError(
            "this experiment cannot run:\n" + "\n".join(f"  - {p}" for p in problems)
        )


def continued(experiment: Experiment, unknown: Iterable[identity.Field]) -> Experiment:
    """The experiment with the values that an older working directory was made with.

    Args:
      unknown: the fields that the directory's version did not know. Each of them that
        is at its default takes its value in `identity.SINCE`, even if nothing reads it.

    Raises:
      ConfigError: other fields do not fit these values.
    """
    found = identity.continued(experiment, unknown)
    unread = reads.unread(found)
    _refuse([p for p in checks.problems_of(found) if p not in unread])
    return found


def _choose_text_encoder(experiment: Experiment) -> Experiment:
    """Replaces "auto" by an encoder; minilm also sets the width of its features."""
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
    """An instance of a config class; appends what is wrong with the given values."""
    defaults = cls()
    known = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(cls)}
    values = {}
    for key, value in _current(given, where).items():
        if key not in known:
            problems.append(unknown(key, list(known), f"{where}."))
        elif dataclasses.is_dataclass(known[key]):
            if isinstance(value, Mapping):
                values[key] = _build(
                    type(known[key]), value, f"{where}.{key}", problems
                )
            else:
                problems.append(f"{where}.{key} is a section, got {value!r}")
        elif reader := _PAIRS.get(f"{where}.{key}"):
            given = axes.pairs(value)
            values[key] = reader(given, f"{where}.{key}", _coerce, problems)
        else:
            values[key] = _coerce(value, known[key], f"{where}.{key}", problems)
    return cls(**values)


def _current(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given fields and values under their current names; says which are old."""
    found = dict(given)
    for (section, field), first in identity.FIRST_NAMES.items():
        if where == f"config.{section}" and first in found:
            found |= given_as(section, field, found.pop(first))
    return found


# Fields that hold pairs -> what checks their values.
_PAIRS = {
    "config.plan.axes": axes.read,
    "config.plan.axes_only": axes.read,
    "config.data.mix": mix.read_mix,
    "config.data.parts": mix.read_parts,
}
# Each tuple that may be empty -> an element of the right type.
_MAY_BE_EMPTY: dict[str, Any] = {
    "config.optimizer.rate_law_constants": 1.0,
    "config.optimizer.rate_law_at": 1.0,
    "config.plan.budgets_flops": 1.0,
    "config.train.checkpoint_flops": 1.0,
    "config.train.save_signals": "SIGUSR1",
    "config.train.stop_signals": "SIGUSR2",
    "config.train.init_exceptions": "",
    "config.generate.captions": "",
    "config.evaluate.held_out": "",
    "config.fit.protocols": "",
    "config.report.published": "",
    "config.compare.studies": "",
    "config.compare.groups": "",
    "config.compare.budgets": 1.0,
}


def _coerce(value: Any, like: Any, where: str, problems: list[str]) -> Any:
    """Checks `value` against the default's type; ints become floats, lists tuples.

    A number that is not finite is refused here, so in every field that holds one.
    """
    kind = type(like)
    if kind is float and type(value) in (int, float):
        if abs(value) <= sys.float_info.max:
            return float(value)
        problems.append(f"{where} = {value}: must be finite")
        return like
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
