"""What a run tells while it runs: lines for people, JSON lines and TensorBoard.

The only user of clu (whose `metric_writers` would import TensorFlow, so TensorBoard
goes through tensorboardX) and of the wall clock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize


def say(line: str) -> None:
    """One line for the user, at once, from the primary process only (see `mute`)."""
    if not _muted:
        print(line, file=sys.stderr, flush=True)


_muted = False


def mute() -> None:
    """Silences `say` on a process that is not the primary one."""
    global _muted
    _muted = True


def format_duration(seconds: float) -> str:
    """3661 -> "1:01:01", 61 -> "1:01"."""
    minutes, seconds = divmod(int(round(max(seconds, 0))), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_rate(flops_per_second: float) -> str:
    """12.3e9 -> "12.3 GFLOP/s"."""
    for suffix in ("", "k", "M", "G", "T", "P"):
        if abs(flops_per_second) < 1000:
            return f"{flops_per_second:.3g} {suffix}FLOP/s"
        flops_per_second /= 1000
    return f"{flops_per_second:.3g} EFLOP/s"


def parameter_table(params: Any) -> str:
    """A table of parameters (arrays, or their shapes alone): name, shape, size."""
    from clu import parameter_overview  # brings jax, which reading a study does without

    return parameter_overview.get_parameter_overview(params, include_stats=False)


class Progress:
    """Lines on how many of a known number of things are done, and the time left.

    Args:
      what: how a line begins.
      things: how they are called, in the plural.
      at_once: whether the first of them is worth a line.
    """

    def __init__(
        self,
        what: str,
        total: int,
        things: str,
        every_seconds: float,
        at_once: bool = True,
    ) -> None:
        self._what, self._total, self._things = what, total, things
        self._every, self._at_once = every_seconds, at_once
        self.begin(0)

    def begin(self, done: int) -> None:
        """Work starts now; so many were done before."""
        self._since = done, time.perf_counter()
        self._shown = None if self._at_once else self._since[1]

    def show(self, done: int) -> None:
        """A line at first and then now and again, given how many are done in all."""
        now = time.perf_counter()
        if self._shown is not None and now - self._shown < self._every:
            return
        before, begun = self._since
        left = (now - begun) * (self._total - done) / (done - before)
        if self._shown is None:
            self._since = done, now  # what follows compiles no more
        self._shown = now
        say(
            f"{self._what}  {done:,} of {self._total:,} {self._things}  "
            f"left {format_duration(left)}"
        )


class Profile:
    """Traces a few steps into a folder, once compiled code is running."""

    def __init__(self, folder: pathlib.Path, steps: int, first: int) -> None:
        self._folder, self._first, self._steps = str(folder), first + 10, steps
        self._on = False

    def _profiler(self) -> Any:
        from clu import profiler  # brings jax, as above

        return profiler

    def step(self, step: int) -> None:
        if self._steps and not self._on and step >= self._first:
            self._profiler().start(self._folder)
            self._on = True
        elif self._on and step >= self._first + self._steps:
            self._profiler().stop()
            self._on, self._steps = False, 0

    def close(self) -> None:
        if self._on:
            self._profiler().stop()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemainingRun:
    """What a run that is left will take."""

    size: tuple[int, int]  # runs of one size share a compiled step
    steps: int
    flops_per_step: int


class SweepProgress:
    """Progress over all runs: where we are, how fast, how long it will take.

    The time left is that of the steps left, at a + b FLOPs seconds a step (small
    networks are bound by a, large ones by b), plus what a run takes beyond its steps:
    compilation for the first run of a size, validation and saving for all.
    """

    def __init__(
        self, runs: int, jobs: Sequence[RemainingRun], every_seconds: float
    ) -> None:
        """Args: runs in the whole plan; the jobs of those that are left, in order."""
        self._runs, self._every = runs, every_seconds
        self._jobs = list(jobs)
        self._measured: dict[int, list[float]] = {}  # FLOPs a step: [steps, seconds]
        self._beyond: dict[bool, list[float]] = {
            True: [],
            False: [],
        }  # by first of size
        self._compiled: set[tuple[int, int]] = set()
        self._line = ""

    def begin(self, number: int, title: str) -> None:
        """The next job starts."""
        self._line = f"run {number + 1} of {self._runs}  {title}"
        self._job = self._jobs.pop(0)
        self._steps_left = self._job.steps
        self._shown = self._begun = time.perf_counter()
        self._stepping = 0.0

    def skip(self, steps: int) -> None:
        """Steps that an earlier process has done already."""
        self._steps_left -= steps

    def spend(self, steps: int, seconds: float | None) -> None:
        """Steps done just now, in `seconds` (None: compilation was in it)."""
        self._steps_left -= steps
        if seconds is not None:
            self._stepping += seconds
            tally = self._measured.setdefault(self._job.flops_per_step, [0, 0.0])
            tally[0] += steps
            tally[1] += seconds

    def end(self) -> None:
        """The job is over; what it did not do of its steps will not be done."""
        self._steps_left = 0
        first = self._job.size not in self._compiled
        self._compiled.add(self._job.size)
        took = time.perf_counter() - self._begun
        self._beyond[first].append(max(took - self._stepping, 0.0))

    def left(self) -> str:
        """The time left, or "?" before there is anything to go by."""
        if not self._measured:
            return "?"
        seconds = self._steps_left * self._step_seconds(self._job.flops_per_step)
        compiled = self._compiled | {self._job.size}
        for job in self._jobs:
            seconds += job.steps * self._step_seconds(job.flops_per_step)
            known = self._beyond[job.size not in compiled] or self._beyond[True]
            seconds += sum(known) / len(known) if known else 0.0
            compiled.add(job.size)
        return format_duration(seconds)

    def _step_seconds(self, flops: int) -> float:
        """Seconds of a step of that many FLOPs, measured or by the line through all."""
        if flops in self._measured:
            steps, seconds = self._measured[flops]
            return seconds / steps
        x = np.array(list(self._measured), float)
        y = np.array([seconds / steps for steps, seconds in self._measured.values()])
        if len(x) == 1:  # half of it taken as bound by arithmetic
            return float(y[0] * (0.5 + 0.5 * flops / x[0]))
        a, b = optimize.nnls(np.stack([np.ones_like(x), x / x.max()], 1), y)[0]
        return float(a + b * flops / x.max())

    def show(self, step: int, steps: int, loss: float, flops_per_second: float) -> None:
        """A line, unless the last one was a moment ago or it is too early to tell."""
        now = time.perf_counter()
        if flops_per_second == 0 or now - self._shown < self._every:
            return
        self._shown = now
        say(
            f"{self._line}  step {step}/{steps}  loss {loss:.4f}  "
            f"{format_rate(flops_per_second)}  left {self.left()}"
        )

    def result(self, loss: float) -> None:
        """The line that ends a run."""
        say(f"{self._line}  done  validation loss {loss:.5f}  left {self.left()}")


class MetricLog:
    """A run's metrics.jsonl (and TensorBoard events), continued after `step`.

    Lines beyond the step that training continues from are dropped: those steps happen
    again.
    """

    def __init__(
        self, folder: pathlib.Path | None, step: int, tensorboard: bool
    ) -> None:
        self._file = self._events = None
        if folder is None:  # not the process that writes
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break  # cut off in the middle of a write
                if row["step"] <= step:
                    kept.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self._file = open(path, "a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        row = {"step": step, **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, global_step=step)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


class RunClock:
    """A run's wall time over all its restarts, and its speed once compiled."""

    def __init__(self, before: float = 0.0) -> None:
        self._begin = time.perf_counter() - before
        self._steps = 0
        self._stepping = 0.0
        self._last: float | None = None

    def lap(self, steps: int) -> float | None:
        """A dispatch of `steps` steps is done: seconds since the one before.

        None for the first, which waits for compilation.
        """
        before, self._last = self._last, time.perf_counter()
        if before is None:
            return None
        self._steps += steps
        self._stepping += self._last - before
        return self._last - before

    def resume(self) -> None:
        """Steps go on after something else (a save), whose time is not theirs."""
        self._last = time.perf_counter()

    def steps_per_second(self) -> float:
        """Of this process, from its second dispatch on; 0 before."""
        return self._steps / self._stepping if self._steps else 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self._begin
