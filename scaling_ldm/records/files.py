"""Records as JSON lines, and files that are written whole or not at all.

Every record is a frozen dataclass. It becomes one JSON line and is read back equal.
A record of an older version is read through `UPGRADES`. Unknown keys are an error, so
a file of a newer version is refused. Non-finite numbers are written as the strings
"nan", "inf" and "-inf", so that the files stay standard JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

from scaling_ldm.records.errors import Damaged
from scaling_ldm.records.frontier import (
    Advice,
    BestGuidance,
    Cell,
    Choice,
    Crossing,
    Front,
    Frontier,
    FrontPoint,
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
from scaling_ldm.records.runs import EvalRecord, RunSpec, SampleRecord, TrainRecord

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


_RECORDS = {
    cls.__name__: cls
    for cls in (
        RunSpec,
        TrainRecord,
        SampleRecord,
        EvalRecord,
        Interval,
        Refusal,
        Parabola,
        PowerLaw,
        Parametric,
        HeldOut,
        FitResult,
        Cell,
        Choice,
        BestGuidance,
        FrontPoint,
        Front,
        Crossing,
        Advice,
        Frontier,
    )
}


def _refusal(fields: dict[str, Any]) -> dict[str, Any]:
    """The first version had one text, `what`, in place of three fields."""
    if "what" not in fields:
        return fields
    fields = dict(fields)
    what = fields.pop("what")
    quantity, budget, group = what, None, ""
    if found := re.fullmatch(r"isoFLOP minimum at (\S+) FLOPs", what):
        quantity, budget = "isoFLOP minimum", float(found[1])
    elif found := re.fullmatch(r"prediction of (\w+) at (\S+) FLOPs", what):
        quantity, budget = f"{found[1]} held out", float(found[2])
    elif found := re.fullmatch(r"power law of (.+) against \w+", what):
        quantity = found[1]
    elif what.startswith("parametric surface"):
        quantity = "parametric surface"
    elif found := re.fullmatch(r"(.+ over .+) \((.+)\)", what):
        quantity, group = "crossing", f"{found[1]}, {found[2]}"
    return fields | {"quantity": quantity, "budget_flops": budget, "group": group}


# By record name: what turns the JSON fields of any older version into today's. A
# function gets today's fields too and returns them as they are.
UPGRADES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"Refusal": _refusal}


def upgraded(value: dict[str, Any]) -> dict[str, Any]:
    """The JSON fields of one record under today's names; not those of nested ones."""
    upgrade = UPGRADES.get(value.get("record", ""))
    return upgrade(value) if upgrade else value


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


def from_json(value: Any) -> Any:
    """The inverse of `to_json`.

    Raises:
      ValueError: an unknown record name, or fields that are missing or unknown.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "record" not in value:
        return {k: from_json(v) for k, v in value.items()}
    name = value["record"]
    if name not in _RECORDS:
        raise ValueError(
            f"unknown record {name!r}; known: {', '.join(sorted(_RECORDS))}"
        )
    cls = _RECORDS[name]
    given = {k: from_json(v) for k, v in upgraded(value).items() if k != "record"}
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    if given.keys() != known:
        raise ValueError(
            f"{name}: missing {sorted(known - given.keys())}, "
            f"unknown {sorted(given.keys() - known)}; written by another version?"
        )
    for k, v in given.items():
        if (
            isinstance(v, str)
            and v in _NON_FINITE
            and hints[k] in (float, float | None)
        ):
            given[k] = _NON_FINITE[v]
    return cls(**given)


def dumps(record: Any) -> str:
    """One JSON line, without the newline."""
    return json.dumps(to_json(record), allow_nan=False)


def loads(line: str) -> Any:
    """A record from one JSON line.

    Raises:
      Damaged: it is none.
    """
    try:
        return from_json(json.loads(line))
    except (ValueError, TypeError, KeyError) as e:
        raise Damaged(f"not a record: {e}") from e


def write_jsonl(path: str | os.PathLike, records: Iterable[Any]) -> None:
    """Writes records a line each, atomically: a reader sees the old file or the new."""
    write_text(path, "".join(dumps(r) + "\n" for r in records))


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """Reads what `write_jsonl` wrote.

    Raises:
      Damaged: a line that is no record, with file and line number.
    """
    records = []
    text = pathlib.Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(loads(line))
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
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(to_json(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
