"""Holds back what jax's coordination client prints before it aborts a process.

When process 0 is gone, the client of every other process prints two errors and a stack
of C++ frames, and aborts. `jobs` then says in one line what happened. Everything else
that compiled code prints is passed on at once.
"""

from __future__ import annotations

import atexit
import os
import re
import select
import sys
import threading

WAIT = 10.0  # seconds; a process that lives on prints what was held back
_START = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d")  # of a line of the C++ logger
_HELD = re.compile(
    rb"[WEF]\d{4} .*\b(coordination_service\w*\.cc|preemption_sync_manager\.cc"
    rb"|client\.h):\d+\]"
)


class HeldBack:
    """The lines that come through a pipe, apart from those that are held back.

    Args:
      source: the end of the pipe that is read.
      target: the file descriptor that gets the lines.
    """

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._rest, self._held, self._holds = b"", b"", False

    def run(self) -> None:
        """Passes lines on until the pipe is closed."""
        while True:
            ready, _, _ = select.select([self._source], [], [], WAIT)
            data = os.read(self._source, 65536) if ready else None
            if data is None:
                self._release()  # the client did not abort
            elif not data:
                break
            else:
                self.take(data)
        self._release()
        os.write(self._target, self._rest)

    def take(self, data: bytes) -> None:
        """Passes lines on or holds them back; the last one may be incomplete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if _START.match(line):
                self._holds = bool(_HELD.match(line))
            if self._holds:
                self._held += line + b"\n"
            else:
                os.write(self._target, line + b"\n")

    def _release(self) -> None:
        if self._held:
            os.write(self._target, self._held)
        self._held, self._holds = b"", False


def hold_back() -> None:
    """Holds these lines back from now on; Python's own messages go out as before."""
    sys.stderr.flush()
    target = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    sys.stderr = open(
        target, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    lines = HeldBack(source, target)
    thread = threading.Thread(target=lines.run, name="native stderr", daemon=True)
    thread.start()

    def restore() -> None:
        os.dup2(target, 2)  # closes the pipe, unless a child has it
        thread.join(1.0)

    atexit.register(restore)
