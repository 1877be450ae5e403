"""Checks whether a working directory is this experiment's and whether it is complete.

experiment.json    name, question, recipe, resolved config, and which version made it
environment.json   versions and facts of the host that wrote last
complete.json      a digest of all that the finished report shows

A directory that an older version made is continued under the same experiment file.
Fields that the older version did not have, and that are at their defaults, take the
values at which the study runs as before (config/identity.py). experiment.json keeps the
names of these fields, so that they are still known after it is written again.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Collection, Iterable
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.config import identity
from scaling_ldm.config.files import continued
from scaling_ldm.records import table
from scaling_ldm.training import progress
from scaling_ldm.workdir import init_record, laws_from, lock, runs, tuned_from


def check(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Refuses a directory that is not this experiment's; writes nothing.

    Raises:
      ConfigError: the directory holds another experiment, or something else.
      NewerVersion: a newer version of the library wrote it.
    """
    path = workdir / "experiment.json"
    found = [p.name for p in workdir.iterdir()] if workdir.exists() else []
    # A command that starts leaves its lock, and perhaps an incomplete first file.
    start = (lock.NAME, f".{lock.NAME}.", path.name, f".{path.name}.")
    held = _held(workdir)  # read last: another process may be writing it
    if held is not None:
        _compare(continued(experiment, _unknown(held)), held, path)
    elif not all(name.startswith(start) for name in found):
        raise config.ConfigError(
            f"{workdir} is not empty and holds no experiment.json: use another "
            "--workdir"
        )


def unknown(workdir: pathlib.Path) -> list[identity.Field]:
    """The fields that the version which made a directory did not know; none if new.

    Raises:
      ConfigError: experiment.json is damaged.
      NewerVersion: a newer version of the library wrote it.
    """
    held = _held(workdir)
    return [] if held is None else _unknown(held)


def as_made(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    stages: Collection[str] = config.STAGES,
) -> config.Experiment:
    """The experiment with which this directory is continued; itself if it is new.

    The weights that it starts from are identified. Every process of a job gets the same
    result; nothing is written.

    Args:
      stages: the stages that will run. If nothing is planned or trained, weights whose
        identity the directory records are not read again.

    Raises:
      ConfigError: experiment.json is damaged, the older values do not fit the others,
        or there are no weights to start from.
      NewerVersion: a newer version of the library wrote it.
    """
    if experiment.train.init_from:
        begins = {"plan", "train"} & {*stages}
        known = None if begins else init_record.recorded(experiment, workdir)
        if known is None:
            from scaling_ldm.workdir import initial_weights  # it needs jax

            known = initial_weights.identified(experiment, workdir)
        experiment = known
    if tuned_from.is_tuned(experiment):
        experiment = tuned_from.identified(experiment, workdir)
    held = _held(workdir)
    return experiment if held is None else continued(experiment, _unknown(held))


def register(experiment: config.Experiment, workdir: pathlib.Path) -> config.Experiment:
    """Writes experiment.json and environment.json; one process does it for all.

    Returns:
      The experiment to go on with; see `as_made`.

    Raises:
      ConfigError, NewerVersion: see `check`.
    """
    check(experiment, workdir)
    path = workdir / "experiment.json"
    held = _held(workdir)
    without: list[identity.Field] = []
    made_by = records.SCHEMA
    if held is not None:
        without, made_by = _unknown(held), _made_by(held)
        experiment = continued(experiment, without)
        _say_as_then(experiment, workdir, made_by, without)
    content = {
        "name": experiment.name,
        "question": experiment.question,
        "recipe_hash": experiment.recipe_hash,
        "made_by": made_by,
        "made_without": [".".join(field) for field in without],
        "config": _without_name(experiment),
    }
    if held != records.stamped(content):
        records.write_json(path, content)
    for path in records.remove_leftovers(workdir):
        progress.say(f"{path} is removed: a process that was killed left it")
    records.write_json(workdir / "environment.json", _environment())
    if experiment.train.init_from and init_record.read(workdir) is None:
        from scaling_ldm.workdir import initial_weights  # it needs jax

        initial_weights.record(experiment, workdir)
    if tuned_from.is_tuned(experiment):
        tuned_from.record(experiment, workdir)
    if experiment.plan.from_laws:
        laws_from.record(experiment, workdir)
    return experiment


