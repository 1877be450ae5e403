"""Starts the missing rows of a planned study with xpk, one workload a row.

    python launch/xpk.py --config EXPERIMENT --workdir W --cluster C --project P
        --zone Z --device_type v5litepod-16 --docker_image IMAGE
        --also=--storage=NAME --dry-run

xpk ends a workload for good after an exit status that it does not know. So it is told
to start one again after 75 (preempted) and 4 (a host was lost), and how often. It
refuses a workload that is already there: delete one that failed before it is started
again.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import rows

# What xpk tells the nodes of a job of GPUs. TPUs find one another by GKE's variables.
GPUS = (
    "--coordinator=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT",
    "--num_processes=$NNODES",
    "--process_id=$NODE_RANK",
)


def flags_of(words: Sequence[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = rows.parser(__doc__)
    add = parser.add_argument
    add("--cluster", required=True)
    add("--project", required=True)
    add("--zone", required=True)
    add("--device_type", required=True, help="as xpk calls it")
    add("--docker_image", required=True, help="container image with this library")
    add("--slices", type=int, default=1, help="slices of a row")
    add("--nodes", type=int, default=1, help="nodes of a row, of GPUs")
    add("--grace", type=int, default=120, help="seconds to save in when preempted")
    add(
        "--max_restarts",
        type=int,
        default=100,
        help="after a preemption or a lost host",
    )
    add("--also", action="append", default=[], help="one more flag of xpk")
    flags = rows.parse(parser, words)
    flags.name = rows.name_of_study(flags)
    return flags


PLAIN = {*map(chr, range(0x20, 0x7F))} - {*"\"'\\"}


def quote(word: str) -> str:
    """A word for bash, without double quotes and with \\xNN as the only backslashes.

    For GPUs, xpk also writes the command into YAML between double quotes.
    """
    quoted = shlex.quote(word)
    if {*quoted} <= PLAIN | {"'"}:
        return quoted
    codes = [
        c if c in PLAIN else "".join(rf"\x{b:02x}" for b in c.encode()) for c in word
    ]
    return f"$'{''.join(codes)}'"


def in_container(flags: argparse.Namespace, row: int) -> str:
    """The shell command of each host.

    With exec, SIGTERM comes to Python and not to the shell around it. Kubernetes reads
    $$ as $.
    """
    words = " ".join(map(quote, rows.train(flags, row))).replace("$", "$$")
    return " ".join(["exec", words, *(GPUS if flags.nodes > 1 else ())])


def main(words: Sequence[str]) -> int:
    flags = flags_of(words)
    found = rows.missing(flags)
    rows.say_and_check(found)
    restart_on = ",".join(map(str, sorted((rows.LOST, rows.PREEMPTED))))
    starts = [
        rows.Start(
            command=[
                *("xpk", "workload", "create"),
                f"--workload={rows.name_of(flags, row, longest=40)}",
                f"--cluster={flags.cluster}",
                f"--project={flags.project}",
                f"--zone={flags.zone}",
                f"--device-type={flags.device_type}",
                f"--docker-image={flags.docker_image}",
                f"--num-slices={flags.slices}",
                *([f"--num-nodes={flags.nodes}"] if flags.nodes > 1 else ()),
                f"--restart-on-exit-codes={restart_on}",
                f"--max-restarts={flags.max_restarts}",
                f"--termination-grace-period-seconds={flags.grace}",
                *flags.also,
                f"--command={in_container(flags, row)}",
            ]
        )
        for row in found
    ]
    return rows.start(starts, flags.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
