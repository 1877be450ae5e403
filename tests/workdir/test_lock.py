"""Locks: who holds one, when it is taken over, and two commands in one place."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
from processes import MainProcess

from scaling_ldm import records
from scaling_ldm.records.errors import ConfigError, Held
from scaling_ldm.training import progress
from scaling_ldm.workdir import exit_status, lock

OLD = 2 * lock.STALE


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w" / lock.NAME


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    return said


@pytest.fixture
def other():
    """A process of this machine that is not this one."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def write(path):
    """write(age, field=...): the lock of a holder, renewed `age` seconds ago."""

    def go(age=0.0, **changes):
        held = dataclasses.replace(lock._this_process(), **changes)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(held)))
        renew(path, age)

    return go


def renew(path, age=0.0):
    os.utime(path, (time.time() - age,) * 2)


def elsewhere(**changes):
    return {"place": "another machine", "host": "node7", "pid": 4711} | changes


def test_a_lock_names_its_holder_and_goes_with_it(path, lines):
    with pytest.raises(RuntimeError), lock.holding([path]):
        held = json.loads(path.read_text())
        assert held["host"] == socket.gethostname()
        assert held["pid"] == os.getpid()
        assert time.strptime(held["since"], "%Y-%m-%d %H:%M:%S %z")
        assert pathlib.Path(sys.argv[0]).name in held["command"]
        raise RuntimeError
    assert not path.parent.exists()  # which it had created
    path.parent.mkdir()
    (path.parent / "runs.jsonl").touch()
    with lock.holding([path]):
        pass
    assert [p.name for p in path.parent.iterdir()] == ["runs.jsonl"]
    assert lines == []


def test_the_holder_that_lives_here_is_named(path, write, other):
    start = lock._start(other.pid)
    write(OLD, pid=other.pid, start=start, since="2026-01-02 03:04", command="train x")
    with pytest.raises(Held) as refused, lock.holding([path]):
        pytest.fail("not refused")
    assert str(refused.value).startswith(
        f"{path.parent} is in use by process {other.pid} on {socket.gethostname()} "
        "since 2026-01-02 03:04 (`train x`)."
    )
    assert f"It ends with `kill {other.pid}`" in str(refused.value)
    assert isinstance(refused.value, ConfigError)  # the exit status
    assert json.loads(path.read_text())["pid"] == other.pid


def test_one_process_holds_a_lock_once(path):
    with lock.holding([path]):
        with pytest.raises(Held, match=f"process {os.getpid()}"):
            with lock.holding([path]):
                pytest.fail("not refused")
        assert path.exists()


