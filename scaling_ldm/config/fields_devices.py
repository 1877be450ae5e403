"""Fields about devices: those that run an experiment, and those it is compiled for.

The comment of a field stands on its line or directly above it, as in fields.py.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices and processes are used."""

    replica: int = -1  # copies of the parameters; -1: as many as devices allow
    fsdp: int = 1  # devices that share one copy of the parameters
    # Runs that train side by side, each on its own part of the devices, if they differ
    # in their seed, rate, warm-up or length alone; 0: as many as devices and memory
    # allow.
    runs: int = 1
    cpu_devices: int = 0  # simulated devices on a CPU host; 0: one per core
    heartbeat_seconds: int = 100  # of silence, after which a process counts as lost
    # Seconds without progress in training after which each process prints where it is;
    # five times as long before the first step and the first held-out batch. 0: never.
    stall_seconds: float = 300.0
    stall_limit_seconds: float = 1800.0  # then a job of several ends; 0: never
    # Folder or bucket of compiled programs, for the next process; "": none; "auto":
    # `compiled` in the working directory, and none on a CPU.
    compilation_cache: str = "auto"
    # Compiler flags of TPUs and GPUs with which collectives run beside arithmetic; see
    # training/xla_flags.py.
    overlap_collectives: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Compiling a run's programs for devices that are not here."""

    topology: str = ""  # TPU chips, "v5p:4x8x8", or hosts x GPUs, "h100:8x8"
    slices: int = 1  # of TPUs, joined by the data centre's network
    programs: tuple[str, ...] = ("train", "loss", "sample")  # some of PROGRAMS
