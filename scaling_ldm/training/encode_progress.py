"""Lines of the encode stage while it runs."""

from __future__ import annotations

import time

from scaling_ldm.data import manifests
from scaling_ldm.training.progress import say
from scaling_ldm.training.time_left import Pace, left


def size(count: float) -> str:
    """12345678 -> "12.3 MB"."""
    for suffix in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {suffix}"
        count /= 1000
    return f"{count:.3g} TB"


def by_channel(manifest: manifests.Manifest) -> str:
    """A text with the mean and the standard deviation of the network's input."""
    means, stds = (
        " ".join(f"{value:.2f}" for value in manifest[name]) for name in ("mean", "std")
    )
    return f"channels of mean {means} and standard deviation {stds}"


class EncodeProgress:
    """Lines while the stage runs: pictures done, speed, time left.

    Other processes are assumed to be as fast as this one, until all have finished a
    shard.

    Args:
      total: pictures of the data set.
      done: how many of them are encoded already.
      processes: of the job.
      every_seconds: between two lines.
    """

    def __init__(
        self, total: int, done: int, processes: int, every_seconds: float
    ) -> None:
        self._total, self._done, self._processes = total, done, processes
        self._every = every_seconds
        self._mine = 0  # pictures of this process in its current shard
        self._bytes = 0  # size of the shards that this process has written
        self._pace = Pace()
        self._shown = time.perf_counter()

    def show(self, count: int, written: int, bad: int) -> None:
        """Prints a line if it is time for one.

        Args:
          count: pictures encoded since the last call.
          written: bytes in the current shard; the line says this process's bytes.
          bad: records found bad so far.
        """
        now = time.perf_counter()
        self._mine += count
        done = min(self._done + self._mine * self._processes, self._total)
        pace = self._pace.per_second(done)
        if now - self._shown < self._every:
            return
        self._shown = now
        speed = "" if pace is None else f"{pace:,.0f} a second  "
        seconds = None if pace is None else (self._total - done) / pace
        say(
            f"encode  {done:,} of {self._total:,} pictures  {speed}"
            f"{size(self._bytes + written)}  {bad:,} bad{left(seconds)}"
        )

    def written(self, count: int) -> None:
        """A shard of this process is complete and has `count` bytes."""
        self._bytes += count

    def level(self, count: int) -> None:
        """Every process has finished its shard; the shards hold `count` pictures."""
        self._done, self._mine = self._done + count, 0
