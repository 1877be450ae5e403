"""What launchers write, read by the services' own packages; no service is asked."""

import functools
import json
import os
import subprocess
import sys

import launch_programs
import pytest
import yaml
from launch_programs import AWKWARD, FLAGS, STUDY, expanded, of_row
from slurm_here import wait_for

pytestmark = pytest.mark.slow
rows = launch_programs.load("rows")


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """package("name==version"): a folder with it and what it needs, from pip.

    They are not installed beside the library: they ask for other versions of its
    packages.
    """

    @functools.cache
    def get(name):
        folder = tmp_path_factory.mktemp("package")
        pip = [sys.executable, "-m", "pip", "install", "-q", f"--target={folder}"]
        done = subprocess.run(
            [*pip, name], capture_output=True, text=True, timeout=1200
        )
        if done.returncode:
            pytest.skip(f"{name} cannot be had: {done.stderr.strip()[-200:]}")
        return folder

    return get


def run_with(folder, *words, stdin="", cwd=None):
    """Runs Python with the packages of a folder and a home of its own."""
    variables = {
        "PYTHONPATH": str(folder),
        "HOME": str(cwd or folder),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG")}
    return subprocess.run(
        [sys.executable, *words],
        input=stdin,
        cwd=cwd,
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def dry_run(name, *more, capsys, monkeypatch):
    monkeypatch.setattr(rows, "listed", lambda flags: [5])
    monkeypatch.setattr(rows.shutil, "which", lambda name: None)
    module = launch_programs.load(name)
    assert module.main([*STUDY, *FLAGS[name], *AWKWARD, *more, "--dry-run"]) == 0
    return capsys.readouterr().out


def file_of(text, name):
    """A file that the shell script of a dry run writes."""
    return text.split(f"cat >launched/{name} <<'END'\n")[1].split("\nEND\n")[0]


# Kubernetes: the job in the JobSet, with every field of it

VALIDATE = """\
import json, sys, kubernetes_validate
try:
    kubernetes_validate.validate(json.load(sys.stdin), "1.37", strict=True)
except kubernetes_validate.ValidationError as e:
    sys.exit(f"{'.'.join(map(str, e.path))}: {e.message}")
"""
GPUS = ("--gpu=nvidia-h100-80gb", "--nodes=2", "--service_account=a", "--name=iso")


@pytest.mark.parametrize("kind", ["tpus", "gpus"])
def test_kubernetes_knows_the_job_of_a_jobset(kind, package, capsys, monkeypatch):
    folder = package("kubernetes-validate==1.37.0")
    if kind == "gpus":
        flags = ("--image=i", "--pvc=studies:/data", *GPUS)
        monkeypatch.setitem(FLAGS, "gke", flags)
    text = dry_run("gke", capsys=capsys, monkeypatch=monkeypatch)
    jobset = yaml.safe_load(file_of(text, "iso-5.yaml"))
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": jobset["metadata"],
        **replicated["template"],
    }
    done = run_with(folder, "-c", VALIDATE, stdin=json.dumps(job))
    assert done.returncode == 0, done.stderr
    pod = job["spec"]["template"]["spec"]
    for broken, said in (
        ({"restartPolicies": "Never"}, "restartPolicies"),
        ({"hostNetwork": "yes"}, "'yes' is not of type"),
    ):
        job["spec"]["template"]["spec"] = pod | broken
        done = run_with(folder, "-c", VALIDATE, stdin=json.dumps(job))
        assert done.returncode == 1
        assert said in done.stderr


# xpk: the manifest of its own dry run


@pytest.mark.parametrize("device", ["v5litepod-16", "h100-mega-80gb-8"])
def test_the_manifest_that_xpk_makes(device, package, tmp_path, capsys, monkeypatch):
    """It starts again after 75 and 4, and the words come through its shell."""
    folder = package("xpk==1.16.0")
    gpus = device.startswith("h100")
    flags = [f"--device_type={device}", *(["--nodes=2"] if gpus else [])]
    text = dry_run("xpk", *flags, capsys=capsys, monkeypatch=monkeypatch)
    words = rows.shlex.split(text)
    assert words[0] == "xpk"
    words.remove("--storage=studies")  # it would ask the cluster which storages it has
    more = ("--dry-run", "--output-manifest-file=m.yaml")
    done = run_with(folder, "-m", "xpk.main", *words[1:], *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    jobset = yaml.safe_load((tmp_path / "m.yaml").read_text())
    assert jobset["metadata"]["name"] == "iso-5"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 100
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == (2 if gpus else 4)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "NotIn"
    again = set(rule["onExitCodes"]["values"])
    assert {rows.PREEMPTED, rows.LOST} < again
    assert not again & set(rows.HOPELESS)
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120
    (container,) = [
        c for c in pod["containers"] if c["name"] in ("jax-tpu", "gpu-image")
    ]
    assert container["image"] == "example/ldm:1"
    # Its shell script, with a python that prints its words and waits for SIGTERM.
    launch_programs.stub(tmp_path, "python", WAITS)
    script = expanded(container["command"][2])
    variables = {"JAX_COORDINATOR_ADDRESS": "there", "JAX_COORDINATOR_PORT": "6002"}
    variables |= {"NNODES": "2", "NODE_RANK": "1"}
    started = subprocess.Popen(
        ["bash", "-c", script.replace("/usr/share/workload/", f"{tmp_path}/")],
        cwd=tmp_path,
        env=os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    try:
        wait_for((tmp_path / "python.ready").exists, 30)
        started.terminate()
        assert started.wait(30) == rows.PREEMPTED
    finally:
        started.kill()
    words = launch_programs.words_of(tmp_path, "python")
    assert of_row(words, 5)
    if gpus:
        joins = ["--coordinator=there:6002", "--num_processes=2", "--process_id=1"]
        assert words[-3:] == joins


WAITS = """\
printf "%s\\0" "$@" >>"$0.words"
trap 'exit 75' TERM
touch "$0.ready"
while true; do sleep 0.2; done
"""


# SkyPilot: its schema, and its own reading of the task

READ = """\
import json, sys
import jsonschema, yaml
from sky.utils import schemas
task = yaml.safe_load(open("task.yaml"))
jsonschema.validate(task, schemas.get_task_schema())
resources = schemas.get_resources_schema()
for one in resources["properties"]["job_recovery"]["anyOf"]:
    if one["type"] == "object":
        one["additionalProperties"] = False  # as on the server
jsonschema.validate(task["resources"], resources)
import sky
read = sky.Task.from_yaml("task.yaml")
(resource,) = read.resources
print(json.dumps([read.run, read.num_nodes, resource.use_spot, resource.job_recovery]))
"""


def test_skypilot_reads_the_task(package, tmp_path, capsys, monkeypatch):
    folder = package("skypilot==0.14.1")
    text = dry_run("skypilot", capsys=capsys, monkeypatch=monkeypatch)
    task = file_of(text, "iso-5.yaml") + "\n"
    (tmp_path / "task.yaml").write_text(task)
    done = run_with(folder, "-c", READ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run, nodes, spot, recovery = json.loads(done.stdout.splitlines()[-1])
    assert run == yaml.safe_load(task)["run"]
    assert (nodes, spot) == (2, True)
    assert recovery["recover_on_exit_codes"] == [rows.PREEMPTED]
    wrong = task.replace("recover_on_exit_codes", "recover_on_codes")
    (tmp_path / "task.yaml").write_text(wrong)
    done = run_with(folder, "-c", READ, cwd=tmp_path)
    assert done.returncode == 1
    assert "recover_on_codes" in done.stderr
