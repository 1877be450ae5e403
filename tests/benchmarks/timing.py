"""Fair timing on a machine that others use too; standard library only."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping

DISTURBANCE = 0.05  # share of the cores that others may take in a round


def used_by_others() -> float:
    """CPU seconds that other processes have had since boot; 0 where unknown."""
    try:
        fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, fields[1:9])
    ticks = user + nice + system + irq + soft + steal
    mine = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - mine.user - mine.system


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds a step of each contender, round by round, on a quiet machine."""

    seconds: dict[str, list[float]]
    disturbed: int  # rounds among them in which others had some of the cores


def alternate(
    contenders: Mapping[str, Callable[[int], None]],
    seconds: float,
    rounds: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Times the contenders in turns, over `rounds` rounds without other load.

    A round during which other processes took more than DISTURBANCE of the cores is
    repeated, up to three times `rounds` in all; if too few are left, the least
    disturbed ones count. With a clock of this process's own seconds, such as
    `time.process_time` where each contender has one thread, every round counts.
    """
    calm = DISTURBANCE if clock is time.perf_counter else math.inf
    steps = {}
    for name, advance in contenders.items():
        advance(3)  # compile, allocate, reach the steady state
        start = clock()
        advance(3)
        one = (clock() - start) / 3
        steps[name] = max(2, round(seconds / rounds / one))
    cores = len(os.sched_getaffinity(0))
    done: list[tuple[float, dict[str, float]]] = []
    while len(done) < 3 * rounds:
        others, begin, times = used_by_others(), time.perf_counter(), {}
        for name, advance in contenders.items():
            start = clock()
            advance(steps[name])
            times[name] = (clock() - start) / steps[name]
        wall = time.perf_counter() - begin
        done.append(((used_by_others() - others) / wall / cores, times))
        if sum(share <= calm for share, _ in done) == rounds:
            break
    done.sort(key=lambda entry: entry[0])
    kept = [times for _, times in done[:rounds]]
    return Times(
        seconds={name: [times[name] for times in kept] for name in contenders},
        disturbed=sum(share > DISTURBANCE for share, _ in done[:rounds]),
    )
