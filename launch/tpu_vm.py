"""Starts the missing rows of a planned study on Cloud TPU VMs, a queued resource a row.

    python launch/tpu_vm.py --config EXPERIMENT --workdir W --zone Z
        --accelerator v5litepod-16 --runtime v2-alpha-tpuv5-lite --spot
        --setup 'mount /data && cd /data/code && source venv/bin/activate' --dry-run

Every host of a TPU runs the same script, at each of its starts: --setup, which mounts
the file system of W and goes to the code, and then the row, again after 75 (preempted)
and 4 (a host was lost), the latter up to --max_restarts times in one run of the script.
When the row is done, the script deletes its queued resource. After any other status the
TPU stays, so that it can be looked at, and costs money.

Rows whose queued resource waits or works are left out. One that was preempted or failed
is deleted and asked for again: run the launcher from time to time. Queued resources are
known by name; the default of --name differs between studies.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import rows

# Every host asks Google Cloud's metadata server which one it is, as jax does. An
# endpoint is the address of a host, or name:id:address.
SCRIPT = """\
#!/bin/bash
# Row {row} of {workdir}, on every host of the TPU.
export HOME="${{HOME:-/root}}"
fact() {{
  curl -sf -H 'Metadata-Flavor: Google' --retry 5 \\
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}
if ! hosts=$(fact worker-network-endpoints) || ! host=$(fact agent-worker-number); then
  echo "the metadata server does not say which host this is"; exit 1
fi
first=${{hosts%%,*}}
count=$(tr ',' '\\n' <<<"$hosts" | grep -c .)
job=()
if [ "$count" -gt 1 ]; then
  job=("--coordinator=${{first##*:}}:{port}")
  job+=("--num_processes=$count" "--process_id=$host")
fi
setup() {{
{setup}
}}
if ! setup; then echo "setup failed"; exit 1; fi
lost=0
while true; do
  {command} "${{job[@]}}"
  status=$?
  if [ "$status" = {lost} ]; then
    lost=$((lost + 1))
    if [ "$lost" -gt {max_restarts} ]; then break; fi
  elif [ "$status" != {preempted} ]; then
    break
  fi
  sleep 20
done
echo "row {row} ended with $status"
if [ "$status" = 0 ]; then
  {delete}
fi
exit "$status"
"""


def flags_of(words: Sequence[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = rows.parser(__doc__)
    add = parser.add_argument
    add("--zone", required=True)
    add("--project", help="default: that of gcloud")
    add("--accelerator", required=True, help="its type, as in v5litepod-16")
    add("--runtime", required=True, help="version of the software of the TPU VM")
    add("--setup", default=":", help="shell commands before the row")
    add("--spot", action="store_true", help="may be preempted")
    add("--keep", action="store_true", help="never delete the TPU")
    add(
        "--max_restarts",
        type=int,
        default=100,
        help="after lost hosts, counted anew at each start of a host",
    )
    add("--also", action="append", default=[], help="one more flag of gcloud")
    flags = rows.parse(parser, words)
    flags.name = rows.name_of_study(flags)
    return flags


def gcloud(flags: argparse.Namespace, verb: str, *words: str) -> list[str]:
    """A command for queued resources in the zone."""
    where = [f"--zone={flags.zone}"]
    where += [f"--project={flags.project}"] if flags.project else []
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *words, *where]


def delete(flags: argparse.Namespace, name: str, *more: str) -> list[str]:
    return gcloud(flags, "delete", name, "--force", "--quiet", *more)


def script(flags: argparse.Namespace, name: str, row: int) -> str:
    """What every host of the row's TPU runs at its start."""
    ended = ["true"] if flags.keep else delete(flags, name, "--async")
    return SCRIPT.format(
        row=row,
        workdir=flags.workdir_there,
        setup=flags.setup,
        command=shlex.join(rows.train(flags, row)),
        lost=rows.LOST,
        preempted=rows.PREEMPTED,
        port=rows.PORT,
        max_restarts=flags.max_restarts,
        delete=shlex.join(ended),
    )


def main(words: Sequence[str]) -> int:
    flags = flags_of(words)
    named = {rows.name_of(flags, row, longest=63): row for row in rows.missing(flags)}
    ask = gcloud(flags, "list", "--format=value(name.basename(),state.state)")
    told = rows.told(ask, flags.dry_run).replace("\t", " ")
    there = dict(rows.pairs(told))
    named = rows.left(named, there, over=("FAILED", "SUSPENDED"))
    rows.say_and_check([*named.values()])
    starts = []
    for name, row in named.items():
        if name in there:
            starts.append(rows.Start(command=delete(flags, name)))
        path = f"{name}.sh"
        create = gcloud(
            flags,
            "create",
            name,
            f"--node-id={name}",
            f"--accelerator-type={flags.accelerator}",
            f"--runtime-version={flags.runtime}",
            *(["--spot"] if flags.spot else []),
            f"--metadata-from-file=startup-script={rows.FILES / path}",
            *flags.also,
        )
        files = {path: script(flags, name, row)}
        starts.append(rows.Start(command=create, files=files))
    return rows.start(starts, flags.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
