"""compile: what a run needs on devices that are not here, by their compiler."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.models import attention_backends
from scaling_ldm.records.compiled import COMPILED, CompiledProgram
from scaling_ldm.training import (
    ahead_of_time,
    capacity,
    progress,
    step_memory,
    topologies,
)

_GIB = 2**30


def check(experiment: config.Experiment) -> None:
    """Refuses a topology (ConfigError) before anything is planned.

    It is unknown, or cannot run the attention that was chosen.
    """
    cfg = experiment.compile
    if not cfg.topology:
        raise config.ConfigError(
            "the stage compile needs --config.compile.topology, such as v5p:4x8x8 "
            "or h100:8x8"
        )
    topology = topologies.describe(cfg.topology, cfg.slices)
    attention_backends.check(experiment.model.attention, topology.platform)


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> None:
    """Compiles the programs of the run that needs most memory.

    It adds a line for each program to `compiled.jsonl`, in place of that of an earlier
    call.

    Raises:
      ConfigError: a program does not fit on the devices; the message has what would.
      Damaged: the file of what was found before is no such file.
    """
    cfg = experiment.compile
    _held(workdir / COMPILED)  # before minutes of compilation
    topology = topologies.describe(cfg.topology, cfg.slices)
    spec = max(specs, key=lambda one: one.memory_bytes_per_device)
    progress.say(
        f"compile: {spec.run_id}, {spec.params / 1e6:.4g}M parameters, for "
        f"{len(topology.devices)} devices of {topology.name}"
    )
    for program in cfg.programs:
        found = ahead_of_time.compiled(experiment, spec, topology, program)
        _keep(workdir / COMPILED, found)
        for line in lines(found):
            progress.say(line)
        if found.refusal or found.peak_bytes > found.device_bytes:
            raise config.ConfigError(_refusal(experiment, spec, found))


def lines(found: CompiledProgram) -> list[str]:
    """What a program needs, for people."""
    if found.refusal:
        return [f"{found.program}: the compiler refuses it: {found.refusal}"]
    said = (
        f"{found.program}: {found.peak_bytes / _GIB:.3g} GiB at most on each device "
        f"({found.argument_bytes / _GIB:.3g} of inputs, "
        f"{found.temporary_bytes / _GIB:.3g} of temporaries)"
    )
    if found.program == "train":
        ratio = found.planned_bytes / found.peak_bytes
        said += f"; planned {found.planned_bytes / _GIB:.3g} GiB, {ratio:.2f} of it"
    said += f"; compiled in {found.seconds:.0f} s"
    return [said, *(f"  {_collective(one)}" for one in found.collectives)]


def _collective(one: records.Collective) -> str:
    more = "at least " if one.at_least else ""
    return (
        f"{one.kind} of {one.dtype}: {more}{one.nbytes / 2**20:.4g} MiB in "
        f"{more}{one.count:,} arrays"
    )


def _keep(path: pathlib.Path, found: CompiledProgram) -> None:
    def key(one: CompiledProgram) -> tuple[Any, ...]:
        how = one.fsdp, one.remat, one.microbatch, one.overlap
        return one.run_id, one.program, one.topology, *how

    held = [one for one in _held(path) if key(one) != key(found)]
    records.write_jsonl(path, [*held, found])


def _held(path: pathlib.Path) -> list[CompiledProgram]:
    """What was found before."""
    return records.read_jsonl(path, CompiledProgram) if path.is_file() else []


def _refusal(
    experiment: config.Experiment, spec: records.RunSpec, found: CompiledProgram
) -> str:
    there = found.device_bytes / _GIB
    said = f"{found.peak_bytes / _GIB:.3g} GiB" if found.peak_bytes else "more"
    refused = (
        f"{spec.run_id} does not fit on {found.topology} with mesh.fsdp = "
        f"{found.fsdp}: {found.program} needs {said}, a device has {there:.4g} GiB. "
    )
    if found.program != "train":
        field = {"loss": "validation", "sample": "generate"}[found.program]
        return refused + f"Lower config.{field}.batch_size, or raise mesh.fsdp"
    own = config.with_overrides(experiment, spec.overrides)

    def held(changed: config.Experiment, devices: int, fsdp: int) -> int:
        return step_memory.step_memory(
            changed, spec.width, spec.depth, devices, fsdp, found.accelerator
        ).total

    ways = capacity.ways_to_fit(own, spec, found.devices, found.device_bytes, held)
    return refused + (
        "By the library's estimate this may fit: "
        f"{'; or '.join(ways) or 'nothing known'}"
    )
