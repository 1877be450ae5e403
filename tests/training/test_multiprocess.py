"""Jobs of two processes with two simulated devices each, against one with four."""

import ast
import dataclasses
import json
import shutil
import signal
import time

import networks
import numpy as np
import pytest
from processes import ROOT, MainProcess, start_job

from scaling_ldm import config, records, study
from scaling_ldm.records import table
from scaling_ldm.workdir import exit_status, lock

STEPS, DEVICES = 24, 4
SMALL = (
    "--config=experiments/tiny.py",
    "--config.data.shape=(8, 8, 3)",
    "--config.data.text_tokens=4",
    "--config.plan.sizes=((16, 1),)",
    f"--config.plan.budgets_flops=({STEPS * 3648512.0},)",
    "--config.plan.sizes_per_budget=1",
    "--config.plan.minimum_steps=10",
    "--config.train.checkpoints_per_run=4",
    "--config.train.log_every_steps=1",
    "--config.train.steps_per_dispatch=1",
    "--config.train.show_every_seconds=0.0",
    "--config.validation.samples=8",  # so that a mark takes 1.4% of the run
    "--config.validation.batch_size=8",
    "--config.mesh.heartbeat_seconds=10",
    "--stages=plan,train",
)


# A run that does not end before it is disturbed.
LONG = f"--config.plan.budgets_flops=({5000 * 3648512.0},)"


@pytest.fixture(scope="module")
def start():
    """start(workdir, processes, *flags): the processes of one job."""
    started = []

    def go(workdir, processes, *more, devices=DEVICES, hang=None):
        flags = [*SMALL, *more, f"--workdir={workdir}"]
        flags.append(f"--config.mesh.cpu_devices={devices // processes}")
        job = (
            [MainProcess(*flags)]
            if processes == 1
            else start_job(processes, *flags, hang=hang)
        )
        started.extend(job)
        return job

    yield go
    for process in started:
        process.popen.kill()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The workdir of one process with all devices, which is this process."""
    workdir = tmp_path_factory.mktemp("one") / "w"
    c = config.load(ROOT / "experiments" / "tiny.py")
    c.mesh.cpu_devices = DEVICES
    for flag in SMALL:
        if flag.startswith("--config."):
            name, value = flag.removeprefix("--config.").split("=")
            c.update_from_flattened_dict({name: ast.literal_eval(value)})
    stages, cluster = ("plan", "train"), (None, None, None)
    code = study.run(c, workdir=str(workdir), stages=stages, only=None, cluster=cluster)
    assert code == exit_status.EXIT["done"]
    return workdir


def results(workdir):
    """The log of every step and the record."""
    (folder,) = (workdir / "runs").iterdir()
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "record.json").read_text())


def written(workdir):
    """The lines of the run's measurements."""
    (path,) = workdir.glob("runs/*/measurements.jsonl")
    return path.read_text().splitlines()


def last_losses(workdir, *weights):
    """The held-out losses at the end, of these weights."""
    found = {
        (r.step, r.metric, r.weights): r.value for r in records.read_table(workdir)
    }
    return [found[STEPS, "loss", each] for each in weights]


def saved_steps(folder):
    """The steps of a run's complete checkpoints."""
    found = (folder / "checkpoints").iterdir()
    return [int(path.name) for path in found if path.name.isdigit()]


def assert_same(workdir, one, restarts, devices=DEVICES):
    rows, record = results(workdir)
    expected_rows, _ = results(one)
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))  # one writer
    for a, b in zip(rows, expected_rows, strict=True):
        assert a["loss"] == pytest.approx(
            b["loss"], rel=1e-6 if a["step"] < 9 else 1e-5
        )
    assert (record["devices"], record["restarts"]) == (devices, restarts)
    assert len(list(workdir.glob("*.jsonl"))) == 1
    ours, theirs = (records.read_table(w) for w in (workdir, one))
    assert [table.key(r) for r in ours] == [table.key(r) for r in theirs]
    assert {r.step for r in ours} == {2, STEPS}
    assert len(written(workdir)) == len(written(one)) == len(ours)  # one writer
    for a, b in zip(ours, theirs, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-5)


def test_two_processes_train_as_one(start, one, tmp_path):
    job = start(tmp_path / "w", 2)
    out = [process.end() for process in job]
    assert "trained: 1 of 1 runs finished" in out[0]
    assert "run 1 of 1" not in out[1]
    assert_same(tmp_path / "w", one, restarts=0)
    assert not list((tmp_path / "w").rglob(lock.NAME))


