"""A thread that looks whether training goes on, and says where it stands if not."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator

import jax

from scaling_ldm import config
from scaling_ldm.training import goodput, jobs, pulse, signals

FIRST = 5.0  # times as long where something is compiled; see `_compiles`


def _compiles(ledger: goodput.Ledger) -> bool:
    """Whether a run is before its first step or its first held-out batch."""
    return ledger.step is None or (
        ledger.parts.now == "EVAL_STEP" and not ledger.measured
    )


class Watchdog:
    """Looks at the run that is trained now.

    Progress is a step that is done, a batch of the validation set that is measured, or
    a part of `goodput` that ends, such as a save. Without any, each process prints its
    own place.

    Args:
      cfg: says after which time.
      lost: called with what happened if a job stands still for too long. It must end
        the process.
      awake: the clock.
    """

    def __init__(
        self, cfg: config.MeshConfig, lost: Callable[[str], None], awake: pulse.Awake
    ) -> None:
        self._cfg, self._lost, self._awake = cfg, lost, awake
        self._sign: object = None  # the last sign of progress
        self._since = self._told = 0.0
        self._main = threading.main_thread().ident

    def look(self) -> None:
        """Looks whether there was a sign of progress since the last look."""
        ledger, now = goodput.current(), self._awake.seconds
        if ledger is None:
            self._sign = None
            return
        sign = id(ledger), ledger.step, ledger.measured, ledger.parts.since
        if sign != self._sign:
            self._sign, self._since, self._told = sign, now, now
            return
        times = FIRST if _compiles(ledger) else 1.0
        stalled, limit = now - self._since, times * self._cfg.stall_limit_seconds
        if 0 < times * self._cfg.stall_seconds <= now - self._told:
            self._told = now
            with contextlib.suppress(OSError, ValueError):  # stderr is gone; it goes on
                print(self._place(ledger, stalled), file=sys.stderr, flush=True)
        if jax.process_count() > 1 and 0 < limit <= stalled:
            self._lost(f"{ledger.run_id} made no progress for {stalled:.0f} s")

    def _place(self, ledger: goodput.Ledger, stalled: float) -> str:
        """Where this process is: one block of lines, the main thread's stack last."""
        frame = sys._current_frames().get(self._main or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else "  (no stack)\n"
        step = "before its first step" if ledger.step is None else f"step {ledger.step}"
        return (
            f"no progress for {stalled:.0f} s: process {jax.process_index()} of "
            f"{jax.process_count()} on {socket.gethostname()}, stage "
            f"{signals.current().doing}, run {ledger.run_id}, {step}, in "
            f"{ledger.parts.now}; it goes on. Its main thread is at\n{stack}"
        ).rstrip("\n")


@contextlib.contextmanager
def watching(
    cfg: config.MeshConfig, job: jobs.JaxJob | None, lost: Callable[[str], None]
) -> Generator[None, None, None]:
    """The context of work that a thread watches.

    Args:
      job: that this process has joined. Its other processes are watched, too.
      lost: as of `Watchdog` and `pulse.Pulse`.
    """
    awake, over = pulse.Awake(), threading.Event()
    dog = Watchdog(cfg, lost, awake)
    heart = None
    if job is not None:
        heart = pulse.Pulse(job.client, cfg.heartbeat_seconds, lost, awake)
        heart.start()

    def watch() -> None:
        before = time.monotonic()
        while not over.wait(pulse.TICK):
            now = time.monotonic()
            awake.tick(now - before)
            before = now
            dog.look()
            if heart:
                heart.check()

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        if heart:
            heart.stop()
        over.set()
        thread.join()
