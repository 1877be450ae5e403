"""Starts the missing rows of a planned study on GKE, one JobSet a row.

    python launch/gke.py --config EXPERIMENT --workdir W --image IMAGE
        --pvc CLAIM:/data --tpu tpu-v5-lite-podslice --topology 4x4 --queue tpus
        --dry-run

The claim is mounted in every pod, and --workdir_there says where W is in it. Kueue
admits the JobSets of --queue; --quota makes that queue. TPUs find one another by the
variables that GKE sets. GPUs of several nodes (--gpu, --nodes) are told the address of
the first pod.

A row that is preempted is started again, as often as that happens. One whose host is
lost is, too, up to --max_restarts times. One that cannot work (status 1, 2, 3 or 5)
fails at once. Rows whose JobSet is there and not over are left out.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import rows

CONTAINER = "train"
JOB = "workers"  # of a JobSet: its pods are called JOBSET-workers-SLICE-HOST


def flags_of(words: Sequence[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = rows.parser(__doc__)
    add = parser.add_argument
    add("--image", required=True, help="container image with this library")
    add("--pvc", required=True, help="CLAIM:PATH, the volume that holds the study")
    add("--tpu", help="value of cloud.google.com/gke-tpu-accelerator")
    add("--topology", help="of a slice, as in 4x4 or 2x2x2")
    add("--slices", type=int, default=1, help="slices of a row")
    add("--gpu", help="value of cloud.google.com/gke-accelerator")
    add("--nodes", type=int, default=1, help="nodes of a row, of GPUs")
    add("--chips", type=int, help="of a host (default: 4 TPUs, 8 GPUs)")
    add("--spot", action="store_true", help="on spot nodes")
    add("--queue", help="Kueue's LocalQueue")
    add("--quota", type=int, help="also make the queue, with so many chips")
    add("--namespace", default="default")
    add("--service_account", help="of the pods")
    add("--grace", type=int, default=120, help="seconds to save in when preempted")
    add("--max_restarts", type=int, default=100, help="after lost hosts")
    flags = rows.parse(parser, words)
    claim, _, mounted = flags.pvc.partition(":")
    if bool(flags.tpu) == bool(flags.gpu) or bool(flags.tpu) != bool(flags.topology):
        parser.error("give --tpu and --topology, or --gpu and --nodes")
    if flags.quota and not flags.queue:
        parser.error("--quota is that of --queue")
    if not mounted.startswith("/"):
        parser.error(f"--pvc={flags.pvc}: must be CLAIM:/PATH")
    flags.name = rows.name_of_study(flags, volumes={mounted: claim})
    flags.chips = flags.chips or (4 if flags.tpu else 8)
    if flags.tpu:
        sides = flags.topology.split("x")
        if not all(side.isdigit() for side in sides):
            parser.error(f"--topology={flags.topology}: must be as in 4x4 or 2x2x2")
        chips = math.prod(map(int, sides))
        if chips % flags.chips:
            parser.error(
                f"a slice of {flags.topology} has {chips} chips, no multiple of "
                f"--chips={flags.chips} of a host"
            )
        flags.nodes = chips // flags.chips
    elif flags.slices > 1:
        parser.error("--slices are of TPUs")
    return flags


def node_labels(flags: argparse.Namespace) -> dict[str, str]:
    """The labels of the nodes that a row runs on."""
    prefix = "cloud.google.com/gke-"
    labels = {f"{prefix}accelerator": flags.gpu}
    if flags.tpu:
        labels = {
            f"{prefix}tpu-accelerator": flags.tpu,
            f"{prefix}tpu-topology": flags.topology,
        }
    return labels | ({f"{prefix}spot": "true"} if flags.spot else {})


def resource(flags: argparse.Namespace) -> str:
    return "google.com/tpu" if flags.tpu else "nvidia.com/gpu"


def command(flags: argparse.Namespace, name: str, row: int) -> list[str]:
    """The command of each pod; $(...) in it is put in by Kubernetes."""
    words = [word.replace("$", "$$") for word in rows.train(flags, row)]
    if flags.gpu and flags.nodes > 1:
        words += [f"--coordinator={name}-{JOB}-0-0.{name}:{rows.PORT}"]
        words += [f"--num_processes={flags.nodes}"]
        words += ["--process_id=$(JOB_COMPLETION_INDEX)"]
    return words


def pod(flags: argparse.Namespace, name: str, row: int) -> dict[str, Any]:
    """The specification of a pod."""
    claim, _, path = flags.pvc.partition(":")
    several = flags.nodes * flags.slices > 1
    tolerated = [resource(flags)] + (["cloud.google.com/gke-spot"] * flags.spot)
    account = flags.service_account
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": flags.grace,
        **({"serviceAccountName": account} if account else {}),
        **(
            {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
            if several
            else {}
        ),
        "nodeSelector": node_labels(flags),
        "tolerations": [{"key": key, "operator": "Exists"} for key in tolerated],
        "containers": [
            {
                "name": CONTAINER,
                "image": flags.image,
                "command": command(flags, name, row),
                "resources": {"limits": {resource(flags): flags.chips}},
                "volumeMounts": [
                    {"name": "study", "mountPath": path},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "study", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def job(flags: argparse.Namespace, name: str, row: int) -> dict[str, Any]:
    """The specification of the job of a slice: a host that ends ends all of them."""

    def after(*statuses: int) -> dict[str, Any]:
        found = {"containerName": CONTAINER, "operator": "In", "values": [*statuses]}
        return {"action": "FailJob", "onExitCodes": found}

    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return {
        "parallelism": flags.nodes,
        "completions": flags.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                after(rows.PREEMPTED),
                after(*rows.HOPELESS),
                {"action": "FailJob", "onPodConditions": [disrupted]},
            ]
        },
        "template": {"spec": pod(flags, name, row)},
    }


def jobset(flags: argparse.Namespace, name: str, row: int) -> dict[str, Any]:
    """The JobSet of a row.

    Its first rule reads the messages of Kubernetes' job controller, which say the exit
    code or the condition; the second is for the other codes of the job's policy. After
    anything else, such as status 4, it is started again and counts.
    """
    by_policy = {"onJobFailureReasons": ["PodFailurePolicy"]}
    messages = [rf"exit code {rows.PREEMPTED}\b", "DisruptionTarget"]
    labels = {"kueue.x-k8s.io/queue-name": flags.queue} if flags.queue else {}
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": flags.namespace,
            **({"labels": labels} if labels else {}),
            **(
                {"annotations": {exclusive: "cloud.google.com/gke-nodepool"}}
                if flags.tpu
                else {}
            ),
        },
        "spec": {
            "ttlSecondsAfterFinished": 86400,
            "failurePolicy": {
                "maxRestarts": flags.max_restarts,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        **by_policy,
                        "onJobFailureMessagePatterns": messages,
                    },
                    {"name": "hopeless", "action": "FailJobSet", **by_policy},
                ],
            },
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": flags.slices,
                    "template": {"spec": job(flags, name, row)},
                }
            ],
        },
    }


def queue(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Kueue's objects: nodes of one kind, a quota of their chips, a queue for it."""

    def made(kind: str, spec: dict[str, Any], **where: str) -> dict[str, Any]:
        metadata = {"name": flags.queue, **where}
        version = "kueue.x-k8s.io/v1beta2"
        return {
            "apiVersion": version,
            "kind": kind,
            "metadata": metadata,
            "spec": spec,
        }

    quota = {"name": resource(flags), "nominalQuota": flags.quota}
    group = {
        "coveredResources": [resource(flags)],
        "flavors": [{"name": flags.queue, "resources": [quota]}],
    }
    return [
        made("ResourceFlavor", {"nodeLabels": node_labels(flags)}),
        made("ClusterQueue", {"namespaceSelector": {}, "resourceGroups": [group]}),
        made("LocalQueue", {"clusterQueue": flags.queue}, namespace=flags.namespace),
    ]


