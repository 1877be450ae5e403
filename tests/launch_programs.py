"""The programs of launch/, in the process of a test, and stand-ins for schedulers."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

from processes import ROOT

PROGRAMS = ("local", "slurm", "gke", "xpk", "tpu_vm", "skypilot")
STUDY = ("--config", "experiments/tiny.py", "--workdir", "runs/iso")
INDEX = "$(JOB_COMPLETION_INDEX)"
# Values that a shell would change if they were not quoted.
AWKWARD = (
    '--config.plan.axes=(("optimizer.learning_rate", (1e-3, 3e-4)),)',
    '--config.question=it\'s "one" of $HOME, `id`, $$, $(JOB_COMPLETION_INDEX), {no}',
    "--config.generate.captions=('a cat', )",
)
# What each needs beside --config and --workdir.
FLAGS = {
    "local": ("--at_once=2",),
    "slurm": ("--nodes=2", "--at_once=4", "--also=--gpus-per-node=8"),
    "gke": (
        *("--image=example/ldm:1", "--pvc=studies:/data", "--workdir_there=/data/iso"),
        *("--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--queue=tpus"),
        *("--quota=32", "--spot"),
        "--name=iso",
    ),
    "xpk": (
        *("--cluster=c", "--project=p", "--zone=us-central2-b"),
        *("--device_type=v5litepod-16", "--docker_image=example/ldm:1"),
        *("--workdir_there=/data/iso", "--also=--storage=studies"),
        "--name=iso",
    ),
    "tpu_vm": (
        *("--zone=us-central2-b", "--accelerator=v5litepod-16", "--spot"),
        *("--runtime=v2-alpha-tpuv5-lite", "--workdir_there=/data/iso"),
        "--setup=mount /data && cd /data/code",
        "--name=iso",
    ),
    "skypilot": (
        *("--accelerators=H100:8", "--nodes=2", "--spot", "--volume=/data=studies"),
        *("--setup=pip install -e .", "--workdir_there=/data/iso"),
        "--name=iso",
    ),
}


def load(name):
    """A module of launch/, as its programs import one another."""
    folder = str(ROOT / "launch")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def stub(folder, name, body):
    """A program on a PATH of its own."""
    path = pathlib.Path(folder) / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def records_its_words(folder, name, more=""):
    """A program that adds its words to a file, one call after the other."""
    stub(folder, name, f'printf "%s\\0" "$@" >>"{folder}/{name}.words"\n{more}')


def words_of(folder, name):
    """The words of all calls of `records_its_words`."""
    path = pathlib.Path(folder) / f"{name}.words"
    return path.read_text().split("\0")[:-1] if path.exists() else []


def bash(text, folder, cwd, **variables):
    """Runs shell commands with the programs of a folder first; returns its process."""
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", text],
        cwd=cwd,
        env=os.environ | {"PATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def of_row(words, row, workdir="/data/iso"):
    """Whether words are those of the entry point for a row, in a given order."""
    train = ["--workdir", workdir, *AWKWARD, "--stages", "train", "--run", str(row)]
    expected = ["-m", "scaling_ldm.main", "--config", "experiments/tiny.py", *train]
    start = words.index("-m")
    return words[start : start + len(expected)] == expected


def expanded(word):
    """A word of a container's command, as Kubernetes hands it on.

    $$ is $, and $(NAME) is the value of a variable of the container, if it has one.
    """

    def value(found):
        return "$" if found[0] == "$$" else {INDEX: "1"}.get(found[0], found[0])

    return re.sub(r"\$\$|\$\(\w+\)", value, word)
