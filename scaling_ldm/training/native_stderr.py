"""Holds back what jax's coordination client prints before it aborts a process.

When process 0 is gone, the client of every other process prints two errors and a stack
of C++ frames, and aborts. `jobs` then says in one line what happened. Everything else
that compiled code prints is passed on: whole lines at once, the beginning of a line
after a moment. Nobody can know before that a client will abort, so the filter runs as
long as the process does. What it costs is in docs/clusters.md.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import re
import select
import sys
import threading
import time

WAIT = 10.0  # seconds; a process that lives on prints what was held back
PART = 0.5  # seconds after which the beginning of a line is passed on
FULL = 1.0  # longest seconds for a target that takes nothing, such as a full pipe
_START = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d")  # of a line of the C++ logger
_HELD = re.compile(
    rb"[WEF]\d{4} .*\b(coordination_service\w*\.cc:\d+\]|preemption_sync_manager\.cc"
    rb":\d+\]|client\.h:\d+\] Terminating process)"
)


class HeldBack:
    """The lines that come through a pipe, apart from those that are held back.

    Args:
      source: the end of the pipe that is read.
      target: the file descriptor that gets the lines. What it refuses is dropped, so
        the pipe never fills.
    """

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._rest, self._held, self._holds = b"", b"", False
        self._begun = False  # the beginning of the line in `_rest` is passed on
        self._since = self._came = 0.0  # of the first held line; of the last bytes
        self._lock = threading.Lock()  # `flush` is called in another thread

    def run(self) -> None:
        """Passes lines on until the pipe is closed."""
        while self._once():
            pass
        with self._lock:
            self._release()
            self._pass_rest()

    def flush(self, held: bool) -> None:
        """Passes on what is in the pipe, and the beginning of a line.

        Args:
          held: whether held lines are passed on, too.
        """
        with self._lock:
            while self._ready(0.0) and (data := os.read(self._source, 65536)):
                self.take(data)
            if held:
                self._release()
            if not self._holds:
                self._pass_rest()

    def take(self, data: bytes) -> None:
        """Passes lines on or holds them back; the last one may be incomplete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._came = time.monotonic()
        for line in lines:
            if _START.match(line) and not self._begun:
                self._holds = bool(_HELD.match(line))
            if self._holds:
                self._since = self._since if self._held else self._came
                self._held += line + b"\n"
            else:
                self._write(line + b"\n")
            self._begun = False

    def _once(self) -> bool:
        """Waits for bytes, or until some are due; returns False at the end."""
        ready = self._ready(self._due())
        with self._lock:
            if ready and self._ready(0.0):  # and not taken by `flush` meanwhile
                if not (data := os.read(self._source, 65536)):
                    return False
                self.take(data)
            now = time.monotonic()
            if self._held and now - self._since >= WAIT:
                self._release()  # the client did not abort
            if self._rest and not self._holds and now - self._came >= PART:
                self._pass_rest()
        return True

    def _due(self) -> float | None:
        """Seconds until something has to be passed on; None: nothing has."""
        times = []
        if self._held:
            times.append(self._since + WAIT)
        if self._rest and not self._holds:
            times.append(self._came + PART)
        return max(min(times) - time.monotonic(), 0.0) if times else None

    def _ready(self, seconds: float | None) -> bool:
        return bool(select.select([self._source], [], [], seconds)[0])

    def _release(self) -> None:
        self._write(self._held)
        self._held, self._holds = b"", False

    def _pass_rest(self) -> None:
        self._begun = self._begun or bool(self._rest)
        self._write(self._rest)
        self._rest = b""

    def _write(self, data: bytes) -> None:
        """Writes all of it; drops what the target does not take."""
        with contextlib.suppress(OSError):  # a full disk, a reader that is gone
            while data:
                try:
                    data = data[os.write(self._target, data) :]
                except BlockingIOError:
                    if not select.select([], [self._target], [], FULL)[1]:
                        return


_filter: HeldBack | None = None  # of this process


def flush(held: bool = False) -> None:
    """Passes on what has come so far, before `os._exit`; see `HeldBack.flush`."""
    if _filter:
        _filter.flush(held)


def hold_back() -> None:
    """Holds these lines back from now on.

    Python's own messages go out as before, also the stacks that faulthandler prints
    when compiled code crashes; it is enabled.
    """
    global _filter
    sys.stderr.flush()
    target = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    sys.stderr = open(
        target, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    faulthandler.enable(target)  # the thread that reads the pipe dies in a crash
    _filter = lines = HeldBack(source, target)
    thread = threading.Thread(target=lines.run, name="native stderr", daemon=True)
    thread.start()

    def restore() -> None:
        os.dup2(target, 2)  # closes the pipe, unless a child has it
        thread.join(1.0)
        flush(held=True)

    atexit.register(restore)
