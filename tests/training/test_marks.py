"""At which steps a run is measured: a function of the plan alone."""

import dataclasses
import pathlib

import pytest

from experiments import dit_1e18, quickstart
from scaling_ldm import config, records
from scaling_ldm.stages import plan
from scaling_ldm.training import marks

STUDY = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "tiny_study"
STEP = 1000  # FLOPs of a step


def run_of(steps):
    """A run of so many steps."""
    spec = records.read_jsonl(STUDY / "runs.jsonl")[0]
    total = float(steps * STEP)
    return dataclasses.replace(
        spec, steps=steps, flops_per_step=STEP, planned_flops=total, budget_flops=total
    )


@pytest.fixture
def found(tiny, monkeypatch):
    """found(steps, each, budgets, wanted): marks of a run whose measuring costs that.

    each: in steps of the run.
    budgets: in steps, too.
    """

    def marks_of(steps, each, budgets=(), wanted=20):
        monkeypatch.setattr(marks, "measuring_flops", lambda *_: each * STEP)
        c = tiny.copy_and_resolve_references()
        c.plan.budgets_flops = tuple(sorted(float(b * STEP) for b in (*budgets, steps)))
        c.validation.marks = wanted
        return marks.marks_of(config.resolve(c), run_of(steps))

    return marks_of


def test_marks_divide_the_last_two_decades_evenly(found):
    got = found(100_000, each=0)
    assert (got.spaced, got.wanted, got.share) == (20, 20, 0)
    assert len(got.steps) == 21 and got.steps[-1] == 100_000
    assert got.steps[0] == round(100_000 * 100 ** (-20 / 21))
    for one, next_ in zip(got.steps, got.steps[1:], strict=False):
        assert next_ / one == pytest.approx(100 ** (1 / 21), rel=1e-3)
    assert found(100_000, each=0, wanted=1).steps == (10_000, 100_000)


def test_a_run_of_few_steps_has_a_mark_on_a_step_once(found):
    got = found(30, each=0).steps
    assert list(got) == sorted(set(got)) and min(got) == 1
    assert found(1, each=0).steps == (1,)


def test_smaller_budgets_come_before_spaced_marks_and_the_largest_first(found):
    # Each measurement takes a hundredth of the run, so there is room for two.
    got = found(1000, each=10, budgets=(150, 400, 2000))
    assert (got.steps, got.spaced) == ((150, 400, 1000), 0)
    assert got.share == pytest.approx(0.02)
    got = found(1000, each=10, budgets=(150, 400, 700, 2000))
    assert (got.steps, got.spaced) == ((400, 700, 1000), 0)
    assert found(1000, each=10, budgets=(150,)).spaced == 1
    # The end is measured whatever it takes.
    assert found(1000, each=100, budgets=(150, 400)).steps == (1000,)
    # The step nearest to a budget that falls between two.
    assert found(1000, each=20, budgets=(100.6,)).steps == (101, 1000)


def test_what_comes_before_the_end_takes_at_most_two_percent(found):
    for each in (1, 3, 7, 21):
        for steps in (400, 1000, 5000):
            got = found(steps, each, budgets=(steps // 3,))
            assert (len(got.steps) - 1) * each <= 0.02 * steps
            assert got.share == (len(got.steps) - 1) * each / steps
            if got.spaced < 20:
                more = marks._spaced(run_of(steps), got.spaced + 1)
                assert len({*more, steps // 3} - {steps}) * each > 0.02 * steps


def test_a_mark_at_a_budget_takes_nothing_more(found):
    assert found(10_000, each=200, budgets=(1000,), wanted=1).spaced == 1
    assert found(10_000, each=200, budgets=(1001,), wanted=1).spaced == 0


def test_no_marks_leave_the_end_alone(found):
    got = found(1000, each=0, budgets=(100,), wanted=0)
    assert (got.steps, got.spaced, got.share) == ((1000,), 0, 0)


def test_too_few_are_said(found):
    assert marks.line([found(1000, each=0), found(10, each=0)]) == ""
    line = marks.line([found(1000, each=0), found(1000, each=10), found(9, each=1)])
    assert line == (
        "2 of 3 runs are measured 0-2 times before their end, not 20 "
        "(config.validation.marks): more would take over 2% of their FLOPs; all are "
        "measured at their end"
    )


def planned(experiment, size):
    """The experiment with one size, and its run of the largest budget."""
    c = experiment.get_config()
    c.plan.sizes, c.plan.sizes_per_budget = (size,), 0
    e = config.resolve(c)
    return e, plan.plan(e)[-1]


def test_a_published_budget_has_room_for_marks_and_a_laptops_has_not():
    """Forward FLOPs are counted: a little over a third of a step's for each picture."""
    experiment, spec = planned(dit_1e18, (448, 7))
    cfg, weights = experiment.validation, 1 + len(experiment.optimizer.averages)
    each = marks.measuring_flops(experiment, spec.width, spec.depth)
    third = weights * cfg.samples * spec.flops_per_step / spec.batch_size / 3
    assert third < each < 1.01 * third
    got = marks.marks_of(experiment, spec)
    assert (got.spaced, len(got.steps)) == (20, 21)
    assert got.share == pytest.approx(20 * each / spec.planned_flops)
    assert 0.001 < got.share < 0.01

    experiment, spec = planned(quickstart, (32, 2))
    got = marks.marks_of(experiment, spec)
    assert 0 < got.share <= 0.02
    budgets = [round(b / spec.flops_per_step) for b in experiment.plan.budgets_flops]
    assert got.steps == (*budgets[-1 - len(got.steps) + 1 : -1], spec.steps)


def test_the_dearer_a_measurement_the_fewer_there_are():
    """By FLOPs that are counted: more pictures, and more averages, take more."""
    experiment, spec = planned(quickstart, (16, 2))

    def count(section, **fields):
        part = dataclasses.replace(getattr(experiment, section), **fields)
        dear = dataclasses.replace(experiment, **{section: part})
        got = marks.marks_of(dear, spec)
        each = marks.measuring_flops(dear, spec.width, spec.depth)
        assert got.share == (len(got.steps) - 1) * each / spec.planned_flops <= 0.02
        assert got.share + each / spec.planned_flops > 0.02 or got.spaced == got.wanted
        return len(got.steps) - 1

    counts = [count("validation", samples=n) for n in (128, 1024, 4096, 8192)]
    assert counts[0] > 20 and counts == sorted(set(counts), reverse=True)
    assert counts[-1] == 0
    two = config.Experiment().optimizer.averages
    assert 0 < count("optimizer", averages=two) < counts[1]
