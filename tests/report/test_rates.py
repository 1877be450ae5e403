"""The best learning rates of a study: the stage fit, the figure, the words."""

import dataclasses
import math

import finished_study
import numpy as np
import pytest
from finished_study import Page, figures_as, make_workdir, table_rows

from scaling_ldm import config, records, report
from scaling_ldm.config import run_names
from scaling_ldm.records import table
from scaling_ldm.report import rate_figures, rate_tables, reading
from scaling_ldm.stages import fit

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
WIDTHS = (32, 64, 128)
DIVERGED, HIGH = (32, 1.6e-2), 64.0  # width and rate of a high loss, and the loss


def best(width, budget):
    """The best rate that the losses are made with: at the edge for width 160."""
    return 4e-3 * (width / 64) ** -0.7 * (budget / 4e11) ** -0.1


def rated(workdir, rates=RATES, only=(), steps=0):
    """A study of three sizes, two budgets and an axis of rates; (experiment, specs).

    Args:
      only: budgets in which the rate varies; (): in all.
    """
    make_workdir(workdir, "few", lean=True)
    plan = records.read_jsonl(workdir / "runs.jsonl")
    axis = (("optimizer.learning_rate", rates), ("train.seed", (0, 1)))
    cfg = config.PlanConfig(axes=axis, budgets_flops=() if steps else (1e11, 2e11))
    e = dataclasses.replace(
        config.Experiment(),
        plan=dataclasses.replace(cfg, steps=steps),
        fit=config.FitConfig(bootstrap=50),
        optimizer=config.OptimizerConfig(averages=("ema",)),
    )
    rng, specs = np.random.default_rng(1), []
    for spec in plan:
        if spec.width not in (*WIDTHS, 160):
            continue
        record = records.read(workdir / "runs" / spec.run_id / "record.json")
        for rate in rates if not only or spec.budget_flops in only else rates[:1]:
            for seed in (0, 1):
                given = {
                    "run_id": f"{spec.run_id}-lr{rate}-seed{seed}",
                    "seed": seed,
                    "learning_rate": rate,
                }
                overrides = {"optimizer.learning_rate": rate, "train.seed": seed}
                group = run_names.group_of(e.plan, overrides)
                own = dataclasses.replace(
                    spec, **given, overrides=overrides, group=group
                )
                specs.append(own)
                x = math.log(rate / best(spec.width, spec.budget_flops))
                if spec.width == 160:
                    x += 3.0  # its best rate is below the grid
                loss = 0.4 + 0.02 * x**2 + 0.004 * max(x, 0) ** 3 - spec.width * 1e-4
                loss += 1e-3 * rng.normal()
                loss = HIGH if (spec.width, rate) == DIVERGED else loss
                folder = workdir / "runs" / own.run_id
                records.write_jsonl(
                    folder / "record.json",
                    [dataclasses.replace(record, **given, status="finished")],
                )
                table.append_rows(
                    folder / table.FILE,
                    [finished_study.row(own, own.steps, "loss", "ema", loss)],
                )
    records.write_jsonl(workdir / "runs.jsonl", specs)
    return e, specs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(workdir, what the stage returned, page); of rates alone, which is faster."""
    workdir = tmp_path_factory.mktemp("rated")
    e, specs = rated(workdir, steps=100)
    found = fit.run(e, workdir, specs)
    one = [dataclasses.replace(spec, group="") for spec in specs]
    records.write_jsonl(workdir / "runs.jsonl", one)
    with figures_as("svg"):
        text = report.write(workdir).read_text(encoding="utf-8")
    return workdir, found, Page(text)


def test_the_stage_fits_the_best_rates(study):
    workdir, found, _ = study
    assert records.read_jsonl(workdir / "laws.json") == found
    (rates,) = found
    assert (rates.group, rates.weights, rates.size) == (
        "",
        "ema",
        "params_without_embeddings",
    )
    assert len(rates.runs) == 2 * 4 * len(RATES) * 2 and rates.protocol_hash
    kinds = [getattr(b, "reason", "") for b in rates.best]
    assert kinds == [
        *["loss rises abruptly beside the best rate"] * 2,
        *[""] * 4,
        *["best rate at the edge of the grid"] * 2,
    ]
    for b, width in zip(rates.best[2:6], (64, 64, 128, 128), strict=True):
        right = best(width, 1e11 if b.tokens in (355840, 71680) else 2e11)
        assert b.rate == pytest.approx(right, rel=0.25)
    assert rates.law.exponents["params"] < 0 and rates.law.points == 4


def test_the_page_says_what_the_rates_say(study):
    workdir, found, page = study
    assert page.wrong == [] and page.open == []
    assert page.text.count("Best learning rates") == 1
    assert "4 of 8 combinations of size, length and batch have a best" in page.text
    assert "A power law goes through 4 best rates, with the exponents N: \u2212" in (
        page.text
    )
    assert "Refused: The best rate of 2 of 8: best rate at the edge" in page.text
    assert "Half the best rate costs" in page.text
    assert "It was measured at B = 32 alone" in page.text
    rows = table_rows(workdir, "rates")
    assert [float(r["params"]) for r in rows] == [
        float(n) for n, *_ in sorted({run[:3] for run in found[-1].runs})
    ]
    assert float(rows[2]["rate_low"]) < float(rows[2]["rate"]) < 5e-3
    assert rows[0]["rate"] == "" and "64 at 0.016" in rows[0]["refused"]


def test_the_figure_has_a_panel_for_each_budget_and_says_what_is_outside(study):
    read = reading.read(study[0])
    (plot,) = rate_figures.draw(read)
    assert plot.name == "rates"
    assert "Hollow points: sizes whose best rate was refused" in plot.caption
    # Two diverged runs of each budget, and six of the largest size.
    assert "Triangles: 16 runs" in plot.caption
    panels = rate_figures._panels(
        read, read.rates[0], list(rate_figures._cells(read.rates[0]))
    )
    assert [len(cells) for _, cells in panels] == [4, 4]
    assert "1.00\u00d710\u00b9\u00b9" in panels[0][0]


def test_a_cell_that_was_planned_at_one_rate_is_not_asked(tmp_path):
    e, specs = rated(tmp_path, rates=RATES[:2], only=(1e11,))
    (rates,) = [
        f for f in fit.run(e, tmp_path, specs) if isinstance(f, records.RateFit)
    ]
    assert len(rates.best) == 4 and not rates.excluded
    assert {b.budget_flops for b in rates.best} == {1e11}


def test_rates_are_fitted_where_all_sizes_take_the_same_steps(tmp_path):
    e, specs = rated(tmp_path, rates=RATES[:2], steps=100)
    (rates,) = fit.run(e, tmp_path, specs)
    assert {b.reason for b in rates.best} == {"fewer than 3 rates"}
    read = reading.read(tmp_path)
    assert read.fits == () and read.rates == (rates,)
    assert rate_tables.said(rates)[0].startswith("0 of 8 combinations")


def test_without_an_axis_of_rates_there_is_no_such_fit(tmp_path):
    e, specs = rated(tmp_path, rates=RATES[:1])
    found = fit.run(e, tmp_path, specs)
    assert [type(one).__name__ for one in found] == ["FitResult"]


def test_a_metric_of_which_more_is_better_is_refused(tmp_path):
    e, specs = rated(tmp_path, rates=RATES[:2])
    for spec in specs:
        path = tmp_path / "runs" / spec.run_id / table.FILE
        (row,) = table.read_rows(path)[0]
        table.append_rows(path, [dataclasses.replace(row, metric="recall_lite0")])
    cfg = dataclasses.replace(e.fit, metrics=("loss", "recall_lite0"))
    found = fit.run(dataclasses.replace(e, fit=cfg), tmp_path, specs)
    loss, recall = [f for f in found if isinstance(f, records.RateFit)]
    assert "larger values of recall_lite0 are better" in recall.law.reason
    assert len(loss.best) == 8 and recall.best == ()
    names = [name for name, _, _ in rate_tables.named(reading.read(tmp_path))]
    assert len(set(names)) == 2
