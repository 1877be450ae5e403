"""Steps a second of two small runs: one after the other, as a pack, and on a core each.

    python tests/benchmarks/side_by_side.py [--widths 16,32,64] [--rounds 5]

Networks of experiments/quickstart.py, of depth 2, on made-up batches, dispatched as the
quickstart does. Three ways take turns in one process: one run over all devices (one
simulated device a core), a pack with a run on each device (`mesh.runs`), and one run on
one device, for comparison. Then a process on each core times a run there alone, as
`launch/local.py --at_once auto` starts them. Printed are optimizer steps of all runs
together a second: medians, and the ratio to one run over all devices.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments import quickstart
from scaling_ldm import config
from scaling_ldm.training import mesh, objective_checks, train_step

CALLS = 10  # dispatches of one turn


def contender(
    width: int, devices: Sequence[jax.Device], runs: int
) -> Callable[[], float]:
    """A function that trains for CALLS dispatches; returns steps of runs a second."""
    recipe = config.resolve(quickstart.get_config())
    each = recipe.train.steps_per_dispatch
    part = train_step.compiled_part(recipe)
    placed = mesh.build(recipe.mesh, {}, use=devices, runs=runs)
    with jax.set_mesh(placed):
        compiled = train_step.compile_functions(part, width, 2, placed)
        rows = recipe.train.batch_size
        shapes = objective_checks.abstract_inputs(part, compiled.objective, rows)
        batch, uncond = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), shapes)
        stacked = {name: np.stack([value] * each) for name, value in batch.items()}
        whole = mesh.named_sharding(placed, mesh.REPLICATED)
        key = jax.device_put(jax.random.key(0), whole)
        state = compiled.slots.spread(compiled.init(key))
        numbers: dict[str, Any] = {"peak": np.float32(1e-3), "warmup": np.float32(0)}
        count, spec = np.int32(each), mesh.REPLICATED
        if runs > 1:
            numbers = {name: np.repeat(value, runs) for name, value in numbers.items()}
            count, spec = np.repeat(count, runs), mesh.PACKED
            key = jax.random.split(jax.random.key(0), runs)
        own = jax.device_put(key, mesh.named_sharding(placed, spec))
        hyper = mesh.put(placed, numbers, spec) | {"key": own}
        given = (
            mesh.put(placed, count, spec),
            mesh.put(placed, uncond, mesh.REPLICATED),
            hyper,
            mesh.request_flags(placed, 0),
        )

    def advance() -> float:
        nonlocal state
        unread, begin = None, time.perf_counter()
        with jax.set_mesh(placed):
            for _ in range(CALLS):
                batches = mesh.put(placed, stacked, mesh.STACKED_BATCHES)
                state, metrics = compiled.steps(state, batches, *given)
                if unread is not None:
                    jax.device_get(unread)
                unread = metrics
            jax.device_get(unread)
        return CALLS * each * runs / (time.perf_counter() - begin)

    advance()  # compile
    return advance


def one_core(width: int, rounds: int) -> None:
    """Trains on this process's only device when told to; prints steps a second."""
    advance = contender(width, jax.devices(), 1)
    print("ready", flush=True)
    sys.stdin.readline()
    print(statistics.median(advance() for _ in range(rounds)), flush=True)


def on_each_core(width: int, rounds: int) -> float:
    """Steps a second of a process on each core, all at once."""
    flags = [f"--widths={width}", f"--rounds={rounds}", "--one_core"]
    started = [
        subprocess.Popen(
            ["taskset", "-c", f"{core}", sys.executable, __file__, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for core in sorted(os.sched_getaffinity(0))
    ]
    for process in started:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="16,32,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one_core", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    widths = [int(width) for width in args.widths.split(",")]
    cores = 1 if args.one_core else len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cores)
    if args.one_core:
        return one_core(widths[0], args.rounds)
    print("| width | one device | over all devices | a pack | a core each |")
    for width in widths:
        devices = jax.devices()
        ways = {
            "one": contender(width, devices[:1], 1),
            "all": contender(width, devices, 1),
            "pack": contender(width, devices, cores),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, advance in ways.items():
                times[name].append(advance())
        speeds = {name: statistics.median(found) for name, found in times.items()}
        speeds["each"] = on_each_core(width, 6 * args.rounds)
        said = [f"{v:.0f} ({v / speeds['all']:.2f})" for v in speeds.values()]
        print(f"| {width} | {' | '.join(said)} |", flush=True)


if __name__ == "__main__":
    main()
