"""Stages that read a finished study, stopped while they read."""

import errno
import os
import signal
import time

import older_workdirs
import pytest
from processes import MainProcess

from scaling_ldm import records
from scaling_ldm.workdir import exit_status

EXAMPLE = older_workdirs.MADE / records.FIRST
RUN = "1.600e09-16x1"
# What each reads while it is at work.
READS = {
    "fit": f"runs/{RUN}/record.json",
    "advise": "frontier.json",
    "export": f"runs/{RUN}/record.json",
}


def held_open(pipe, process):
    """A descriptor of a pipe that somebody reads; the reader waits for its bytes."""
    for _ in range(6000):
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as e:
            assert e.errno == errno.ENXIO and process.popen.poll() is None, (
                process.output
            )
            time.sleep(0.02)
    raise AssertionError(f"nobody reads {pipe}")


def content(workdir):
    """{name: bytes} of all files but the experiment's, which has another version."""
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.suffix == ".jsonl"
    }


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("advise", signal.SIGTERM),
        *(
            pytest.param(stage, number, marks=pytest.mark.slow)
            for stage in READS
            for number in (signal.SIGTERM, signal.SIGINT)
        ),
    ],
)
def test_a_stage_that_reads_is_stopped_with_one_line(stage, number, tmp_path):
    workdir = tmp_path / "w"
    older_workdirs.unpack(EXAMPLE, workdir, finished=True)
    flags = (
        f"--config={EXAMPLE / 'study.py'}",
        "--config.advise.budget=1.0",
        f"--config.generate.run={records.read(workdir / 'samples/record.json').run_id}",
        f"--workdir={workdir}",
        f"--stages={stage}",
    )
    before = content(workdir)
    file = workdir / READS[stage]
    data = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    process = MainProcess(*flags)
    pipe = held_open(file, process)
    process.popen.send_signal(number)
    began = time.monotonic()
    out = process.end(exit_status.EXIT["preempted, run the same command again"])
    assert time.monotonic() - began < 5
    os.close(pipe)
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped: {number.name} in {stage}; what is finished is")
    assert "Traceback" not in out and out.count("stopped") == 1
    file.unlink()
    file.write_bytes(data)
    assert content(workdir) == before and not list(workdir.rglob("*.lock"))
    assert "Traceback" not in MainProcess(*flags).end()
