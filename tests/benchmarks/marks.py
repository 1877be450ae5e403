"""What validation through training takes: a run with marks against one without.

python tests/benchmarks/marks.py [--budget 4.8e11] [--width 32] [--rounds 5]

A run of experiments/quickstart.py, on pixels instead of latents, so that nothing is
encoded first. Three ways take turns in one process, compiled before: measured at the
end alone; with marks; with marks and two averages by power functions. Each is a whole
run, with its checkpoints. Ratios are of the wall time of the training loop to that of
the first way in the same round, and medians over the rounds. Rounds that other
processes disturb are repeated. The share of FLOPs that the marks take is printed, too.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import timing

from experiments import quickstart
from scaling_ldm import config, records
from scaling_ldm.stages import plan, train
from scaling_ldm.training import marks

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


def seconds(e: config.Experiment, spec: records.RunSpec) -> float:
    """Wall time inside the loop of a whole run."""
    with tempfile.TemporaryDirectory() as name:
        (record,) = train.run(e, pathlib.Path(name), [(0, spec)], 1)
    assert record.status == "finished", record
    return record.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=4.8e11)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cores)
    ways = {}
    for name, (wanted, averages) in WAYS.items():
        e = experiment(wanted, averages, args.width, cores)
        specs = {spec.budget_flops: spec for spec in plan.plan(e)}
        if args.budget not in specs:
            sys.exit(f"--budget must be one of {list(specs)}")
        ways[name] = e, specs[args.budget]
        seconds(e, specs[min(specs)])  # compile
    done: list[tuple[float, dict[str, float]]] = []
    while len(done) < 3 * args.rounds:
        others, begin = timing.used_by_others(), time.perf_counter()
        took = {name: seconds(*way) for name, way in ways.items()}
        wall = time.perf_counter() - begin
        done.append(((timing.used_by_others() - others) / wall / cores, took))
        if sum(x <= timing.DISTURBANCE for x, _ in done) == args.rounds:
            break
    done.sort(key=lambda entry: entry[0])
    kept = done[: args.rounds]
    found = {}
    for name, way in ways.items():
        got = marks.marks_of(*way)
        ratios = [took[name] / took["end"] for _, took in kept]
        found[name] = {
            "steps": way[1].steps,
            "marks": len(got.steps) - 1,
            "share_of_flops": got.share,
            "seconds": statistics.median(took[name] for _, took in kept),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    disturbed = sum(share > timing.DISTURBANCE for share, _ in kept)
    print(json.dumps({"disturbed_rounds": disturbed, **found}, indent=1))


if __name__ == "__main__":
    main()
