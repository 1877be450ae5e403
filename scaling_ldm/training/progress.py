"""Progress of runs and stages: lines for people, JSON lines, TensorBoard, profiles.

The only user of clu. Its `metric_writers` would import TensorFlow, so tensorboardX
writes the TensorBoard events.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ldm import records
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.training.growing import GrowingObject
from scaling_ldm.training.run_files import RunFiles
from scaling_ldm.training.time_left import Pace, left


def say(line: str) -> None:
    """Prints one line for the user at once; only the primary process does (`mute`)."""
    if not _muted:
        print(line, file=sys.stderr, flush=True)


_muted = False


def mute() -> None:
    """Silences `say` in this process; for all processes but the primary one."""
    global _muted
    _muted = True


def format_rate(flops_per_second: float) -> str:
    """12.3e9 -> "12.3 GFLOP/s"."""
    for suffix in ("", "k", "M", "G", "T", "P"):
        if abs(flops_per_second) < 1000:
            return f"{flops_per_second:.3g} {suffix}FLOP/s"
        flops_per_second /= 1000
    return f"{flops_per_second:.3g} EFLOP/s"


def parameter_table(params: Any) -> str:
    """A table of parameters (arrays, or only their shapes): name, shape, size."""
    from clu import parameter_overview  # it imports jax, and reading a study must not

    return parameter_overview.get_parameter_overview(params, include_stats=False)


class Progress:
    """Lines that say how many of a known number of things are done, and the time left.

    Args:
      what: the beginning of each line.
      total: how many things there are.
      things: what they are called, in the plural.
      every_seconds: between two lines.
      at_once: whether the first call of `show` prints a line.
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
        self.begin()

    def begin(self) -> None:
        """Work starts now, perhaps where an earlier process stopped."""
        self._pace = Pace()
        self._shown = None if self._at_once else time.perf_counter()

    def show(self, done: int) -> None:
        """Prints a line if it is time for one; `done` things are done in all."""
        now, pace = time.perf_counter(), self._pace.per_second(done)
        if self._shown is not None and now - self._shown < self._every:
            return
        self._shown = now
        seconds = None if pace is None else (self._total - done) / pace
        say(f"{self._what}  {done:,} of {self._total:,} {self._things}{left(seconds)}")


class StepTrace:
    """Traces a few steps into a folder, beginning ten steps after the first.

    Args:
      folder: where the trace is written.
      steps: how many to trace; 0 traces none.
      first: the step from which this process trains.
    """

    def __init__(self, folder: pathlib.Path, steps: int, first: int) -> None:
        self._folder, self._first, self._steps = str(folder), first + 10, steps
        self._on = False

    def _profiler(self) -> Any:
        from clu import profiler  # it imports jax, as above

        return profiler

    def step(self, step: int) -> None:
        """Starts or stops the trace if this step is its first or last."""
        if self._steps and not self._on and step >= self._first:
            self._profiler().start(self._folder)
            self._on = True
        elif self._on and step >= self._first + self._steps:
            self._profiler().stop()
            self._on, self._steps = False, 0

    def close(self) -> None:
        """Stops a trace under way."""
        if self._on:
            self._profiler().stop()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemainingRun:
    """A run that is not trained yet, and its cost.

    size: width and depth; runs of one size share a compiled step.
    steps: how many it has.
    flops_per_step: FLOPs of one of them.
    """

    size: tuple[int, int]
    steps: int
    flops_per_step: int


