"""Trains the missing runs of a planned study on this machine, a few at a time.

    python -m scaling_ldm.main --config EXPERIMENT --workdir W --stages plan,encode
    python launch/local.py --config EXPERIMENT --workdir W --at_once 2

It starts the entry point with --run K for each row of the plan that has no record.
A run that ends with exit status 75 (preempted) is started again. SIGTERM or Ctrl-C is
handed to the runs: each saves its state, and the launcher ends with 75, too; the same
command continues. When all records are there, run the entry point with
--stages fit,generate,report.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import rows


def flags_of(words: Sequence[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = rows.parser(__doc__)
    parser.add_argument("--at_once", type=int, default=1, help="runs side by side")
    flags = rows.parse(parser, words)
    if flags.at_once < 1:
        parser.error(f"--at_once={flags.at_once}: must be at least 1")
    return flags


def main(words: Sequence[str]) -> int:
    flags = flags_of(words)
    waiting = rows.missing(flags)
    rows.say_and_check(waiting)
    commands = {row: rows.train(flags, row, sys.executable) for row in waiting}
    if flags.dry_run:
        starts = [rows.Start(command=commands[row]) for row in waiting]
        return rows.start(starts, dry_run=True)
    running: dict[int, subprocess.Popen] = {}
    failed = []
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        for process in running.values():
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while running or (waiting and not stopped):
        while waiting and not stopped and len(running) < flags.at_once:
            row = waiting.pop(0)
            running[row] = subprocess.Popen(commands[row])
            if stopped:  # while it was started
                running[row].terminate()
        for row, process in list(running.items()):
            if process.poll() is not None:
                del running[row]
                at_once = stopped and process.returncode < 0  # before it could hear
                if process.returncode == rows.PREEMPTED or at_once:
                    waiting.append(row)
                elif process.returncode:
                    failed.append(row)
                    print(f"row {row} ended with {process.returncode}", flush=True)
        time.sleep(0.5)
    if stopped and waiting:
        return rows.PREEMPTED
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
