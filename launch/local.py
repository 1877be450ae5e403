"""Trains the missing runs of a planned study on this machine, a few at a time.

    python -m scaling_ldm.main --config EXPERIMENT --workdir W --stages plan,encode
    python launch/local.py --config EXPERIMENT --workdir W --at_once 2

It reads W/runs.jsonl, skips every row that has a record, and starts the entry point
with --run K for each of the others. Arguments after `--` are given to the entry point.
A run that ends with exit status 75 (preempted) is started again. SIGTERM or Ctrl-C is
handed to the runs: each saves its state, and the launcher ends with 75, too; the same
command continues. When all records are there, run the entry point with
--stages fit,generate,report.
"""

import argparse
import pathlib
import signal
import subprocess
import sys
import time

from scaling_ldm import records, study
from scaling_ldm.workdir.runs import read_record

PREEMPTED = study.EXIT["preempted, run the same command again"]


def missing_rows(workdir: pathlib.Path) -> list[int]:
    """Numbers of the rows of the plan that have no record yet."""
    specs = records.read_plan(workdir)
    return [k for k, s in enumerate(specs) if not read_record(workdir, s.run_id)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--at_once", type=int, default=1, help="runs side by side")
    parser.add_argument("rest", nargs="*", help="more arguments of the entry point")
    flags = parser.parse_args()
    if not (flags.workdir / "runs.jsonl").exists():
        parser.error(f"no plan in {flags.workdir}: run the plan stage first")
    try:
        waiting = missing_rows(flags.workdir)
    except (ValueError, OSError) as e:
        print(f"error: {e}; remove the file or put a copy back", file=sys.stderr)
        return study.EXIT["storage"]
    print(f"{len(waiting)} runs to do", flush=True)
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
            command = [sys.executable, "-m", "scaling_ldm.main"]
            command += ["--config", flags.config, "--workdir", str(flags.workdir)]
            command += ["--stages", "train", "--run", str(row), *flags.rest]
            running[row] = subprocess.Popen(command)
            if stopped:  # while it was started
                running[row].terminate()
        for row, process in list(running.items()):
            if process.poll() is not None:
                del running[row]
                at_once = stopped and process.returncode < 0  # before it could hear
                if process.returncode == PREEMPTED or at_once:
                    waiting.append(row)
                elif process.returncode:
                    failed.append(row)
                    print(f"row {row} ended with {process.returncode}", flush=True)
        time.sleep(0.5)
    if stopped and waiting:
        return PREEMPTED
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
