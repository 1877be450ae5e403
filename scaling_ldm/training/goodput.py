"""Measures where the seconds of a run go, and writes them as its `records.Attempt`.

Every moment of an attempt is in exactly one part. The clock is read where a part begins
and ends; no device is waited for. jax says itself how long it traced and compiled.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import jax

from scaling_ldm import records
from scaling_ldm.records import goodput
from scaling_ldm.records.errors import Preempted
from scaling_ldm.training import progress
from scaling_ldm.training.run_files import RunFiles

# An attempt is written again when a tenth of it is not yet in the file, but not more
# often than LEAST seconds and not less often than MOST.
LEAST, MOST = 0.5, 30.0
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
# Parts of a step that are told apart within a process: the host's own work, and waits
# for data during which the devices had work.
HOST, _OVERLAPPED = "HOST", "DATA_LOADING_ASYNC"
_DATA = "DATA_LOADING_SYNC"
_COMPILED, _CACHE_HIT = _COMPILING[-1], "/jax/compilation_cache/cache_hits"


class Parts:
    """Seconds by part; each moment counts for one of them.

    Args:
      clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.now = goodput.OTHER  # the part of this moment
        self.since = self.began = clock()  # when it began; when the first one did
        self._took: dict[str, float] = collections.defaultdict(float)
        self._moved = 0.0  # seconds since `since` that count for another part
        self._spans: list[tuple[float, float]] = []  # of compilation
        self._lock = threading.Lock()  # the watchdog reads

    def enter(self, name: str, counts_as: str = "") -> str:
        """Another part begins; returns the name of the one that ends.

        Args:
          counts_as: the part that the one which ends counts for; "": itself.
        """
        with self._lock:
            before, now = self.now, self._clock()
            self._took[counts_as or before] += now - self.since - self._moved
            self.now, self.since, self._moved = name, now, 0.0
            return before

    def compiled(self, seconds: float) -> None:
        """The last `seconds` were compilation; one within another counts once."""
        with self._lock:
            end = self._clock()
            begin, inside = end - seconds, 0.0
            while self._spans and sum(self._spans[-1]) / 2 >= begin:
                a, b = self._spans.pop()
                inside += b - a
            self._spans.append((begin, end))
            own = min(seconds - inside, end - self.since - self._moved)
            self._moved += max(own, 0.0)
            self._took["PROGRAM_STARTUP"] += max(own, 0.0)

    def seconds(self) -> dict[str, float]:
        """By name of MEASURED, up to now; their sum is the time since the start."""
        with self._lock:
            took = collections.defaultdict(float, self._took)
            took[self.now] += self._clock() - self.since - self._moved
        took[goodput.STEP] += took[HOST] + took[_OVERLAPPED]
        return {name: took[name] for name in goodput.MEASURED}

    def stepping(self) -> float:
        """Seconds of steps and of the waits for their data."""
        with self._lock:
            names = goodput.STEP, HOST, _DATA, _OVERLAPPED
            return sum(self._took[name] for name in names)

    def of_host(self) -> tuple[float, float]:
        """Seconds of waits for data, and of these with the host's own work."""
        with self._lock:
            data = self._took[_DATA] + self._took[_OVERLAPPED]
            return data, data + self._took[HOST]


def _last_logged(files: RunFiles) -> int:
    """The last step in a run's log; 0 if there is none."""
    if not files.metrics.exists():
        return 0
    lines, _ = records.complete_lines(files.metrics)
    return records.json_object(lines[-1], files.metrics, "step")["step"] if lines else 0


