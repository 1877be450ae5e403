"""Which runs of a plan train side by side (config.mesh.runs)."""

from __future__ import annotations

from collections.abc import Sequence

from scaling_ldm import config, records
from scaling_ldm.training import train_step

Rows = Sequence[tuple[int, records.RunSpec]]  # (number in the plan, spec)


def packs(experiment: config.Experiment, rows: Rows) -> list[Rows]:
    """The rows that train side by side, in the order of their first ones.

    They share a size, a batch size, and everything else that is compiled into a step.
    Runs of similar length are put together, because a device whose run is over waits
    for the others.
    """
    most = experiment.mesh.runs
    if most == 1:
        return [[row] for row in rows]
    alike: dict[object, list[tuple[int, records.RunSpec]]] = {}
    for number, spec in rows:
        own = config.with_overrides(experiment, spec.overrides)
        part = train_step.compiled_part(own)
        key = part, spec.width, spec.depth, spec.batch_size
        alike.setdefault(key, []).append((number, spec))
    found: list[Rows] = []
    for group in alike.values():
        by_length = sorted(group, key=lambda row: -row[1].steps)
        found += [
            sorted(by_length[i : i + most], key=lambda row: row[0])
            for i in range(0, len(by_length), most)
        ]
    return sorted(found, key=lambda pack: pack[0][0])


def slots(experiment: config.Experiment, together: Sequence[Rows]) -> int:
    """How many runs the mesh has room for; 1 if no two runs train side by side."""
    if all(len(pack) == 1 for pack in together):
        return 1
    return experiment.mesh.runs


def line(together: Sequence[Rows], room: int) -> str:
    """What is said of the packs before they train; "" without any."""
    if room == 1:
        return ""
    count = sum(len(pack) for pack in together)
    said = f"{count} runs train in {len(together)} packs of up to {room}, side by side"
    empty = sum(room - len(pack) for pack in together)
    if empty:
        said += f"; {empty} places are empty, and their devices idle"
    return f"{said} (config.mesh.runs)"


def check(experiment: config.Experiment, processes: int) -> None:
    """Refuses settings with which runs cannot train side by side.

    Raises:
      ConfigError: the job has several processes, or devices share parameters.
    """
    cfg = experiment.mesh
    if cfg.runs == 1:
        return
    where = f"config.mesh.runs = {cfg.runs}"
    if cfg.fsdp > 1:
        raise config.ConfigError(
            f"{where} with mesh.fsdp = {cfg.fsdp}: runs that train side by side have "
            "whole parameters on every device; set one of the two to 1"
        )
    if processes > 1:
        raise config.ConfigError(
            f"{where} in a job of {processes} processes: runs side by side are those "
            "of one process; set mesh.runs = 1, or start one process for each row "
            "(--run)"
        )
