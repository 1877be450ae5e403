"""Two programs that compute the same, timed in turns; numpy and this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import timing

Run = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
    """Two programs with the same result; each call waits for it."""

    ours: Run
    theirs: Run
    flops: int


Contests = Mapping[str, tuple[Callable[[int], Contest], int]]  # with the batch


def tensors_of(net: Any) -> dict[str, np.ndarray]:
    """A torch module's state dict."""
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


def repeated(run: Run) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            run()

    return advance


def measure(
    name: str, make: Callable[[int], Contest], batch: int, flags: argparse.Namespace
) -> dict[str, Any]:
    """One row; times are seconds a call.

    Raises:
      SystemExit: the results differ by more than 1e-4 of the largest value.
    """
    contest = make(batch)
    start = time.perf_counter()
    got = contest.ours()
    first = time.perf_counter() - start
    wanted = contest.theirs()
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    if not error <= 1e-4:
        sys.exit(f"{name}: results differ by {error:.1e}; nothing is timed")
    measured = timing.alternate(
        {"ours": repeated(contest.ours), "theirs": repeated(contest.theirs)},
        flags.seconds,
        rounds=flags.rounds,
        clock=time.process_time if flags.one_core else time.perf_counter,
    )
    times = {who: np.asarray(seconds) for who, seconds in measured.seconds.items()}
    ratios = times["theirs"] / times["ours"]
    row: dict[str, Any] = {who: float(np.median(s)) for who, s in times.items()}
    return row | {
        "name": name,
        "batch": batch,
        "gflops": {who: contest.flops / row[who] / 1e9 for who in times},
        "ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
        "difference": error,
        "first_call": first,
        "disturbed_rounds": measured.disturbed,
        "load": os.getloadavg()[0],
    }


def machine(*packages: Any) -> dict[str, Any]:
    """What the numbers were measured on, and with which versions."""
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in packages},
    }


def parser(doc: str, contests: Contests) -> argparse.ArgumentParser:
    """The command line of all benchmarks."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--only", default=",".join(contests), help="some of them")
    parser.add_argument("--batch", type=int, default=0, help="instead of each's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for each contender, in all rounds"
    )
    parser.add_argument(
        "--one_core",
        action="store_true",
        help="CPU seconds of one thread, for a machine that others use as well",
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    return parser


def one_core(torch: Any) -> None:
    """Limits both libraries to one thread; call it before they start threads."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def run(
    flags: argparse.Namespace,
    contests: Contests,
    facts: dict[str, Any],
    columns: str,
    line: Callable[[dict[str, Any]], str],
) -> None:
    """Times one network after the other and prints rows of Markdown."""
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(columns)
    print("|---" * columns.count(" | ") + "|---|")
    rows = []
    for name in flags.only.split(","):
        make, batch = contests[name]
        rows.append(measure(name, make, flags.batch or batch, flags))
        print(line(rows[-1]), flush=True)
    if flags.json:
        result = {"command": sys.argv[1:], "machine": facts, "rows": rows}
        flags.json.write_text(json.dumps(result, indent=2) + "\n")
