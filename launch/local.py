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

--whole does all of it: it plans and encodes, trains the missing runs, and then gives
the entry point's own command for the stages that are left.

    python launch/local.py --config EXPERIMENT --workdir W --at_once auto --whole
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

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
    parser.add_argument(
        "--whole", action="store_true", help="the stages before and after, too"
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


class Running:
    """The commands that run now; SIGTERM and Ctrl-C are handed to them."""

    def __init__(self) -> None:
        self.stopped = False
        self._processes: dict[str, subprocess.Popen] = {}
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def _stop(self, *_: object) -> None:
        self.stopped = True
        for process in self._processes.values():
            process.terminate()

    def _start(self, name: str, command: Sequence[str]) -> None:
        self._processes[name] = subprocess.Popen(command)
        if self.stopped:  # while it was started
            self._processes[name].terminate()

    def one(self, command: Sequence[str]) -> int:
        """Runs a command to its end; its exit status."""
        if self.stopped:
            return rows.PREEMPTED
        self._start("", command)
        status = self._processes[""].wait()
        del self._processes[""]
        return rows.PREEMPTED if self.stopped and status < 0 else status

    def every(self, commands: Mapping[str, Sequence[str]], most: int) -> int:
        """Runs the commands, a few at a time, and again those that were preempted.

        Returns:
          0, 1 if a command failed, or PREEMPTED.
        """
        waiting, failed = [*commands], []
        while self._processes or (waiting and not self.stopped):
            while waiting and not self.stopped and len(self._processes) < most:
                name = waiting.pop(0)
                self._start(name, commands[name])
            for name, process in list(self._processes.items()):
                if process.poll() is not None:
                    del self._processes[name]
                    # Before it could hear the signal.
                    at_once = self.stopped and process.returncode < 0
                    if process.returncode == rows.PREEMPTED or at_once:
                        waiting.append(name)
                    elif process.returncode:
                        failed.append(name)
                        print(f"{name} ended with {process.returncode}", flush=True)
            time.sleep(0.5)
        if self.stopped and waiting:
            return rows.PREEMPTED
        return 1 if failed else 0


def main(words: Sequence[str]) -> int:
    flags = flags_of(words)
    entry, running = rows.command(flags, sys.executable), Running()
    before = [*entry, "--stages", "plan,encode"]
    if flags.whole and flags.dry_run:
        # Which rows are missing is known when there is a plan.
        again = [w for w in words if w not in ("--whole", "--dry-run", "--dry_run")]
        commands = before, [sys.executable, __file__, *again], entry
        return rows.start([rows.Start(command=c) for c in commands], True)
    if flags.whole and (status := running.one(before)):
        return status
    missing = rows.missing(flags)
    if missing or not flags.whole:
        rows.say_and_check(missing)
        side_by_side, most = commands_of(flags, missing)
        if flags.dry_run:
            starts = [rows.Start(command=one) for one in side_by_side.values()]
            return rows.start(starts, dry_run=True)
        if status := running.every(side_by_side, most):
            return status
    return running.one(entry) if flags.whole else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
