"""JobSets and Kueue's objects have only fields that their definitions have.

Their schemas are in no package. The fields here are those of jobset.x-k8s.io/v1alpha2
and kueue.x-k8s.io/v1beta2 as their repositories had them in 2026. Fields of Kubernetes
itself, below ..., are checked by test_services.py.
"""

import copy
import re

import launch_programs
import pytest
import yaml
from launch_programs import FLAGS, STUDY

NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
METADATA = {"name": NAME, "namespace": NAME, "labels": ..., "annotations": ...}
ACTIONS = (
    "FailJobSet|RestartJobSet|RestartJobSetAndIgnoreMaxRestarts|RestartJob|"
    "RestartJobAndIgnoreMaxRestarts"
)
RULE = {
    "name": r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?",
    "action": ACTIONS,
    "onJobFailureReasons": ["PodFailurePolicy|BackoffLimitExceeded|DeadlineExceeded"],
    "onJobFailureMessagePatterns": [str],
    "targetReplicatedJobs": [NAME],
}
KINDS = {
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): {
        "ttlSecondsAfterFinished": int,
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": "Recreate|BlockingRecreate|InPlaceRestart",
            "rules": [RULE],
        },
        "replicatedJobs": [
            {"name": NAME, "groupName": NAME, "replicas": int, "template": ...}
        ],
    },
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): {
        "nodeLabels": ...,
        "nodeTaints": ...,
        "tolerations": ...,
        "topologyName": NAME,
    },
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): {
        "cohortName": NAME,
        "namespaceSelector": ...,
        "queueingStrategy": "StrictFIFO|BestEffortFIFO",
        "resourceGroups": [
            {
                "coveredResources": [str],
                "flavors": [
                    {"name": NAME, "resources": [{"name": str, "nominalQuota": int}]}
                ],
            }
        ],
    },
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): {"clusterQueue": NAME},
}


def problems(found, known, where="spec"):
    """A line for each value that the definition does not have."""
    if known is ...:
        return []
    if isinstance(known, dict) and isinstance(found, dict):
        lines = [f"{where}.{key}: unknown" for key in found.keys() - known.keys()]
        for key in found.keys() & known.keys():
            lines += problems(found[key], known[key], f"{where}.{key}")
        return lines
    if isinstance(known, list) and isinstance(found, list):
        return [line for one in found for line in problems(one, known[0], where)]
    if isinstance(known, str) and isinstance(found, str):
        return [] if re.fullmatch(known, found) else [f"{where}: {found!r}"]
    fits = isinstance(known, type) and type(found) is known
    return [] if fits else [f"{where}: {found!r}"]


def problems_of(document):
    found = dict(document)
    key = found.pop("apiVersion"), found.pop("kind")
    lines = problems(found.pop("metadata"), METADATA, "metadata")
    lines += problems(found.pop("spec"), KINDS[key])
    return lines + [f"{name}: unknown" for name in found]


@pytest.fixture
def documents(capsys, monkeypatch):
    """Every document of a dry run for TPUs with a queue."""
    rows = launch_programs.load("rows")
    monkeypatch.setattr(rows, "listed", lambda flags: [5])
    monkeypatch.setattr(rows.shutil, "which", lambda name: None)
    assert launch_programs.load("gke").main([*STUDY, *FLAGS["gke"], "--dry-run"]) == 0
    files = re.findall(r"<<'END'\n(.*?)\nEND\n", capsys.readouterr().out, re.DOTALL)
    return [one for text in files for one in yaml.safe_load_all(text)]


def test_every_field_is_known(documents):
    kinds = {(one["apiVersion"], one["kind"]) for one in documents}
    assert kinds == {*KINDS}
    assert [problems_of(one) for one in documents] == [[]] * 4


def test_wrong_fields_would_be_found(documents):
    jobset = documents[-1]
    for path, value in (
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "failurePolicy", "rules", 0, "name"), "75"),
        (("spec", "ttlSecondsAfterFinished"), "1"),
        (("metadata", "name"), "iso_5"),
    ):
        wrong = copy.deepcopy(jobset)
        at = wrong
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        assert len(problems_of(wrong)) == 1, path


def test_queue_objects_name_one_another(documents):
    flavor, cluster_queue, queue, jobset = documents
    (group,) = cluster_queue["spec"]["resourceGroups"]
    (quota,) = group["flavors"]
    assert quota["name"] == flavor["metadata"]["name"]
    assert [one["name"] for one in quota["resources"]] == group["coveredResources"]
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    labels = jobset["metadata"]["labels"]
    assert labels == {"kueue.x-k8s.io/queue-name": queue["metadata"]["name"]}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == flavor["spec"]["nodeLabels"]
    (container,) = pod["containers"]
    assert [*container["resources"]["limits"]] == group["coveredResources"]


def follows(rule, reason, text):
    patterns = rule.get("onJobFailureMessagePatterns", [""])
    said = any(re.search(pattern, text) for pattern in patterns)
    return said and reason in rule["onJobFailureReasons"]


@pytest.mark.parametrize(
    ("message", "action"),
    [
        ("BackoffLimitExceeded: Job has reached the specified backoff limit", None),
        (
            "PodFailurePolicy: Container train for pod default/iso-5-workers-0-1-x "
            "failed with exit code 75 matching FailJob rule at index 0",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        (
            "PodFailurePolicy: Pod default/iso-5-workers-0-1-x has condition "
            "DisruptionTarget matching FailJob rule at index 2",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        (
            "PodFailurePolicy: Container train for pod default/iso-75-workers-0-1-x "
            "failed with exit code 2 matching FailJob rule at index 1",
            "FailJobSet",
        ),
    ],
)
def test_what_follows_from_the_messages_of_kubernetes(message, action, documents):
    """The first rule that matches counts; with none, a restart that is counted."""
    reason, _, text = message.partition(": ")
    rules = documents[-1]["spec"]["failurePolicy"]["rules"]
    found = [rule["action"] for rule in rules if follows(rule, reason, text)]
    assert (found or [None])[0] == action
