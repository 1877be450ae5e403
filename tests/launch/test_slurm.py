"""launch/slurm.py and slurm.sh on a real Slurm: what is queued, and goes on."""

import os
import pathlib
import subprocess
import sys

import pytest
import slurm_here
from processes import ROOT, run_main
from slurm_here import told, wait_for

from scaling_ldm import records
from scaling_ldm.workdir import runs

pytestmark = pytest.mark.slow
AWKWARD = '--config.question=it\'s a "test" of $HOME, `id` and $(id); echo {no}'
SMALL = (
    *("--config=experiments/tiny.py", "--config.data.shape=(8, 8, 3)"),
    *("--config.plan.sizes=((32, 1),)", "--config.plan.sizes_per_budget=1", AWKWARD),
)


@pytest.fixture(scope="module")
def slurm():
    if why := slurm_here.why_not():
        pytest.skip(why)
    with slurm_here.running() as shell:
        yield shell


def launch(slurm, workdir, *more):
    """Starts the launcher; returns what it says and where row K writes: {K: path}."""
    out = pathlib.Path(workdir).parent
    flags = [f"--workdir={workdir}", f"--also=--output={out}/%a.out"]
    done = subprocess.run(
        [sys.executable, "launch/slurm.py", *SMALL, *flags, *more],
        cwd=ROOT,
        # The task finds the Python of this test.
        env=os.environ
        | slurm
        | {"PATH": f"{pathlib.Path(sys.executable).parent}:{slurm['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def text_of(workdir, row):
    path = pathlib.Path(workdir).parent / f"{row}.out"
    return path.read_text() if path.exists() else ""


def test_missing_rows_are_trained_once(slurm, tmp_path):
    workdir = tmp_path / "w"
    run_main(*SMALL, f"--workdir={workdir}", "--stages=plan,encode")
    assert "3 rows to start: 0-2" in launch(slurm, workdir, "--rows=0,1,2")
    again = launch(slurm, workdir)
    assert "already started: 0-2" in again
    assert "Submitted" not in again
    wait_for(lambda: not told(slurm, "squeue", "-h"), 600)
    specs = records.read_plan(workdir)
    assert [runs.read_record_of(workdir, s).status for s in specs] == ["finished"] * 3
    assert "0 rows to start" in launch(slurm, workdir)
    held = records.read_experiment(workdir / "experiment.json")
    assert held["question"] == AWKWARD.partition("=")[2]


def test_the_tasks_of_a_row_are_one_job(slurm, tmp_path):
    """Two tasks find one another by Slurm's variables, as those of two nodes do."""
    workdir = tmp_path / "w"
    run_main(*SMALL, f"--workdir={workdir}", "--stages=plan,encode")
    two = ("--also=--ntasks-per-node=2", "--also=--overcommit")
    launch(slurm, workdir, "--rows=1", *two)
    wait_for(lambda: not told(slurm, "squeue", "-h"), 400)
    spec = records.read_plan(workdir)[1]
    record = runs.read_record_of(workdir, spec)
    assert record is not None, text_of(workdir, 1)
    assert record.devices == 2  # one of each process
    assert text_of(workdir, 1).count("trained: 1 of 3 runs finished") == 1


@pytest.mark.parametrize("by", ["preemption", "USR1", "TERM"])
def test_a_stopped_task_saves_and_is_queued_again(by, slurm, tmp_path):
    """By a job of higher priority, or by the signal before its time is over."""
    workdir = tmp_path / "w"
    long = "--config.plan.budgets_flops=(4e11,)"
    run_main(*SMALL, long, f"--workdir={workdir}", "--stages=plan,encode")
    more = ["--also=--open-mode=append", long]
    if by != "preemption":  # Slurm may send it a minute earlier
        more += [f"--signal={by}@30", "--also=--time=2"]
    launch(slurm, workdir, *more)
    wait_for(lambda: "loss" in text_of(workdir, 0), 240)
    if by == "preemption":
        told(slurm, "sbatch", "-p", "high", "-n2", "-o", "/dev/null", "--wrap=true")
    wait_for(lambda: "is saved at step" in text_of(workdir, 0), 150)
    shown = ("scontrol", "show", "job")
    wait_for(lambda: "Restarts=1" in told(slurm, *shown), 60)
    job = told(slurm, "squeue", "-h", "-r", "-n", "w", "-o", "%A")
    # It would wait for two minutes.
    wait_for(lambda: "PD" in told(slurm, "squeue", "-h", "-j", job, "-o", "%t"), 60)
    told(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")
    said = "continues from step"
    wait_for(lambda: "loss" in text_of(workdir, 0).partition(said)[2], 240)
    told(slurm, "scancel", job)
    wait_for(lambda: not told(slurm, "squeue", "-h"), 120)
    text = text_of(workdir, 0)
    assert text.count("is saved at step") == 2  # scancel saves, and queues nothing
    assert text.count(said) == 1