class SweepProgress:
    """Progress over all runs: which run, at which speed, and the time left.

    The time left is that of all remaining steps, and of what each run does beyond its
    steps: compilation for the first run of a size, validation and saving for all. A
    step whose FLOPs were measured before takes the mean measured time. Any other step
    takes a + b x (its FLOPs) seconds, with a and b fitted to the measured steps: a
    dominates in small networks, b in large ones.

    Args:
      runs: in the whole plan.
      remaining: the runs that are not trained yet, in order.
      every_seconds: between two lines.
    """

    def __init__(
        self, runs: int, remaining: Sequence[RemainingRun], every_seconds: float
    ) -> None:
        self._runs, self._every = runs, every_seconds
        self._remaining = list(remaining)
        self._measured: dict[int, list[float]] = {}  # FLOPs a step: [steps, seconds]
        # Seconds beyond the steps, by whether a run was the first of its size.
        self._beyond: dict[bool, list[float]] = {True: [], False: []}
        self._compiled: set[tuple[int, int]] = set()
        self._line = ""

    def begin(self, numbers: Sequence[int], title: str) -> None:
        """The next remaining runs start, side by side.

        Args:
          numbers: of their rows in the plan, from 0.
        """
        said = " and ".join(str(number + 1) for number in numbers)
        runs = "run" if len(numbers) == 1 else "runs"
        self._line = f"{runs} {said} of {self._runs}  {title}"
        self._run = self._remaining.pop(0)
        self._steps_left = self._run.steps
        self._shown = self._begun = time.perf_counter()
        self._stepping = 0.0

    def skip(self, steps: int) -> None:
        """An earlier process has done these steps already."""
        self._steps_left -= steps

    def spend(self, steps: int, seconds: float | None) -> None:
        """Steps are done, in `seconds`; None if that included compilation."""
        self._steps_left -= steps
        if seconds is not None:
            self._stepping += seconds
            sums = self._measured.setdefault(self._run.flops_per_step, [0, 0.0])
            sums[0] += steps
            sums[1] += seconds

    def end(self, begun: bool = True) -> None:
        """The run is over; steps that it did not do will not be done.

        Args:
          begun: whether it was trained here at all.
        """
        self._steps_left = 0
        if not begun:
            return
        first = self._run.size not in self._compiled
        self._compiled.add(self._run.size)
        took = time.perf_counter() - self._begun
        self._beyond[first].append(max(took - self._stepping, 0.0))

    def seconds_left(self) -> float | None:
        """The time left; None until a step has been measured."""
        if not self._measured:
            return None
        seconds = self._steps_left * self._step_seconds(self._run.flops_per_step)
        compiled = self._compiled | {self._run.size}
        for run in self._remaining:
            seconds += run.steps * self._step_seconds(run.flops_per_step)
            known = self._beyond[run.size not in compiled] or self._beyond[True]
            seconds += sum(known) / len(known) if known else 0.0
            compiled.add(run.size)
        return seconds

    def _step_seconds(self, flops: int) -> float:
        """Seconds of a step of that many FLOPs, measured or from the fitted line."""
        if flops in self._measured:
            steps, seconds = self._measured[flops]
            return seconds / steps
        x = np.array(list(self._measured), float)
        y = np.array([seconds / steps for steps, seconds in self._measured.values()])
        if len(x) == 1:  # assume that half of it grows with the FLOPs
            return float(y[0] * (0.5 + 0.5 * flops / x[0]))
        from scipy import optimize  # half a second that few commands need

        a, b = optimize.nnls(np.stack([np.ones_like(x), x / x.max()], 1), y)[0]
        return float(a + b * flops / x.max())

    def show(self, step: int, steps: int, loss: float, flops_per_second: float) -> None:
        """Prints a line, if it is time for one and the speed is known (not 0)."""
        now = time.perf_counter()
        if flops_per_second == 0 or now - self._shown < self._every:
            return
        self._shown = now
        say(
            f"{self._line}  step {step}/{steps}  loss {loss:.4f}  "
            f"{format_rate(flops_per_second)}{left(self.seconds_left())}"
        )

    def result(self, loss: float, name: str = "") -> None:
        """Prints the last line of a run; `name` says which of those side by side."""
        said = f"{self._line}{name and '  '}{name}  done  validation loss {loss:.5f}"
        say(f"{said}{left(self.seconds_left())}")


