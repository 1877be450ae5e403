"""Records as JSON lines.

Every record is a frozen dataclass. It becomes one JSON line and is read back equal.
A line says which schema it has; `upgrade` turns that of an older version into today's
and refuses that of a newer one. Unknown keys are an error. Non-finite numbers are
written as the strings "nan", "inf" and "-inf", so that the files stay standard JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from scaling_ldm.records import comparison, places, upgrade
from scaling_ldm.records.compiled import Collective, CompiledProgram
from scaling_ldm.records.errors import Damaged, NewerVersion
from scaling_ldm.records.frontier import (
    Advice,
    BestGuidance,
    Cell,
    Choice,
    Crossing,
    Front,
    Frontier,
    FrontPoint,
    MeasuredCell,
)
from scaling_ldm.records.goodput import Attempt
from scaling_ldm.records.laws import (
    FitResult,
    HeldOut,
    Interval,
    LeftOut,
    LossForm,
    MinimaEstimate,
    OffsetLaw,
    Parabola,
    Parametric,
    PowerLaw,
    Refusal,
)
from scaling_ldm.records.measurements import Measurement
from scaling_ldm.records.rate_laws import BestRate, RateFit, RateLaw
from scaling_ldm.records.runs import (
    EvalRecord,
    Evaluation,
    RunSpec,
    SampleRecord,
    TrainRecord,
)
from scaling_ldm.records.whole_files import write_text

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


_RECORDS = {
    cls.__name__: cls
    for cls in (
        RunSpec,
        TrainRecord,
        SampleRecord,
        EvalRecord,
        Evaluation,
        Measurement,
        Attempt,
        Interval,
        Refusal,
        Parabola,
        PowerLaw,
        OffsetLaw,
        Parametric,
        HeldOut,
        LeftOut,
        LossForm,
        MinimaEstimate,
        FitResult,
        BestRate,
        RateLaw,
        RateFit,
        Cell,
        MeasuredCell,
        Choice,
        BestGuidance,
        FrontPoint,
        Front,
        Crossing,
        Advice,
        Frontier,
        Collective,
        CompiledProgram,
        *comparison.RECORDS,
    )
}


def to_json(value: Any) -> Any:
    """Turns a record (or any nesting of them) into plain JSON values.

    A record becomes a dict with its class name under "record".
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
        return {"record": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def from_json(value: Any, version: str = upgrade.SCHEMA) -> Any:
    """The inverse of `to_json`.

    Args:
      version: schema of the file that holds the value. Fields that have a default may
        be missing: they are newer than the file.

    Raises:
      ValueError: an unknown record name, fields that are missing or unknown, or a field
        whose value is of another type.
    """
    return _built(upgrade.upgraded(value, version))


def _built(value: Any) -> Any:
    """Records from JSON values of the current schema."""
    if isinstance(value, list):
        return tuple(map(_built, value))
    if not isinstance(value, dict):
        return value
    if "record" not in value:
        return {k: _built(v) for k, v in value.items()}
    name = value["record"]
    if name not in _RECORDS:
        raise ValueError(
            f"unknown record {name!r}; known: {', '.join(sorted(_RECORDS))}"
        )
    cls = _RECORDS[name]
    given = {k: _built(v) for k, v in value.items() if k != "record"}
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    missing = {k for k, f in fields.items() if k not in given and _required(f)}
    if missing or given.keys() - fields.keys():
        raise ValueError(
            f"{name}: missing {sorted(missing)}, "
            f"unknown {sorted(given.keys() - fields.keys())}"
        )
    for k, v in given.items():
        if (
            isinstance(v, str)
            and v in _NON_FINITE
            and hints[k] in (float, float | None)
        ):
            given[k] = _NON_FINITE[v]
        if not _is_of(given[k], hints[k]):
            wanted = getattr(hints[k], "__name__", hints[k])
            raise ValueError(f"{name}: {k} is {str(v)[:80]!r}, which is not {wanted}")
    return cls(**given)


_hints = functools.cache(typing.get_type_hints)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value of a record's field is of the type that the field has."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if kind in (typing.Union, types.UnionType):
        return any(_is_of(value, part) for part in parts)
    if kind is tuple:
        each = parts[:1] * len(value) if parts[-1] is ... else parts
        return isinstance(value, tuple) and all(map(_is_of, value, each))
    if kind is not None:
        return isinstance(value, kind) and all(
            _is_of(v, parts[-1]) for v in value.values()
        )
    return isinstance(value, hint)


def _required(field: dataclasses.Field[Any]) -> bool:
    """Whether a record cannot be made without this field."""
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def dumps(record: Any) -> str:
    """One JSON line with the version of its schema, without the newline.

    Args:
      record: a record, or a mapping of values and records.
    """
    return json.dumps(upgrade.stamped(to_json(record)), allow_nan=False)


def loads(line: str | bytes, where: object = "a record", kind: Any = object) -> Any:
    """A record from one JSON line.

    Args:
      where: the file, for a message.
      kind: the class of record that it must be.

    Raises:
      Damaged: the line is not a record of this class.
      NewerVersion: a newer version of the library wrote it.
    """
    try:
        value = parse_object(line)
        version = upgrade.known_version(value, where)
        if upgrade.is_changed(value):
            raise ValueError(upgrade.CHANGED)
        found = from_json(upgrade.bare(value), version)
    except NewerVersion:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise Damaged(f"not a record: {e}") from e
    if not isinstance(found, kind):
        raise Damaged(f"it holds no {kind.__name__}")
    return found


def parse_object(data: str | bytes) -> dict[str, Any]:
    """Parses a JSON object in text of any origin; ValueError says why it is none."""
    try:
        value = json.loads(data.decode() if isinstance(data, bytes) else data)
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 text (byte {e.start})") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {e}") from e
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read(path: str | os.PathLike, kind: Any = object) -> Any:
    """The record of a file that holds one.

    Args:
      kind: the class of record that it must be.

    Raises:
      Damaged: the file does not hold such a record.
      NewerVersion: a newer version of the library wrote it.
    """
    try:
        return loads(places.place(path).read_bytes(), path, kind)
    except Damaged as e:
        raise Damaged(f"{path}: {e}") from e


