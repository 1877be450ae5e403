"""Runs of the entry point that are killed, stopped, or have no room on the disk."""

import json
import random
import shutil
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import MainProcess

from scaling_ldm import records
from scaling_ldm.records import goodput
from scaling_ldm.workdir import exit_status

STEPS = 60
SMALL = (
    "--config=experiments/tiny.py",
    "--config.data.shape=(8, 8, 3)",
    "--config.data.text_tokens=4",
    "--config.plan.sizes=((16, 1),)",
    "--config.plan.budgets_flops=(2.189e8,)",
    "--config.plan.sizes_per_budget=1",
    "--config.train.checkpoints_per_run=6",
    "--config.train.log_every_steps=1",
    "--config.train.steps_per_dispatch=1",
    "--config.train.show_every_seconds=0.0",
    "--config.validation.samples=8",  # so that three marks fit in 2% of the run
    "--config.validation.batch_size=8",
    "--stages=plan,train",
)


def start(workdir, *more, first=""):
    return MainProcess(*SMALL, *more, f"--workdir={workdir}", first=first)


def end(process, expect=0):
    out = process.end(expect)
    assert "Traceback" not in out, out
    return out


def folder(workdir):
    (found,) = (workdir / "runs").iterdir()
    return found


def final(workdir):
    """The last checkpoint as orbax reads it, without our code: arrays and data."""
    path = folder(workdir) / "checkpoints" / str(STEPS)
    reader = ocp.PyTreeCheckpointer()
    meta = json.loads((path / "meta" / "metadata").read_text())
    return reader.restore(path / "state"), meta["progress"]["data"]


def losses(workdir):
    lines = (folder(workdir) / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines)]


def measured(workdir):
    """The run's measurements as they are in the file."""
    return (folder(workdir) / "measurements.jsonl").read_bytes()


def flat(tree, path=()):
    if not isinstance(tree, dict | list | tuple):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, t in items for k, v in flat(t, (*path, key)).items()}