@pytest.mark.parametrize("gone", ["killed", "not collected", "another start", "this"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(
    path, write, other, lines, gone
):
    start = lock._start(other.pid)
    if gone in ("killed", "not collected"):
        other.kill()
    if gone == "killed":
        other.wait()
    if gone == "not collected":  # no wait(): it stays in the table of processes
        while "ended" != lock._start(other.pid):
            time.sleep(0.01)
    if gone == "another start":  # its number was given to another process
        start = str(int(start) - 1)
    pid = os.getpid() if gone == "this" else other.pid
    write(0.0, pid=pid, start=start)
    with lock.holding([path]):
        held = json.loads(path.read_text())
        assert (held["pid"], held["start"]) == (os.getpid(), lock._start(os.getpid()))
        assert [p.name for p in path.parent.iterdir()] == [lock.NAME]
    assert len(lines) == 1
    assert f"in use by process {pid} on" in lines[0]
    assert lines[0].endswith("which is gone: this process takes over")


def test_without_proc_a_process_lives_if_its_number_does(
    path, write, other, lines, monkeypatch
):
    monkeypatch.setattr(lock, "_start", lambda pid: "")
    write(OLD, pid=other.pid, start="")
    with pytest.raises(Held), lock.holding([path]):
        pytest.fail("not refused")
    other.kill()
    other.wait()
    with lock.holding([path]):
        assert len(lines) == 1


@pytest.mark.parametrize("text", [None, "", '{"host": "no'])
def test_a_holder_elsewhere_counts_as_gone_without_signs_of_life(
    path, write, lines, text
):
    write(**elsewhere())
    if text is not None:  # of a process that died while it wrote
        path.write_text(text)
    renew(path, lock.STALE + 5)
    with lock.holding([path]):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    who = "process 4711 on node7" if text is None else "has not said which one it is"
    assert who in lines[0] and "takes over" in lines[0]


@pytest.mark.parametrize("ends", ["lives", "dies", "releases"])
def test_a_holder_elsewhere_is_watched_until_it_is_known(
    path, write, lines, monkeypatch, ends
):
    """One look shows no more than the age of the last sign of life."""
    write(lock.STALE - 30, **elsewhere())
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            if ends == "releases":
                path.unlink()
            else:
                renew(path, 0.0 if ends == "lives" else lock.STALE + 1)

    monkeypatch.setattr(lock, "_pause", pause)
    if ends == "lives":
        with pytest.raises(Held) as refused, lock.holding([path]):
            pytest.fail("not refused")
        said = str(refused.value)
        assert "process 4711 on node7" in said and "is on another machine" in said
        assert "after 3 minutes without one this command takes over" in said
        assert f"remove {path}" in said
    else:
        with lock.holding([path]):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    assert pauses == [lock.POLL] * 3
    assert lines[0].startswith("waiting to see whether process 4711 on node7 since")
    assert "heartbeat is 150 s old" in lines[0]
    assert len(lines) == (2 if ends == "dies" else 1)  # it takes over


def test_a_clock_that_is_set_back_keeps_no_dead_holder(path, write, lines, monkeypatch):
    """Its last sign of life lies in the future for an hour."""
    write(-3600.0, **elsewhere())
    steady = [0.0]
    clock = types.SimpleNamespace(**vars(time) | {"monotonic": lambda: steady[0]})
    monkeypatch.setattr(lock, "time", clock)

    def pause(_):
        assert steady[0] <= lock.STALE, "it waits on"
        steady[0] += 60.0

    monkeypatch.setattr(lock, "_pause", pause)
    with lock.holding([path]):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert lock.STALE < steady[0] <= lock.STALE + 60.0


def test_the_clocks_of_two_machines_need_not_agree(path, write, lines, monkeypatch):
    """The age of a lock is by the clock of the file system alone."""
    write(**elsewhere())
    now = time.time()
    monkeypatch.setattr(lock.time, "time", lambda: now + 10 * lock.STALE)
    monkeypatch.setattr(lock, "_pause", lambda _: os.utime(path, (now, now)))
    with pytest.raises(Held), lock.holding([path]):
        pytest.fail("not refused")


def test_of_two_that_take_over_one_does(path, write, lines, monkeypatch):
    """The other one has renewed the lock since it was looked at, or is renewing it."""
    write(OLD, **elsewhere())
    mine = lock.Lock(path)
    found = mine._read()
    write(OLD, **elsewhere(pid=5))
    assert not mine._replace(found)
    assert json.loads(path.read_text())["pid"] == 5
    guard = path.with_name(f".{lock.NAME}.taken-over")
    guard.touch()
    assert not mine._replace(mine._read())
    assert "is being taken over" in mine.take()
    renew(guard, OLD)  # of a process that died at that
    mine.take()
    assert mine.take() == ""
    assert not guard.exists()
    mine.release()
    assert not path.exists()


def test_a_holder_shows_that_it_lives(path, monkeypatch):
    with lock.holding([path]):
        (mine,) = lock._held.values()
        renew(path, 100)
        mine.beat()
        assert time.time() - path.stat().st_mtime < 50
        path.unlink()  # by hand; nobody has taken it
        mine.beat()
        assert json.loads(path.read_text())["pid"] == os.getpid()
    mine.beat()
    assert not path.exists()


def test_the_thread_beats(path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    monkeypatch.setattr(lock, "_beating", None)  # another test's sleeps longer
    with lock.holding([path]):
        renew(path, 100)
        limit = time.monotonic() + 20
        while time.time() - path.stat().st_mtime > 50:
            assert time.monotonic() < limit
            time.sleep(0.01)


def test_who_has_lost_its_lock_is_told_and_leaves_the_others(path, write, monkeypatch):
    told = []
    monkeypatch.setattr(lock, "_when_lost", told.append)
    with lock.holding([path]):
        (mine,) = lock._held.values()
        write(**elsewhere())
        mine.beat()
        assert len(told) == 1 and "was taken over by process 4711 on node7" in told[0]
    assert json.loads(path.read_text())["pid"] == 4711


def test_all_locks_or_none(tmp_path, write, path, other):
    write(pid=other.pid, start=lock._start(other.pid))
    free = tmp_path / "free" / lock.NAME
    with pytest.raises(Held), lock.holding([free, path]):
        pytest.fail("not refused")
    assert not free.exists() and path.exists()


def test_waiting_ends_with_the_holder_and_is_said_once(
    path, write, other, lines, monkeypatch
):
    write(pid=other.pid, start=lock._start(other.pid))
    pauses = []

    def pause(_):
        pauses.append(1)
        if len(pauses) == 4:
            path.unlink()

    monkeypatch.setattr(lock, "_pause", pause)
    with lock.holding([path], wait=True):
        assert len(pauses) == 4
    assert len(lines) == 1 and lines[0].startswith(f"waiting: {path.parent} is in use")


def test_process_0_holds_the_lock_of_a_job(path, write, other):
    votes = []

    def any_process(mine):
        votes.append(mine)
        return mine

    with lock.holding([path], primary=False, any_process=any_process):
        assert not path.exists()
    assert votes == [False, False]
    with pytest.raises(ConfigError, match="process 0 refused"):
        with lock.holding([path], primary=False, any_process=lambda _: True):
            pytest.fail("not refused")


SMALL = (
    "--config=experiments/tiny.py",
    "--config.data.shape=(8, 8, 3)",
    "--config.data.text_tokens=4",
    "--config.plan.sizes=((16, 1),)",
    "--config.plan.budgets_flops=(2.189e8, 4.378e8)",
    "--config.plan.sizes_per_budget=1",
    "--config.train.log_every_steps=1",
    "--config.train.steps_per_dispatch=1",
    "--config.train.show_every_seconds=0.0",
)


def check_run(workdir, number):
    """A run is whole: one writer wrote every step once."""
    spec = records.read_jsonl(workdir / "runs.jsonl")[number]
    folder = workdir / "runs" / spec.run_id
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, spec.steps + 1))
    assert records.loads((folder / "record.json").read_text()).status == "finished"
    assert not list(workdir.rglob(lock.NAME))


@pytest.mark.slow  # by day: the tests of the lock itself, above
def test_a_second_command_in_one_place_is_refused(tmp_path):
    """Of the study and of its rows; a report may be written beside it."""
    workdir = tmp_path / "w"
    arguments = (*SMALL, f"--workdir={workdir}", "--stages=plan,train")
    first = MainProcess(*arguments)
    try:
        first.wait_for("  step 3/")
        first.popen.send_signal(signal.SIGSTOP)  # it holds, however long this takes
        bad = exit_status.EXIT["bad configuration"]
        for more, place in (
            ((), workdir),
            (("--run=0",), workdir / "runs" / "2.189e08-16x1"),
        ):
            said = MainProcess(*arguments, *more).end(bad)
            assert f"error: {place} is in use by process {first.popen.pid} on" in said
            assert f"since {time.strftime('%Y-')}" in said
            assert "--stages=plan,train`" in said
        assert "Traceback" not in said
        first.popen.send_signal(signal.SIGCONT)
        first.end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            first.popen.send_signal(signal.SIGCONT)
        first.kill()
    check_run(workdir, 0)
    check_run(workdir, 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_stopped_command_leaves_is_free(tmp_path, how):
    arguments = (*SMALL, f"--workdir={tmp_path / 'w'}", "--stages=plan,train")
    first = MainProcess(*arguments)
    first.wait_for("  step 3/")
    left = list((tmp_path / "w").rglob(lock.NAME))
    assert len(left) == 3  # of the study and of both runs
    first.popen.send_signal(how)
    if how == signal.SIGTERM:
        first.end(exit_status.EXIT["preempted, run the same command again"])
    else:
        first.kill()
    assert [path.exists() for path in left] == [how == signal.SIGKILL] * 3
    said = MainProcess(*arguments).end()
    assert ("takes over" in said) == (how == signal.SIGKILL)
    check_run(tmp_path / "w", 1)


@pytest.mark.slow
def test_rows_side_by_side(tmp_path):
    """Both plan, into a workdir that is not there yet; neither disturbs the other."""
    workdir = tmp_path / "w"
    rows = [
        MainProcess(*SMALL, f"--workdir={workdir}", f"--run={row}") for row in (0, 1)
    ]
    said = [row.end() for row in rows]
    assert not [text for text in said if "Traceback" in text]
    for number in (0, 1):
        check_run(workdir, number)
    assert len(records.read_jsonl(workdir / "runs.jsonl")) == 2
