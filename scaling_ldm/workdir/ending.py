"""Ends a process at once, and detects that another one of its job is gone; no jax."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from scaling_ldm import records
from scaling_ldm.records import whole_files
from scaling_ldm.training import native_stderr
from scaling_ldm.workdir import lock

_ends = threading.Lock()  # held by the thread that ends the process
TIDY = 6.0  # longest seconds for cleaning up; a file system may hang


def now(
    why: str,
    status: int,
    before: Callable[[], None] = lambda: None,
    held: bool = False,
) -> NoReturn:
    """Ends the process; its locks and half-written files are removed first.

    Args:
      why: the message for the user; "" if it is already printed.
      status: of the process.
      before: further cleaning up. All of it together has TIDY seconds.
      held: whether to print what `native_stderr` holds back. The end of a job whose
        processes miss one another needs no more than the message.
    """
    if not _ends.acquire(blocking=False):
        time.sleep(2 * TIDY)  # another thread ends the process, and has said why
    tidying = threading.Thread(target=_tidy, args=(why, before, held), daemon=True)
    tidying.start()
    tidying.join(TIDY)
    os._exit(status)


def _tidy(why: str, before: Callable[[], None], held: bool) -> None:
    try:
        if why:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it
                print(f"stopped: {why}", file=sys.stderr)
        lock.release_all()
        before()
        whole_files.remove_unfinished()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        native_stderr.flush(held)


def in_a_job() -> bool:
    """Whether this job has more than one process."""
    return "jax" in sys.modules and sys.modules["jax"].process_count() > 1


def lost_a_process(error: Exception) -> bool:
    """Whether an error means that another process of this job is gone."""
    if not in_a_job():
        return False
    of_jax = sys.modules["jax"].errors.JaxRuntimeError
    return any(
        (isinstance(one, of_jax) and "RESOURCE_EXHAUSTED" not in str(error))
        or (isinstance(one, ValueError) and "Gloo" in str(one))  # on CPUs
        for one in (error, error.__cause__)
    )


def message(error: Exception) -> str:
    """What went wrong and what to do."""
    if isinstance(error, OSError):
        return records.in_one_line(error)
    if not isinstance(error, records.Damaged) or error.remedy:
        return f"{error}"
    return f"{error}; remove it or put a copy back"