def main(words: Sequence[str]) -> int:
    flags = flags_of(words)
    named = {rows.name_of(flags, row, longest=40): row for row in rows.missing(flags)}
    fields = '{range .items[*]}{.metadata.name} {.status.terminalState}{"\\n"}{end}'
    ask = ["kubectl", "get", "jobsets", f"--namespace={flags.namespace}"]
    ask += [f"--output=jsonpath={fields}"]
    there = dict(rows.pairs(rows.told(ask, flags.dry_run)))
    named = rows.left(named, there, over=("Completed", "Failed"))
    rows.say_and_check([*named.values()])
    starts = []
    if flags.quota:
        path = f"{flags.name}-queue.yaml"
        files = {path: rows.as_yaml(*queue(flags))}
        apply = ["kubectl", "apply", f"--filename={rows.FILES / path}"]
        starts.append(rows.Start(command=apply, files=files))
    if again := [name for name in named if name in there]:
        delete = ["kubectl", "delete", "jobset", f"--namespace={flags.namespace}"]
        starts.append(rows.Start(command=[*delete, *again]))
    files = {
        f"{name}.yaml": rows.as_yaml(jobset(flags, name, row))
        for name, row in named.items()
    }
    create = ["kubectl", "create", *(f"--filename={rows.FILES / f}" for f in files)]
    starts.append(rows.Start(command=create, files=files))
    return rows.start(starts, flags.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
