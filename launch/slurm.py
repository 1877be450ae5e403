"""Queues the missing rows of a planned study under Slurm, one array task a row.

    python -m scaling_ldm.main --config EXPERIMENT --workdir W --stages plan,encode
    python launch/slurm.py --config EXPERIMENT --workdir W --nodes 2
        --also=--gpus-per-node=8 --dry-run

Rows that a task in the queue already has are left out: the task's comment names the
working directory. W must be on a file system that all nodes see. launch/slurm.sh is
what each task runs; a task that is stopped saves and is queued again.
"""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Sequence

import rows

BODY = os.path.relpath(pathlib.Path(__file__).with_name("slurm.sh"))
RESTARTS = 100  # as in slurm.sh


def flags_of(words: Sequence[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = rows.parser(__doc__)
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="nodes of a row")
    add("--at_once", type=int, default=0, help="most rows at a time (0: no limit)")
    add(
        "--signal",
        default="TERM@120",
        help="TERM, USR1 or USR2, and how many seconds before the end of its time a "
        "run is saved and ended by it",
    )
    add(
        "--max_restarts",
        type=int,
        default=RESTARTS,
        help="how often a task may have been queued again for it to be so after a lost "
        "node; those after a preemption count as well. 0: nothing is queued again",
    )
    add("--also", action="append", default=[], help="one more flag of sbatch")
    flags = rows.parse(parser, words)
    if not re.fullmatch(r"(TERM|USR1|USR2)@\d+", flags.signal):
        parser.error(f"--signal={flags.signal}: must be as in TERM@120, USR1 or USR2")
    return flags


def as_signal(signal: str) -> list[str]:
    """Overrides with which a run ends at this signal. By default it goes on at USR1."""
    if not signal.startswith("USR1"):
        return []
    stop = '--config.train.stop_signals=("SIGUSR1", "SIGUSR2")'
    return ["--config.train.save_signals=()", stop]


def queued(comment: str, dry_run: bool) -> set[int]:
    """The rows that tasks in the queue have; the comment says of which study."""
    ask = ["squeue", "--me", "--noheader", "--array", "--format=%K %k"]
    found = rows.pairs(rows.told(ask, dry_run))
    return {int(row) for row, said in found if row.isdigit() and said == comment}


def main(words: Sequence[str]) -> int:
    flags = flags_of(words)
    comment = f"scaling_ldm {rows.absolute(flags.workdir)}"
    found = rows.missing(flags)
    if found and (there := queued(comment, flags.dry_run) & {*found}):
        print(f"already started: {rows.ranges(there)}", file=sys.stderr)
        found = [row for row in found if row not in there]
    rows.say_and_check(found)
    at_once = f"%{flags.at_once}" if flags.at_once else ""
    given = [*as_signal(flags.signal), *flags.overrides]
    command = [
        "sbatch",
        f"--job-name={flags.name or rows.folder_name(flags)}",
        f"--comment={comment}",
        f"--array={rows.ranges(found)}{at_once}",
        f"--nodes={flags.nodes}",
        f"--signal={flags.signal}",
        "--requeue" if flags.max_restarts else "--no-requeue",
    ]
    if flags.max_restarts != RESTARTS:
        command.append(f"--export=ALL,SCALING_LDM_MAX_RESTARTS={flags.max_restarts}")
    command += [*flags.also, BODY, "--config", flags.config]
    command += ["--workdir", flags.workdir_there, *given]
    return rows.start([rows.Start(command=command)], flags.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
