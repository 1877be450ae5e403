"""Advice from the command line: what it reads, prints and refuses."""

import dataclasses
import math

import pytest

from scaling_ldm import config, frontier, records, study
from scaling_ldm.stages import advise
from scaling_ldm.workdir import exit_status

CLUSTER = (None, None, None)


def cells():
    """Two sizes of cost 1 and 4; the larger wins from 16 evaluations of the smaller."""
    for k, (start, slope) in enumerate(((40, 2), (40 + 2 * math.log(16), 4))):
        for steps in (2, 4, 8, 16, 32):
            for guidance in (1.5, 3.0):
                value = start - slope * math.log(4**k * steps) + guidance
                yield records.MeasuredCell(
                    model=f"run{k}",
                    label=f"{8 * (k + 1)} x 2",
                    params=4**k * 10_000,
                    relative_cost=4.0**k / 4,
                    sampler="ddim",
                    steps=steps,
                    guidance=guidance,
                    nfe=2 * steps,
                    flops=1e9 * 4**k * steps,
                    decoder_flops=0.0,
                    seconds=1e-3 * 4**k * steps,
                    metric="fd_lite0",
                    value=value,
                    deviations=tuple(0.01 * i for i in range(-20, 21)),
                    protocol="p0",
                    images=500,
                )


@pytest.fixture(scope="module")
def found():
    return frontier.build(cells(), reference="16 x 2", device="cpu", bootstrap=50)


@pytest.fixture(scope="module")
def workdir(tiny, found, tmp_path_factory):
    """A planned study that holds a frontier."""
    workdir = tmp_path_factory.mktemp("advise") / "study"
    given = dict(workdir=str(workdir), stages=["plan"], only=None, cluster=CLUSTER)
    assert study.run(tiny, **given) == 0
    records.write_text(workdir / "frontier.json", records.dumps(found) + "\n")
    return workdir


def ask(tiny, workdir, **how):
    given = tiny.copy_and_resolve_references()
    given.advise.update(how)
    return study.run(
        given, workdir=str(workdir), stages=["advise"], only=None, cluster=CLUSTER
    )


def test_the_answer_is_that_of_the_function(tiny, workdir, found, capsys):
    assert ask(tiny, workdir, budget=0.04) == exit_status.EXIT["done"]
    out = capsys.readouterr().out
    wanted = frontier.advice(found, 0.04, "seconds")
    assert wanted.choice.steps == 8 and wanted.choice.model == "run1"
    interval, probability = wanted.choice.interval, wanted.choice.probability
    assert out.splitlines() == [
        "within 0.04 s an image:",
        "  model    16 x 2, 40,000 parameters, run run1",
        "  sampler  ddim, 8 steps, guidance 1.5",
        f"  expected fd_lite0 {wanted.choice.expected:.4g} [{interval.low:.4g}, "
        f"{interval.high:.4g}] at 90%, less is better; probability that no other "
        f"setting is better {probability:.2f}",
        "  cost     0.032 s (measured on cpu)",
        "  in doubt guidance 1.5 is the lowest that was tried, so a better one may lie "
        "beyond",
    ]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"budget": 8.1e9, "unit": "flops"}, "8e+09 FLOPs (counted"),
        ({"budget": 2.0, "unit": "relative_cost"}, "a relative cost of 2 (relative to"),
        ({"budget": 1e5, "unit": "memory_bytes"}, "40 kB (an estimate"),
        (
            {"budget": 1.0, "device": "l4", "utilisation": 0.5},
            "(an estimate: FLOPs / (0.5 of the bfloat16 peak of l4",
        ),
        ({"budget": 1.0, "device": "l4", "dtype": "float32"}, "the float32 peak of l4"),
    ],
)
def test_each_unit_and_device_says_how_the_cost_is_known(
    tiny, workdir, capsys, how, said
):
    assert ask(tiny, workdir, **how) == exit_status.EXIT["done"]
    assert said in capsys.readouterr().out


def test_a_refusal_has_its_reason_and_a_status_of_its_own(tiny, workdir, capsys):
    assert ask(tiny, workdir, budget=1e-3) == exit_status.EXIT["no answer"] == 5
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    assert "error" not in said.err
    assert line.startswith("no advice within 0.001 s: nothing fits; the least is")
    assert "0.002 s: 8 x 2, ddim, 2 steps" in line


def test_without_replicates_no_interval_is_claimed(found):
    bare = [dataclasses.replace(c, deviations=()) for c in found.cells]
    bare = frontier.build(bare, reference="16 x 2", device="cpu")
    text = "\n".join(advise.lines(frontier.advice(bare, 1.0)))
    assert "(no interval is known), less is better" in text
    assert "probability" not in text and "[" not in text
    assert (
        f"  in doubt {bare.notes[0]}" in text and "fewer than 20 rep" in bare.notes[0]
    )


