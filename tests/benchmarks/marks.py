"""What validation through training takes: marks, and averages of the weights.

python tests/benchmarks/marks.py [--budget 4.8e11] [--width 24] [--rounds 400]
python tests/benchmarks/marks.py --counts

The recipe is that of experiments/quickstart.py, on pixels instead of latents, so that
nothing is encoded first.

Two things take time. A training step with averages is timed against one without, in
short blocks that take turns: medians and ranges of the ratios, pair by pair. Rounds
that others disturb are repeated. And a whole run with marks says which share of its
wall time was spent on measuring before its end, which is limited in FLOPs, and at its
end, which is not. Times of whole runs are not compared: they scatter by a tenth.

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
from typing import Any
from unittest import mock

import jax
import numpy as np
import throughput
import timing

from experiments import quickstart
from scaling_ldm import config, records
from scaling_ldm.stages import plan, train
from scaling_ldm.training import (
    marks,
    measuring,
    mesh,
    objective_checks,
    train_step,
)

TWO = config.Experiment().optimizer.averages  # the default
AVERAGES = {"one": ("ema",), "two": TWO}


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


def step_times(
    ways: dict[str, config.Experiment], width: int, seconds: float, rounds: int
) -> timing.Times:
    """Times a training step of each recipe, in turns."""
    recipe = next(iter(ways.values()))
    device_mesh = mesh.build(recipe.mesh, {})
    with jax.set_mesh(device_mesh):
        contenders = {}
        for name, e in ways.items():
            learnt = train_step.train_functions(
                train_step.compiled_part(e), width, 2, True
            ).objective
            rows = e.train.batch_size
            shapes = objective_checks.abstract_inputs(e, learnt, rows)
            batch, uncond = jax.tree.map(
                lambda one: np.ones(one.shape, one.dtype), shapes
            )
            contenders[name] = throughput.Ours(
                e, (width, 2), device_mesh, batch, uncond
            ).advance
        return timing.alternate(contenders, seconds, rounds)


def spent_measuring(e: config.Experiment, spec: records.RunSpec) -> dict[str, float]:
    """Trains a whole run: its seconds, and the shares that were spent on measuring."""
    measure, spent = measuring.of_state, {}

    def timed(compiled: Any, batches: Any, state: Any) -> list[measuring.Measured]:
        begin = time.perf_counter()
        found = measure(compiled, batches, state)
        spent[int(state.step)] = time.perf_counter() - begin
        return found

    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(measuring, "of_state", timed),
    ):
        (record,) = train.run(e, pathlib.Path(name), [(0, spec)], 1)
    assert record.status == "finished", record
    end = spent.pop(spec.steps)
    return {
        "seconds": record.seconds,
        "marks_share_of_time": sum(spent.values()) / record.seconds,
        "end_share_of_time": end / record.seconds,
    }


def counts() -> None:
    """Prints, for each budget, the marks of each size and the range of FLOPs."""
    for averages in AVERAGES["one"], TWO:
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
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--counts", action="store_true")
    args = parser.parse_args()
    if args.counts:
        return counts()
    cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cores)
    ways = {
        name: experiment(20, averages, args.width, cores)
        for name, averages in AVERAGES.items()
    }
    # No experiment may have none; a step without is timed for comparison.
    bare = dataclasses.replace(ways["one"].optimizer, averages=())
    ways = {"none": dataclasses.replace(ways["one"], optimizer=bare)} | ways
    measured = step_times(ways, args.width, args.seconds, args.rounds)
    found: dict[str, Any] = {"disturbed_rounds": measured.disturbed}
    for name, e in ways.items():
        pairs = zip(measured.seconds[name], measured.seconds["none"], strict=True)
        ratios = [ours / bare for ours, bare in pairs]
        found[name] = {
            "microseconds": 1e6 * statistics.median(measured.seconds[name]),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios)[::2],
        }
        if not e.optimizer.averages:
            continue
        specs = {spec.budget_flops: spec for spec in plan.plan(e)}
        if args.budget not in specs:
            sys.exit(f"--budget must be one of {list(specs)}")
        spec, got = specs[args.budget], marks.marks_of(e, specs[args.budget])
        spent_measuring(e, specs[min(specs)])  # compile
        found[name] |= {
            "steps": spec.steps,
            "marks": len(got.steps) - 1,
            "marks_share_of_flops": got.share,
        } | spent_measuring(e, spec)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