class Ledger:
    """Keeps the attempt of this process at one run.

    Args:
      run_id: of the run.
      files: of the run; None in a process that does not write.
      devices: of the mesh.
      starting: seconds that starting the devices took, if this is the first run.

    Attributes:
      first_step: the step from which the run starts or continues; None: not known yet.
      step: the last step that is done; None before the first one.
      measured: batches of the validation set that are measured.
      ended: how the attempt ends if no error ends it.
      data_seconds, host_seconds: as of `records.Attempt`; `pulse` sets them.
      parts: the seconds so far.
      beside: the ledgers of runs that train in the same steps; see `add`.
      closed: whether the attempt is over and written.

    Raises:
      Damaged, NewerVersion: the file of earlier attempts cannot be read.
    """

    def __init__(
        self,
        run_id: str,
        files: RunFiles | None = None,
        devices: int = 0,
        starting: float = 0.0,
    ) -> None:
        self.run_id, self._devices, self._starting = run_id, devices, starting
        self.parts = Parts()
        self.step: int | None = None
        self.ended = "finished"
        self.data_seconds: tuple[float, ...] = ()
        self.host_seconds: tuple[float, ...] = ()
        self.first_step: int | None = None
        self.measured = 0
        self.compilations = self.cache_hits = 0
        self.thread = threading.get_ident()
        self._began = time.time() - starting
        self._path = files.attempts if files else None
        self._before: list[records.Attempt] = []
        if self._path and self._path.exists():
            self._before = records.read_attempts(self._path, run_id)
        if files and self._before and not self._before[-1].ended:  # it was killed
            self._before[-1] = goodput.with_later_steps(
                self._before[-1], _last_logged(files), self._began
            )
        self._written = self.parts.began
        self._told = False  # that the file cannot be written
        self.beside: list[Ledger] = []
        self.closed = False

    def add(self, run_id: str, files: RunFiles | None) -> None:
        """Another run trains in the same steps from the start; its time is the same."""
        other = Ledger(run_id, files, self._devices)
        other.parts, other._began = self.parts, self._began
        other._starting = self._starting
        self.beside.append(other)

    def _together(self) -> list[Ledger]:
        """The ledgers whose attempts go on, with what happened to the process."""
        for other in self.beside:
            other.compilations, other.cache_hits = self.compilations, self.cache_hits
            other.host_seconds, other.data_seconds = (
                self.host_seconds,
                self.data_seconds,
            )
        return [one for one in (self, *self.beside) if not one.closed]

    def starts_at(self, step: int, run_id: str = "") -> None:
        """A run starts, or continues, after this step; writes its attempt.

        Args:
          run_id: of the run; "": of this ledger.
        """
        for one in self._together():
            if one.run_id == (run_id or self.run_id):
                one.first_step = step
                one.write_if_possible("")

    def close(self, run_id: str, ended: str) -> None:
        """The attempt at a run ends like this, whatever comes after it."""
        for one in self._together():
            if one.run_id == run_id:
                one.write_if_possible(ended)
                one.closed = True

    def close_all(self, ended: str) -> None:
        """All attempts that go on end like this (OSError: one cannot be written)."""
        for one in self._together():
            one.write(ended)

    def steps_done(self, step: int) -> None:
        """The steps up to this one are done; writes the attempts if it is time."""
        self.step = step
        for one in self._together():
            if step > (one.first_step or 0):
                one._step_done(step)

    def _step_done(self, step: int) -> None:
        self.step = step
        now = time.perf_counter()
        age = now - self.parts.began
        if now - self._written > max(LEAST, min(MOST, age / 10)):
            self.write_if_possible("")

    def write_if_possible(self, ended: str) -> None:
        """Writes the attempt; says once if it cannot, because training goes on."""
        try:
            self.write(ended)
        except OSError as e:
            if not self._told:
                self._told = True
                progress.say(
                    f"where the time of {self.run_id} goes cannot be written, and "
                    f"training goes on: {records.in_one_line(e)}"
                )

    def write(self, ended: str) -> None:
        """Writes the attempt as the last line of the file; see `Attempt.ended`.

        Raises:
          OSError: it cannot be written.
        """
        self._written = time.perf_counter()
        if self._path is not None:
            records.write_jsonl(self._path, [*self._before, self.attempt(ended)])

    def attempt(self, ended: str = "") -> records.Attempt:
        """The attempt so far."""
        parts = self.parts.seconds()
        parts["TPU_INITIALIZATION"] += self._starting
        # Another thread sets both.
        hosts, data = self.host_seconds, self.data_seconds
        return records.Attempt(
            run_id=self.run_id,
            number=len(self._before),
            began=self._began,
            seconds=sum(parts.values()),
            ended=ended,
            first_step=self.first_step,
            last_step=max(self.first_step or 0, self.step or 0),
            parts=parts,
            compiled=self.compilations,
            cache_hits=self.cache_hits,
            processes=jax.process_count(),
            devices=self._devices,
            data_seconds=data,
            host_seconds=hosts if len(hosts) == len(data) else (),
        )


