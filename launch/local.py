"""Trains the missing runs of a planned study on this machine, a few at a time.

    python -m scaling_ldm.main --config EXPERIMENT --workdir W --stages plan,encode
    python launch/local.py --config EXPERIMENT --workdir W --at_once 2

It starts the entry point with --run K for each row of the plan that has no record. With
--at_once auto there is one process for each CPU core instead, which has that core for
itself. All of them are given all rows, those of the largest budgets first, and each row
is trained by the process that comes to it first. They share compiled programs, in
`compiled` in the working directory unless mesh.compilation_cache says another place. On
a machine with accelerators, "auto" is 1.

A run that ends with exit status 75 (preempted) is started again. SIGTERM or Ctrl-C is
handed to the runs: each saves its state, and the launcher ends with 75, too; the same
command continues. When all records are there, run the entry point with
--stages fit,generate,report.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import rows

from scaling_ldm import records
from scaling_ldm.records import places

AUTO = "auto"


def flags_of(words: Sequence[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = rows.parser(__doc__)
    parser.add_argument(
        "--at_once", default="1", help="runs side by side; auto: one on each CPU core"
    )
    flags = rows.parse(parser, words)
    if flags.at_once != AUTO and not (
        flags.at_once.isdecimal() and int(flags.at_once) > 0
    ):
        parser.error(f"--at_once={flags.at_once}: must be at least 1, or {AUTO}")
    return flags


def one_each(flags: argparse.Namespace, waiting: Sequence[int]) -> dict[str, list]:
    """The command of each row, by what it is called."""
    return {f"row {row}": rows.train(flags, row, sys.executable) for row in waiting}


def platform() -> str:
    """Where jax would train on this machine."""
    ask = "import jax; print(jax.default_backend())"
    asked = subprocess.run(
        [sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True
    )
    return asked.stdout.strip()


def orders(
    specs: Sequence[records.RunSpec], waiting: Sequence[int], workers: int
) -> list[list[int]]:
    """The order in which each process comes to the rows.

    The longest runs come first, so that none of them is left at the end. Among runs of
    one budget, the processes begin at different sizes. So a size is compiled by one of
    them, and the others find its programs.
    """
    found = []
    for worker in range(workers):
        order: list[int] = []
        for budget in sorted({specs[row].budget_flops for row in waiting})[::-1]:
            some = [row for row in waiting if specs[row].budget_flops == budget]
            sizes = list(dict.fromkeys((specs[r].width, specs[r].depth) for r in some))
            first = worker * len(sizes) // workers
            for size in sizes[first:] + sizes[:first]:
                order += [r for r in some if (specs[r].width, specs[r].depth) == size]
        found.append(order)
    return found


def one_a_core(flags: argparse.Namespace, waiting: Sequence[int]) -> dict[str, list]:
    """The command of each process, by what it is called."""
    if not shutil.which("taskset"):
        rows.refuse(f"--at_once={AUTO} needs taskset, of util-linux")
    given = [word.partition("=")[0].lstrip("-") for word in flags.overrides]
    if "config.mesh.cpu_devices" in given:
        rows.refuse(f"--at_once={AUTO} sets config.mesh.cpu_devices itself: leave it")
    more = ["--config.mesh.cpu_devices=1"]
    if "config.mesh.compilation_cache" not in given:
        place = f"{flags.workdir_there.rstrip('/')}/compiled"
        more.append(f"--config.mesh.compilation_cache={place}")
    specs = records.read_plan(places.place(flags.workdir))
    cores = sorted(os.sched_getaffinity(0))[: len(waiting)]
    commands = {}
    for core, order in zip(cores, orders(specs, waiting, len(cores)), strict=True):
        command = rows.train(flags, ",".join(map(str, order)), sys.executable)
        on_core = ["taskset", "--cpu-list", str(core)]
        commands[f"the process on core {core}"] = [*on_core, *command, *more]
    return commands


def commands_of(
    flags: argparse.Namespace, waiting: Sequence[int]
) -> tuple[dict[str, list], int]:
    """The commands, by what they are called, and how many run side by side."""
    if flags.at_once != AUTO:
        return one_each(flags, waiting), int(flags.at_once)
    if (found := platform()) != "cpu":
        print(f"one run at a time, on {found}", file=sys.stderr)
        return one_each(flags, waiting), 1
    commands = one_a_core(flags, waiting)
    print(f"{len(commands)} processes, one on each core", file=sys.stderr)
    return commands, len(commands)


def main(words: Sequence[str]) -> int:
    flags = flags_of(words)
    missing = rows.missing(flags)
    rows.say_and_check(missing)
    commands, most = commands_of(flags, missing)
    if flags.dry_run:
        starts = [rows.Start(command=command) for command in commands.values()]
        return rows.start(starts, dry_run=True)
    running: dict[str, subprocess.Popen] = {}
    waiting, failed = [*commands], []
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        for process in running.values():
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while running or (waiting and not stopped):
        while waiting and not stopped and len(running) < most:
            name = waiting.pop(0)
            running[name] = subprocess.Popen(commands[name])
            if stopped:  # while it was started
                running[name].terminate()
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                at_once = stopped and process.returncode < 0  # before it could hear
                if process.returncode == rows.PREEMPTED or at_once:
                    waiting.append(name)
                elif process.returncode:
                    failed.append(name)
                    print(f"{name} ended with {process.returncode}", flush=True)
        time.sleep(0.5)
    if stopped and waiting:
        return rows.PREEMPTED
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
