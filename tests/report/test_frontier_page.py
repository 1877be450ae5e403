"""The frontier on the page: its figures, tables and sentences."""

import dataclasses
import json
import math
import shutil
import struct

import numpy as np
import pytest
from finished_study import Page, figures_as, make_workdir, table_rows
from matplotlib.figure import Figure

from scaling_ldm import frontier, records, report
from scaling_ldm.records import Crossing, MeasuredCell
from scaling_ldm.report import frontier_figures

FRONTIER_FIGURES = {"frontier", "best_size", "best_guidance"}
FRONTIER_TABLES = {"frontier", "best_at_budget", "crossings", "best_guidance", "cells"}


def _cells(samplers: tuple[str, ...]) -> list[MeasuredCell]:
    """Sizes of cost 1, 2 and 4; the second wins from cost e^3, the third never."""
    cells = []
    noise = np.linspace(-0.3, 0.3, 40)
    for sampler in samplers:
        for k, (start, slope) in enumerate(((20, 2), (26, 4), (90, 4))):
            for steps in (1, 2, 4, 8, 16, 32, 64):
                for guidance in (1.5, 2.0, 3.0, 4.0):
                    value = start - slope * math.log(2**k * steps) + 4 - guidance
                    cells.append(
                        MeasuredCell(
                            model=f"run{k}",
                            label=f"{2**k}M",
                            params=2**k * 10**6,
                            relative_cost=2.0**k,
                            sampler=sampler,
                            steps=steps,
                            guidance=guidance,
                            nfe=2 * steps,
                            flops=0.9e9 * 2**k * steps,
                            decoder_flops=1e8,
                            seconds=1e-3 * 2**k * steps,
                            metric="fd",
                            value=value,
                            deviations=tuple(noise),
                            protocol="p0",
                            images=500,
                        )
                    )
    return cells


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A workdir that was trained but not fitted, with a frontier of three sizes."""
    workdir = tmp_path_factory.mktemp("frontier")
    make_workdir(workdir, "unfitted", lean=True)
    found = frontier.build(
        _cells(("ddim", "<dpm>")),
        reference="1M",
        device="NVIDIA L4",
        bootstrap=200,
        budgets=9,
    )
    records.write_text(workdir / "frontier.json", records.dumps(found))
    with figures_as("svg", "png"):
        index = report.write(workdir)
    return workdir, found, Page(index.read_text(encoding="utf-8"))


def test_frontier_has_its_figures_and_tables(sampled):
    workdir, _, page = sampled
    assert page.wrong == [] and page.open == []
    folder = workdir / "report" / "figures"
    assert FRONTIER_FIGURES <= {p.stem for p in folder.glob("*.pdf")}
    for name in FRONTIER_FIGURES:
        head = (folder / f"{name}.png").read_bytes()[:24]
        assert min(struct.unpack(">II", head[16:24])) > 300
    assert page.tags.count("svg") == 1 + len(FRONTIER_FIGURES)  # and the isoFLOP curves
    for name in FRONTIER_TABLES:
        rows = table_rows(workdir, name)
        assert rows and None not in rows[0], name


def test_the_page_says_what_the_frontier_says(sampled):
    _, found, page = sampled
    for line_ in found.sentences:
        assert line_ in page.text
    assert (
        "168 settings were measured with 500 images each. In parentheses is fd; lower "
        "is better. Cost is steps × the cost of one evaluation of the network, that of "
        "1M being 1. Times were measured on NVIDIA L4. Protocol p0." in page.text
    )
    assert "90% intervals of 200 bootstrap draws" in page.text
    assert "With <dpm> the larger wins" in page.text  # escaped, or it were a tag


def test_sizes_of_the_same_steps_are_reported_by_their_frontier_first(
    sampled, tmp_path
):
    workdir, found, _ = sampled
    shutil.copytree(workdir, tmp_path / "copy")
    path = tmp_path / "copy" / "experiment.json"
    held = json.loads(path.read_text())
    held["config"]["plan"] = {"steps": 900}
    records.write_text(path, json.dumps(held))
    for spec in records.read_jsonl(tmp_path / "copy" / "runs.jsonl")[::9]:
        lines = [
            {"step": s, "loss": 2 / s, "flops": s * 1e7, "seconds": s / 50}
            for s in (100, 500, 900)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        records.write_text(
            tmp_path / "copy" / "runs" / spec.run_id / "metrics.jsonl", text
        )
    with figures_as("svg", "png"):
        page = Page(report.write(tmp_path / "copy").read_text(encoding="utf-8"))
    first = page.text.index(found.sentences[0])
    assert first < page.text.index("there are no laws to fit")
    where = page.text.index("Quality against the cost of sampling")
    assert first < where < page.text.index("Every run (")
    assert "Samples" not in page.text  # none were drawn
    assert page.text.count(found.sentences[0]) == 1
    assert page.text.count(found.sentences[1]) == 1
    best = page.text.index("The lowest loss at the end is ")
    assert first < best < page.text.index("there are no laws to fit")
    absent = ("IsoFLOP", "Refused", "laws.json", "budgets 1", "Held", "laws are")
    for words in (*absent, "the budget by", "of the budget", "C = "):
        assert words not in page.text, words
    assert "against the step." in page.text  # all sizes in one panel
    runs = table_rows(tmp_path / "copy", "runs")
    assert {float(r["actual_over_planned"]) for r in runs[:-1]} == {0.0}
    figures = {p.stem for p in (tmp_path / "copy" / "report" / "figures").glob("*.pdf")}
    assert figures == FRONTIER_FIGURES | {"training"}
    png = (tmp_path / "copy" / "report" / "figures" / "training.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == (1040, 720)  # of one panel, at 200 dpi


def test_frontier_tables_are_those_of_the_record(sampled):
    workdir, found, page = sampled
    pareto = [c for front in found.fronts for c in front.pareto]
    rows = table_rows(workdir, "frontier")
    assert [float(r["cost"]) for r in rows] == [c.cost for c in pareto]
    assert [float(r["expected_low"]) for r in rows] == [c.interval.low for c in pareto]
    rows = table_rows(workdir, "crossings")
    assert len(rows) == len(found.crossings)
    for row, c in zip(rows, found.crossings, strict=True):
        if isinstance(c, Crossing):
            assert (float(row["at"]), row["larger"]) == (c.at, c.larger)
            assert float(row["at_high"]) == c.interval.high
        else:
            assert row["at"] == "" and row["refused"].startswith(c.reason)
            assert row["pair"] == c.group
    rows = table_rows(workdir, "best_at_budget")
    assert len(rows) == 9 * len(found.fronts)
    for row in rows:
        shares = [float(row[f"probability_run{k}"]) for k in range(3)]
        assert sum(shares) == pytest.approx(1)
    rows = table_rows(workdir, "best_guidance")
    assert {r["doubt"] for r in rows} == {"the highest tried"}
    assert len(table_rows(workdir, "cells")) == len(found.cells) == 168
    shown = page.cells("the larger over the smaller")
    first = found.crossings[0]
    assert shown[0][3].startswith(f"{first.at:.1f} [")


def test_rings_are_where_the_plotted_lines_reach_a_new_low():
    """Of noisy cells: rings are points of the lines, fall, and are the table's."""
    rng = np.random.default_rng(0)
    cells = []
    for c in _cells(("ddim",)):
        value = c.value + rng.normal()
        noise = tuple(rng.normal(size=40))
        cells.append(dataclasses.replace(c, value=value, deviations=noise))
    found = frontier.build(cells, reference="1M", device="cpu", budgets=4)
    front = next(f for f in found.fronts if f.cost == frontier_figures.COST)
    axes = Figure().add_subplot()
    frontier_figures._front(axes, [b.choice for b in found.best])
    (drawn,) = axes.lines
    rings = drawn.get_xydata().tolist()
    assert rings == [[c.cost, c.expected] for c in front.pareto]
    plotted = [[b.choice.cost, b.choice.expected] for b in found.best]
    assert all(ring in plotted for ring in rings)
    for cost, value in plotted:  # what has no ring is not below all rings to its left
        assert min(y for x, y in rings if x <= cost) <= value
    assert (np.diff([y for _, y in rings]) < 0).all() and len(rings) > 3


