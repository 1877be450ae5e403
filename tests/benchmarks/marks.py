"""What validation through training takes: a run with marks against one without.

python tests/benchmarks/marks.py [--budget 4.8e11] [--width 32] [--rounds 5]
python tests/benchmarks/marks.py --counts
python tests/benchmarks/marks.py --updates

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

--updates times the updates of two averages alone, of one size on one device, in
processor time: leaf by leaf as in training, as one flat array, and with all of the
compiler's optimisations.
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
import jax.numpy as jnp
import timing

from experiments import quickstart
from scaling_ldm import config, records
from scaling_ldm.stages import plan, train
from scaling_ldm.training import (
    compiler_options,
    marks,
    measuring,
    optimizer,
    train_step,
)

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
    measure, spent = measuring.of_state, {}

    def timed(compiled: Any, batches: Any, state: Any) -> list[measuring.Measured]:
        begin = time.perf_counter()
        found = measure(compiled, batches, state)
        spent[int(state.step)] = time.perf_counter() - begin
        return found

    begin = time.process_time()
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(measuring, "of_state", timed),
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


def updates(width: int) -> None:
    """Prints what a step of two averages takes, in three forms."""
    e = experiment(0, TWO, width, 1)
    of = train_step.train_functions(train_step.compiled_part(e), width, 2, True)
    shapes = train_step.abstract_state(of).params
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])

    def steps(given: dict[str, Any], newest: Any, count: jax.Array) -> dict[str, Any]:
        def body(i: jax.Array, now: dict[str, Any]) -> dict[str, Any]:
            return {
                name: optimizer.average(e.optimizer, name, one, newest, i + 1000)
                for name, one in now.items()
            }

        return jax.lax.fori_loop(0, count, body, given)

    quick = compiler_options.quick_to_compile(jax.default_backend())
    forms = {
        "leaf by leaf": (params, quick),
        "one flat array": (flat, quick),
        "leaf by leaf, optimised": (params, None),
    }
    took: dict[str, list[float]] = {name: [] for name in forms}
    run = {}
    for name, (tree, options) in forms.items():
        jitted = jax.jit(steps, donate_argnums=0, compiler_options=options)
        state = {average: jax.tree.map(jnp.copy, tree) for average in TWO}
        run[name] = jitted.lower(state, tree, jnp.int32(0)).compile(), [state], tree
    for _ in range(10):
        for name, (compiled, box, tree) in run.items():
            begin = time.process_time()
            box[0] = jax.block_until_ready(compiled(box[0], tree, jnp.int32(200)))
            took[name].append((time.process_time() - begin) / 200)
    leaves = len(jax.tree.leaves(params))
    print(f"{flat.size} parameters in {leaves} leaves, two averages")
    for name, seconds in took.items():
        median, each = statistics.median(seconds), min(seconds) / 2 / flat.size
        print(
            f"{name}: {1e6 * median:.0f} us a step, at least {1e9 * each:.2f} ns each"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=4.8e11)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", action="store_true")
    parser.add_argument("--updates", action="store_true")
    args = parser.parse_args()
    if args.counts:
        return counts()
    if args.updates:
        return updates(args.width)
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
