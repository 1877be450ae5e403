"""Evaluations and the frontier with their numbers, which are rows of the table."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from scaling_ldm import records
from scaling_ldm.records import joined, measurements, rows_of, table

OLDER = pathlib.Path(__file__).parents[1] / "data" / "workdirs" / "0.1.0" / "workdir"
SPECS = records.read_jsonl(OLDER / "runs.jsonl")


@pytest.fixture
def older(tmp_path):
    """A copy of a working directory whose records hold their numbers."""
    shutil.copytree(OLDER, tmp_path / "w")
    return tmp_path / "w"


def test_an_older_evaluation_becomes_a_row_when_it_is_written_again(older):
    before, rows = records.read_evaluations(older), records.read_table(older)
    lines = (OLDER / "evaluations.jsonl").read_text().splitlines()
    held = [json.loads(line) for line in lines]
    assert [r.value for r in before] == [line["value"] for line in held]
    new = dataclasses.replace(before[0], metric="fd_other", value=3.0, low=3.0)
    joined.write_evaluations(older, [*before, new], [new], SPECS, "study")
    assert records.read_evaluations(older) == [*before, new]
    kept = records.read_jsonl(older / "evaluations.jsonl")
    assert {type(r) for r in kept} == {records.EvalRecord}
    after = records.read_table(older)
    assert set(rows) < set(after)
    (row,) = set(after) - set(rows)
    assert (row.metric, row.value, row.weights) == ("fd_other", 3.0, "ema")


def test_a_number_whose_row_is_gone_was_not_measured(older):
    found = records.read_evaluations(older)
    joined.write_evaluations(older, found, found, SPECS, "study")
    path = older / "runs" / found[0].run_id / table.FILE
    table.drop_rows(path, found[0].step - 1)  # as training the run again does
    left = records.read_evaluations(older)
    assert left == [r for r in found if r.run_id != found[0].run_id]


def test_weights_of_a_folder_have_rows_that_are_no_run_of_the_study(older, evaluated):
    one = evaluated(run_id="export-1", checksum="ab", step=0, train_flops=None)
    two = dataclasses.replace(one, run_id="export-2", checksum="cd", value=7.0)
    before = records.read_table(older)
    joined.write_evaluations(older, [one], [one], SPECS, "study")
    joined.write_evaluations(older, [one, two], [two], SPECS, "study")
    assert records.read_evaluations(older) == [one, two]
    assert len(table.read_rows(older / "evaluate" / table.FILE)[0]) == 2
    left = [row for row in before if "_lite0" not in row.metric]
    assert [r for r in records.read_table(older) if "_lite0" not in r.metric] == left


def test_rows_are_put_in_the_place_of_those_that_they_measure_again(tmp_path):
    path = tmp_path / table.FILE

    def row(value, metric="fd", step=7):
        names = {"weights": "raw", "protocol_hash": "p"}
        return measurements.measurement(
            SPECS[0], step=step, metric=metric, value=value, **names
        )

    table.put_rows(path, [row(1.0), row(2.0, "kid")])
    first = path.read_text().splitlines(keepends=True)
    table.put_rows(path, [row(3.0, step=8)])
    assert path.read_text().splitlines(keepends=True)[:2] == first
    path.write_bytes(path.read_bytes() + b'{"cut')
    table.put_rows(path, [row(4.0)])
    assert table.read_rows(path) == ([row(2.0, "kid"), row(3.0, step=8), row(4.0)], "")


def test_an_older_frontier_has_its_values_and_its_cells_are_in_the_table(older):
    held = json.loads((OLDER / "frontier.json").read_text())["cells"]
    found = records.read_frontier(older)
    assert [c.value for c in found.cells] == [c["value"] for c in held]
    for cell, was in zip(found.cells, held, strict=True):
        draws = np.array(was["replicates"])
        np.testing.assert_allclose(cell.deviations, draws - draws.mean(), rtol=1e-9)
    rows = {
        (r.run_id, r.metric, r.protocol_hash): r
        for r in records.read_table(older)
        if r.metric == "fd_lite0_cell"
    }
    assert len(rows) == len(found.cells)
    last = {spec.run_id: spec.steps for spec in SPECS}
    for cell in found.cells:
        row = rows[joined.place_of_cell(cell)]
        assert (row.value, row.step, row.weights) == (
            (cell.value, last[cell.model], "ema")
        )


def test_the_interval_of_a_cells_row_is_that_of_its_noise(older):
    cell = records.read_frontier(older).cells[0]
    noise = np.random.default_rng(0).exponential(size=41)
    (spec,) = (spec for spec in SPECS if spec.run_id == cell.model)
    noisy = dataclasses.replace(cell, deviations=tuple(noise))
    row = rows_of.cell(spec, noisy, 10.0, "ema", 0.9)
    high, low = 10 - np.quantile(noise, [0.05, 0.95])
    assert (row.low, row.high) == pytest.approx((low, high)) and row.level == 0.9
    for deviations, half in (((), 0.0), ((2.0,), -2.0)):
        few = dataclasses.replace(cell, deviations=deviations)
        row = rows_of.cell(spec, few, 10.0, "ema", 0.9)
        assert row.low == row.high == 10.0 + half
    assert row.level == 0.9


def test_a_frontier_is_read_with_the_values_of_the_table(older):
    found = records.read_frontier(older)
    joined.write_frontier(older, found)
    assert '"value"' not in json.dumps(records.to_json(_cells(older)))
    with pytest.raises(records.Damaged, match=r"frontier.json: the value of .* is not"):
        records.read_frontier(older)
    by_id = {spec.run_id: spec for spec in SPECS}
    for cell in found.cells:
        spec = by_id[cell.model]
        early = dataclasses.replace(
            rows_of.cell(spec, cell, -1.0, "ema", 0.9), step=spec.steps - 1
        )
        rows = [rows_of.cell(spec, cell, cell.value + 1, "ema", 0.9), early]
        table.put_rows(older / "runs" / cell.model / table.FILE, rows)
    again = records.read_frontier(older)
    assert [c.value for c in again.cells] == [c.value + 1 for c in found.cells]


def _cells(workdir):
    return records.read(workdir / "frontier.json").cells
