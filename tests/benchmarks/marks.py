"""What validation through training takes: a run with marks against one without.

python tests/benchmarks/marks.py [--budget 4.8e11] [--width 32] [--rounds 5]
python tests/benchmarks/marks.py --counts

A run of experiments/quickstart.py, on pixels instead of latents, so that nothing is
encoded first. Three ways take turns in one process, compiled before: measured at the
end alone; with marks; with marks and two averages by power functions. Each is a whole
run, with its checkpoints. Ratios are to the first way in the same round, and medians
over the rounds: of the wall time of the training loop, and of the processor time of
this process, which other processes change less. Rounds that others disturb are
repeated. The shares of a run that are spent on measuring are of its own wall time:
before its end, which is limited in FLOPs, and at its end, which is not.

--counts trains nothing. It counts the marks of every run of the quickstart, with its
one average and with two, and their FLOPs as shares of those of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import timing

from experiments import quickstart
from scaling_ldm import config, records
from scaling_ldm.stages import plan, train
from scaling_ldm.training import marks, measuring

TWO = config.Experiment().optimizer.averages  # the default
WAYS = {"end": (0, ("ema",)), "marks": (20, ("ema",)), "marks, two": (20, TWO)}


def experiment(
    wanted: int, averages: tuple[str, ...], width: int, cores: int
) -> config.Experiment:
    """The quickstart with one size, pixels, and so many marks."""
    c = quickstart.get_config()
    c.data.shape = (8, 8, 3)
    c.encode.autoencoder, c.encode.text_encoder = "none", "auto"
    c.encode.pictures = config.default().encode.pictures
    c.plan.sizes = ((width, 2),)
    c.mesh.cpu_devices = cores
    c.optimizer.averages = averages
    c.validation.marks = wanted
    return config.resolve(c)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunTimes:
    """Seconds of a whole run.

    wall: inside its loop.
    processor: of this process, all threads, with what comes before and after the loop.
    marks: of `wall`, measuring before the end.
    end: of `wall`, measuring at the end.
    """

    wall: float
    processor: float
    marks: float
    end: float


def times(e: config.Experiment, spec: records.RunSpec) -> RunTimes:
    """Trains a whole run."""
    measure, spent = measuring.RunTable.measure, {}

    def timed(table: measuring.RunTable, step: int, state: Any) -> dict[str, float]:
        begin = time.perf_counter()
        found = measure(table, step, state)
        spent[step] = time.perf_counter() - begin
        return found

    begin = time.process_time()
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(measuring.RunTable, "measure", timed),
    ):
        (record,) = train.run(e, pathlib.Path(name), [(0, spec)], 1)
    assert record.status == "finished", record
    return RunTimes(
        wall=record.seconds,
        processor=time.process_time() - begin,
        end=spent.pop(spec.steps),
        marks=sum(spent.values()),
    )


def summary(
    runs: Sequence[RunTimes], bare: Sequence[RunTimes], clock: str
) -> dict[str, Any]:
    """The ratio of two ways by a clock, pair by pair."""
    ratios = [
        getattr(one, clock) / getattr(other, clock)
        for one, other in zip(runs, bare, strict=True)
    ]
    return {
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def counts() -> None:
    """Prints, for each budget, the marks of each size and the range of FLOPs."""
    for averages in WAYS["marks"][1], TWO:
        c = quickstart.get_config()
        c.optimizer.averages = averages
        e = config.resolve(c)
        print(f"averages {averages}")
        for budget, specs in itertools.groupby(plan.plan(e), lambda s: s.budget_flops):
            runs = list(specs)
            found = [marks.marks_of(e, spec) for spec in runs]
            ends = [
                marks.measuring_flops(e, spec.width, spec.depth) / spec.planned_flops
                for spec in runs
            ]
            print(
                f"{budget:.1e} FLOPs: marks {[len(m.steps) - 1 for m in found]}, "
                f"up to {max(m.share for m in found):.1%}; "
                f"the end {min(ends):.1%} to {max(ends):.0%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=4.8e11)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", action="store_true")
    args = parser.parse_args()
    if args.counts:
        return counts()
    cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cores)
    ways = {}
    for name, (wanted, averages) in WAYS.items():
        e = experiment(wanted, averages, args.width, cores)
        specs = {spec.budget_flops: spec for spec in plan.plan(e)}
        if args.budget not in specs:
            sys.exit(f"--budget must be one of {list(specs)}")
        ways[name] = e, specs[args.budget]
        times(e, specs[min(specs)])  # compile
    done: list[tuple[float, dict[str, RunTimes]]] = []
    while len(done) < 3 * args.rounds:
        others, begin = timing.used_by_others(), time.perf_counter()
        took = {name: times(*way) for name, way in ways.items()}
        wall = time.perf_counter() - begin
        done.append(((timing.used_by_others() - others) / wall / cores, took))
        if sum(x <= timing.DISTURBANCE for x, _ in done) == args.rounds:
            break
    done.sort(key=lambda entry: entry[0])
    kept = done[: args.rounds]
    found = {}
    for name, way in ways.items():
        got = marks.marks_of(*way)
        runs = [took[name] for _, took in kept]
        bare = [took["end"] for _, took in kept]
        found[name] = {
            "steps": way[1].steps,
            "marks": len(got.steps) - 1,
            "share_of_flops": got.share,
            "share_of_time": statistics.median(r.marks / r.wall for r in runs),
            "end_share_of_time": statistics.median(r.end / r.wall for r in runs),
            "seconds": statistics.median(r.wall for r in runs),
            "wall": summary(runs, bare, "wall"),
            "processor": summary(runs, bare, "processor"),
        }
    disturbed = sum(share > timing.DISTURBANCE for share, _ in kept)
    print(json.dumps({"disturbed_rounds": disturbed, **found}, indent=1))


if __name__ == "__main__":
    main()
