"""Who is lost and who is slow in a job, told by lines in a store."""

import json
import time

import jax
import pytest

from scaling_ldm.training import goodput, progress, pulse


class Store:
    """jax's key-value store; `deaf` after process 0 is gone."""

    def __init__(self):
        self.values, self.deaf = {}, False

    def _ask(self):
        if self.deaf:
            raise RuntimeError("UNAVAILABLE")

    def key_value_set(self, key, value, allow_overwrite=False):
        self._ask()
        if key in self.values and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_try_get(self, key):
        self._ask()
        if key not in self.values:
            raise RuntimeError("NOT_FOUND")
        return self.values[key]

    def key_value_dir_get(self, folder):
        self._ask()
        return [item for item in self.values.items() if item[0].startswith(folder)]


@pytest.fixture
def job(monkeypatch):
    """job(n): the pulses of n processes, their clock, and what each was told."""
    store, awake = Store(), pulse.Awake()
    monkeypatch.setattr(pulse, "EVERY", 0.001)

    def of(count):
        monkeypatch.setattr(jax, "process_count", lambda: count)
        pulses, ends = [], [[] for _ in range(count)]
        for number in range(count):
            monkeypatch.setattr(jax, "process_index", lambda n=number: n)
            pulses.append(pulse.Pulse(store, 10.0, ends[number].append, awake))
        return pulses, ends

    return of, store, awake


def pass_by(awake, seconds):
    for _ in range(seconds):
        awake.tick(1.0)


def test_a_silent_process_is_lost_to_every_other_one(job):
    of, store, awake = job
    pulses, ends = of(3)
    for one in pulses:
        one.exchange()
    for _ in range(9):
        pass_by(awake, 1)
        for one in pulses[:2]:  # the last one says nothing more
            one.exchange()
            one.check()
    assert ends == [[], [], []]
    for _ in range(3):
        pass_by(awake, 1)
        for one in pulses[:2]:
            one.exchange()
            one.check()
    (mine,), (other,), _ = ends
    assert mine == other
    assert mine.startswith("process 2 on ") and "sent nothing for 10 s" in mine


def test_a_process_that_never_said_anything_is_lost_too(job):
    of, _, awake = job
    pulses, ends = of(2)
    pulses[0].exchange()
    pass_by(awake, 11)
    pulses[0].exchange()
    pulses[0].check()
    assert ends[0] == ["process 1 has sent nothing for 10 s"]


@pytest.mark.parametrize("hangs", [True, False])
def test_process_0_is_lost_if_it_does_not_answer(job, hangs):
    """It answers with an error, or a call does not return."""
    of, store, awake = job
    pulses, ends = of(2)
    pulses[1].exchange()
    store.deaf = True
    for _ in range(12):
        if not hangs:
            with pytest.raises(RuntimeError):
                pulses[1].exchange()
        pass_by(awake, 1)
        pulses[1].check()
    assert ends[1] == ["process 0 has not answered for 10 s"]


def test_a_job_that_was_suspended_as_a_whole_loses_nobody(job):
    """A scheduler stops all processes and continues them an hour later."""
    of, _, awake = job
    pulses, ends = of(2)
    for one in pulses:
        one.exchange()
    awake.tick(3600.0)
    for one in pulses:
        one.check()
        one.exchange()
    assert ends == [[], []]


def test_an_error_of_one_process_ends_the_others(job):
    of, store, _ = job
    pulses, ends = of(2)
    pulse.tell_loss(store, "process 1 ended; its message says why")
    pulse.tell_loss(store, "another reason")  # the first one counts
    pulses[0].exchange()
    assert ends[0] == ["process 1 ended; its message says why"]


def test_after_the_end_nobody_is_missed(job):
    of, _, awake = job
    pulses, ends = of(2)
    pulses[0].exchange()
    pulses[0].stop()
    pass_by(awake, 60)
    pulses[0].check()
    assert ends == [[], []]


def beats(step, own, data=None, run="a"):
    """Lines of processes whose steps take a second each."""
    data = data or [0.0] * len(own)
    return {
        n: pulse.Beat(1, f"h{n}", run, step, float(step), step * data[n], step * o)
        for n, o in enumerate(own)
    }


