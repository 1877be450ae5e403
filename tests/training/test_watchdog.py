"""A run that stands still: each process says where it is, and goes on or ends."""

import io
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from scaling_ldm import config
from scaling_ldm.training import goodput, held_out, pulse, train_step, watchdog


def dog(**fields):
    """A watchdog, its clock, and what ended the process."""
    awake, ends = pulse.Awake(), []
    cfg = config.MeshConfig(**fields)
    return watchdog.Watchdog(cfg, ends.append, awake), awake, ends


def looks(one, awake, seconds):
    for _ in range(seconds):
        awake.tick(1.0)
        one.look()


def test_a_step_that_does_not_end_is_told_with_its_place(capsys):
    one, awake, ends = dog(stall_seconds=10.0)
    with goodput.attempt("a", None, 1):
        goodput.steps_done(7)
        with goodput.part("STEP"):
            looks(one, awake, 10)
            assert capsys.readouterr().err == ""
            looks(one, awake, 12)
    said = capsys.readouterr().err
    assert said.count("no progress for") == 2  # after 10 and after 20 seconds
    assert "process 0 of 1 on " in said and "run a, step 7, in STEP" in said
    assert "in test_a_step_that_does_not_end" in said  # the stack of the main thread
    assert ends == []


def test_progress_of_any_kind_is_a_sign(capsys):
    one, awake, _ = dog(stall_seconds=10.0)
    with goodput.attempt("a", None, 1):
        for step in range(6):
            goodput.steps_done(step)
            looks(one, awake, 6)
        for _ in range(6):  # a long save follows a long measurement
            with goodput.part("EVAL_STEP"):
                looks(one, awake, 6)
    looks(one, awake, 60)  # no run is trained
    assert capsys.readouterr().err == ""


def test_the_first_step_has_five_times_as_long(capsys):
    one, awake, _ = dog(stall_seconds=10.0)
    with goodput.attempt("a", None, 1):
        looks(one, awake, 50)
        assert capsys.readouterr().err == ""
        looks(one, awake, 2)
        assert "before its first step" in capsys.readouterr().err


def held_out_losses(one, awake, seconds, count):
    """Measures batches of two pictures, of which each takes some seconds."""

    def slow(params, *batch):
        looks(one, awake, seconds)
        return np.ones(2)

    compiled = object.__new__(train_step.CompiledFunctions)  # nothing else is called
    object.__setattr__(compiled, "per_example_loss", slow)
    batch = held_out.HeldOutBatch(
        batch={},
        times=np.zeros(2),
        indices=np.arange(2),
        key=jax.random.key(0),
        samples=2,
    )
    with goodput.part("EVAL_STEP"):
        assert len(held_out.losses(compiled, {}, [batch] * count)) == 2 * count


def test_each_held_out_batch_is_a_sign_and_the_first_one_has_longer(
    monkeypatch, capsys
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    one, awake, ends = dog(stall_seconds=10.0, stall_limit_seconds=15.0)
    with goodput.attempt("a", None, 1):
        goodput.steps_done(7)
        held_out_losses(one, awake, 45, 1)  # it is compiled
        held_out_losses(one, awake, 9, 10)  # 90 seconds in all
        assert (capsys.readouterr().err, ends) == ("", [])
        held_out_losses(one, awake, 16, 1)
        assert "in EVAL_STEP" in capsys.readouterr().err and len(ends) == 1
    with goodput.attempt("b", None, 1):
        goodput.steps_done(7)
        held_out_losses(one, awake, 76, 1)  # nor may it take for ever
    assert "run b" in capsys.readouterr().err and "b made no" in ends[1]


def test_a_stderr_that_nobody_reads_does_not_end_the_watch(monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    one, awake, ends = dog(stall_seconds=10.0, stall_limit_seconds=30.0)
    with goodput.attempt("a", None, 1):
        goodput.steps_done(7)
        monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=gone))
        looks(one, awake, 31)
    assert len(ends) == 1


@pytest.mark.parametrize(("processes", "limit"), [(2, 30.0), (1, 30.0), (2, 0.0)])
def test_a_job_ends_after_its_limit_and_a_process_alone_never(
    monkeypatch, processes, limit
):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    one, awake, ends = dog(stall_seconds=0.0, stall_limit_seconds=limit)
    with goodput.attempt("a", None, 1):
        goodput.steps_done(7)
        looks(one, awake, 30)
        assert ends == []
        looks(one, awake, 2)
    ended = processes > 1 and limit > 0
    assert bool(ends) == ended
    if ended:
        assert ends[0] == "a made no progress for 30 s"


def test_the_thread_looks_while_a_step_is_slow(monkeypatch):
    monkeypatch.setattr(pulse, "TICK", 0.01)
    cfg = config.MeshConfig(stall_seconds=0.05)
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)

    def a_slow_step():
        end = time.monotonic() + 20
        while "Its main thread" not in said.getvalue() and time.monotonic() < end:
            time.sleep(0.01)

    with watchdog.watching(cfg, None, pytest.fail):
        with goodput.attempt("a", None, 1):
            goodput.steps_done(1)
            a_slow_step()
    assert "no progress for" in said.getvalue() and "in a_slow_step" in said.getvalue()
    assert not [t for t in threading.enumerate() if t.name in ("watchdog", "pulse")]
