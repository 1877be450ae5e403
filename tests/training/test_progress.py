"""Time left, speeds, and logs that a restart continues."""

import json

import pytest

from scaling_ldm import records
from scaling_ldm.training import encode_progress, progress, time_left
from scaling_ldm.training.run_files import RunFiles


def remaining(*flops, steps=100):
    return [
        progress.RemainingRun(size=(int(f), 1), steps=steps, flops_per_step=int(f))
        for f in flops
    ]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told the time."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def said(monkeypatch):
    """The lines that are printed."""
    lines = []
    monkeypatch.setattr(progress, "say", lines.append)
    monkeypatch.setattr(encode_progress, "say", lines.append)
    return lines


def finish(sweep, clock, steps, seconds, beyond):
    sweep.begin([0], "")
    sweep.spend(1, None)  # compiles
    sweep.spend(steps - 1, seconds * (steps - 1))
    clock[0] += seconds * (steps - 1) + beyond
    sweep.end()


def test_time_left_counts_steps_by_size_and_what_is_beyond_them(clock):
    """A step takes a + b FLOPs seconds here, compiling a size 10 s, the rest 2 s."""
    a, b = 0.01, 1e-9
    sizes = [int(1e7), int(3e7), int(9e7)]
    sweep = progress.SweepProgress(
        5, remaining(*sizes[:2], sizes[0], sizes[2], sizes[2]), 0.0
    )
    assert sweep.seconds_left() is None
    finish(sweep, clock, 100, a + b * sizes[0], 12.0)
    finish(sweep, clock, 100, a + b * sizes[1], 12.0)
    finish(sweep, clock, 100, a + b * sizes[0], 2.0)
    want = 2 * 100 * (a + b * sizes[2]) + 12.0 + 2.0
    assert sweep.seconds_left() == pytest.approx(want)


def test_steps_of_an_earlier_process_are_not_left(clock):
    sweep = progress.SweepProgress(1, remaining(1e7), 0.0)
    sweep.begin([0], "")
    sweep.skip(60)
    sweep.spend(1, None)
    sweep.spend(9, 90.0)
    assert sweep.seconds_left() == pytest.approx(30 * 10.0)


def test_a_failed_run_leaves_nothing(clock):
    sweep = progress.SweepProgress(1, remaining(1e7), 0.0)
    sweep.begin([0], "")
    sweep.spend(1, None)
    sweep.spend(1, 5.0)
    sweep.end()
    assert sweep.seconds_left() == 0


def test_lines_come_at_intervals_and_not_before_there_is_a_speed(clock, said):
    sweep = progress.SweepProgress(7, remaining(1e7), every_seconds=5.0)
    sweep.begin([2], "1e+11 FLOPs  64 x 2")
    for second in range(12):
        clock[0] = float(second)
        sweep.show(second, 100, 0.5, 0.0 if second < 6 else 2e9)
    assert said == [
        "run 3 of 7  1e+11 FLOPs  64 x 2  step 6/100  loss 0.5000  2 GFLOP/s",
        "run 3 of 7  1e+11 FLOPs  64 x 2  step 11/100  loss 0.5000  2 GFLOP/s",
    ]


def test_the_log_drops_what_will_happen_again(tmp_path):
    log = progress.MetricLog(RunFiles(tmp_path), 0, tensorboard=False)
    for step in (5, 10, 15):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 20, "lo')  # cut off by a kill
    log = progress.MetricLog(RunFiles(tmp_path), 10, tensorboard=False)
    log.write(11, {"loss": 0.5})
    log.close()
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 11]
    assert {row["version"] for row in rows} == {records.SCHEMA}


def test_a_log_without_its_last_lines_is_named(tmp_path, capsys):
    log = progress.MetricLog(RunFiles(tmp_path), 0, tensorboard=False, every=5)
    for step in (5, 10):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    for step in (10, 14, 15):
        progress.MetricLog(RunFiles(tmp_path), step, False, every=5).close()
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    progress.MetricLog(RunFiles(tmp_path), 4, False, every=5).close()
    progress.MetricLog(RunFiles(tmp_path), 5, False, every=5).close()
    assert capsys.readouterr().err.splitlines() == [
        f"{path} has no lines of steps {steps}; it lacks them now"
        for steps in ("11 to 15", "1 to 5")
    ]


def test_tensorboard_events_are_written(tmp_path):
    log = progress.MetricLog(RunFiles(tmp_path), 0, tensorboard=True)
    log.write(1, {"loss": 0.25, "mfu": None})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3661, "1:01:01")]
)
def test_duration(seconds, text):
    assert time_left.format_duration(seconds) == text


def test_rate():
    assert progress.format_rate(12.34e9) == "12.3 GFLOP/s"
    assert progress.format_rate(0) == "0 FLOP/s"


def test_the_first_things_are_no_basis_for_the_time_left(clock, said):
    """Of 400 things, 100 were there before; the first 10 took 50 s, others 1 s each."""
    shown = progress.Progress("look", 400, "things", 20)
    clock[0] += 77  # work begins later
    shown.begin()
    for seconds, done in ((50, 110), (10, 120), (10, 130), (270, 400)):
        clock[0] += seconds
        shown.show(done)
    assert said == [
        "look  110 of 400 things",  # it compiled
        "look  130 of 400 things  left 4:30",  # 20 s after the line before
        "look  400 of 400 things  left 0:00",
    ]


def test_the_first_of_many_small_things_is_not_worth_a_line(clock, said):
    shown = progress.Progress("count", 100, "things", 20, at_once=False)
    for done in range(1, 51):
        clock[0] += 0.9
        shown.show(done)
    assert said == [
        "count  23 of 100 things  left 1:09",
        "count  46 of 100 things  left 0:49",
    ]


def test_one_slow_first_resample_is_not_extrapolated(clock, said):
    """The first of 50 compiles for 24 s; the others take 0.1 s."""
    shown = progress.Progress("evaluate", 50, "resamples", 20, at_once=False)
    for seconds, done in ((24, 1), (0.1, 2), (20, 3)):
        clock[0] += seconds
        shown.show(done)
    assert said == [
        "evaluate  1 of 50 resamples",
        "evaluate  3 of 50 resamples  left 7:52",  # 2 in 20.1 s
    ]


def test_encoding_has_a_pace_when_a_second_batch_is_done(clock, said):
    """Two processes: the first batch compiles for 60 s, the others take 1 s."""
    shown = encode_progress.EncodeProgress(1000, 200, 2, 5.0)
    for seconds in (60, 1, 1, 1, 1, 1):
        clock[0] += seconds
        shown.show(10, 1000, 0)
    assert said == [
        "encode  220 of 1,000 pictures  1 kB  0 bad",
        "encode  320 of 1,000 pictures  20 a second  1 kB  0 bad  left 0:34",
    ]
