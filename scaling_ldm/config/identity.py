"""Which fields of an experiment decide the numbers of its runs, and their digest.

A working directory belongs to one recipe. Its digest does not change when the library
does: it is made of the fields' first names, without fields that came later and have
the value that behaves as before. So an older directory is continued by a newer version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from scaling_ldm import records
from scaling_ldm.config import names

Field = tuple[str, str]  # section, name

# Fields that came after 0.1.0 -> the value at which a study runs as without the field.
# Every new field has a line here. Its default may be another value: a directory that
# was made without the field continues with the value here, and a new directory starts
# with the default.
SINCE: dict[Field, Any] = {
    ("plan", "axes"): (),
    ("plan", "axes_only"): (),
    ("plan", "reuse"): "separate",
    ("compile", "topology"): "",
    ("compile", "slices"): 1,
    ("compile", "programs"): ("train", "loss", "sample"),
    ("model", "remat_policy"): "blocks",
    ("model", "attention"): "auto",  # decides rounding alone, as a backend does
    ("plan", "probe"): False,  # decides no number
    ("train", "checkpoint_minutes"): 10.0,  # decides no number
    ("train", "save_signals"): ("SIGUSR1",),
    ("train", "stop_signals"): ("SIGUSR2",),
    ("optimizer", "averages"): ("ema",),  # the default since 0.2.0 is another
    ("optimizer", "schedule"): "constant",
    ("optimizer", "decay_fraction"): 0.2,
    ("optimizer", "decay_shape"): "linear",
    ("optimizer", "warmup_steps"): 0,
    ("optimizer", "warmup_samples"): 0,
    ("data", "captions"): "",
    ("data", "label"): "",
    ("data", "mix"): (),
    ("data", "parts"): (),
    ("validation", "part"): "",
    ("validation", "marks"): 0,  # decides no number
    ("objective", "kind"): "auto",
    ("objective", "folder"): "",
    ("objective", "digest"): "",
    ("train", "init_from"): "",
    ("train", "init_exceptions"): (),
    ("train", "init_checksum"): "",
    ("fit", "metrics"): ("loss",),
    ("fit", "weights"): "",
    ("data", "shuffle_window"): 0,
    ("data", "reader_threads"): 4,  # decides no number
    ("data", "cache_gigabytes"): 100.0,  # decides no number
    ("data", "split_by"): "caption_alone",  # the default since 0.2.0 is another
    ("data", "validation_path"): "",
    ("data", "validation_split"): "",
    ("data", "validation_minimum"): 0,  # decides no number
    ("encode", "choose"): "first",  # the default since 0.2.0 is another
    ("generate", "captions"): (),
    ("fit", "protocols"): (),
    ("fit", "estimator"): "auto",
    ("fit", "window"): 0.0,
    ("fit", "huber"): 0.0,
    ("fit", "extend"): 4.0,
    ("evaluate", "held_out"): (),
    ("evaluate", "held_out_draws"): 16,
    ("mesh", "heartbeat_seconds"): 100,  # as all of mesh, it decides no number
    ("mesh", "stall_seconds"): 300.0,
    ("mesh", "stall_limit_seconds"): 1800.0,
    ("mesh", "compilation_cache"): "auto",
    ("mesh", "overlap_collectives"): True,
    ("mesh", "runs"): 1,
    ("train", "microbatch"): 0,  # decides no number but by rounding
    ("optimizer", "first_moment_dtype"): "float32",
    ("optimizer", "policy_depth"): 2,
    ("optimizer", "rate_law"): "none",
    ("optimizer", "rate_law_constants"): (),
    ("optimizer", "rate_law_at"): (),
    ("optimizer", "tuned_from"): "",
    ("optimizer", "tuned_group"): "",
    ("optimizer", "tuned_budget"): 0.0,
    ("optimizer", "tuned_sizes"): "measured",
    ("optimizer", "tuned_digest"): "",
    ("plan", "from_laws"): "",
    ("plan", "budget"): 0.0,
    ("plan", "next"): 0,
    ("plan", "next_of"): "N_opt",
    ("advise", "flops"): 0.0,
    ("advise", "hours"): 0.0,
    ("advise", "loss"): 0.0,
    ("advise", "chips"): 1,
    ("advise", "flops_per_second"): 0.0,
    ("advise", "run"): "",
    ("advise", "price"): 0.0,
    ("advise", "images"): 0.0,
    ("advise", "laws"): "",
    ("report", "published"): (),
    ("compare", "studies"): (),
    ("compare", "groups"): (),
    ("compare", "budgets"): (),
}
# Renamed fields: current name -> first name. The recipe hash uses the first names, so
# that working directories made before the renaming continue.
FIRST_NAMES: dict[Field, str] = {
    ("objective", "timestep_sampling"): "time_law",
    ("train", "checkpoint_flops"): "keep_flops",
    ("fit", "metrics"): "metric",
}
# Renamed fields whose values changed too: first value -> fields of the same section.
FIRST_VALUES: dict[Field, dict[str, dict[str, Any]]] = {
    ("fit", "metrics"): {
        "validation_loss": {"metrics": ("loss",), "weights": "raw"},
        "validation_loss_ema": {"metrics": ("loss",), "weights": ""},
        "train_loss_smoothed": {"metrics": ("train_loss_smoothed",), "weights": ""},
    }
}
_GIVEN = "given"  # stands for a path in the digest: its place decides nothing
_NO_RECIPE = (
    "plan",
    "mesh",
    "generate",
    "evaluate",
    "frontier",
    "advise",
    "fit",
    "compare",
    "compile",
    "report",
    "question",
    "record",
)
_NOT_IDENTITY: tuple[Field, ...] = (
    ("data", "path"),
    ("data", "prefetch_batches"),
    ("data", "reader_threads"),
    ("data", "cache_gigabytes"),
    ("data", "validation_minimum"),
    ("encode", "path"),
    ("encode", "batch_size"),
    ("encode", "records_per_shard"),
    ("encode", "largest_bad_fraction"),
    ("encode", "workers"),
    ("model", "unroll"),
    ("model", "remat"),
    ("model", "remat_policy"),
    ("model", "attention"),
    ("objective", "folder"),
    ("optimizer", "tuned_from"),
    ("train", "init_from"),
    ("train", "microbatch"),
    ("train", "steps_per_dispatch"),
    ("train", "optimize_code"),
    ("train", "checkpoints_per_run"),
    ("train", "keep_checkpoints"),
    ("train", "checkpoint_flops"),
    ("train", "checkpoint_minutes"),
    ("train", "save_signals"),
    ("train", "stop_signals"),
    ("train", "log_every_steps"),
    ("train", "show_every_seconds"),
    ("train", "tensorboard"),
    ("train", "profile_steps"),
    ("validation", "marks"),
)


def current(section: str, field: str, value: Any) -> dict[str, Any]:
    """{current name: value} for a value that is given under a field's first name."""
    known = FIRST_VALUES.get((section, field), {})
    if known and isinstance(value, str):
        return dict(known.get(value, {field: (value,)}))
    return {field: value}


