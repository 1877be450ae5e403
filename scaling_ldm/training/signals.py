"""Signals of the operating system: stop, or save and go on; needs no jax.

A thread receives them, even while the main thread compiles or waits; no handler raises
an exception. A stop ends the process at once, because its files are whole at any
moment. Within `StopSignal.polled` it does not: there is something to save, and the code
asks `StopSignal.request` between two of its steps. In a job of several processes, a
stop of one stops all: each process asks the `Job` once a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Protocol, runtime_checkable

from scaling_ldm import config
from scaling_ldm.records.errors import Preempted
from scaling_ldm.training import progress

# What a process asks of the training loop, in order of urgency. A job follows the most
# urgent request of its processes.
GO_ON, SAVE, SAVE_AND_SAY, STOP = range(4)
LISTEN = 1.0  # seconds between two checks whether another process was stopped


@runtime_checkable
class Job(Protocol):
    """How the processes of a job tell one another that they stop; thread-safe."""

    def tell(self, signal_name: str) -> None:
        """Tells the other processes which signal this one got."""

    def told(self) -> str:
        """The signal that some process got; "": none."""

    def leave(self, signal_name: str) -> None:
        """Tells the others the signal, if there is one; waits until they are ready."""

    def finish(self) -> None:
        """Waits until every process has finished."""


class StopSignal:
    """Which signals have arrived.

    Attributes:
      heard: the signal that stops this process, or another one of the job; "": none.
      save_asked: one of train.save_signals arrived.
      doing: what the process does now, for a message.
    """

    def __init__(self) -> None:
        self.heard, self.save_asked, self.doing = "", False, "the start"
        self._deciding = threading.RLock()
        self._after = ""  # what is finished before the process ends

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return bool(self.heard)

    def request(self) -> int:
        """STOP, SAVE_AND_SAY or GO_ON; a signal to save is told once."""
        if self.asked:
            return STOP
        if self.save_asked:
            self.save_asked = False
            return SAVE_AND_SAY
        return GO_ON

    @contextlib.contextmanager
    def polled(self, after: str) -> Generator[None, None, None]:
        """A context in which the code itself asks whether to stop.

        Outside of it, a stop ends the process at once.

        Args:
          after: what is finished first, for the message.

        Raises:
          Preempted: at the end of the block, if a stop came in it that was not obeyed.
        """
        with self._deciding:
            self._after = after
        try:
            yield
        finally:
            with self._deciding:
                self._after = ""
        if self.heard:
            raise Preempted(f"{self.heard}; what is finished is kept")

    def hear(self, name: str, end: Callable[[str], None]) -> None:
        """Notes a stop; calls `end` unless the code polls.

        Args:
          name: of the signal. A second SIGINT ends the process in any case.
          end: gets why; it ends the process.
        """
        with self._deciding:  # the main thread enters and leaves no block meanwhile
            again = bool(self.heard) and name == "SIGINT"
            first, self.heard = not self.heard, self.heard or name
            if not self._after or again:
                end(self.heard)
            elif first:
                progress.say(f"{name}: stopping after {self._after}")


class Listener:
    """The thread that hears signals; see `listen`.

    Args:
      end: ends the process because of a signal, whose name it gets. In a job it also
        leaves that.
    """

    def __init__(self, end: Callable[[str], None]) -> None:
        self.stop = StopSignal()
        self._end = end
        self._job: Job | None = None
        self._over = False
        self._stops: set[str] = set()
        self._saves: set[str] = set()
        self._sender: socket.socket | None = None
        self._obeyed = threading.Event()  # some signal was, by the thread

    def start(self) -> None:
        """Hears from now on; to be called by the main thread.

        A stop that was blocked until now is obeyed before this returns, so that the
        main thread does not end first, with another status.
        """
        receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._reset_in_child)
        threading.Thread(
            target=self._receive, args=[receiver], name="signals", daemon=True
        ).start()
        self.configure(config.TrainConfig(), None)
        blocked = {signal.SIGINT, signal.SIGTERM}
        waiting = signal.sigpending() & blocked
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        if waiting:
            self._obeyed.wait()

    def finish(self) -> None:
        """Everything is done; from now on signals have no effect."""
        if self._job:
            self._job.finish()
        self._over = True

    def leave(self, name: str) -> None:
        """Leaves the job, if there is one; see `Job.leave`."""
        if self._job:
            self._job.leave(name)

    def configure(self, cfg: config.TrainConfig, job: Job | None) -> None:
        """Sets the meaning of the signals, and the job of this process, if any."""
        self._stops = {"SIGTERM", "SIGINT", *cfg.stop_signals}
        self._saves = set(cfg.save_signals)
        # Set again each time: joining a job, jax installs its own handler of SIGTERM.
        for name in {*config.SIGNALS, *self._stops, *self._saves}:
            known = name in self._stops | self._saves
            signal.signal(getattr(signal, name), _noted if known else signal.SIG_DFL)
        self._job = job
        if self._sender:
            self._sender.send(_AWAKE)  # wakes the thread, which now also asks the job

    def _reset_in_child(self) -> None:
        """In a forked child: restores the usual effect of signals."""
        with contextlib.suppress(ValueError):  # forked by another thread
            signal.set_wakeup_fd(-1)
            for name in self._stops | self._saves:
                signal.signal(getattr(signal, name), signal.SIG_DFL)

    def _receive(self, receiver: socket.socket) -> None:
        while True:
            wait = LISTEN if self._job and not self.stop.heard else None
            ready, _, _ = select.select([receiver], [], [], wait)
            numbers = receiver.recv(64) if ready else b""
            self.take(numbers)
            if any(numbers):
                self._obeyed.set()

    def take(self, numbers: Iterable[int]) -> None:
        """Obeys the signals that arrived here, and those that the job passes on."""
        if self._over:
            return
        job = self._job
        for number in filter(None, numbers):
            name = signal.Signals(number).name
            if name in self._saves:
                self.stop.save_asked = True
            elif name in self._stops:
                self.stop.hear(name, self._end)
                if job:
                    job.tell(name)
        if job and not self.stop.heard and (told := job.told()):
            self.stop.hear(told, self._end)


_AWAKE = bytes(1)  # no signal has the number 0


def _noted(*_: object) -> None:
    """The handler: Python has handed the signal's number to the listener before."""


_listener: Listener | None = None


def listen(end: Callable[[str], None]) -> None:
    """Hears signals from now on; for a program that owns its process, not a library.

    Without this call, signals have their usual effect on a Python program.

    Args:
      end: as of `Listener`.
    """
    global _listener
    _listener = Listener(end)
    _listener.start()


def configure(cfg: config.TrainConfig, job: Job | None = None) -> None:
    """Sets the meaning of the signals for the listener, if there is one."""
    if _listener:
        _listener.configure(cfg, job)


def finish() -> None:
    """Everything is done, here and in the job; see `Listener.finish`."""
    if _listener:
        _listener.finish()


def leave(name: str) -> None:
    """Leaves the job, if this process has joined one, because of a signal or an error.

    Args:
      name: of the signal, which the others are told; "": an error.
    """
    if _listener:
        _listener.leave(name)


def current() -> StopSignal:
    """Which signals have arrived in this process; none without a listener."""
    return _listener.stop if _listener else StopSignal()
