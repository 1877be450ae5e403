"""What compiled code prints passes through, apart from the end of a client."""

import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from scaling_ldm.training import native_stderr

END = (
    b"E1130 20:14:30.763020 9 preemption_sync_manager.cc:159] Failed to cancel.\n"
    b"E1130 20:14:30.763023 11 coordination_service_agent.cc:289] Polled an error.\n"
    b"F1130 20:14:30.763292 11 client.h:80] Terminating process because of it\n"
    b"\n"
    b"*** Check failure stack trace: ***\n"
    b"    @     0x7f4029440634  absl::SendToLog()\n"
)
OTHER = b"W1130 20:14:31.000000 11 cpu_client.cc:1] a warning\n  of two lines\n"


@pytest.fixture
def pipes(monkeypatch):
    """(write what compiled code prints, read what goes out, the thread, the filter)."""
    source, sink = os.pipe()
    out, target = os.pipe()
    lines = native_stderr.HeldBack(source, target)
    thread = threading.Thread(target=lines.run, daemon=True)
    yield sink, out, thread, lines
    for end in (source, out, target):
        os.close(end)


def read(out):
    """The next bytes that go out."""
    assert select.select([out], [], [], 5)[0], "nothing goes out"
    return os.read(out, 65536)


def test_the_end_of_a_client_is_held_back_and_the_rest_is_not(pipes):
    sink, out, thread, _ = pipes
    thread.start()
    os.write(sink, b"first\n" + END[:100])
    os.write(sink, END[100:] + OTHER + b"unfinished")
    said = b""
    while b"two lines\n" not in said:
        said += read(out)
    assert said == b"first\n" + OTHER
    os.close(sink)  # the process ends by itself
    thread.join(5)
    assert read(out) == END + b"unfinished"


def test_a_process_that_lives_on_prints_it_later(pipes, monkeypatch):
    monkeypatch.setattr(native_stderr, "WAIT", 0.05)
    sink, out, thread, _ = pipes
    thread.start()
    os.write(sink, END)
    assert read(out) == END
    os.close(sink)
    thread.join(5)


def test_held_lines_come_out_by_their_age_though_others_arrive(pipes, monkeypatch):
    monkeypatch.setattr(native_stderr, "WAIT", 0.1)
    sink, out, thread, _ = pipes
    thread.start()
    os.write(sink, END)
    said, end = b"", time.monotonic() + 10
    while END not in said and time.monotonic() < end:
        os.write(sink, b"I1130 20:14:31.000000 1 a.cc:1] alive\n" + END[:70] + b"\n")
        time.sleep(0.01)
        if select.select([out], [], [], 0)[0]:
            said += read(out)
    assert END in said
    os.close(sink)
    thread.join(5)


def test_the_beginning_of_a_line_comes_out_after_a_moment(pipes, monkeypatch):
    monkeypatch.setattr(native_stderr, "PART", 0.02)
    sink, out, thread, _ = pipes
    thread.start()
    os.write(sink, b"reading ")
    assert read(out) == b"reading "
    os.write(sink, b"weights\nnext\n" + END[:20])
    said = b""
    while END[:20] not in said:
        said += read(out)
    assert said == b"weights\nnext\n" + END[:20]
    os.close(sink)
    thread.join(5)


def test_a_flush_passes_on_all_but_what_is_held(pipes):
    sink, out, _, lines = pipes  # its thread is not started
    os.write(sink, b"one\n" + END + OTHER + b"no newline")
    lines.flush(held=False)
    assert read(out) == b"one\n" + OTHER + b"no newline"
    lines.flush(held=True)
    assert read(out) == END
    os.close(sink)


def test_a_target_that_takes_a_part_gets_the_rest(pipes, monkeypatch):
    sink, out, thread, _ = pipes
    write = os.write
    monkeypatch.setattr(
        native_stderr.os, "write", lambda fd, data: write(fd, bytes(data)[:3])
    )
    thread.start()
    write(sink, b"a longer line\n")
    said = b""
    while b"\n" not in said:
        said += read(out)
    assert said == b"a longer line\n"
    os.close(sink)
    thread.join(5)


def run(code, **more):
    """A process that holds back; returns it when it has ended."""
    head = (
        "import faulthandler, os, sys, signal, subprocess\n"
        "from scaling_ldm.training import native_stderr\n"
        "native_stderr.hold_back()\n"
    )
    given = {"capture_output": True} | more
    return subprocess.run([sys.executable, "-c", head + code], timeout=30, **given)


def test_a_full_disk_below_stderr_blocks_nobody():
    """More than the 64 KiB that a pipe takes."""
    with open("/dev/full", "wb") as full:
        code = "for _ in range(40): os.write(2, 4999 * b'x' + b'\\n')\nos._exit(7)\n"
        done = run(code, capture_output=False, stderr=full)
    assert done.returncode == 7


@pytest.mark.parametrize("before", ["0", "1"])
def test_a_crash_of_compiled_code_prints_its_stack(before):
    code = "os.kill(os.getpid(), signal.SIGSEGV)\n"
    environment = os.environ | {"PYTHONFAULTHANDLER": before.strip("0")}
    done = run(code, env=environment)
    assert done.returncode == -signal.SIGSEGV
    assert b"Segmentation fault" in done.stderr and b"line 4 in" in done.stderr


@pytest.mark.parametrize("held", [False, True])
def test_the_end_of_a_process_loses_no_last_words(held):
    code = (
        "from scaling_ldm.workdir import ending\n"
        f"os.write(2, {END + OTHER!r} + b'no newline')\n"
        f"ending.now('we say why', 4, held={held})\n"
    )
    done = run(code)
    assert done.returncode == 4
    assert b"stopped: we say why\n" in done.stderr
    # Two threads write, so ours may stand between two lines of a native message.
    assert all(line in done.stderr for line in OTHER.splitlines(keepends=True))
    assert b"no newline" in done.stderr
    assert (END in done.stderr) == held


def test_a_process_keeps_its_own_messages_and_those_of_its_children():
    """Also those that are printed last."""
    code = (
        "print('ours', file=sys.stderr)\n"
        "subprocess.run(['sh', '-c', 'echo of a child >&2'])\n"
        "os.write(2, b'native')\n"
    )
    done = run(code)
    assert done.returncode == 0
    assert sorted(done.stderr.replace(b"native", b"native\n").split(b"\n")) == [
        b"",
        b"native",
        b"of a child",
        b"ours",
    ]