def deciding(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an experiment, as nested dicts, that decides its runs' numbers.

    A field under its first name is returned under its current name.
    """
    kept = {
        section: dict(value) if isinstance(value, Mapping) else value
        for section, value in experiment.items()
        if section not in _NO_RECIPE
    }
    for (section, field), first in FIRST_NAMES.items():
        if first in kept.get(section, {}):
            kept[section][field] = kept[section].pop(first)
    for section, field in _NOT_IDENTITY:
        kept.get(section, {}).pop(field, None)
    _drop_unread(kept)
    if kept.get("data", {}).get("validation_path"):
        kept["data"]["validation_path"] = _GIVEN
    if parts := kept.get("data", {}).get("parts"):
        kept["data"]["parts"] = _deciding_parts(parts)
    return kept


def _drop_unread(kept: dict[str, Any]) -> None:
    """Removes fields of SINCE that decide nothing in this experiment."""
    data, encode = kept.get("data", {}), kept.get("encode", {})
    if data.get("source") in names.ENDLESS and not data.get("mix"):
        data.pop("split_by", None)
        encode.pop("choose", None)
    parts = data.get("parts") or ()
    some = any(f == "encode.pictures" for _, own in parts for f, _ in own)
    if encode.get("pictures") == 0 and not some:
        encode.pop("choose", None)


def _deciding_parts(parts: Iterable[Any]) -> list[Any]:
    """The fields of `data.parts` that decide numbers, in one fixed order."""
    places = {f if s == "data" else f"{s}.{f}" for s, f in _NOT_IDENTITY}
    found = []
    for name, fields in sorted(parts):
        told = [
            [f, _GIVEN if f == "validation_path" and value else value]
            for f, value in sorted(fields)
        ]
        if kept := [[f, value] for f, value in told if f not in places]:
            found.append([name, kept])
    return found


def recipe_hash(experiment: Mapping[str, Any]) -> str:
    """Digest of everything that decides a run's numbers, apart from its RunSpec.

    Left out are: which runs there are (plan, because a sweep may grow), where they
    run (mesh, accelerator), how they log, and the stages after training.
    """
    found = as_before(deciding(experiment))
    for (section, field), first in FIRST_NAMES.items():
        if field in found.get(section, {}):
            found[section][first] = found[section].pop(field)
    return records.digest(found)


def as_before(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment, as nested dicts, without fields at their values in SINCE."""
    found = {
        section: dict(value) if isinstance(value, Mapping) else value
        for section, value in experiment.items()
    }
    for (section, field), before in SINCE.items():
        fields = found.get(section, {})
        if field in fields and _same(fields[field], before):
            del fields[field]
            if not fields.keys() - {"record"}:  # the section came later, too
                del found[section]
    return found


def filled(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """An older experiment, as nested dicts, with the fields that came after it."""
    found = dict(experiment)
    for (section, field), before in SINCE.items():
        found[section] = {field: records.to_json(before), **found.get(section, {})}
    return found


def unknown_to(experiment: Mapping[str, Any]) -> list[Field]:
    """The deciding fields that an older experiment, as nested dicts, does not have."""
    later = [
        (section, field)
        for section, field in SINCE
        if field not in experiment.get(section, {})
    ]
    return [(s, f) for s, f in later if f in deciding(filled({})).get(s, {})]


def continued(experiment: Any, unknown: Iterable[Field]) -> Any:
    """An Experiment with the values of SINCE for unknown fields at their defaults.

    Args:
      experiment: a `fields.Experiment`.
      unknown: the fields that a working directory was made without.
    """
    for section, field in unknown:
        part = getattr(experiment, section)
        if getattr(part, field) == getattr(type(part)(), field):
            part = dataclasses.replace(part, **{field: SINCE[section, field]})
            experiment = dataclasses.replace(experiment, **{section: part})
    return experiment


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same in a file."""
    return records.to_json(a) == records.to_json(b)
