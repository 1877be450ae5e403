"""What the stage compile found about a run's programs on devices that are not here.

    compiled.jsonl    one line for each program, topology and run

May import: the standard library.
"""

from __future__ import annotations

import dataclasses

COMPILED = "compiled.jsonl"
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective, over a whole run of a program, on each device."""

    kind: str  # one of COLLECTIVES
    dtype: str  # XLA's name of the arrays' type, such as "bf16"
    count: int  # how many arrays
    nbytes: int  # of the whole arrays: results, and what a reduce-scatter adds up
    at_least: bool = False  # some are in a loop whose turns are not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """One program of a run, compiled for a topology; bytes are those of one device."""

    run_id: str
    study: str
    program: str  # one of config.PROGRAMS
    topology: str  # as config.compile.topology, with the slices if there are several
    accelerator: str  # a device with a known peak (flops/peaks.py)
    devices: int  # of the job
    fsdp: int  # devices that share one copy of the parameters
    remat: str  # what the backward pass computes again: a policy, or "none"
    device_bytes: int  # memory of a device, as its data sheet states it
    microbatch: int = 0  # rows of one pass of a training step; 0: the whole batch
    overlap: bool = False  # with flags that let collectives run beside arithmetic
    planned_bytes: int  # what the plan expects of a training step
    seconds: float  # of tracing and compiling
    refusal: str = ""  # what the compiler said where the program does not fit
    argument_bytes: int = 0  # state, batch and other inputs
    temporary_bytes: int = 0  # what the program allocates beside them
    peak_bytes: int = 0  # the most that is held at once
    collectives: tuple[Collective, ...] = ()  # by kind and type, most bytes first
