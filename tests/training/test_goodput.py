"""Every second of an attempt is in one part; compilation is told by jax."""

import errno
import os
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from scaling_ldm import config, records
from scaling_ldm.records.errors import Preempted
from scaling_ldm.training import goodput, mesh, progress
from scaling_ldm.training.run_files import RunFiles


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_parts_within_parts_add_up_to_the_time():
    clock = Clock()
    parts = goodput.Parts(clock)
    clock.wait(1)
    assert parts.enter("STEP") == "OTHER"
    clock.wait(10)
    assert parts.enter("EVAL_STEP") == "STEP"
    clock.wait(3)
    parts.enter("STEP")
    clock.wait(5)
    found = parts.seconds()
    assert found == dict.fromkeys(found, 0.0) | {
        "OTHER": 1.0,
        "STEP": 15.0,
        "EVAL_STEP": 3.0,
    }
    assert sum(found.values()) == clock.now
    assert parts.seconds() == found  # a look changes nothing


def test_compilation_within_another_counts_once_and_is_taken_from_its_part():
    """As jax tells it: what is inside of something is told before it."""
    clock = Clock()
    parts = goodput.Parts(clock)
    parts.enter("STEP")
    clock.wait(2)
    parts.compiled(1)  # from 1 to 2: a function within another
    clock.wait(1)
    parts.compiled(0.5)  # from 2.5 to 3: another one
    clock.wait(1)
    parts.compiled(3)  # from 1 to 4: the one around both
    clock.wait(6)
    parts.compiled(2)  # from 8 to 10: a later one
    clock.wait(5)
    parts.enter("EVAL_STEP")
    found = parts.seconds()
    assert found["PROGRAM_STARTUP"] == 5.0
    assert found["STEP"] == 10.0
    assert sum(found.values()) == clock.now


def test_more_compilation_than_time_takes_no_part_below_zero():
    """jax reads another clock, which may be set forward meanwhile."""
    clock = Clock()
    parts = goodput.Parts(clock)
    parts.enter("STEP")
    clock.wait(2)
    parts.compiled(3600)
    found = parts.seconds()
    assert (found["PROGRAM_STARTUP"], found["STEP"]) == (2.0, 0.0)


@pytest.mark.parametrize("busy", [True, False])
def test_a_wait_for_data_is_lost_only_if_the_devices_had_nothing_to_do(busy):
    class Running:
        def is_ready(self):
            return not busy

    with goodput.attempt("a", None, 1) as ledger:
        with goodput.part(goodput.HOST), goodput.loading(Running()):
            time.sleep(0.02)
        found = ledger.parts.seconds()
    assert found["STEP" if busy else "DATA_LOADING_SYNC"] >= 0.02
    assert (found["DATA_LOADING_SYNC"] == 0.0) == busy
    assert ("DATA_LOADING_ASYNC" in ledger.parts._took) == busy
    data, host = ledger.parts.of_host()
    assert 0.02 <= data <= host


def test_what_no_part_names_is_seen_as_other(tmp_path):
    """The seconds are those of the wall clock, not of the parts that were named."""
    files = RunFiles(tmp_path)
    began = time.perf_counter()
    with goodput.attempt("a", files, 4) as ledger:
        entered = time.perf_counter()
        with goodput.part("EVAL_STEP"):
            time.sleep(0.03)
        time.sleep(0.05)
        goodput.starts_at(3)
        goodput.steps_done(7)
        ledger.ended = "non_finite_loss"
        inside = time.perf_counter() - entered
    took = time.perf_counter() - began
    (found,) = records.read_jsonl(files.attempts, records.Attempt)
    assert found.parts["OTHER"] >= 0.05 and found.parts["EVAL_STEP"] >= 0.03
    assert 0.08 <= inside <= found.seconds <= took
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert (found.first_step, found.last_step, found.devices) == (3, 7, 4)
    assert found.ended == "non_finite_loss"


def test_each_end_is_told_and_earlier_attempts_stay(tmp_path):
    files = RunFiles(tmp_path)
    for error in (KeyboardInterrupt, Preempted, OSError, None):  # the first: a kill
        try:
            with goodput.attempt("a", files, 1):
                if error:
                    raise error("because")
        except (KeyboardInterrupt, Preempted, OSError) as e:
            assert type(e) is error
    found = records.read_jsonl(files.attempts, records.Attempt)
    assert [one.ended for one in found] == ["", "stopped", "failed", "finished"]
    assert [one.number for one in found] == [0, 1, 2, 3]
    assert goodput.current() is None


