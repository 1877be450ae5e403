"""What a run tells while it runs: lines for people, JSON lines and TensorBoard.

The only user of clu (whose `metric_writers` would import TensorFlow, so TensorBoard
goes through tensorboardX) and of the wall clock.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from clu import parameter_overview, profiler


def say(line: str) -> None:
    """One line for the user, at once, from the primary process only (see `mute`)."""
    if not _muted:
        print(line, file=sys.stderr, flush=True)


_muted = False


def mute() -> None:
    """Silences `say` on a process that is not the primary one."""
    global _muted
    _muted = True


def duration(seconds: float) -> str:
    """3661 -> "1:01:01", 61 -> "1:01"."""
    minutes, seconds = divmod(int(round(max(seconds, 0))), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def rate(flops_per_second: float) -> str:
    """12.3e9 -> "12.3 GFLOP/s"."""
    for suffix in ("", "k", "M", "G", "T", "P"):
        if abs(flops_per_second) < 1000:
            return f"{flops_per_second:.3g} {suffix}FLOP/s"
        flops_per_second /= 1000
    return f"{flops_per_second:.3g} EFLOP/s"


def overview(params: Any) -> str:
    """A table of parameters: name, shape, size, mean, standard deviation."""
    return parameter_overview.get_parameter_overview(params)


class Profile:
    """Traces a few steps into a folder, once compiled code is running."""

    def __init__(self, folder: pathlib.Path, steps: int, first: int) -> None:
        self._folder, self._first, self._steps = str(folder), first + 10, steps
        self._on = False

    def step(self, step: int) -> None:
        if self._steps and not self._on and step >= self._first:
            profiler.start(self._folder)
            self._on = True
        elif self._on and step >= self._first + self._steps:
            profiler.stop()
            self._on, self._steps = False, 0

    def close(self) -> None:
        if self._on:
            profiler.stop()


class Sweep:
    """Progress over all runs: where we are, how fast, how long it will take.

    The time left is the FLOPs left at the speed so far, plus for every run left the
    mean of what a run has taken beyond its steps (compilation, validation, saving).
    """

    def __init__(self, runs: int, flops: Sequence[float], every_seconds: float) -> None:
        """Args: runs in the plan; the FLOPs of each run that is left, in order."""
        self._runs, self._every = runs, every_seconds
        self._flops_left, self._runs_left = float(sum(flops)), len(flops)
        self._spent = self._stepping = 0.0  # FLOPs, seconds
        self._overhead: list[float] = []
        self._line = ""

    def begin(self, number: int, title: str) -> None:
        """A run starts."""
        self._line = f"run {number + 1} of {self._runs}  {title}"
        self._shown = self._begun = time.perf_counter()
        self._steps_took = self._run_flops = 0.0

    def skip(self, flops: float) -> None:
        """FLOPs that an earlier process has spent already."""
        self._flops_left -= flops
        self._run_flops += flops

    def spend(self, flops: float, seconds: float | None) -> None:
        """FLOPs done just now, in `seconds` (None: compilation was in it)."""
        self._flops_left -= flops
        self._run_flops += flops
        if seconds is not None:
            self._spent += flops
            self._stepping += seconds
            self._steps_took += seconds

    def end(self, planned_flops: float) -> None:
        """The run is over; what it did not spend of its plan will not be spent."""
        self._runs_left -= 1
        self._flops_left -= planned_flops - self._run_flops
        took = time.perf_counter() - self._begun
        self._overhead.append(max(took - self._steps_took, 0.0))

    def left(self) -> str:
        """The time left, or "?" before there is anything to go by."""
        if not self._spent:
            return "?"
        seconds = self._flops_left * self._stepping / self._spent
        if self._overhead:
            mean = sum(self._overhead) / len(self._overhead)
            seconds += max(self._runs_left - 1, 0) * mean
        return duration(seconds)

    def show(self, step: int, steps: int, loss: float, flops_per_second: float) -> None:
        """A line, unless the last one was a moment ago or it is too early to tell."""
        now = time.perf_counter()
        if flops_per_second == 0 or now - self._shown < self._every:
            return
        self._shown = now
        say(
            f"{self._line}  step {step}/{steps}  loss {loss:.4f}  "
            f"{rate(flops_per_second)}  left {self.left()}"
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


class Clock:
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