def test_without_replicates_nothing_is_claimed_of_probability(sampled, tmp_path):
    workdir, found, _ = sampled
    cells = [dataclasses.replace(c, deviations=()) for c in found.cells]
    bare = frontier.build(
        [c for c in cells if c.sampler == "ddim"],
        reference="1M",
        device="cpu",
        costs=["relative_cost_steps"],
    )
    records.write_jsonl(
        tmp_path / "runs.jsonl", records.read_jsonl(workdir / "runs.jsonl")
    )
    records.write_text(tmp_path / "frontier.json", records.dumps(bare))
    with figures_as("svg"):
        page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert page.wrong == []
    assert "without replicates no probability is known" in page.text
    assert "bootstrap" not in page.text.split("Quality against")[1].split("Samples")[0]
    assert "Frontier: no intervals: 84 of 84 cells" in page.text
    assert page.tags.count("svg") == len(FRONTIER_FIGURES)


def test_a_page_without_a_frontier_is_as_before(sampled, tmp_path):
    workdir, _, _ = sampled
    runs = records.read_jsonl(workdir / "runs.jsonl")
    records.write_jsonl(tmp_path / "runs.jsonl", runs)
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "Quality against" not in page.text
    (tmp_path / "frontier.json").write_text('{"record": "Frontier"}')
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "frontier.json could not be read" in page.text


def test_models_that_share_a_label_are_told_apart():
    cells = [dataclasses.replace(c, label="A") for c in _cells(("ddim",))]
    found = frontier.build(cells, reference="A", device="cpu", budgets=4)
    assert frontier_figures.sizes(found) == {f"run{k}": f"A (run{k})" for k in range(3)}
    assert frontier_figures.samplers(found) == ["ddim"]
