"""The axes of a study: what its runs vary beside their size and their budget.

    c.plan.axes = {
        "train.seed": (0, 1, 2),
        "optimizer.learning_rate,train.batch_size": ((1e-3, 16), (2e-3, 32)),
    }
    c.plan.axes_only = {"train.seed": {"budgets": (1e17,), "sizes": ((128, 2),)}}

A run has one value of each axis: its overrides, {"section.field": value}. Fields that
are named together, with a comma between them, are tied. An axis of `axes_only` varies
in the named budgets and sizes alone, and has its first value elsewhere.

An experiment keeps both as tuples of (name, values) pairs, which is also how they are
given on the command line. Everything here is a pure function of an experiment.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from scaling_ldm.config import checks, identity, names
from scaling_ldm.config.fields import Experiment, PlanConfig
from scaling_ldm.records.errors import ConfigError
from scaling_ldm.records.measurements import MEASURES

Overrides = Mapping[str, Any]  # "section.field" -> value
SEED = "train.seed"
RATE = "optimizer.learning_rate"
BATCH = "train.batch_size"
# Fields that may vary: all of these sections that decide a run's numbers, and these.
SECTIONS = ("model", "objective", "optimizer")
_OF_TRAIN = (SEED, BATCH)
_EVERY_FIELD = ", ".join((*(f"{s}.*" for s in SECTIONS), *_OF_TRAIN))
# Why the other fields may not vary.
_SHARED = "the runs of a study share their pictures and records"
_AFTER = "it belongs to the stages after training"
_FOUND = "it is found from the file, not chosen"
_STARTS = "the runs of a study start from the same weights"
_TUNED = "the rates of a study are tuned by one other study"
_WHY_NOT = {
    "train.init_from": _STARTS,
    "train.init_exceptions": _STARTS,
    "train.init_checksum": _STARTS,
    "optimizer.tuned_from": _TUNED,
    "optimizer.tuned_group": _TUNED,
    "optimizer.tuned_budget": _TUNED,
    "optimizer.tuned_sizes": _TUNED,
    "optimizer.tuned_digest": _TUNED,
    "objective.kind": "objectives have different losses; make each a study of its own",
    "objective.folder": _FOUND,
    "objective.digest": _FOUND,
    "data": _SHARED,
    "encode": _SHARED,
    "plan": "sizes and budgets are axes of every study, and the rest trains nothing",
    "train": "it changes how a run is trained, not which numbers it has",
    "validation": "losses are compared on one validation set",
    "mesh": "it says where runs are, not which",
    "name": "it names the study",
    "question": "it belongs to the study",
}
_RESTRICTIONS = {"budgets": "budgets_flops", "sizes": "sizes"}


def pairs(given: Any) -> Any:
    """Mappings, at any depth of tuples, as tuples of their (key, value) pairs."""
    if isinstance(given, Mapping):
        return tuple((str(key), pairs(value)) for key, value in given.items())
    if isinstance(given, (list, tuple)):
        return tuple(pairs(value) for value in given)
    return given


def is_pairs(given: Any) -> bool:
    """Whether a value is a tuple of (name, non-empty tuple) pairs."""
    return isinstance(given, tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], tuple)
        and len(pair[1]) > 0
        for pair in given
    )


Coerce = Callable[[Any, Any, str, list[str]], Any]


def read(given: Any, where: str, coerce: Coerce, problems: list[str]) -> Any:
    """`plan.axes` or `plan.axes_only` as tuples, each value with the type of its field.

    Args:
      given: a mapping, or a sequence of pairs.
      where: "config.plan.axes" or "config.plan.axes_only".
      coerce: (value, one of the right type, its place, problems) -> the value.
      problems: gets a line for everything that is wrong.
    """
    found = pairs(given)
    if not is_pairs(found):
        problems.append(
            f"{where} = {given!r}: must be {{name: values}}, or (name, values) pairs "
            'with a comma behind each, as in (("train.seed", (0, 1, 2)),)'
        )
        return ()
    if where.endswith("_only"):
        return tuple((_spaceless(name), only) for name, only in found)
    return tuple(
        (_spaceless(name), _values(_spaceless(name), values, where, coerce, problems))
        for name, values in found
    )


def _spaceless(name: str) -> str:
    return ",".join(part.strip() for part in name.split(","))


def _values(
    name: str, values: Sequence[Any], where: str, coerce: Coerce, problems: list[str]
) -> tuple[Any, ...]:
    """The values of one axis; of tied fields, each value is a tuple."""
    paths = name.split(",")
    refused = [line for path in paths if (line := _refusal(path, where))]
    if refused:
        problems += refused
        return ()
    likes = [value_of(Experiment(), path) for path in paths]
    place = f"{where}[{name!r}]"
    found = []
    for value in values:
        row = value if len(paths) > 1 else (value,)
        if not isinstance(row, tuple) or len(row) != len(paths):
            problems.append(
                f"{place}: {value!r} is not one value for each of {', '.join(paths)}"
            )
            continue
        typed = [
            coerce(*pair, place, problems) for pair in zip(row, likes, strict=True)
        ]
        found.append(tuple(typed) if len(paths) > 1 else typed[0])
    if len(set(found)) < len(found):
        problems.append(f"{place} = {values!r}: a value is given twice")
    return tuple(found)


def _refusal(path: str, where: str) -> str:
    """Why a field may not be an axis, or ""."""
    section, _, name = path.partition(".")
    known = vars(Experiment())
    may = f"an axis is one of {_EVERY_FIELD}"
    part = known.get(section)
    if section not in known or (
        dataclasses.is_dataclass(part) and name not in vars(part)
    ):
        every = [f"{s}.{n}" for s in (*SECTIONS, "train") for n in vars(known[s])]
        close = names.nearest(path, every)
        hint = f" (did you mean {close!r}?)" if close else ""
        return f"{where}: there is no field {path!r}{hint}; {may}"
    allowed = path not in _WHY_NOT and (section in SECTIONS or path in _OF_TRAIN)
    if allowed and name in identity.deciding({section: {name: None}})[section]:
        return ""
    why = _WHY_NOT.get(path) or _WHY_NOT.get("train" if allowed else section, _AFTER)
    return f"{where}: {path} cannot be an axis: {why}; {may}"


def problems_of(e: Experiment) -> list[str]:
    """What is wrong with the axes of an experiment apart from their values' types."""
    found, plan = [], e.plan
    paths = [path for name, _ in plan.axes for path in name.split(",")]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        found.append(f"config.plan.axes: {path} is given twice")
    if "model.text_width" in paths and not e.reads_words:
        found.append(
            "config.plan.axes: model.text_width cannot be an axis: the records of the "
            "study hold features of one width"
        )
    for name, values in plan.axes:
        if "model.architecture" in name and "autoencoder_kl" in str(values):
            found.append(
                "config.plan.axes: an autoencoder_kl learns something else than the "
                "other architectures; make it a study of its own"
            )
    axes = dict(plan.axes)
    for name, only in plan.axes_only:
        where = f"config.plan.axes_only[{name!r}]"
        if name not in axes:
            found.append(
                f"{where}: no axis of this name; config.plan.axes has "
                f"{', '.join(axes) or 'none'}"
            )
        if not is_pairs(only):
            found.append(
                f'{where} = {only!r}: must be {{"budgets": ..., "sizes": ...}}'
            )
            continue
        for kind, values in only:
            if kind not in _RESTRICTIONS:
                found.append(f"{where}: {kind!r} is neither 'budgets' nor 'sizes'")
                continue
            field = _RESTRICTIONS[kind]
            there = getattr(plan, field)
            if strange := [value for value in values if value not in there]:
                found.append(
                    f"{where}: {strange} is not in config.plan.{field} = {there}"
                )
    return found


