"""Attempts of a run together: what was lost, and what lies between them."""

import pytest

from scaling_ldm import records
from scaling_ldm.records import goodput


def attempt(number, began, first, last, *, step=10.0, other=2.0, **more):
    parts = dict.fromkeys(goodput.MEASURED, 0.0) | {"STEP": step, "OTHER": other}
    given = {"compiled": 3, "cache_hits": 1, "processes": 1, "devices": 4}
    return records.Attempt(
        run_id="a",
        number=number,
        began=began,
        seconds=step + other,
        ended="",
        first_step=first,
        last_step=last,
        parts=parts,
        **given | more,
    )


def test_all_time_from_the_first_start_to_the_last_sign_is_in_one_part():
    """Killed at step 50 after a checkpoint of step 30; 8 seconds later it goes on."""
    lives = [attempt(0, 100.0, 0, 50), attempt(1, 120.0, 30, 80)]
    found = goodput.of_run(lives)
    assert found.lost_steps == 20
    assert found.seconds["WASTED_PROGRESS_FROM_DISRUPTION"] == pytest.approx(4.0)
    assert found.seconds["STEP"] == pytest.approx(16.0)
    assert found.seconds["INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"] == pytest.approx(8)
    assert found.total == pytest.approx(120.0 + 12.0 - 100.0)
    assert found.share == pytest.approx(0.5)
    assert (found.attempts, found.compiled, found.cache_hits) == (2, 6, 2)


def test_nothing_is_lost_after_a_stop_and_no_time_is_negative():
    lives = [attempt(0, 100.0, 0, 50), attempt(1, 90.0, 50, 80)]  # a clock set back
    found = goodput.of_run(lives)
    assert found.lost_steps == 0
    assert found.seconds["WASTED_PROGRESS_FROM_DISRUPTION"] == 0.0
    assert found.seconds["INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"] == 0.0
    assert found.total == pytest.approx(24.0)


def test_an_attempt_without_a_step_loses_none():
    """Attempts that died before their first step, one after another."""
    lives = [attempt(0, 0.0, 0, 0, step=0.0), attempt(1, 2.0, 0, 9)]
    found = goodput.of_run(lives)
    assert (found.lost_steps, found.seconds["STEP"]) == (0, 10.0)
    # Two that died in the same steps lose them twice.
    lives = [attempt(0, 0.0, 0, 9), attempt(1, 12.0, 0, 9), attempt(2, 24.0, 0, 9)]
    assert goodput.of_run(lives).lost_steps == 18
    assert goodput.of_run(lives).seconds["STEP"] == pytest.approx(10.0)


def test_steps_after_the_last_line_of_a_killed_attempt_are_counted():
    """It wrote step 50 after 10 s of steps, and had logged step 60 when it ended."""
    killed = goodput.with_later_steps(attempt(0, 100.0, 0, 50), 60, 120.0)
    assert (killed.last_step, killed.seconds) == (60, pytest.approx(14.0))
    assert killed.parts["STEP"] == pytest.approx(12.0)
    found = goodput.of_run([killed, attempt(1, 120.0, 30, 80)])
    assert found.lost_steps == 30
    assert found.seconds["WASTED_PROGRESS_FROM_DISRUPTION"] == pytest.approx(6.0)
    assert found.total == pytest.approx(32.0)
    # They took no longer than there was time, and there may be none to tell of.
    soon = goodput.with_later_steps(attempt(0, 100.0, 0, 50), 60, 113.0)
    assert soon.seconds == pytest.approx(13.0)
    assert goodput.with_later_steps(killed, 60, 120.0) == killed
    early = goodput.with_later_steps(attempt(0, 100.0, 0, 0, step=0.0), 9, 120.0)
    assert (early.last_step, early.parts["STEP"]) == (9, 0.0)


def test_an_attempt_that_ended_while_restoring_loses_nothing():
    """A run of 500 steps was saved; one restart died before it had read that."""
    died = attempt(1, 20.0, None, 0, step=0.0)
    lives = [attempt(0, 0.0, 0, 500), died, attempt(2, 40.0, 500, 1000)]
    found = goodput.of_run(lives)
    assert (found.lost_steps, found.seconds["STEP"]) == (0, 20.0)
    assert found.seconds["WASTED_PROGRESS_FROM_DISRUPTION"] == 0.0
    assert found.seconds["INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"] == 26.0
    assert found.total == pytest.approx(52.0)
    assert goodput.with_later_steps(died, 500, 40.0) == died
    # What is really lost is seen across it.
    lives[2] = attempt(2, 40.0, 300, 1000)
    assert goodput.of_run(lives).lost_steps == 200
    assert goodput.of_run(lives).seconds["STEP"] == pytest.approx(16.0)
    for end in ([died], [attempt(0, 0.0, 0, 500), died], []):
        assert goodput.of_run(end).lost_steps == 0


def test_a_fallback_past_an_attempt_takes_the_seconds_of_those_before_too():
    """0 to 500 in 10 s, to 600 in 4 s; then only the checkpoint of 300 is whole."""
    lives = [
        attempt(0, 0.0, 0, 500),
        attempt(1, 20.0, 500, 600, step=4.0),
        attempt(2, 40.0, 300, 900, step=6.0),
    ]
    found = goodput.of_run(lives)
    assert found.lost_steps == 300
    assert found.seconds["WASTED_PROGRESS_FROM_DISRUPTION"] == pytest.approx(8.0)
    assert found.seconds["STEP"] == pytest.approx(12.0)
    # What was lost once is not lost again.
    later = [*lives, attempt(3, 60.0, 200, 900)]
    found = goodput.of_run(later)
    assert found.lost_steps == 300 + 600 + 100
    assert found.seconds["STEP"] == pytest.approx(4.0 + 10.0)


def test_runs_add_up():
    one = goodput.of_run([attempt(0, 0.0, 0, 50), attempt(1, 20.0, 30, 80)])
    both = goodput.total([one, goodput.of_run([attempt(0, 500.0, 0, 5)])])
    assert both.attempts == 3 and both.lost_steps == 20
    assert both.total == pytest.approx(one.total + 12.0)
    assert goodput.total([]).share is None


def test_the_slowest_process_is_the_one_with_most_time_of_its_own():
    many = attempt(0, 0.0, 0, 5, host_seconds=(1.0, 4.0, 2.0), data_seconds=(0, 3.0, 1))
    assert goodput.slowest(many) == (1, pytest.approx(0.4), pytest.approx(0.3))
    assert goodput.slowest(attempt(0, 0.0, 0, 5)) is None


def test_a_line_of_an_attempt_is_read_back(tmp_path):
    lives = [attempt(0, 1.5, 0, 3), attempt(1, 2.5, 3, 6, data_seconds=(1.0, 2.0))]
    lives.append(attempt(2, 3.5, None, 0))
    records.write_jsonl(tmp_path / "attempts.jsonl", lives)
    assert records.read_jsonl(tmp_path / "attempts.jsonl", records.Attempt) == lives
    assert b'{"version": "' in (tmp_path / "attempts.jsonl").read_bytes()
