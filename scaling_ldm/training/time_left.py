"""Estimates of the time left: the one place of the rule when there is one.

The first thing that is done may include compilation. It is no basis, so a line says
nothing of the time left before a second one is done.
"""

from __future__ import annotations

import time


def format_duration(seconds: float) -> str:
    """3661 -> "1:01:01", 61 -> "1:01"."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def left(seconds: float | None) -> str:
    """The end of a line: "  left 1:01"; "" where there is no basis to say it (None)."""
    return "" if seconds is None else f"  left {format_duration(seconds)}"


class Pace:
    """How many things a second are done, once compilation is over.

    What is done at the first call includes compilation, so it is no basis.
    """

    def __init__(self) -> None:
        self._since: tuple[int, float] | None = None

    def per_second(self, done: int) -> float | None:
        """The pace since the first call; None while there is no basis for it.

        Args:
          done: things done so far, those of earlier processes among them.
        """
        now = time.perf_counter()
        if self._since is None:
            self._since = done, now
        before, begun = self._since
        return (
            (done - before) / (now - begun) if done > before and now > begun else None
        )
