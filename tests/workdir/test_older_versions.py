"""What every older release left is read, continued and drawn from by this version.

The examples are in tests/data/workdirs; tests/older_workdirs.py makes them.
"""

import dataclasses
import json

import numpy as np
import older_workdirs
import pytest
from golden import study as golden
from processes import run_main

from scaling_ldm import config, records, report, study
from scaling_ldm.records.measurements import is_floor
from scaling_ldm.workdir import exit_status

EXAMPLES = sorted(path.parent for path in older_workdirs.MADE.glob("*/study.py"))
RECORDS = ("runs.jsonl", "laws.json", "evaluations.jsonl", "frontier.json")


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda path: path.name)
def example(request):
    """The folder of one release's example."""
    return request.param


@pytest.fixture
def unpacked(example, tmp_path):
    """unpacked(finished): the example's directory, with or without its last record."""

    def unpack(finished):
        older_workdirs.unpack(example, tmp_path / "older", finished)
        return tmp_path / "older"

    return unpack


@pytest.fixture
def run_here(example, capsys):
    """run_here(workdir, stage, estimator="auto"): runs a stage.

    It returns the lines on standard error.

    Left out are those that say which values are those of then.
    """

    def run(workdir, stage, estimator="auto"):
        given = config.load(example / "study.py")
        given.fit.estimator = estimator
        status = study.run(
            given,
            workdir=str(workdir),
            stages=(stage,),
            only=None,
            cluster=(None, None, None),
        )
        assert status == exit_status.EXIT["done"]
        said = f"{workdir} was made by {example.name}: "
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if not line.startswith(said)]

    return run


@pytest.fixture(scope="module")
def continued(example, tmp_path_factory):
    """(workdir, lines): the unfinished run and half of the pictures are made anew."""
    workdir = tmp_path_factory.mktemp("continued") / "older"
    older_workdirs.unpack(example, workdir, finished=False)
    for name in ("shards/00001.npy", "images.npy", "grid.png", "record.json"):
        (workdir / "samples" / name).unlink()
    _, lines = run_main(
        f"--config={example / 'study.py'}",
        f"--workdir={workdir}",
        "--stages=train,generate",
    )
    return workdir, lines


def as_made(example):
    """made.json, and whether numbers are the same to the bit on this processor."""
    made = json.loads((example / "made.json").read_text())
    return made, made["processor"] == golden.processor()


def read(path):
    """The records of a file as JSON values of today."""
    return records.to_json(records.read_jsonl(path))


def test_there_is_an_example_of_the_first_release():
    assert records.FIRST in {path.name for path in EXAMPLES}


@pytest.mark.slow
def test_the_page_shows_everything(example, unpacked, run_here):
    workdir = unpacked(finished=False)
    run_here(workdir, "report")
    found = report.reading.read(workdir)
    assert found.notes == ()
    assert found.fit and found.samples and found.frontier and found.evaluations
    specs = records.read_jsonl(workdir / "runs.jsonl")
    assert len(found.records) == len(specs) - 1
    assert set(found.curves) == {spec.run_id for spec in specs}
    assert (workdir / "report" / "index.html").exists()
    held = records.read_json(workdir / "experiment.json")
    assert held["made_by"] == example.name


def test_the_plan_is_the_same(example, unpacked, run_here):
    workdir = unpacked(finished=False)
    said = run_here(workdir, "plan")
    assert [line for line in said if "networks counted" not in line] == []
    before = example / "workdir" / "runs.jsonl"
    assert read(workdir / "runs.jsonl") == read(before)


def test_today_s_default_averages_are_for_new_directories(
    example, unpacked, tmp_path, capsys
):
    given = config.load(example / "study.py")
    averages = config.resolve(given).optimizer.averages
    assert averages == config.OptimizerConfig().averages
    then = records.read_json(example / "workdir" / "experiment.json")
    asked = {"stages": ("plan",), "only": None, "cluster": (None, None, None)}
    for workdir, new in ((unpacked(finished=True), False), (tmp_path / "new", True)):
        status = study.run(given, workdir=str(workdir), **asked)
        assert status == exit_status.EXIT["done"]
        said = "config.optimizer.averages = ('ema',) as then"
        assert (said in capsys.readouterr().err) != new
        held = records.read_json(workdir / "experiment.json")
        kept = averages if new else ("ema",)
        assert held["config"]["optimizer"]["averages"] == list(kept)
        assert (held["recipe_hash"] == then["recipe_hash"]) != new
        found = report.reading.read(workdir)
        assert {tuple(found.averages(run)) for run in found.runs} == {kept}
        specs = records.read_jsonl(workdir / "runs.jsonl")
        assert {spec.recipe_hash == then["recipe_hash"] for spec in specs} == {not new}


