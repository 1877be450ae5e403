"""What compiled code prints passes through, apart from the end of a client."""

import os
import subprocess
import sys
import threading

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
    """(write what compiled code prints, read what goes out, close and wait)."""
    source, sink = os.pipe()
    out, target = os.pipe()
    thread = threading.Thread(target=native_stderr.HeldBack(source, target).run)
    yield sink, out, thread
    for end in (source, out, target):
        os.close(end)


def test_the_end_of_a_client_is_held_back_and_the_rest_is_not(pipes):
    sink, out, thread = pipes
    thread.start()
    os.write(sink, b"first\n" + END[:100])
    os.write(sink, END[100:] + OTHER + b"unfinished")
    said = b""
    while b"two lines\n" not in said:
        said += os.read(out, 65536)
    assert said == b"first\n" + OTHER
    os.close(sink)  # the process ends by itself
    thread.join(5)
    assert os.read(out, 65536) == END + b"unfinished"


def test_a_process_that_lives_on_prints_it_later(pipes, monkeypatch):
    monkeypatch.setattr(native_stderr, "WAIT", 0.05)
    sink, out, thread = pipes
    thread.start()
    os.write(sink, END)
    assert os.read(out, 65536) == END
    os.close(sink)
    thread.join(5)


def test_a_process_keeps_its_own_messages_and_those_of_its_children():
    """Also those that are printed last."""
    code = (
        "import os, sys, subprocess\n"
        "from scaling_ldm.training import native_stderr\n"
        "native_stderr.hold_back()\n"
        "print('ours', file=sys.stderr)\n"
        "subprocess.run(['sh', '-c', 'echo of a child >&2'])\n"
        "os.write(2, b'native')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert sorted(done.stderr.replace(b"native", b"native\n").split(b"\n")) == [
        b"",
        b"native",
        b"of a child",
        b"ours",
    ]
