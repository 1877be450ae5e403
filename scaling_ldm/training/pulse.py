"""Tells the processes of a job that one of them is gone, and which one is slow.

Each process writes a line about itself to the key-value store of process 0, every few
seconds and from a thread of its own. Process 0 reads them all. So nobody waits for
anybody, and a loss is told with the name of the process, before jax aborts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax

from scaling_ldm.training import goodput, progress

EVERY = 2.0  # seconds between two lines
TICK = 1.0  # seconds between two looks at the clock
SAY = 60.0  # seconds between two lines about the slowest process
_ALIVE, _LOST = "scaling_ldm/alive/", "scaling_ldm/lost"
# A process is said to be slow if its own work takes this share of the time of its
# steps, and this many times the work of the median process.
_SHARE, _TIMES = 0.1, 2.0


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a process says of itself.

    Attributes:
      count: of its lines.
      host: its name.
      run_id: of the run that it trains; "": none.
      step: the last one that is done.
      stepping: seconds of steps with their waits for data, so far in the run.
      data: of these, waits for data.
      own: of these, the host's own work, with the waits for data.
    """

    count: int
    host: str
    run_id: str = ""
    step: int = 0
    stepping: float = 0.0
    data: float = 0.0
    own: float = 0.0


def _of_this_process(count: int) -> Beat:
    host, ledger = socket.gethostname(), goodput.current()
    if ledger is None:
        return Beat(count, host)
    data, own = ledger.parts.of_host()
    stepping = ledger.parts.stepping()
    return Beat(count, host, ledger.run_id, ledger.step or 0, stepping, data, own)


class Awake:
    """Seconds for which this process was not stopped itself; see `tick`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def tick(self, passed: float) -> None:
        """Some seconds have passed since the last tick.

        Much more than TICK means that this process stood still, and perhaps all
        others too: a scheduler suspends whole jobs.
        """
        self.seconds += min(passed, 3 * TICK)


class Pulse:
    """The exchange of this process with process 0.

    Args:
      client: of jax's key-value store.
      silence: seconds after which a process that says nothing is lost.
      lost: called once with what happened. It must end the process.
      awake: the clock.
    """

    def __init__(
        self, client: Any, silence: float, lost: Callable[[str], None], awake: Awake
    ) -> None:
        self._client, self._silence, self._lost = client, silence, lost
        self._awake, self._count, self._answered = awake, 0, 0.0
        self._index, self._processes = jax.process_index(), jax.process_count()
        self._heard = dict.fromkeys(range(self._processes), ("", 0.0))
        self._before: dict[int, Beat] = {}
        self._said = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """From now on nothing is sent, and nothing counts as lost."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(EVERY):
            # `check` looks how long it lasts.
            with contextlib.suppress(RuntimeError, OSError):
                self.exchange()

    def exchange(self) -> None:
        """Sends a line, and hears what there is to hear.

        Raises:
          RuntimeError: process 0 does not answer.
        """
        self._count += 1
        line = json.dumps(dataclasses.astuple(_of_this_process(self._count)))
        self._client.key_value_set(f"{_ALIVE}{self._index}", line, True)
        if self._index == 0:
            self._hear(self._client.key_value_dir_get(_ALIVE))
        self._answered = self._awake.seconds
        if told := told_loss(self._client):
            self._end(told)

    def _hear(self, found: list[tuple[str, str]]) -> None:
        """Notes the lines of all processes, in process 0."""
        beats = {}
        for key, line in found:
            number = int(key.rpartition("/")[2])
            if self._heard[number][0] != line:
                self._heard[number] = line, self._awake.seconds
            beats[number] = Beat(*json.loads(line))
        self._tell_the_slowest(beats)
        if ledger := goodput.current():
            own = [beats.get(n) for n in range(self._processes)]
            if all(b and b.run_id == ledger.run_id for b in own):
                ledger.data_seconds = tuple(b.data for b in own if b)
                ledger.host_seconds = tuple(b.own for b in own if b)

    def _tell_the_slowest(self, beats: dict[int, Beat]) -> None:
        """Says which process holds up the others, at most once in SAY seconds."""
        if self._awake.seconds - self._said < SAY:
            return
        line = slowest(self._before, beats)
        self._said, self._before = self._awake.seconds, beats
        if line:
            with contextlib.suppress(OSError, ValueError):  # stderr is gone; it goes on
                progress.say(line)

    def check(self) -> None:
        """Ends this process if another one is silent for too long."""
        if self._over.is_set():
            return
        now = self._awake.seconds
        if now - self._answered > self._silence:
            self._end(f"process 0 has not answered for {self._silence:g} s")
        for number, (line, when) in self._heard.items():
            if self._index == 0 and now - when > self._silence:
                host = f" on {Beat(*json.loads(line)).host}" if line else ""
                told = (
                    f"process {number}{host} has sent nothing for {self._silence:g} s"
                )
                tell_loss(self._client, told)
                self._over.wait(3 * EVERY)  # until the others have heard it
                self._end(told)

    def _end(self, why: str) -> None:
        if not self._over.is_set():
            self._over.set()
            self._lost(why)


def tell_loss(client: Any, why: str) -> None:
    """Tells the other processes that they cannot go on; the first reason counts."""
    with contextlib.suppress(RuntimeError):
        client.key_value_set(_LOST, why)


def told_loss(client: Any) -> str:
    """What `tell_loss` told; "": nothing."""
    try:
        return client.key_value_try_get(_LOST)
    except RuntimeError:
        return ""


def slowest(before: dict[int, Beat], now: dict[int, Beat]) -> str:
    """A line about the process that holds up the others between two lines; or "".

    The steps of all processes take the same time, because they wait for one another
    in each. The one that others wait for is seen by the work of its host.

    Args:
      before, now: by number of the process.
    """
    own: dict[int, float] = {}
    data: dict[int, float] = {}
    for number, beat in now.items():
        old = before.get(number)
        if old is None or old.run_id != beat.run_id or beat.step <= old.step:
            return ""
        steps = beat.step - old.step
        if beat.stepping <= old.stepping:
            return ""
        own[number] = (beat.own - old.own) / steps
        data[number] = (beat.data - old.data) / steps
    if len(own) < 2:
        return ""
    first = max(own, key=own.__getitem__)
    median = sorted(own.values())[(len(own) - 1) // 2]
    beat, old = now[first], before[first]
    per_step = (beat.stepping - old.stepping) / (beat.step - old.step)
    if own[first] < max(_SHARE * per_step, _TIMES * median):
        return ""
    return (
        f"{beat.run_id}: process {first} on {beat.host} is the slowest: of "
        f"{1e3 * per_step:.3g} ms a step its own work takes {1e3 * own[first]:.3g} ms, "
        f"waits for data {1e3 * data[first]:.3g} ms of that; the median process has "
        f"{1e3 * median:.3g} ms"
    )