def assert_identical(workdir, reference):
    (ours, data), (theirs, their_data) = final(workdir), final(reference)
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    assert {str(path[0]) for path in ours} >= {"params", "ema", "opt", "step"}
    for path in ours:
        if ours[path] is not None:
            np.testing.assert_array_equal(ours[path], theirs[path], err_msg=str(path))
    assert data == their_data
    assert losses(workdir) == losses(reference)
    assert [step for step, _ in losses(workdir)] == list(range(1, STEPS + 1))
    ours, theirs = (measured(w) for w in (workdir, reference))
    assert ours == theirs
    assert {json.loads(line)["step"] for line in ours.splitlines()} == {2, 6, 19, STEPS}
    records = [
        json.loads((folder(w) / "record.json").read_text())
        for w in (workdir, reference)
    ]
    assert records[0]["steps"] == records[1]["steps"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference") / "w"
    end(start(workdir))
    return workdir


@pytest.mark.slow  # tests/stages/test_train_marks.py stops a run at any moment by day
@pytest.mark.parametrize("kills", [1, 6])
def test_kill_at_random_moments(reference, tmp_path, kills):
    chance = random.Random(kills)
    killed = 0
    while killed < kills:
        saved = max(saved_steps(tmp_path / "w"), default=0)
        if saved > 54:  # the last process came far before it was gone
            break
        process = start(tmp_path / "w", "--config.train.checkpoints_per_run=30")
        # A random step of those that are left, and a moment within it or a save.
        last = min(saved + 8 + 50 // kills, 58)
        process.wait_for(f"  step {chance.randrange(saved + 2, last)}/")
        time.sleep(chance.random() * 0.05)
        process.kill()
        killed += 1
        assert process.popen.returncode == -signal.SIGKILL
        assert not (folder(tmp_path / "w") / "record.json").exists()
    assert killed >= min(kills, 2)
    out = end(start(tmp_path / "w", "--config.train.checkpoints_per_run=30"))
    assert "continues from step" in out
    assert_identical(tmp_path / "w", reference)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(reference, tmp_path):
    process = start(tmp_path / "w")
    process.wait_for("  step 13/")
    process.popen.terminate()
    out = end(process, exit_status.EXIT["preempted, run the same command again"])
    assert "is saved at step" in out
    step = int(out.split("is saved at step ")[1].split()[0])
    assert 13 < step < STEPS
    assert f"continues from step {step} of {STEPS}" in end(start(tmp_path / "w"))
    assert_identical(tmp_path / "w", reference)


def saved_steps(workdir):
    """The steps of the checkpoints that are complete."""
    found = workdir.glob("runs/*/checkpoints/*/commit_success.txt")
    return {int(path.parent.name) for path in found if path.parent.name.isdigit()}


@pytest.mark.slow  # by day: tests/stages/test_train.py, within one process
def test_sigusr1_saves_and_goes_on_and_sigusr2_saves_and_ends(reference, tmp_path):
    workdir = tmp_path / "w"
    process = start(workdir)
    process.wait_for("  step 13/")
    process.popen.send_signal(signal.SIGUSR1)
    process.wait_for("and goes on")
    process.popen.send_signal(signal.SIGUSR2)
    out = end(process, exit_status.EXIT["preempted, run the same command again"])
    first, last = (int(x.split()[0]) for x in out.split("is saved at step ")[1:])
    assert 13 < first < last < STEPS
    assert last in saved_steps(workdir)
    # A checkpoint at a signal is kept until the run is saved at its next tenth step.
    replaced = any(first < step <= last for step in range(10, STEPS, 10))
    assert (first in saved_steps(workdir)) != replaced

    process = start(workdir)
    process.wait_for(f"continues from step {last} of {STEPS}")
    process.wait_for("  step ")
    process.popen.send_signal(signal.SIGUSR1)
    assert "is saved at step" in end(process)
    assert saved_steps(workdir) == {50, 60}
    assert_identical(workdir, reference)


@pytest.mark.slow
def test_signals_can_be_given_other_meanings(tmp_path):
    process = start(
        tmp_path / "w",
        "--config.train.save_signals=()",
        "--config.train.stop_signals=('SIGUSR1',)",
    )
    process.wait_for("  step 13/")
    process.popen.send_signal(signal.SIGUSR1)
    end(process, exit_status.EXIT["preempted, run the same command again"])


@pytest.mark.slow
def test_a_kill_costs_no_more_than_the_minutes_between_checkpoints(reference, tmp_path):
    """The run has one mark, its end; the clock saves every 30 ms."""
    workdir = tmp_path / "w"
    rarely = "--config.train.checkpoints_per_run=1"
    process = start(workdir, rarely, "--config.train.checkpoint_minutes=0.0005")
    process.wait_for("  step 14/")  # so step 13 is in the log
    while not saved_steps(workdir):
        assert process.popen.poll() is None
        time.sleep(0.001)
    process.kill()
    (*_, last) = sorted(saved_steps(workdir))
    assert last < STEPS
    out = end(start(workdir, rarely, "--config.train.checkpoint_minutes=0"))
    assert f"continues from step {last} of {STEPS}" in out
    assert_identical(workdir, reference)
    killed, after = records.read_jsonl(folder(workdir) / "attempts.jsonl")
    assert (killed.ended, after.ended) == ("", "finished")
    assert (after.first_step, after.last_step) == (last, STEPS)
    assert killed.last_step >= 13  # as logged
    found = goodput.of_run([killed, after])
    assert found.lost_steps == max(killed.last_step - last, 0)
    assert found.seconds["INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"] > 0


@pytest.mark.slow
def test_no_room_on_disk_loses_nothing(reference, tmp_path):
    """There is room for a few checkpoints, then for no large file, then for all."""
    workdir = tmp_path / "w"
    process = start(workdir)
    process.wait_for("  step 25/")
    process.kill()
    saved = {p for p in (folder(workdir) / "checkpoints").iterdir() if p.name.isdigit()}
    assert saved

    no_large_files = "ulimit -f 20; trap '' XFSZ;"  # KiB; EFBIG, not a signal
    out = end(start(workdir, first=no_large_files), exit_status.EXIT["storage"])
    assert "MiB free there" in out or "File too large" in out
    assert "run the same command" in out
    for path in saved:
        assert (path / "commit_success.txt").exists()
    end(start(workdir))
    assert_identical(workdir, reference)


@pytest.mark.slow
def test_refusals_come_as_one_message(reference, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("all I have")
    (tmp_path / "file").write_text("a file in the place of a folder")
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    seed = "--config.train.seed=1"
    bad = exit_status.EXIT["bad configuration"]
    cases = [
        (start(occupied), bad, "is not empty and holds no experiment.json"),
        (start(tmp_path / "file"), exit_status.EXIT["storage"], "Not a directory"),
        (start(other, seed), bad, "holds another experiment"),
    ]
    for process, code, text in cases:
        out = end(process, code)
        assert text in out
        assert out.count("error:") == 1
    assert (occupied / "thesis.tex").read_text() == "all I have"
    assert [p.name for p in occupied.iterdir()] == ["thesis.tex"]
    assert_identical(other, reference)
