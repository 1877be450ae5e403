"""Records as JSON lines, and files that are written whole or not at all.

Every record is a frozen dataclass. It becomes one JSON line and is read back equal.
A line says which schema it has; `upgrade` turns that of an older version into today's
and refuses that of a newer one. Unknown keys are an error. Non-finite numbers are
written as the strings "nan", "inf" and "-inf", so that the files stay standard JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

from scaling_ldm.records import upgrade
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
from scaling_ldm.records.laws import (
    FitResult,
    HeldOut,
    Interval,
    Parabola,
    Parametric,
    PowerLaw,
    Refusal,
)
from scaling_ldm.records.measurements import Measurement
from scaling_ldm.records.runs import (
    EvalRecord,
    Evaluation,
    RunSpec,
    SampleRecord,
    TrainRecord,
)

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
        Interval,
        Refusal,
        Parabola,
        PowerLaw,
        Parametric,
        HeldOut,
        FitResult,
        Cell,
        MeasuredCell,
        Choice,
        BestGuidance,
        FrontPoint,
        Front,
        Crossing,
        Advice,
        Frontier,
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
      version: of the file that the value is from. A field that has a default may be
        missing in a file of an older version: it came later.

    Raises:
      ValueError: an unknown record name, or fields that are missing or unknown.
    """
    return _built(upgrade.upgraded(value, version), version == upgrade.SCHEMA)


def _built(value: Any, complete: bool) -> Any:
    """Records from JSON values of today; `complete`: every field must be there."""
    if isinstance(value, list):
        return tuple(_built(v, complete) for v in value)
    if not isinstance(value, dict):
        return value
    if "record" not in value:
        return {k: _built(v, complete) for k, v in value.items()}
    name = value["record"]
    if name not in _RECORDS:
        raise ValueError(
            f"unknown record {name!r}; known: {', '.join(sorted(_RECORDS))}"
        )
    cls = _RECORDS[name]
    given = {k: _built(v, complete) for k, v in value.items() if k != "record"}
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    missing = {
        k for k, f in fields.items() if k not in given and (complete or _required(f))
    }
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
    return cls(**given)


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


def loads(line: str, where: object = "a record") -> Any:
    """A record from one JSON line.

    Args:
      where: the file, for a message.

    Raises:
      Damaged: it is none.
      NewerVersion: a newer version of the library wrote it.
    """
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        version = upgrade.version_of(value, where)
        return from_json(upgrade.unstamped(value, where), version)
    except NewerVersion:
        raise
    except (ValueError, TypeError, KeyError) as e:
        raise Damaged(f"not a record: {e}") from e


def read(path: str | os.PathLike) -> Any:
    """The record of a file that holds one; raises as `loads`."""
    try:
        return loads(pathlib.Path(path).read_text(encoding="utf-8"), path)
    except Damaged as e:
        raise Damaged(f"{path}: {e}") from e


def write_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Writes one JSON object with the version of its schema; see `write_file`."""
    text = json.dumps(upgrade.stamped(to_json(value)), indent=1, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object that `write_json` wrote, or an older version, as it is there.

    Raises:
      Damaged: the file holds none.
      NewerVersion: a newer version of the library wrote it.
    """
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise Damaged(f"{path} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise Damaged(f"{path} is not a JSON object")
    upgrade.version_of(value, path)
    return value


def write_jsonl(path: str | os.PathLike, records: Iterable[Any]) -> None:
    """Writes records a line each, atomically: a reader sees the old file or the new."""
    write_text(path, "".join(dumps(r) + "\n" for r in records))


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """Reads what `write_jsonl` wrote.

    Raises:
      Damaged: a line that is no record, with file and line number.
      NewerVersion: a newer version of the library wrote the file.
    """
    records = []
    text = pathlib.Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(loads(line, path))
        except Damaged as e:
            raise Damaged(f"{path}:{number}: {e}") from e
    return records


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a whole file of UTF-8; see `write_file`."""
    write_file(path, lambda file: file.write(text.encode()))


def write_file(path: str | os.PathLike, fill: Callable[[BinaryIO], Any]) -> None:
    """Writes a whole file or none: a temporary one is filled, fsynced, renamed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of two machines may have one number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    _unfinished.add(temporary)
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


_unfinished: set[pathlib.Path] = set()


def remove_unfinished() -> None:
    """Removes what `write_file` has begun, in a process that is about to end."""
    for path in list(_unfinished):
        path.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(to_json(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