def test_the_slowest_process_is_named_with_its_time_and_its_wait_for_data():
    own, data = [0.01, 0.02, 0.4, 0.02], [0.0, 0.0, 0.3, 0.0]
    line = pulse.slowest(beats(10, own, data), beats(30, own, data))
    assert line == (
        "a: process 2 on h2 is the slowest: of 1e+03 ms a step its own work takes "
        "400 ms, waits for data 300 ms of that; the median process has 20 ms"
    )


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (beats(10, [0.3, 0.3, 0.31]), beats(20, [0.3, 0.3, 0.31])),  # all alike
        (beats(10, [0.01, 0.05]), beats(20, [0.01, 0.05])),  # too short to matter
        ({}, beats(20, [0.01, 0.5])),  # the first look
        (beats(10, [0.01, 0.5], run="b"), beats(20, [0.01, 0.5])),  # another run
        (beats(20, [0.01, 0.5]), beats(20, [0.01, 0.5])),  # no step since
        (beats(10, [0.5]), beats(20, [0.5])),  # one process
    ],
)
def test_no_process_is_named_without_cause(before, now):
    assert pulse.slowest(before, now) == ""


def test_a_slow_host_is_told_once_a_minute_and_is_in_the_attempt(job, monkeypatch):
    """Process 1 of two waits for its data, half of each step."""
    of, store, awake = job
    pulses, _ = of(2)
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    with goodput.attempt("a", None, 2) as ledger:
        for step in range(1, 200):
            mine = pulse.Beat(step, "h0", "a", step, 1.0 * step, 0.0, 0.01 * step)
            other = pulse.Beat(
                step, "h1", "a", step, 1.0 * step, 0.5 * step, 0.6 * step
            )
            monkeypatch.setattr(pulse, "_of_this_process", lambda _, mine=mine: mine)
            line = json.dumps(list(vars(other).values()))
            store.values["scaling_ldm/alive/1"] = line
            pulses[0].exchange()
            pass_by(awake, 1)
        found = ledger.attempt()
    assert found.data_seconds == (0.0, pytest.approx(99.5))
    assert found.host_seconds == (pytest.approx(1.99), pytest.approx(119.4))
    assert len(said) == 2  # after two and after three minutes
    assert all("process 1 on h1 is the slowest" in line for line in said)


def test_an_error_of_the_system_does_not_end_the_exchange(job, monkeypatch):
    """The first line cannot be sent, as if the network were gone for a moment."""
    of, store, _ = job
    (one,), _ = of(1)
    failures = [OSError("no route to host")]

    def set_once(key, value, allow_overwrite=False):
        if failures:
            raise failures.pop()
        store.values[key] = value

    monkeypatch.setattr(store, "key_value_set", set_once)
    one.start()
    end = time.monotonic() + 5
    while not store.values and time.monotonic() < end:
        time.sleep(0.005)
    one.stop()
    one._thread.join(5)
    assert "scaling_ldm/alive/0" in store.values and not failures


def test_a_line_that_nobody_reads_keeps_process_0_alive(job, monkeypatch):
    of, store, awake = job
    pulses, ends = of(2)

    def gone(line):
        raise BrokenPipeError

    monkeypatch.setattr(progress, "say", gone)
    monkeypatch.setattr(pulse, "slowest", lambda before, now: "process 1 is")
    pass_by(awake, 61)
    for one in reversed(pulses):
        one.exchange()
    pulses[0].check()
    assert ends == [[], []]


def test_a_process_says_what_its_run_does():
    assert pulse._of_this_process(3).run_id == ""
    with goodput.attempt("a", None, 1) as ledger:
        with goodput.part(goodput.HOST):
            pass
        goodput.steps_done(5)
        found = pulse._of_this_process(4)
        assert (found.count, found.run_id, found.step) == (4, "a", 5)
        assert 0 < found.own <= found.stepping
        assert ledger.parts.seconds()["STEP"] == pytest.approx(found.stepping)