def test_a_guidance_between_those_that_were_tried_is_no_doubt(found):
    lower = [
        dataclasses.replace(c, guidance=0.0, value=c.value + 9)
        for c in found.cells
        if c.guidance == 3.0
    ]
    more = frontier.build(
        [*found.cells, *lower], reference="16 x 2", device="cpu", bootstrap=50
    )
    given = frontier.advice(more, 0.04)
    assert given.choice.guidance == 1.5 and given.doubts == ()


@pytest.mark.parametrize(("probability", "doubtful"), [(0.49, True), (0.5, False)])
def test_a_choice_that_most_draws_do_not_make_is_in_doubt(found, probability, doubtful):
    given = frontier.advice(found, 0.04)
    choice = dataclasses.replace(given.choice, probability=probability)
    said = advise.lines(dataclasses.replace(given, choice=choice))
    line = "  in doubt another setting is the best in most bootstrap draws"
    assert (line in said) == doubtful


def test_amounts_are_in_words():
    for value, unit, words in (
        (1.0, "seconds", "1 s"),
        (2e5, "memory_bytes", "200 kB"),
        (3.5e6, "memory_bytes", "3.5 MB"),
        (4e9, "memory_bytes", "4 GB"),
        (12.0, "memory_bytes", "12 bytes"),
    ):
        assert frontier.amount(value, unit) == words


def test_planned_memory_is_not_of_a_device_that_was_not_measured(found):
    cells_ = [dataclasses.replace(c, memory_bytes=9 * c.params) for c in found.cells]
    planned = dataclasses.replace(found, cells=tuple(cells_))
    here = frontier.advice(planned, 1e6, "memory_bytes", device="cpu")
    there = frontier.advice(planned, 1e6, "memory_bytes", device="l4")
    assert here.basis.endswith("for one image, on cpu") and not here.estimated
    assert there.estimated and there.choice == here.choice
    assert there.basis.endswith("on cpu; on l4 that plan may differ")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "--stages advise answers one question: --config.advise.budget=0.5"),
        ({"budget": -1.0}, "config.advise.budget = -1.0: must be >= 0"),
        ({"budget": math.inf}, "config.advise.budget = inf: must be finite"),
        ({"budget": 1.0, "unit": "hours"}, "config.advise.unit = 'hours'; known: sec"),
        ({"budget": 1.0, "device": "abacus"}, "unknown device 'abacus'; known: "),
        (
            {"budget": 1.0, "unit": "flops", "utilisation": 0.5},
            "utilisation = 0.5 is not read by config.advise.unit = 'flops'",
        ),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_message(
    tiny, workdir, capsys, how, said
):
    assert ask(tiny, workdir, **how) == exit_status.EXIT["bad configuration"]
    assert said in capsys.readouterr().err


def test_no_frontier_is_said_and_leaves_nothing_behind(tiny, tmp_path, capsys):
    where = tmp_path / "new"
    assert ask(tiny, where, budget=1.0) == exit_status.EXIT["bad configuration"]
    assert (
        f"no frontier in {where}: add frontier to --stages" in capsys.readouterr().err
    )
    assert not where.exists()
    given = tiny.copy_and_resolve_references()
    given.advise.budget = 1.0
    advise.check(config.resolve(given), where, ("frontier",))
    with pytest.raises(config.ConfigError, match="no frontier in"):
        advise.run(config.resolve(given), where, lambda _: [])


OTHER = records.dumps(records.Refusal(quantity="a", reason="b", detail="c"))


@pytest.mark.parametrize("text", ["", "{", OTHER])
def test_a_damaged_frontier_is_named(tiny, workdir, tmp_path, capsys, text):
    (tmp_path / "frontier.json").write_text(text)
    held = (workdir / "experiment.json").read_text()
    (tmp_path / "experiment.json").write_text(held)
    assert ask(tiny, tmp_path, budget=1.0) == exit_status.EXIT["storage"]
    assert str(tmp_path / "frontier.json") in capsys.readouterr().err


def test_units_are_those_of_the_function_and_advice_is_on_request_alone():
    assert config.ADVICE_UNITS == frontier.advise.UNITS
    assert "advise" in config.STAGES_ON_REQUEST and "advise" not in config.STAGES
    base = config.Experiment()
    asked = dataclasses.replace(
        base, advise=config.AdviseConfig(budget=1.0, device="l4")
    )
    assert asked.recipe_hash == base.recipe_hash
