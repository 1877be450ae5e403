"""Where the seconds of a run went: one `Attempt` of each process that trained it.

The parts have the names of Google's ml-goodput-measurement, which maxtext reports. STEP
is the useful time; every other part is time in which the run did not advance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

STEP = "STEP"
LOST = "WASTED_PROGRESS_FROM_DISRUPTION"
BETWEEN = "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"
OTHER = "OTHER"
# Parts that a process measures: name -> what it does meanwhile.
MEASURED: Mapping[str, str] = {
    STEP: "training steps",
    "TPU_INITIALIZATION": "joining the job, starting devices of any kind",
    "TRAINING_PREP": "opening data, first state, weights to start from",
    "PROGRAM_STARTUP": "tracing, compiling, reading compiled programs",
    "DATA_LOADING_SYNC": "waiting for data while the devices are idle",
    "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME": "saving, and waiting for a save",
    "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME": "reading a checkpoint",
    "EVAL_STEP": "measuring the held-out loss",
    OTHER: "everything else",
}
# All parts: also those that follow from the attempts of a run together.
PARTS: Mapping[str, str] = {
    **MEASURED,
    LOST: "steps after the last checkpoint, which were done again",
    BETWEEN: "from the last sign of one process to the start of the next",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One process's work at a run, from its start or restart to its end.

    Process 0 of a job measures `parts`; their sum is `seconds`. The line is written
    again during the attempt, so a killed process has one, too.

    Raises:
      ValueError: a part that nothing measures, or other processes in `host_seconds`
        than in `data_seconds`.
    """

    run_id: str
    number: int  # of the attempt, from 0
    began: float  # seconds since 1970, by the host's clock
    seconds: float  # wall time until it ended, or until this was written
    ended: str  # finished | non_finite_loss | stopped | failed; "": it said no end
    first_step: int | None  # steps done before; None: it ended before it knew them
    last_step: int  # steps that were done at its end; 0 without a first one
    parts: Mapping[str, float]  # name of MEASURED -> seconds
    compiled: int  # programs that were compiled or read from the cache
    cache_hits: int  # of these, read from the persistent compilation cache
    processes: int  # of the job
    devices: int  # of the mesh
    # Of each process: seconds in which it waited for its data, also those during which
    # its devices had work; (): one process.
    data_seconds: tuple[float, ...] = ()
    # Of each process: these, and the seconds of the host's own work between steps.
    host_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if unknown := self.parts.keys() - MEASURED.keys():
            raise ValueError(f"Attempt: parts has unknown {sorted(unknown)}")
        if self.host_seconds and len(self.host_seconds) != len(self.data_seconds):
            raise ValueError(
                f"Attempt: host_seconds are of {len(self.host_seconds)} processes, "
                f"data_seconds of {len(self.data_seconds)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goodput:
    """The attempts of one or several runs together."""

    attempts: int  # how many there are
    # By name of PARTS; their sum is the time from the first start to the last sign.
    seconds: Mapping[str, float]
    lost_steps: int  # steps that were done again
    compiled: int  # programs
    cache_hits: int  # of these

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float | None:
        """The useful share of the time; None without any."""
        return self.seconds[STEP] / self.total if self.total else None


def with_later_steps(attempt: Attempt, last_step: int, began: float) -> Attempt:
    """An attempt whose process was killed after it had written the attempt last.

    The steps since then are counted at the pace of those before. They cannot have taken
    longer than until the next attempt. An attempt without a first step did none.

    Args:
      last_step: that was logged.
      began: when the next attempt did.
    """
    if attempt.first_step is None or last_step <= attempt.last_step:
        return attempt
    later, done = last_step - attempt.last_step, attempt.last_step - attempt.first_step
    stepping = attempt.parts.get(STEP, 0.0)
    pace = stepping / done if done else 0.0
    free = max(began - attempt.began - attempt.seconds, 0.0)
    spent = min(pace * later, free)
    return dataclasses.replace(
        attempt,
        last_step=last_step,
        seconds=attempt.seconds + spent,
        parts={**attempt.parts, STEP: stepping + spent},
    )


def of_run(attempts: Sequence[Attempt]) -> Goodput:
    """The attempts of one run, in order.

    Where an attempt starts before the last step of an earlier one, the steps between
    were lost. Their seconds are taken from STEP, by the pace of the attempts that did
    them. An attempt that ended before it knew its first step loses nothing.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    kept: list[tuple[int, int, float]] = []  # (first, last, seconds of a step)
    lost = 0
    for number, attempt in enumerate(attempts):
        for name, spent in attempt.parts.items():
            seconds[name] += spent
        if number:
            before = attempts[number - 1]
            free = attempt.began - before.began - before.seconds
            seconds[BETWEEN] += max(free, 0.0)
        if attempt.first_step is None:
            continue
        while kept and kept[-1][1] > attempt.first_step:
            first, last, pace = kept.pop()
            again = last - max(first, attempt.first_step)
            seconds[STEP] -= pace * again
            seconds[LOST] += pace * again
            lost += again
            if first < attempt.first_step:
                kept.append((first, attempt.first_step, pace))
        if done := max(attempt.last_step - attempt.first_step, 0):
            pace = attempt.parts.get(STEP, 0.0) / done
            kept.append((attempt.first_step, attempt.last_step, pace))
    return Goodput(
        attempts=len(attempts),
        seconds=seconds,
        lost_steps=lost,
        compiled=sum(one.compiled for one in attempts),
        cache_hits=sum(one.cache_hits for one in attempts),
    )


def slowest(attempt: Attempt) -> tuple[int, float, float] | None:
    """The process whose host had the most to do between steps.

    Returns:
      (its number, share of its own work and waits for data in the time of the steps,
      share of the waits alone); None if there is one process, or nothing was measured.
    """
    steps = sum(attempt.parts.get(name, 0.0) for name in (STEP, "DATA_LOADING_SYNC"))
    if len(attempt.host_seconds) < 2 or not steps:
        return None
    own, data = attempt.host_seconds, attempt.data_seconds
    number = max(range(len(own)), key=own.__getitem__)
    return number, own[number] / steps, data[number] / steps


def total(runs: Iterable[Goodput]) -> Goodput:
    """Several runs together; nothing between one run and another is counted."""
    runs = list(runs)
    return Goodput(
        attempts=sum(run.attempts for run in runs),
        seconds={name: sum(run.seconds[name] for run in runs) for name in PARTS},
        lost_steps=sum(run.lost_steps for run in runs),
        compiled=sum(run.compiled for run in runs),
        cache_hits=sum(run.cache_hits for run in runs),
    )