@pytest.mark.slow
def test_stopped_killed_and_continued_as_one_process(start, one, tmp_path):
    """SIGTERM to one stops both; killing one ends the other; then the run finishes.

    Before that, the clock of process 0 and a signal to process 1 save both.
    """
    workdir = tmp_path / "w"
    job = start(workdir, 2, "--config.train.checkpoint_minutes=1e-6")
    job[0].wait_for("  step 3/")
    assert len(list(workdir.rglob(lock.NAME))) == 2  # of the job and of its run
    while not list(workdir.glob("runs/*/checkpoints/[1-5]")):  # the first mark is 6
        assert job[0].popen.poll() is None
    job[1].popen.send_signal(signal.SIGUSR1)
    job[0].wait_for("and goes on")
    job[1].popen.send_signal(signal.SIGTERM)  # to the one that writes nothing
    code = exit_status.EXIT["preempted, run the same command again"]
    out = [process.end(code) for process in job]
    stopped = int(out[0].split("is saved at step ")[2].split()[0])
    (folder,) = (workdir / "runs").iterdir()
    assert max(saved_steps(folder)) == stopped < STEPS
    assert "is saved" not in out[1]  # told once
    assert not list(workdir.rglob(lock.NAME))

    job = start(workdir, 2)
    job[0].wait_for(f"continues from step {stopped} of {STEPS}")
    job[0].wait_for(f"  step {max(stopped + 2, 13)}/")
    while max(saved_steps(folder)) == stopped:  # what this job saves is complete
        assert job[0].popen.poll() is None
    job[1].popen.kill()
    began = time.monotonic()
    out = job[0].end(exit_status.EXIT["lost a process"], timeout=60)
    assert time.monotonic() - began < 20
    assert_one_line(out)
    assert not list(workdir.rglob(lock.NAME))

    job = start(workdir, 2)
    out = [process.end() for process in job]
    assert "continues from step" in out[0]
    assert "trained: 1 of 1 runs finished" in out[0]
    assert "run 1 of 1" not in out[1]
    assert_same(workdir, one, restarts=2)


@pytest.mark.slow
def test_two_processes_start_from_a_run(start, one, tmp_path):
    """From its average, each with its part of it; the rate is too low to change it."""
    workdir = tmp_path / "w"
    (folder,) = (one / "runs").iterdir()
    flags = (
        f"--config.train.init_from={one}#{folder.name}",
        "--config.optimizer.learning_rate=1e-12",
        "--config.mesh.fsdp=2",
    )
    for process in start(workdir, 2, *flags):
        process.end()
    record, before = results(workdir)[1], results(one)[1]
    assert record["pretraining_flops"] == before["flops"]
    (loss,) = last_losses(one, "ema")
    assert last_losses(workdir, "raw", "ema") == pytest.approx([loss, loss], rel=1e-5)


@pytest.mark.slow
def test_the_coordinators_end_is_everybodys(start, tmp_path):
    job = start(tmp_path / "w", 2)
    job[0].wait_for("  step 3/")
    job[0].popen.kill()
    assert_one_line(job[1].end(exit_status.EXIT["lost a process"], timeout=60))