def write_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Writes one JSON object with the version of its schema; see `whole_files`."""
    text = json.dumps(upgrade.stamped(to_json(value)), indent=1, allow_nan=False)
    write_text(path, text + "\n")


def json_object(
    data: bytes, where: object, *keys: str, stamped: bool = True
) -> dict[str, Any]:
    """The JSON object in the bytes of a file; nothing in it is upgraded.

    Args:
      where: the file, for a message.
      keys: the keys that it must have.
      stamped: whether the version of its schema is checked.

    Raises:
      Damaged: the bytes are not a JSON object, or it lacks one of the keys.
      NewerVersion: a newer version of the library wrote it.
    """
    try:
        value = parse_object(data)
    except ValueError as e:
        raise Damaged(f"{where} is {e}") from e
    if stamped:
        upgrade.version_of(value, where)
    if missing := [key for key in keys if key not in value]:
        raise Damaged(f"{where} lacks {', '.join(missing)}")
    return value


def read_json(path: str | os.PathLike, *keys: str) -> dict[str, Any]:
    """The JSON object of a file; raises as `json_object`."""
    return json_object(places.place(path).read_bytes(), path, *keys)


def check_owner(held: Mapping[str, Any], of: str, path: object) -> None:
    """Refuses the file of another run, which somebody has put in its place.

    Args:
      held: what the file holds; "of" is the recipe hash of its run, if it says one.
      of: the recipe hash that is wanted; "": any.

    Raises:
      Damaged: the recipes differ.
    """
    theirs = held.get("of") or of
    if of and theirs != of:
        raise Damaged(f"{path} is that of another run (recipe {theirs}; wanted {of})")


def read_experiment(path: str | os.PathLike) -> dict[str, Any]:
    """What an experiment.json holds: name, recipe, and config with its sections.

    Raises:
      Damaged: the file is not an experiment.json.
      NewerVersion: a newer version of the library wrote it.
    """
    found = read_json(path, "name", "config")
    config, text = found["config"], ("name", "question", "record")
    if not isinstance(config, dict) or not all(
        isinstance(value, str if key in text else dict) for key, value in config.items()
    ):
        raise Damaged(f"{path}: its entry config is not an experiment")
    return found


def write_jsonl(path: str | os.PathLike, records: Iterable[Any]) -> None:
    """Writes one record a line, atomically: a reader sees the old file or the new."""
    write_text(path, "".join(dumps(r) + "\n" for r in records))


def read_jsonl(path: str | os.PathLike, kind: Any = object) -> list[Any]:
    """Reads what `write_jsonl` wrote.

    Args:
      kind: the class of record that every line must be.

    Raises:
      Damaged: a line is not a record; the message has the file and the line number.
      NewerVersion: a newer version of the library wrote the file.
    """
    lines, rest = complete_lines(path)
    return [
        loads_line(line, path, number, kind)
        for number, line in enumerate([*lines, *([rest] if rest else [])], 1)
    ]


def read_attempts(path: str | os.PathLike, run_id: str) -> list[Attempt]:
    """The attempts at a run; raises as `read_jsonl`.

    So it does for another run's file, and for an empty one: it is written whole.
    """
    found = read_jsonl(path, Attempt)
    if not found:
        raise Damaged(f"{path}: it is empty, not the attempts at a run")
    for number, attempt in enumerate(found, 1):
        if attempt.run_id != run_id:
            raise Damaged(f"{path}:{number}: it is of run {attempt.run_id}")
    return found


def complete_lines(path: str | os.PathLike) -> tuple[list[bytes], bytes]:
    """The complete lines of a file, and the start of an unfinished last line.

    Raises:
      Damaged: the bytes after the last complete line are not the start of a record.
    """
    *lines, rest = places.place(path).read_bytes().split(b"\n")
    # After a power failure, a file may end in zero bytes.
    if not rest.startswith(b"{") and (rest.strip(b"\0") or (rest and not lines)):
        raise Damaged(f"{path}:{len(lines) + 1}: not a record: not JSON")
    return lines, rest


def loads_line(line: bytes, path: object, number: int, kind: Any = object) -> Any:
    """A record from one line of a file; raises as `read_jsonl`."""
    try:
        return loads(line, path, kind)
    except Damaged as e:
        raise Damaged(f"{path}:{number}: {e}") from e


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(to_json(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