_ledger: Ledger | None = None  # of the run that is trained now
_starting = 0.0  # seconds of starting devices that no run counts yet


@contextlib.contextmanager
def starting_devices() -> Generator[None, None, None]:
    """Times the start of the devices; it counts for the first run of this process."""
    global _starting
    began = time.perf_counter()
    yield
    _starting += time.perf_counter() - began


@contextlib.contextmanager
def attempt(
    run_id: str, files: RunFiles | None, devices: int
) -> Generator[Ledger, None, None]:
    """The context of this process's work at one run; its end is written.

    The block sets `Ledger.ended`. An error that ends the block is an end as well; a
    process that is killed leaves the attempt as it was last written.

    Args:
      run_id, files, devices: as of `Ledger`.
    """
    global _ledger, _starting
    _listen()
    ledger = Ledger(run_id, files, devices, _starting)
    _ledger, _starting = ledger, 0.0
    try:
        ledger.write_if_possible("")
        yield ledger
    except Exception as e:
        with contextlib.suppress(OSError):  # what ended it is said, not this
            ledger.close_all("stopped" if isinstance(e, Preempted) else "failed")
        raise
    finally:
        _ledger = None
    if not ledger.closed:
        ledger.write_if_possible(ledger.ended)


def current() -> Ledger | None:
    """That of the run that is trained now."""
    return _ledger


@contextlib.contextmanager
def part(name: str) -> Generator[None, None, None]:
    """A context whose seconds count for one of MEASURED; nothing outside of a run."""
    if (ledger := _ledger) is None:
        yield
        return
    before = ledger.parts.enter(name)
    try:
        yield
    finally:
        ledger.parts.enter(before)


@contextlib.contextmanager
def loading(running: Any) -> Generator[None, None, None]:
    """The context of a wait for data.

    Args:
      running: a result (jax.Array) of the dispatch before, or None. If it is not there
        when the wait is over, the devices had work all the time, and the wait counts
        for STEP.
    """
    if (ledger := _ledger) is None:
        yield
        return
    before = ledger.parts.enter(_DATA)
    try:
        yield
    finally:
        busy = running is not None and not running.is_ready()
        ledger.parts.enter(before, _OVERLAPPED if busy else "")


def steps_done(step: int) -> None:
    """The steps of the run up to this one are done; see `Ledger.steps_done`."""
    if _ledger:
        _ledger.steps_done(step)


def starts_at(step: int, run_id: str = "") -> None:
    """A run starts, or continues, after this step; see `Ledger.starts_at`."""
    if _ledger:
        _ledger.starts_at(step, run_id)


def batch_measured() -> None:
    """A batch of the validation set is measured."""
    if _ledger:
        _ledger.measured += 1


_listening = False


def _listen() -> None:
    """Hears from now on what jax says of its compilation; once for a process."""
    global _listening
    if not _listening:
        _listening = True
        jax.monitoring.register_event_duration_secs_listener(_compiling)
        jax.monitoring.register_event_listener(_happened)


def _compiling(event: str, duration_secs: float, **_: Any) -> None:
    ledger = _ledger
    if event in _COMPILING and ledger and ledger.thread == threading.get_ident():
        ledger.compilations += event == _COMPILED
        ledger.parts.compiled(duration_secs)


def _happened(event: str, **_: Any) -> None:
    ledger = _ledger
    if event == _CACHE_HIT and ledger and ledger.thread == threading.get_ident():
        ledger.cache_hits += 1