def metric_rows(
    path: pathlib.Path,
) -> tuple[list[tuple[dict[str, Any], bytes]], bytes]:
    """((values, line) of each line of a metrics.jsonl, the bytes that were cut off).

    Raises:
      Damaged: a complete line is not a row; the message has file and line number.
      NewerVersion: a newer version of the library wrote it.
    """
    lines, rest = records.complete_lines(path)
    rows = []
    for number, line in enumerate(lines, 1):
        row = records.json_object(line, f"{path}:{number}", "step")
        if not isinstance(row["step"], int):
            raise records.Damaged(f"{path}:{number}: its step is not a number")
        rows.append((row, line))
    return rows, rest


class MetricLog:
    """A run's metrics.jsonl and, if asked for, its TensorBoard events.

    Args:
      files: of the run; None in a process that does not write.
      step: training continues from it. Lines of later steps are removed, because these
        steps will be done again.
      tensorboard: whether to write TensorBoard events, too.
      every: steps between two lines, to notice that the last ones are gone; 0: it is
        not looked at.

    Raises:
      Damaged, NewerVersion: as `metric_rows`; a line that was cut off is dropped.
    """

    def __init__(
        self, files: RunFiles | None, step: int, tensorboard: bool, every: int = 0
    ) -> None:
        self._file = self._events = None
        if files is None:
            return
        path = files.metrics
        path.parent.mkdir(parents=True, exist_ok=True)
        found, rest = metric_rows(path) if path.exists() else ([], b"")
        if rest:
            say(f"the last line of {path} was cut off and is dropped")
        found = [(row, line) for row, line in found if row["step"] <= step]
        last = max((row["step"] for row, _ in found), default=0)
        if every and last // every < step // every:
            say(f"{path} has no lines of steps {last + 1} to {step}; it lacks them now")
        kept = b"".join(line + b"\n" for _, line in found)
        path.with_suffix(".tmp").unlink(missing_ok=True)  # of an older version
        records.write_file(path, lambda file: file.write(kept))
        if isinstance(path, ObjectPath):
            self._file = GrowingObject(path, kept)
        else:
            self._file = open(path, "a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(files.tensorboard), purge_step=step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the values of a step; TensorBoard gets those that are numbers."""
        if self._file is None:
            return
        row = records.stamped(records.to_json({"step": step, **values}))
        with records.writing(self._file.name):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, global_step=step)

    def flush(self) -> None:
        """Hands everything written to the operating system."""
        if self._file is not None:
            with records.writing(self._file.name):
                if isinstance(self._file, GrowingObject):
                    self._file.write_now()
                else:
                    self._file.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            with records.writing(self._file.name):  # what could not be written before
                self._file.close()
        if self._events is not None:
            self._events.close()


class RunClock:
    """A run's wall time over all its restarts, and its speed once compiled.

    Args:
      before: seconds that earlier processes spent on the run.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._begin = time.perf_counter() - before
        self._steps = 0
        self._stepping = 0.0
        self._last: float | None = None

    def lap(self, steps: int) -> float | None:
        """A dispatch of `steps` steps is done; returns the seconds since the last one.

        None for the first dispatch, which waits for compilation.
        """
        before, self._last = self._last, time.perf_counter()
        if before is None:
            return None
        self._steps += steps
        self._stepping += self._last - before
        return self._last - before

    def resume(self) -> None:
        """Steps continue after a save; its time does not count as theirs."""
        self._last = time.perf_counter()

    def steps_per_second(self) -> float:
        """The speed of this process from its second dispatch on; 0 before that."""
        return self._steps / self._stepping if self._steps else 0.0

    def seconds(self) -> float:
        """Wall time of the run so far, all restarts together."""
        return time.perf_counter() - self._begin


class SaveClock:
    """Says when it is time for another checkpoint.

    Args:
      minutes: between two of them; 0: it is never time.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """A checkpoint is written now, or asked for."""
        self._since = time.perf_counter()

    def due(self) -> bool:
        """Whether `minutes` have passed since the last `restart`."""
        return 0 < self._seconds <= time.perf_counter() - self._since
