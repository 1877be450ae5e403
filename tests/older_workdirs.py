"""Working directories as older releases left them, in tests/data/workdirs.

    python tests/older_workdirs.py            makes the folder of today's schema
    python tests/older_workdirs.py FOLDER     makes this one

A folder has
    study.py             the experiment file; the one of the release before, if none is
                         there yet
    workdir/             what the study left, without features and most checkpoints. One
                         run is not finished: it has a checkpoint and no record
    checkpoints.tar.gz   the checkpoints: of the unfinished run, and the one that
                         pictures are drawn with
    finished.json        the record of that run, as this release finishes it
    made.json            the unfinished run, and the processor

The compiler flags are those of the tests, so that a test comes to the same bits.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

from golden import study

from scaling_ldm import records

MADE = pathlib.Path(__file__).parent / "data" / "workdirs"
# As conftest.py sets them.
COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def unpack(example, workdir, finished):
    """Copies an example's directory; returns what its made.json says.

    Args:
      finished: whether the unfinished run gets its record.
    """
    shutil.copytree(example / "workdir", workdir)
    with tarfile.open(example / "checkpoints.tar.gz") as tar:
        tar.extractall(workdir, filter="data")
    made = json.loads((example / "made.json").read_text())
    if finished:
        target = workdir / "runs" / made["unfinished"] / "record.json"
        shutil.copy(example / "finished.json", target)
    return made


def make(example):
    """Runs the study of an example with the installed library, and stores it."""
    file = example / "study.py"
    if not file.exists():
        before = sorted(MADE.glob("*/study.py"), key=lambda p: version(p.parent.name))
        example.mkdir(parents=True)
        shutil.copy(before[-1], file)
    with tempfile.TemporaryDirectory() as scratch:
        workdir = pathlib.Path(scratch) / "older"
        command = ("-m", "scaling_ldm.main", f"--config={file.resolve()}")
        subprocess.run(
            [sys.executable, *command, f"--workdir={workdir}"],
            cwd=scratch,
            env=os.environ | {"XLA_FLAGS": COMPILED, "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        store(workdir, example)


def version(name):
    """ "0.1.0" -> (0, 1, 0), to sort by."""
    return tuple(map(int, name.split(".")))


def store(workdir, example):
    """Keeps what the tests read of a finished study."""
    lines = (workdir / "runs.jsonl").read_text().splitlines()
    specs = [json.loads(line) for line in lines]
    drawn = json.loads((workdir / "samples" / "record.json").read_text())["run_id"]
    # Of the largest budget, neither the best run nor the largest.
    unfinished = [s["run_id"] for s in specs if s["run_id"] != drawn][-3]
    folders = {
        run_id: sorted((workdir / "runs" / run_id / "checkpoints").iterdir(), key=step)
        for run_id in (drawn, unfinished)
    }
    kept = [folders[drawn][-1], folders[unfinished][0]]
    with tarfile.open(example / "checkpoints.tar.gz", "w:gz") as tar:
        for folder in kept:
            tar.add(folder, str(folder.relative_to(workdir)))
    shutil.copy(
        workdir / "runs" / unfinished / "record.json", example / "finished.json"
    )
    (workdir / "runs" / unfinished / "record.json").unlink()
    (workdir / "complete.json").unlink()
    for folder in (*workdir.glob("runs/*/checkpoints"), workdir / "report"):
        shutil.rmtree(folder)
    shutil.rmtree(workdir / "evaluate")
    (workdir / "samples" / "images.tar").unlink()
    shutil.rmtree(example / "workdir", ignore_errors=True)
    shutil.copytree(workdir, example / "workdir")
    made = {"unfinished": unfinished, "processor": study.processor()}
    (example / "made.json").write_text(json.dumps(made, indent=1) + "\n")


def step(folder):
    """The step of a checkpoint's folder."""
    return int(folder.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    folder = parser.parse_args().folder
    make(folder or MADE / records.SCHEMA)