def test_an_attempt_is_written_while_it_lasts_but_not_at_each_step(
    tmp_path, monkeypatch
):
    written = []
    monkeypatch.setattr(goodput.Ledger, "write", lambda self, end: written.append(end))
    with goodput.attempt("a", RunFiles(tmp_path), 1) as ledger:
        goodput.steps_done(1)
        assert written == [""]  # its start
        ledger._written -= 2 * goodput.MOST
        goodput.steps_done(2)
        assert written == ["", ""]


def test_the_first_step_is_written_once_it_is_known_and_not_before(tmp_path):
    """A process that is killed while it restores leaves no first step."""
    files = RunFiles(tmp_path)
    with goodput.attempt("a", files, 1):
        (died,) = records.read_jsonl(files.attempts, records.Attempt)
        goodput.starts_at(500)
        (restored,) = records.read_jsonl(files.attempts, records.Attempt)
    assert (died.first_step, died.last_step) == (None, 0)
    assert (restored.first_step, restored.last_step) == (500, 500)


def test_a_ledger_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr(progress, "say", said.append)

    def full(path, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(records, "write_jsonl", full)
    with goodput.attempt("a", RunFiles(tmp_path), 1) as ledger:
        goodput.starts_at(0)
        for step in (1, 2):
            ledger._written -= 2 * goodput.MOST
            goodput.steps_done(step)
        assert ledger.step == 2
    assert len(said) == 1
    assert "training goes on" in said[0] and "No space left" in said[0]
    with pytest.raises(KeyError), goodput.attempt("a", RunFiles(tmp_path), 1):
        raise KeyError("of training")


def test_starting_devices_counts_for_the_first_run_alone():
    with goodput.starting_devices():
        time.sleep(0.02)
    found = []
    for name in "ab":
        with goodput.attempt(name, None, 1) as ledger:
            found.append(ledger.attempt())
    assert found[0].parts["TPU_INITIALIZATION"] >= 0.02
    assert found[0].seconds >= 0.02
    assert found[1].parts["TPU_INITIALIZATION"] == 0.0


def test_jax_tells_of_compilation(no_cache):
    with goodput.attempt("a", None, 1) as ledger, goodput.part("STEP"):
        jax.jit(lambda x: jnp.sin(x) * 3 + 1)(jnp.ones(5)).block_until_ready()
        found = ledger.attempt()
    assert found.compiled >= 1
    assert 0 < found.parts["PROGRAM_STARTUP"] < found.seconds
    assert found.cache_hits == 0


@pytest.fixture
def no_cache(monkeypatch):
    """Nothing is kept of compiled programs, but by the test."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: jax.config.values[name] for name in names}
    jax.config.update(names[0], None)
    monkeypatch.setattr(mesh, "_kept", "")
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_compiled_program_is_read_again_and_counted(tmp_path, no_cache):
    """The same program of two functions, as of two processes."""
    cfg = config.MeshConfig(compilation_cache=str(tmp_path / "kept"))
    assert mesh.keep_compiled(cfg, tmp_path / "w") == str(tmp_path / "kept")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    found, x = [], jnp.arange(7.0)
    for _ in range(2):
        with goodput.attempt("a", None, 1) as ledger:
            jax.jit(lambda x: jnp.cos(x) * 0.37 - 11)(x).block_until_ready()
            found.append(ledger.attempt())
    assert [one.compiled for one in found] == [1, 1]
    assert [one.cache_hits for one in found] == [0, 1]
    assert list((tmp_path / "kept").iterdir())
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("given", "backend", "before", "kept"),
    [
        ("auto", "cpu", None, ""),
        ("auto", "tpu", None, "{cwd}/runs/a/compiled"),
        ("auto", "gpu", "of_jax", "of_jax"),
        ("", "gpu", "of_jax", ""),
        ("gs://bucket/kept", "cpu", None, "gs://bucket/kept"),
    ],
)
def test_where_programs_are_kept(monkeypatch, no_cache, given, backend, before, kept):
    jax.config.update("jax_compilation_cache_dir", before)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    cfg = config.MeshConfig(compilation_cache=given)
    kept = kept.format(cwd=os.getcwd())
    assert mesh.keep_compiled(cfg, "runs/a") == kept
    assert jax.config.values["jax_compilation_cache_dir"] == (kept or None)


def test_each_study_of_a_process_keeps_its_own_programs(monkeypatch, no_cache):
    """Beside its runs, also in a bucket."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for workdir in ("gs://bucket/a", "gs://bucket/b"):
        found = mesh.keep_compiled(config.MeshConfig(), workdir)
        assert found == f"{workdir}/compiled"
