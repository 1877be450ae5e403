"""Signals: who hears them, what ends at once, and what is asked between two steps."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from scaling_ldm import config
from scaling_ldm.records.errors import Preempted
from scaling_ldm.training import progress, signals


class Store:
    """The key-value store of a job, as far as a `signals.Job` shows it."""

    def __init__(self):
        self.name, self.left = "", []

    def tell(self, name):
        self.name = self.name or name

    def told(self):
        return self.name

    def leave(self, name):
        self.left.append(name)

    def finish(self):
        pass


@pytest.fixture
def ends():
    return []


@pytest.fixture
def listener(ends, monkeypatch):
    """A listener that is told numbers by the test and takes nothing of the system."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    found = signals.Listener(ends.append)
    found.configure(config.TrainConfig(), None)
    return found


def test_a_stop_ends_at_once_and_raises_nothing(listener, ends):
    listener.take([signal.SIGTERM])
    assert ends == ["SIGTERM"] and listener.stop.asked


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda n: n.name
)
def test_while_there_is_something_to_save_a_stop_is_answered_and_asked_for(
    listener, ends, monkeypatch, number
):
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    with pytest.raises(Preempted, match=number.name):
        with listener.stop.polled("a checkpoint of R"):
            assert listener.stop.request() == signals.GO_ON
            listener.take([number])
            listener.take([signal.SIGTERM])  # again: it is heard already
            assert listener.stop.request() == signals.STOP
            assert said == [f"{number.name}: stopping after a checkpoint of R"]
    assert ends == []


def test_a_second_ctrl_c_ends_in_any_case(listener, ends, monkeypatch):
    monkeypatch.setattr(progress, "say", lambda _: None)
    with pytest.raises(Preempted), listener.stop.polled("a checkpoint"):
        listener.take([signal.SIGINT])
        assert ends == []
        listener.take([signal.SIGINT])
        assert ends == ["SIGINT"]


def test_an_error_within_the_block_is_the_one_that_is_raised(listener, monkeypatch):
    monkeypatch.setattr(progress, "say", lambda _: None)
    with pytest.raises(ZeroDivisionError), listener.stop.polled("a checkpoint"):
        listener.take([signal.SIGTERM])
        _ = 1 / 0


def test_a_signal_to_save_is_told_once_and_ends_nothing(listener, ends):
    listener.take([signal.SIGUSR1])
    asked = [listener.stop.request() for _ in range(2)]
    assert asked == [signals.SAVE_AND_SAY, signals.GO_ON] and ends == []


def test_a_stop_of_one_process_is_a_stop_of_all(ends, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(progress, "say", lambda _: None)
    job = Store()
    one, other = (signals.Listener(ends.append) for _ in range(2))
    for each in (one, other):
        each.configure(config.TrainConfig(), job)
    other.take([])
    assert ends == []
    one.take([signal.SIGTERM])
    other.take([])
    assert ends == ["SIGTERM", "SIGTERM"]
    assert other.stop.asked


def test_signals_may_have_other_meanings(listener, ends):
    cfg = config.TrainConfig(save_signals=(), stop_signals=("SIGUSR1",))
    listener.configure(cfg, None)
    listener.take([signal.SIGUSR2])
    assert ends == []
    listener.take([signal.SIGUSR1])
    assert ends == ["SIGUSR1"]


def test_no_block_is_entered_while_the_process_ends(monkeypatch):
    """Otherwise a run could begin to save, and be cut off at that."""
    stop, ending, entered = signals.StopSignal(), threading.Event(), threading.Event()
    done = threading.Event()

    def end(_):
        ending.set()
        done.wait(5)

    def enter():
        with stop.polled("a checkpoint"):
            entered.set()

    hearing = threading.Thread(target=stop.hear, args=("SIGTERM", end))
    hearing.start()
    ending.wait(5)
    running = threading.Thread(target=enter, daemon=True)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # Preempted, after it
    running.start()
    assert not entered.wait(0.1)
    done.set()
    hearing.join(5)
    running.join(5)
    assert entered.is_set()


BUSY = """
import ctypes, sys
from scaling_ldm import study
study.listen()
print("ready", flush=True)
for _ in range(2):  # as a compiler does: no Python runs in this thread
    ctypes.CDLL(None).sleep(30)  # a signal ends the first one early
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_thread_that_runs_no_python_hears_it_too(number):
    busy = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=-1, stderr=-1, text=True, env=os.environ
    )
    assert busy.stdout.readline() == "ready\n"
    began = time.monotonic()
    busy.send_signal(number)
    _, said = busy.communicate(timeout=20)
    assert (busy.returncode, time.monotonic() - began < 10) == (75, True)
    assert said.startswith(f"stopped: {number.name} in the start;")
    assert "Traceback" not in said and len(said.splitlines()) == 1


LOADING = """
import builtins, os, runpy, signal, sys
sys.setswitchinterval(5)  # the listener gets its turn late
importing = builtins.__import__
def interrupted(name, *rest, **more):
    if name == "absl":  # the first module that the entry point loads
        builtins.__import__ = importing
        os.kill(os.getpid(), signal.SIGINT)
    return importing(name, *rest, **more)
builtins.__import__ = interrupted
runpy.run_module("scaling_ldm.main", run_name="__main__")
"""


def test_a_stop_while_modules_are_loaded_waits_for_the_listener():
    done = subprocess.run(
        [sys.executable, "-c", LOADING], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 75
    assert done.stderr.startswith("stopped: SIGINT in the start;")
    assert len(done.stderr.splitlines()) == 1


TOLD = """
import time
from scaling_ldm import config, study
from scaling_ldm.training import signals
class Job:
    tell = leave = finish = lambda *_: None
    told = lambda _: "SIGTERM to process 1"
study.listen()
time.sleep(0.1)  # the thread waits by now
signals.configure(config.TrainConfig(), Job())
time.sleep(30)
"""


def test_what_another_process_got_ends_this_one_too():
    done = subprocess.run(
        [sys.executable, "-c", TOLD], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 75
    assert done.stderr.startswith("stopped: SIGTERM to process 1 in the start;")


@pytest.mark.slow
def test_a_child_of_the_process_takes_signals_as_any_program_does():
    code = (
        "import os, signal, time\n"
        "from scaling_ldm import study\n"
        "study.listen()\n"
        "child = os.fork()\n"
        "if not child: time.sleep(30)\n"
        "time.sleep(0.2); os.kill(child, signal.SIGTERM)\n"
        "assert os.waitpid(child, 0)[1] == signal.SIGTERM\n"
        "time.sleep(0.2); print('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("goes on\n", "")