def assert_one_line(out):
    """The last line says that a process is lost, and nothing else does."""
    assert out.splitlines()[-1].startswith(f"stopped: {study.LOST}")
    assert out.count(study.LOST) == 1
    assert "Traceback" not in out
    assert "coordination_service" not in out and "stack trace" not in out


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_stands_still_is_lost(start, tmp_path, number):
    """SIGSTOP: it neither ends nor answers. When it goes on, it ends as well."""
    job = start(tmp_path / "w", 2, LONG)
    job[0].wait_for("  step 3/")
    began = time.monotonic()
    job[number].popen.send_signal(signal.SIGSTOP)
    out = job[1 - number].end(exit_status.EXIT["lost a process"], timeout=60)
    assert time.monotonic() - began < 20
    assert_one_line(out)
    whom = "process 1 on" if number else "process 0 has not answered for 10 s"
    assert whom in out
    job[number].popen.send_signal(signal.SIGCONT)
    job[number].end(exit_status.EXIT["lost a process"], timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_whose_network_is_gone_is_lost(tmp_path, number):
    """The cable of one of two hosts is pulled: no connection is closed."""
    with networks.two_hosts(tmp_path) as (hosts, why_not):
        if why_not:
            pytest.skip(why_not)
        job = [
            MainProcess(
                f"--coordinator={hosts.coordinator}",
                "--num_processes=2",
                f"--process_id={i}",
                *SMALL,
                LONG,
                f"--workdir={tmp_path / 'w'}",
                "--config.mesh.cpu_devices=2",
                program=program,
            )
            for i, program in enumerate(hosts.programs)
        ]
        try:
            job[0].wait_for("  step 3/")
            began = time.monotonic()
            hosts.pull(number)
            lost = exit_status.EXIT["lost a process"]
            out = [process.end(lost, timeout=60) for process in job]
            assert time.monotonic() - began < 25
        finally:
            for process in job:
                process.kill()
    for text in out:
        assert_one_line(text)
    assert "process 1 on" in out[0] and "process 0 has not answered for 10 s" in out[1]


@pytest.mark.slow
def test_a_process_that_hangs_by_itself_ends_the_job(start, tmp_path):
    """Its other threads live on, so it is seen by its steps, which do not end."""
    hang = tmp_path / "hang"
    flags = ("--config.mesh.stall_seconds=4", "--config.mesh.stall_limit_seconds=12")
    job = start(tmp_path / "w", 2, LONG, *flags, hang=(1, hang))
    job[0].wait_for("  step 3/")
    hang.touch()
    out = [
        process.end(exit_status.EXIT["lost a process"], timeout=90) for process in job
    ]
    for number, text in enumerate(out):
        assert f"process {number} of 2 on " in text and "stage train" in text
    assert "in hang_here" in out[1] and "in hang_here" not in out[0]
    assert any("made no progress for" in text for text in out)


@pytest.mark.slow
def test_the_run_goes_on_with_fewer_and_with_more_processes_and_devices(
    start, one, tmp_path
):
    """Two processes of two devices, one of two, two of four; as one of four."""
    workdir = tmp_path / "w"
    for processes, devices, step in ((2, 4, 5), (1, 2, 11)):
        job = start(workdir, processes, devices=devices)
        job[0].wait_for(f"  step {step}/")
        job[0].popen.send_signal(signal.SIGTERM)
        for process in job:
            process.end(exit_status.EXIT["preempted, run the same command again"])
    for process in start(workdir, 2, devices=8):
        process.end()
    assert_same(workdir, one, restarts=2, devices=8)
    (path,) = workdir.glob("runs/*/attempts.jsonl")
    lives = records.read_jsonl(path)
    assert [life.processes for life in lives] == [2, 1, 2]
    assert [life.devices for life in lives] == [4, 2, 8]
    assert [life.ended for life in lives] == ["stopped", "stopped", "finished"]
    assert len(lives[2].host_seconds) in (0, 2)  # 0: it took less than a beat


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_stop_of_one_ends_both_while_they_draw(start, one, tmp_path, number):
    """And the same command draws what is missing."""
    workdir = tmp_path / "w"
    shutil.copytree(one, workdir)
    flags = (
        "--config.generate.images=800",
        "--config.generate.batch_size=8",
        "--config.generate.steps=2",
        "--stages=generate",
    )
    job = start(workdir, 2, *flags)
    job[0].wait_for("generate  8 of 800")
    began = time.monotonic()
    job[number].popen.send_signal(signal.SIGTERM)
    code = exit_status.EXIT["preempted, run the same command again"]
    out = [process.end(code, timeout=60) for process in job]
    assert time.monotonic() - began < 20
    assert "stopped: SIGTERM" in out[0] and "in generate" in out[0]
    assert not any("Traceback" in text for text in out)
    assert not list(workdir.rglob(lock.NAME))
    assert 1 <= len(list(workdir.glob("samples/shards/*.npy"))) < 100
    for process in start(workdir, 2, *flags):
        process.end()
    assert len(list(workdir.glob("samples/shards/*.npy"))) == 100


@pytest.mark.slow
def test_two_processes_draw_and_measure_what_one_does(start, one, write_clip, tmp_path):
    """Pictures, CLIP's numbers and a frontier are equal to the last bit.

    Each of the four devices has the same rows, whichever process it belongs to.
    """
    weights = write_clip(tmp_path / "clip", 0)
    flags = (
        "--config.generate.images=10",
        "--config.generate.batch_size=8",
        "--config.generate.steps=2",
        "--config.evaluate.network=clip",
        f"--config.evaluate.weights={weights}",
        "--config.evaluate.metrics=('fd', 'kid', 'precision_recall', 'clip_score')",
        "--config.evaluate.reference_images=10",
        "--config.evaluate.batch_size=8",
        "--config.evaluate.bootstrap=4",
        "--config.frontier.images=8",
        "--config.frontier.samplers=('ddim',)",
        "--config.frontier.steps=(2,)",
        "--config.frontier.guidances=(2.0,)",
        "--stages=generate,evaluate,frontier",
    )
    found = {}
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        shutil.copytree(one, workdir)
        out = [job.end() for job in start(workdir, processes, *flags)]
        assert "fd_clip" in out[0]
        assert all("fd_clip" not in text for text in out[1:])  # told once
        found[processes] = workdir

    a, b = (
        {path.name: path.read_bytes() for path in workdir.glob("samples/shards/*.npy")}
        for workdir in found.values()
    )
    assert sorted(a) == ["00000.npy", "00001.npy"] and a == b
    assert np.load(found[2] / "samples" / "shards" / "00000.npy").std() > 1
    x, y = (records.read_evaluations(w) for w in found.values())
    assert [r.metric for r in x] == [
        "fd_clip",
        "kid_clip",
        "precision_clip",
        "recall_clip",
        "clip_score",
        "fd_clip_real",
        "fd_clip_noise",
    ]
    assert x == y
    x, y = (records.read_frontier(w) for w in found.values())
    (x,), (y,) = x.cells, y.cells
    assert dataclasses.replace(x, seconds=0.0) == dataclasses.replace(y, seconds=0.0)
    for workdir in found.values():
        assert not [p for p in workdir.rglob(".*") if p.is_file()]  # nothing half done
        assert len(list((workdir / "frontier" / "cells").iterdir())) == 1
        assert len(list((workdir / "evaluate").iterdir())) == 2