def test_the_laws_are_the_same(example, unpacked, run_here):
    """By parabolas, as then; four sizes do not identify minima of another shape."""
    workdir = unpacked(finished=True)
    (workdir / "laws.json").unlink()
    run_here(workdir, "fit")
    (found,) = read(workdir / "laws.json")
    reasons = {curve.get("reason") for curve in found["parabolas"]}
    assert reasons == {"minimum not identified"}
    run_here(workdir, "fit", estimator="parabola")
    (found,), (before,) = (
        read(folder / "laws.json") for folder in (workdir, example / "workdir")
    )
    assert {name for name, law in before["laws"].items() if "coef" in law}
    assert found.pop("protocol_hash") and before.pop("protocol_hash") == ""
    _, same = as_made(example)
    if same:
        # Intervals are wider since 0.2.0, and the law of the loss has an offset.
        for now, then in zip(found["parabolas"], before["parabolas"], strict=True):
            for name in ("n_opt", "d_opt", "l_opt", "curvature"):
                assert now.get(name) == then.get(name)
        for name in ("N_opt", "D_opt"):
            assert found["laws"][name]["exponent"] == before["laws"][name]["exponent"]
    for name, law in before["laws"].items():
        now = found["laws"][name]["record"]
        assert now == law["record"] or (name, now) == ("L_opt", "OffsetLaw")


@pytest.mark.slow  # by day, test_train_step reads such a checkpoint
def test_the_unfinished_run_comes_to_the_numbers_of_then(example, continued, tmp_path):
    workdir, lines = continued
    made, same = as_made(example)
    assert f"{made['unfinished']} continues from step" in lines
    assert "damaged" not in lines
    finished = tmp_path / "finished"
    older_workdirs.unpack(example, finished, finished=True)
    found, before = (
        {
            "plan": [],
            "training": read(folder / "runs" / made["unfinished"] / "record.json"),
            "losses": golden.losses(folder)[made["unfinished"]],
        }
        for folder in (workdir, finished)
    )
    assert len(before["losses"]) == 3
    assert golden.differences(before, found, to_the_bit=same) == []
    log = workdir / "runs" / made["unfinished"] / "metrics.jsonl"
    line = log.read_text().splitlines()
    assert json.loads(line[-1])["version"] == records.SCHEMA
    rows = records.read_jsonl(log.with_name("measurements.jsonl"))
    assert {row.weights for row in rows if row.metric == "loss"} == {"raw", "ema"}


@pytest.mark.slow
def test_the_pictures_are_the_same(example, continued):
    workdir, lines = continued
    assert "removes" not in lines
    _, same = as_made(example)
    for name in ("00000", "00001"):
        found, before = (
            np.load(folder / "samples" / "shards" / f"{name}.npy")
            for folder in (workdir, example / "workdir")
        )
        assert found.shape == before.shape
        assert not same or np.array_equal(found, before)


@pytest.mark.slow  # a feature network is compiled
def test_what_was_measured_is_not_measured_again(example, tmp_path):
    workdir = tmp_path / "older"
    older_workdirs.unpack(example, workdir, finished=True)
    _, lines = run_main(
        f"--config={example / 'study.py'}",
        f"--workdir={workdir}",
        "--stages=evaluate,frontier",
    )
    before = records.read_evaluations(example / "workdir")
    after = records.read_evaluations(workdir)
    assert [r for r in after if not is_floor(r.metric)] == before
    rows = {r for r in records.read_table(example / "workdir")}
    assert rows <= {*records.read_table(workdir)}  # and the floors of distances
    found, held = (
        records.read_frontier(place) for place in (workdir, example / "workdir")
    )
    for cell, was in zip(found.cells, held.cells, strict=True):
        assert dataclasses.replace(cell, deviations=()) == (
            dataclasses.replace(was, deviations=())
        )
        np.testing.assert_allclose(cell.deviations, was.deviations, rtol=1e-9)


def test_every_file_of_the_example_is_of_its_release(example):
    """Nothing of a later version has come into it."""
    for path in (example / "workdir").rglob("*.json*"):
        for line in (
            path.read_text().splitlines()[:1]
            if path.suffix == ".jsonl"
            else (path.read_text(),)
        ):
            value = json.loads(line)
            assert value.get("version", records.FIRST) == example.name
