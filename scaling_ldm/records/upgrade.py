"""Which schema a file has, and how records of older schemas become current ones.

Every JSON object that the library writes for itself says which schema it has: the
release that introduced it, as text, under "version". A file without one is of FIRST.
Under "seal" it has a digest of all the rest, so that no digit changes unnoticed. An
object without a seal is of FIRST, or made by hand.
Nested objects have the version of the outermost one. A function of UPGRADES turns the
fields of one record from its version into the next one's, so an old file goes through
all later versions in turn. May import: the standard library and the errors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from scaling_ldm.records.errors import Damaged, NewerVersion

FIRST = "0.1.0"  # its files do not say their version
VERSIONS = (FIRST, "0.2.0")  # every schema that this library reads, oldest first
SCHEMA = VERSIONS[-1]  # the schema that it writes
_KEY, _SEAL = "version", "seal"
CHANGED = "changed after it was written: its seal is not that of its content"

Fields = dict[str, Any]


def stamped(value: Mapping[str, Any]) -> Fields:
    """A JSON object of a file, with the version of its schema and its seal.

    Raises:
      ValueError: the object has a key "version" or "seal" already.
    """
    for key in (_KEY, _SEAL):
        if key in value:
            raise ValueError(f"{key!r} is of a file's schema")
    content = {_KEY: SCHEMA, **value}
    return {**content, _SEAL: _seal(json.loads(json.dumps(content)))}


def _seal(content: Fields) -> str:
    """First 16 hex digits of the SHA-256 of an object as it is read."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_changed(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object has a seal that is not that of its content."""
    seal = value.get(_SEAL)
    return seal is not None and seal != _seal(bare(value, _SEAL))


def bare(value: Mapping[str, Any], *keys: str) -> Fields:
    """A JSON object without some keys; by default those that `stamped` added."""
    without = keys or (_KEY, _SEAL)
    return {k: v for k, v in value.items() if k not in without}


def version_of(value: Mapping[str, Any], where: object) -> str:
    """The version of a JSON object, whose seal is checked too.

    Args:
      where: the file, for a message.

    Raises:
      NewerVersion, Damaged: as `known_version`.
      Damaged: its seal is not that of its content.
    """
    version = known_version(value, where)
    if is_changed(value):
        raise Damaged(f"{where} was {CHANGED}")
    return version


def known_version(value: Mapping[str, Any], where: object) -> str:
    """The version of a JSON object that `stamped` or an older version made.

    Args:
      where: the file, for a message.

    Raises:
      NewerVersion: this library is too old for it.
      Damaged: its version is not one of VERSIONS.
    """
    version = value.get(_KEY, FIRST)
    if version in VERSIONS:
        return version
    if isinstance(version, str) and re.fullmatch(r"\d+\.\d+\.\d+", version):
        if _order(version) > _order(SCHEMA):
            raise NewerVersion(where, version, SCHEMA)
    raise Damaged(f"{where} is of version {version!r}; known are {', '.join(VERSIONS)}")


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def unstamped(value: Mapping[str, Any], where: object) -> Fields:
    """A JSON object without what `stamped` added; raises as `version_of`."""
    version_of(value, where)
    return bare(value)


def upgraded(value: Any, version: str) -> Any:
    """A JSON value of any nesting, with its records in the current schema.

    A line on standard error says the new names of fields, once for each kind of record.

    Args:
      version: of the file that the value is from.
    """
    if isinstance(value, list):
        return [upgraded(v, version) for v in value]
    if not isinstance(value, dict):
        return value
    for step in VERSIONS[VERSIONS.index(version) : -1]:
        name = value.get("record", "")
        if upgrade := UPGRADES.get(step, {}).get(name):
            before, value = value, upgrade(value)
            if value != before and (names := RENAMED.get(step, {}).get(name)):
                _say_once(f"a {name} of {step}: {names}")
    # Files that 0.2.0 wrote before its release hold values, too, or one form of a law.
    if "value" in value and (upgrade := _WITH_VALUES.get(value.get("record", ""))):
        value = upgrade(value)
    if value.get("record") == "FitResult":
        value = {"loss_forms": [], **value}
    return {k: upgraded(v, version) for k, v in value.items()}


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _refusal(fields: Fields) -> Fields:
    """The first files of 0.1.0 had one text, `what`, in place of three fields."""
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


# What 0.1.0 called the losses of a run -> metric and weights of today.
_FITTED = {
    "validation_loss": ("loss", "raw"),
    "validation_loss_ema": ("loss", "ema"),
    "train_loss_smoothed": ("train_loss_smoothed", "raw"),
}


def _fit_result(fields: Fields) -> Fields:
    """0.1.0 named a field of the run's record; now metric and weights are fields."""
    metric, weights = _FITTED.get(fields["metric"], (fields["metric"], ""))
    return fields | {"metric": metric, "weights": weights}


def _train_record(fields: Fields) -> Fields:
    """Drops the losses, which are rows of the table of measurements; see `table`."""
    return {name: value for name, value in fields.items() if name not in _FITTED}


def _evaluation(fields: Fields) -> Fields:
    """The record held its number; an `Evaluation` still does."""
    return fields | {"record": "Evaluation"}


def _measured_cell(fields: Fields) -> Fields:
    """Cells held their value, and bootstrap values in place of deviations."""
    fields = fields | {"record": "MeasuredCell"}
    draws = [float(x) for x in fields.pop("replicates", ())]
    mean = math.fsum(draws) / max(len(draws), 1)
    return fields | {"deviations": [x - mean for x in draws]}


# Records whose numbers became rows of the table; see `table`.
_WITH_VALUES = {"EvalRecord": _evaluation, "Cell": _measured_cell}

# Version -> name of a record -> a pure function from the JSON fields of that version to
# those of the next one. Records inside the record are upgraded after it. A new field
# needs no function: it has a default (see `from_json`).
UPGRADES: dict[str, dict[str, Callable[[Fields], Fields]]] = {
    FIRST: {
        "Refusal": _refusal,
        "FitResult": _fit_result,
        "TrainRecord": _train_record,
    }
}

# Of the same keys: what the user is told of the fields' names.
RENAMED: dict[str, dict[str, str]] = {
    FIRST: {
        "Refusal": "what is now quantity, budget_flops and group",
        "FitResult": "metric is now metric and weights",
        "TrainRecord": (
            f"{', '.join(_FITTED)} are now rows of the table of measurements"
        ),
    }
}
