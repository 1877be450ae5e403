"""Which runs of a plan train side by side, and how many (config.mesh.runs)."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from scaling_ldm import config, records
from scaling_ldm.training import capacity, train_step

Rows = Sequence[tuple[int, records.RunSpec]]  # (number in the plan, spec)
SHARE = 0.5  # of a device's memory that "auto" gives to what a step holds at least


def _alike(experiment: config.Experiment, rows: Rows) -> list[Rows]:
    """The rows that share a compiled step: all that is not data of it, and shapes.

    A branch (plan.reuse) is no such row of its trunk, which is trained before it.
    """
    alike: dict[object, list[tuple[int, records.RunSpec]]] = {}
    for number, spec in rows:
        own = config.with_overrides(experiment, spec.overrides)
        part = train_step.compiled_part(own)
        key = part, spec.width, spec.depth, spec.batch_size, bool(spec.trunk)
        alike.setdefault(key, []).append((number, spec))
    return list(alike.values())


def packs(experiment: config.Experiment, rows: Rows, most: int) -> list[Rows]:
    """The rows that train side by side, in the order of their first ones.

    Runs of similar length are put together, because a device whose run is over waits
    for the others.

    Args:
      most: how many runs a pack has; 1: each row is alone, in the given order.
    """
    if most == 1:
        return [[row] for row in rows]
    found: list[Rows] = []
    for group in _alike(experiment, rows):
        by_length = sorted(group, key=lambda row: -row[1].steps)
        found += [
            sorted(by_length[i : i + most], key=lambda row: row[0])
            for i in range(0, len(by_length), most)
        ]
    return sorted(found, key=lambda pack: pack[0][0])


def choose(experiment: config.Experiment, rows: Rows) -> tuple[list[Rows], int]:
    """The packs of the rows on the devices of this job, and their places.

    The places are one if no two rows train side by side: then each has all devices.

    Raises:
      ConfigError: runs cannot train side by side; see `check`.
    """
    check(experiment, jax.process_count())
    most = experiment.mesh.runs or auto(experiment, rows, jax.devices())
    found = packs(experiment, rows, most)
    return found, 1 if all(len(pack) == 1 for pack in found) else most


def auto(
    experiment: config.Experiment, rows: Rows, devices: Sequence[jax.Device]
) -> int:
    """How many runs train side by side where `mesh.runs` is 0.

    It is the largest number that divides the devices and

    - is no larger than the largest group of rows that may share a pack, and
    - leaves every run enough memory: what its step certainly holds takes at most SHARE
      of a device, or of the host where its devices are simulated.

    It is 1 where `check` refuses other numbers, and for convolutional networks on a
    CPU.
    """
    names = {config.with_overrides(experiment, s.overrides).model for _, s in rows}
    on_cpu = devices[0].platform == "cpu"
    slow = any(model.architecture in config.CONVOLUTIONAL for model in names)
    if experiment.mesh.fsdp > 1 or jax.process_count() > 1 or (slow and on_cpu):
        return 1
    largest = max(map(len, _alike(experiment, rows)))
    own = capacity.device_bytes(devices[0])
    there = capacity.host_bytes() // len(devices) if own is None else own

    def fits(runs: int) -> bool:
        each = len(devices) // runs
        return all(
            spec.batch_size % each == 0
            and SHARE * there
            >= capacity.step_bytes(spec.state_bytes, spec.activation_bytes, each, 1)
            for _, spec in rows
        )

    possible = [n for n in range(2, largest + 1) if len(devices) % n == 0 and fits(n)]
    return max(possible, default=1)


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
    if cfg.runs < 2:
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
