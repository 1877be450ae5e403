"""Starts the missing rows of a planned study with SkyPilot, one managed job a row.

    python launch/skypilot.py --config EXPERIMENT --workdir W --accelerators H100:8
        --nodes 2 --setup 'pip install -e .' --volume /data=study --dry-run

The folder in which this is started is copied to every node. A volume holds W, and
--workdir_there says where. A job that ends with 75 (preempted) is started again, as one
whose node was taken is. After 4 (a host was lost) its nodes try again, up to
--max_restarts times, counted anew after each recovery of the job. Any other status ends
the job. Rows whose job is not over are left out.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import rows

OVER = ("SUCCEEDED", "CANCELLED", "FAILED")  # also FAILED_SETUP and others
# The first address is that of rank 0.
JOB = (
    f'--coordinator="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{rows.PORT}"',
    '--num_processes="$SKYPILOT_NUM_NODES"',
    '--process_id="$SKYPILOT_NODE_RANK"',
)
RUN = """\
lost=0
while true; do
  {command}
  status=$?
  lost=$((lost + 1))
  if [ "$status" != {lost} ] || [ "$lost" -gt {max_restarts} ]; then exit "$status"; fi
  sleep 20
done
"""


def flags_of(words: Sequence[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = rows.parser(__doc__)
    add = parser.add_argument
    add("--accelerators", required=True, help="of a node, as in H100:8")
    add("--nodes", type=int, default=1, help="nodes of a row")
    add("--infra", help="where, as in gcp/us-central1; default: wherever it is cheap")
    add("--spot", action="store_true", help="on spot nodes")
    add("--image", help="container image, as in docker:NAME")
    add("--setup", help="shell commands on each node, once, before the row")
    add("--volume", action="append", default=[], help="PATH=NAME of a volume")
    add(
        "--max_restarts",
        type=int,
        default=100,
        help="after lost hosts, counted anew after each recovery of the job",
    )
    add("--also", action="append", default=[], help="one more flag of sky")
    flags = rows.parse(parser, words)
    for volume in flags.volume:
        if not volume.startswith("/") or not volume.partition("=")[2]:
            parser.error(f"--volume={volume}: must be /PATH=NAME")
    flags.name = rows.name_of_study(flags, volumes=volumes_of(flags))
    return flags


def volumes_of(flags: argparse.Namespace) -> dict[str, str]:
    """The names of volumes by the folder in which each is seen."""
    return dict(volume.split("=", 1) for volume in flags.volume)


def task(flags: argparse.Namespace, name: str, row: int) -> dict[str, Any]:
    """The task of a row, as SkyPilot reads it."""
    several = flags.nodes > 1 or flags.accelerators.startswith("tpu")
    command = " ".join([shlex.join(rows.train(flags, row)), *(JOB if several else ())])
    resources = {
        "infra": flags.infra,
        "accelerators": flags.accelerators,
        "use_spot": flags.spot,
        "image_id": flags.image,
        "job_recovery": {"recover_on_exit_codes": [rows.PREEMPTED]},
    }
    run = RUN.format(command=command, lost=rows.LOST, max_restarts=flags.max_restarts)
    found = {
        "name": name,
        "workdir": ".",
        "num_nodes": flags.nodes,
        "resources": {k: v for k, v in resources.items() if v is not None},
        "volumes": volumes_of(flags) or None,
        "setup": flags.setup,
        "run": run,
    }
    return {k: v for k, v in found.items() if v is not None}


def main(words: Sequence[str]) -> int:
    flags = flags_of(words)
    named = {rows.name_of(flags, row, longest=50): row for row in rows.missing(flags)}
    ask = ["sky", "jobs", "queue", "--all", "--output=json"]
    there = dict(_states(rows.told(ask, flags.dry_run)))
    named = rows.left(named, there, over=OVER)
    rows.say_and_check([*named.values()])
    starts = []
    for name, row in named.items():
        path = f"{name}.yaml"
        launch = ["sky", "jobs", "launch", "--yes", "--detach-run", f"--name={name}"]
        launch += [*flags.also, str(rows.FILES / path)]
        files = {path: rows.as_yaml(task(flags, name, row))}
        starts.append(rows.Start(command=launch, files=files))
    return rows.start(starts, flags.dry_run)


def _states(text: str) -> list[tuple[str, str]]:
    """(name, state) of each job in what `sky jobs queue` prints, the newest last."""
    jobs = sorted(json.loads(text or "[]"), key=lambda job: job["job_id"])
    return [(job["job_name"], (job["status"] or "").partition("_")[0]) for job in jobs]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
