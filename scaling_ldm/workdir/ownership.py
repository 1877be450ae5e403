"""Checks whether a working directory is this experiment's and whether it is complete.

experiment.json    name, question, recipe and resolved config
environment.json   versions and facts of the host that wrote last
complete.json      a digest of all that the finished report shows
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.workdir import lock, runs


def check(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Refuses a directory that is not this experiment's; writes nothing.

    Raises:
      ConfigError: the directory holds another experiment, or something else.
    """
    path = workdir / "experiment.json"
    found = [p.name for p in workdir.iterdir()] if workdir.exists() else []
    # Locks, and a first write that was cut off, are those of a command that starts.
    start = (lock.NAME, f".{lock.NAME}.", path.name, f".{path.name}.")
    if path.exists():  # looked for last: another process may be writing it
        _compare(experiment, path)
    elif not all(name.startswith(start) for name in found):
        raise config.ConfigError(
            f"{workdir} is not empty and holds no experiment.json: use another "
            "--workdir"
        )


def register(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Writes experiment.json and environment.json; one process does it for all.

    Raises:
      ConfigError: see `check`.
    """
    check(experiment, workdir)
    path = workdir / "experiment.json"
    resolved = records.to_json(experiment)
    content = {
        "name": experiment.name,
        "question": experiment.question,
        "recipe_hash": experiment.recipe_hash,
        "config": {k: v for k, v in resolved.items() if k != "record"},
    }
    text = json.dumps(content, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        records.write_text(path, text)
    environment = json.dumps(_environment(), indent=1) + "\n"
    records.write_text(workdir / "environment.json", environment)


def _compare(experiment: config.Experiment, path: pathlib.Path) -> None:
    """Raises ConfigError unless an experiment.json belongs to this experiment."""
    try:
        held = json.loads(path.read_text())
    except ValueError as e:
        raise config.ConfigError(
            f"{path} is damaged ({e}): put a copy back, or use another --workdir"
        ) from e
    mine = experiment.name, experiment.recipe_hash
    if (held["name"], held["recipe_hash"]) != mine:
        raise config.ConfigError(
            f"{path.parent} holds another experiment: {held['name']!r} (recipe "
            f"{held['recipe_hash']}), wanted {experiment.name!r} (recipe "
            f"{experiment.recipe_hash}); use another --workdir"
            + _differences(
                config.identity(held["config"]),
                config.identity(records.to_json(experiment)),
            )
        )


def mark_complete(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Records that every stage has run."""
    text = json.dumps({"inputs": _inputs(experiment, workdir)}) + "\n"
    records.write_text(workdir / "complete.json", text)


def is_complete(experiment: config.Experiment, workdir: pathlib.Path) -> bool:
    """Whether every stage has run and nothing that the report shows has changed."""
    path = workdir / "complete.json"
    return path.exists() and json.loads(path.read_text())["inputs"] == _inputs(
        experiment, workdir
    )


def _inputs(experiment: config.Experiment, workdir: pathlib.Path) -> str:
    """A digest of everything the report shows."""
    texts = [path.read_text() for path in runs.record_paths(workdir)]
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
        texts.append(path.read_text() if path.exists() else "")
    return records.digest([records.to_json(experiment), texts])


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
