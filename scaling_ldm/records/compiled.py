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
    """One kind of collective, over a whole run of a program, on each device.

    Attributes:
      kind: one of COLLECTIVES.
      dtype: XLA's name of the arrays' type, such as "bf16".
      count: how many arrays.
      nbytes: bytes of the whole arrays. They are the results, and of a reduce-scatter
        what goes in.
      at_least: whether some are in a loop whose turns are not known.
    """

    kind: str
    dtype: str
    count: int
    nbytes: int
    at_least: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """One program of a run, compiled for a topology; bytes are those of one device."""

    run_id: str
    study: str
    program: str  # one of config.PROGRAMS
    topology: str
    accelerator: str
    devices: int
    fsdp: int  # devices that share one copy of the parameters
    remat: str  # what the backward pass computes again: a policy, or "none"
    device_bytes: int  # memory of a device, as its data sheet states it
    planned_bytes: int  # what the plan expects of a training step
    seconds: float  # of tracing and compiling
    refusal: str = ""  # what the compiler said where the program does not fit
    argument_bytes: int = 0  # state, batch and other inputs
    temporary_bytes: int = 0
    peak_bytes: int = 0  # the most that is held at once
    collectives: tuple[Collective, ...] = ()