def problems_of_run(e: Experiment, size: tuple[int, int]) -> list[str]:
    """Every reason why a run with overrides cannot be of this size; empty if it can.

    Args:
      e: the experiment with the run's overrides.
    """
    alone = dataclasses.replace(e.plan, sizes=(size,), axes=(), axes_only=())
    problems = checks.problems_of(dataclasses.replace(e, plan=alone))
    devices = e.mesh.fsdp * max(e.mesh.replica, 1)  # or a multiple of it
    if e.train.batch_size % devices:
        problems.append(
            f"config.train.batch_size = {e.train.batch_size} is not divisible by the "
            f"{devices} devices of config.mesh"
        )
    return problems


def with_overrides(experiment: Experiment, overrides: Overrides) -> Experiment:
    """The experiment of one run: with the run's value of each axis, unchecked.

    Raises:
      ConfigError: a field that no experiment has; another version planned the run.
    """
    for path, value in overrides.items():
        section, _, name = path.partition(".")
        part: Any = getattr(experiment, section, None)
        if not dataclasses.is_dataclass(part) or not hasattr(part, name):
            raise ConfigError(
                f"the plan of this study varies {path}, which is no field of an "
                "experiment: plan it again with this version"
            )
        changed: Any = dataclasses.replace(part, **{name: value})
        experiment = dataclasses.replace(experiment, **{section: changed})
    return experiment


def combinations(plan: PlanConfig) -> list[dict[str, Any]]:
    """The overrides of every combination of values; the last axis varies fastest."""
    found = []
    for chosen in itertools.product(*(values for _, values in plan.axes)):
        overrides: dict[str, Any] = {}
        for (name, _), value in zip(plan.axes, chosen, strict=True):
            paths = name.split(",")
            row = value if len(paths) > 1 else (value,)
            overrides |= dict(zip(paths, row, strict=True))
        found.append(overrides)
    return found


def variants(experiment: Experiment) -> Iterator[Experiment]:
    """The experiment of each combination of values, without size and budget."""
    for overrides in combinations(experiment.plan):
        yield with_overrides(experiment, overrides)


def objectives(experiment: Experiment) -> list[Experiment]:
    """One of the `variants` for each different objective."""
    return list({one.objective: one for one in variants(experiment)}.values())


def allows(
    plan: PlanConfig, overrides: Overrides, budget: float | None, size: tuple[int, int]
) -> bool:
    """Whether `axes_only` allows a combination of values at this budget and size.

    Args:
      budget: None where a study has no budgets.
    """
    axes, at = dict(plan.axes), {"budgets": budget, "sizes": size}
    return all(
        all(at[kind] in allowed for kind, allowed in only)
        or chosen(overrides, name) == axes[name][0]
        for name, only in plan.axes_only
    )


def chosen(overrides: Overrides, name: str) -> Any:
    """The value of an axis; a tuple if its fields are tied."""
    row = tuple(overrides[path] for path in name.split(","))
    return row if len(row) > 1 else row[0]


def measured_alike(given: Sequence[Overrides]) -> bool:
    """Whether the losses of runs with these overrides may be compared."""
    return len({tuple(o.get(path) for path in MEASURES) for o in given}) <= 1


def value_of(experiment: Experiment, path: str) -> Any:
    section, _, name = path.partition(".")
    return getattr(getattr(experiment, section), name)