def _held(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What experiment.json holds; None if there is none."""
    path = workdir / "experiment.json"
    if not path.exists():
        return None
    try:
        held = records.read_experiment(path)
        if "recipe_hash" in held:
            return held
        raise records.Damaged("it lacks recipe_hash")
    except records.Damaged as e:
        raise config.ConfigError(
            f"{path} is damaged ({e}): put a copy back, or use another --workdir"
        ) from e


def _made_by(held: dict[str, Any]) -> str:
    """The version that made a directory."""
    return held.get("made_by", records.FIRST)


def _unknown(held: dict[str, Any]) -> list[identity.Field]:
    """The fields that this version did not know."""
    without = held.get("made_without", [])
    later = identity.unknown_to(held["config"])
    return [f for f in identity.SINCE if f in later or ".".join(f) in without]


def _without_name(experiment: config.Experiment) -> dict[str, Any]:
    """The experiment as JSON values, without the name of its record."""
    resolved = records.to_json(experiment)
    return {k: v for k, v in resolved.items() if k != "record"}


def _compare(
    experiment: config.Experiment, held: dict[str, Any], path: pathlib.Path
) -> None:
    """Raises ConfigError unless an experiment.json belongs to this experiment."""
    mine = experiment.name, experiment.recipe_hash
    if (held["name"], held["recipe_hash"]) != mine:
        raise config.ConfigError(
            f"{path.parent} holds another experiment: {held['name']!r} (recipe "
            f"{held['recipe_hash']}), wanted {experiment.name!r} (recipe "
            f"{experiment.recipe_hash}); use another --workdir"
            + _differences(
                identity.deciding(identity.filled(held["config"])),
                identity.deciding(records.to_json(experiment)),
            )
        )


def _say_as_then(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    made_by: str,
    without: Iterable[identity.Field],
) -> None:
    """Names the fields whose values here are not those of a new directory."""
    for section, field in without:
        part = getattr(experiment, section)
        value = getattr(part, field)
        if value != getattr(type(part)(), field):
            progress.say(
                f"{workdir} was made by {made_by}: config.{section}.{field} = "
                f"{value!r} as then"
            )


def mark_complete(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Records that every stage has run."""
    records.write_json(
        workdir / "complete.json", {"inputs": _inputs(experiment, workdir)}
    )


def is_complete(experiment: config.Experiment, workdir: pathlib.Path) -> bool:
    """Whether every stage has run and nothing that the report shows has changed."""
    path = workdir / "complete.json"
    return path.exists() and records.read_json(path, "inputs")["inputs"] == _inputs(
        experiment, workdir
    )


def _inputs(experiment: config.Experiment, workdir: pathlib.Path) -> str:
    """A digest of everything the report shows."""
    measured = sorted(workdir.glob(f"runs/*/{table.FILE}"))
    texts = [_text(p) for p in (*runs.record_paths(workdir), *measured)]
    names = (
        "runs.jsonl",
        "laws.json",
        "samples/record.json",
        "evaluations.jsonl",
        "frontier.json",
        "report/index.html",
    )
    for name in names:
        path = workdir / name
        texts.append(_text(path) if path.exists() else "")
    shown = identity.as_before(records.to_json(experiment))
    return records.digest([shown, texts])


def _text(path: pathlib.Path) -> str:
    """A file's text; bytes that are not UTF-8 become escapes, so nothing is refused."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def _differences(held: Any, wanted: Any, where: str = "config") -> str:
    """Up to five fields in which two configs differ, one line each."""
    lines: list[str] = []

    def walk(a: Any, b: Any, where: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted((a.keys() | b.keys()) - {"record"}):
                walk(a.get(key), b.get(key), f"{where}.{key}")
        elif a != b:
            lines.append(f"\n  {where}: {a!r} there, {b!r} here")

    walk(held, wanted, where)
    more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
    return "".join(lines[:5]) + more


def _environment() -> dict[str, Any]:
    """Versions and facts of the host for the report; nothing that identifies it."""
    packages = ("scaling_ldm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    versions = {}
    for package in (*packages, "grain", "numpy", "scipy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "packages": versions,
    }
