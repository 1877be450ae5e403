"""What to run within a budget of time, FLOPs, relative cost or memory; numpy only."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from scaling_ldm.flops import peaks
from scaling_ldm.frontier.cells import CellTable, choose, compare, cost_of
from scaling_ldm.frontier.narrate import EDGES
from scaling_ldm.records import Advice, Choice, Frontier, Refusal

UNITS = ("seconds", "flops", "relative_cost", "memory_bytes")
UTILISATION = 0.3  # share of the peak that is assumed without a measurement
BYTES_PER_PARAMETER = 4  # float32
_WORDS = {
    "seconds": "{:.4g} s",
    "flops": "{:.4g} FLOPs",
    "relative_cost": "a relative cost of {:.4g}",
}
_SETTING = ("model", "sampler", "steps", "guidance")
_PREFIXES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def advice(
    frontier: Frontier,
    budget: float,
    unit: str = "seconds",
    *,
    device: str | None = None,
    dtype: str = "bfloat16",
    utilisation: float = UTILISATION,
) -> Advice | Refusal:
    """The model, sampler, steps and guidance of the lowest value within a budget.

    Args:
      frontier: the measured cells.
      budget: of one image, in `unit`; of "memory_bytes" for the model to run at all.
      unit: "seconds", "flops" (decoder counted), "relative_cost" (x steps) or
        "memory_bytes".
      device: where it will run, a name of `peaks.PEAKS` or a device kind that it knows;
        None is the device of the measurement. Seconds on another device are FLOPs /
        (peak x utilisation), and the advice says that this is an estimate. Planned
        memory stays that of the measuring device, and the advice says so.
      dtype: number format whose peak counts on that device.
      utilisation: assumed share of that peak.

    Returns:
      The advice, or a refusal if nothing fits. If several settings are nearly equal,
      the advice is still the lowest measured one, and its `choice.probability` is low.
      That is the probability of one exact setting, with its guidance and steps, not of
      its model size.

    Raises:
      ValueError: an unknown unit or device, or a budget or share out of range.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; known: {', '.join(UNITS)}")
    if not 0 < budget < float("inf"):
        raise ValueError(f"budget must be positive and finite, got {budget}")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must lie in (0, 1], got {utilisation}")
    table = compare(
        frontier.cells,
        bootstrap=frontier.bootstrap,
        level=frontier.level,
        seed=frontier.seed,
        allow_protocols=frontier.protocols,
    )
    costs, estimated, basis = _costs(table, frontier, unit, device, dtype, utilisation)
    fits = np.flatnonzero(costs <= budget * (1 + 1e-9))
    if not len(fits):
        least = int(costs.argmin())
        cell = table.cells[least]
        return Refusal(
            quantity=f"advice within {amount(budget, unit)}",
            reason="nothing fits",
            detail=f"the least is {amount(costs[least], unit)}: {cell.label}, "
            f"{cell.sampler}, {cell.steps} steps, guidance {cell.guidance:g} ({basis})",
        )
    _, choice = choose(table, fits, costs)
    return Advice(
        choice=choice,
        metric=frontier.metric,
        unit=unit,
        budget=float(budget),
        estimated=estimated,
        basis=basis,
        doubts=tuple(_doubts(frontier, choice)),
    )


def _doubts(frontier: Frontier, choice: Choice) -> Iterator[str]:
    """A guidance at an end of what was tried, and the notes of the frontier."""
    for best in frontier.best:
        same = all(getattr(best.choice, f) == getattr(choice, f) for f in _SETTING)
        if same and best.edge:
            yield (
                f"guidance {choice.guidance:g} is {EDGES[best.edge]} that was tried, "
                "so a better one may lie beyond"
            )
    yield from frontier.notes


def amount(value: float, unit: str) -> str:
    """0.04 s, 8e+09 FLOPs, a relative cost of 2, 40 kB."""
    if unit != "memory_bytes":
        return _WORDS[unit].format(value)
    for factor, prefix in _PREFIXES:
        if value >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:.4g} bytes"


def _costs(
    table: CellTable,
    frontier: Frontier,
    unit: str,
    device: str | None,
    dtype: str,
    utilisation: float,
) -> tuple[np.ndarray, bool, str]:
    """(cost of each cell, whether it is an estimate, how it was found)."""
    if device is not None and unit != "seconds" and device != frontier.device:
        _row(device)  # an unknown name is an error in every unit
    if unit == "relative_cost":
        basis = f"relative to an evaluation of {frontier.reference}, x steps"
        return table.cost("relative_cost_steps"), False, basis
    if unit == "flops":
        return table.cost("flops"), False, "counted, with the decoder"
    if unit == "memory_bytes":
        return _memory(table, frontier, device)
    if device is None or _same(device, frontier.device):
        basis = f"measured on {frontier.device}"
        return table.cost("seconds"), False, basis
    name, row = _row(device)
    if dtype not in row.flops_per_second:
        raise ValueError(
            f"no published {dtype} rate of {name}; there are "
            f"{', '.join(row.flops_per_second)}"
        )
    rate = row.flops_per_second[dtype] * utilisation
    seconds = np.array([cost_of(c, "flops") / rate for c in table.cells])
    basis = (
        f"an estimate: FLOPs / ({utilisation:g} of the {dtype} peak of {name}, "
        f"{row.flops_per_second[dtype]:.4g} FLOP/s); measured on {frontier.device} only"
    )
    return seconds, True, basis


def _memory(
    table: CellTable, frontier: Frontier, device: str | None
) -> tuple[np.ndarray, bool, str]:
    elsewhere = device is not None and not _same(device, frontier.device)
    planned = [c.memory_bytes for c in table.cells if c.memory_bytes is not None]
    if len(planned) == len(table.cells):
        memory = np.array([float(count) for count in planned])
        basis = (
            "parameters, and what the compiler plans beside them for one image, "
            f"on {frontier.device}"
        )
        if elsewhere:
            basis += f"; on {device} that plan may differ"
        return memory, elsewhere, basis
    memory = np.array([float(BYTES_PER_PARAMETER * c.params) for c in table.cells])
    basis = (
        f"an estimate: {BYTES_PER_PARAMETER} bytes a parameter of the denoiser; "
        "activations, text encoder and decoder come on top"
    )
    return memory, True, basis


def _row(device: str) -> tuple[str, peaks.Peak]:
    for name, row in peaks.PEAKS.items():
        kinds = row.device_kinds
        if device == name or any(re.fullmatch(kind, device) for kind in kinds):
            return name, row
    raise ValueError(f"unknown device {device!r}; known: {', '.join(peaks.PEAKS)}")


def _same(device: str, measured: str) -> bool:
    """Whether two names are of one row of the peaks, or equal."""
    if device == measured:
        return True
    try:
        return _row(device)[0] == _row(measured)[0]
    except ValueError:
        return False
