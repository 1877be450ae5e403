"""The report of a study of two groups with two seeds each, whose laws are known."""

import dataclasses

import finished_study
import numpy as np
import pytest
from finished_study import BUDGETS, Page, figures_as, make_workdir, table_rows

from scaling_ldm import config, records, report
from scaling_ldm.records import table
from scaling_ldm.report import learning_figures, reading
from scaling_ldm.stages import fit

GROUPS = ("learning_rate 2e-3", "learning_rate 4e-3")
WORSE = 0.05  # the second group's losses, above the first one's
SEED = 0.004  # the second seed's losses, above the first one's


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A workdir: each run of the plain study for two rates and two seeds."""
    workdir = tmp_path_factory.mktemp("grouped")
    make_workdir(workdir, "unfitted", lean=True)
    specs, written = [], 0
    for spec in records.read_jsonl(workdir / "runs.jsonl"):
        (record,) = records.read_jsonl(workdir / "runs" / spec.run_id / "record.json")
        rows, _ = table.read_rows(workdir / "runs" / spec.run_id / table.FILE)
        for i, group in enumerate(GROUPS):
            for seed in (0, 1):
                rate = (2e-3, 4e-3)[i]
                run_id = f"{spec.run_id}-lr{rate}-seed{seed}"
                overrides = {"optimizer.learning_rate": rate, "train.seed": seed}
                given = {"run_id": run_id, "seed": seed, "learning_rate": rate}
                own = dataclasses.replace(
                    spec, **given, overrides=overrides, group=group
                )
                specs.append(own)
                written += 1
                folder = workdir / "runs" / run_id
                records.write_jsonl(
                    folder / "record.json", [dataclasses.replace(record, **given)]
                )
                table.append_rows(
                    folder / table.FILE,
                    [
                        finished_study.row(
                            own,
                            r.step,
                            r.metric,
                            r.weights,
                            r.value + WORSE * i + SEED * seed,
                        )
                        for r in rows
                    ],
                )
    assert written == 4 * 35
    records.write_jsonl(workdir / "runs.jsonl", specs)
    kept = config.OptimizerConfig(averages=("ema",))  # as in finished_study
    cfg = config.FitConfig(bootstrap=100)
    e = dataclasses.replace(config.Experiment(), fit=cfg, optimizer=kept)
    fit.run(e, workdir, specs)
    with figures_as("svg"):
        return workdir, Page(report.write(workdir).read_text(encoding="utf-8"))


def test_each_group_has_its_laws(grouped):
    workdir, _ = grouped
    results = records.read_jsonl(workdir / "laws.json")
    assert [r.group for r in results] == list(GROUPS)
    for result in results:
        assert isinstance(result.laws["N_opt"], records.PowerLaw)
        assert [p.points for p in result.parabolas] == [14] * 4 + [12]  # one run failed
    a, b = results
    np.testing.assert_allclose(
        [p.n_opt for p in a.parabolas], [p.n_opt for p in b.parabolas], rtol=1e-9
    )
    np.testing.assert_allclose(
        [p.l_opt + WORSE for p in a.parabolas], [p.l_opt for p in b.parabolas]
    )


def test_seeds_of_a_learning_curve_are_told_apart(grouped):
    study = reading.read(grouped[0])
    (part, _) = study.parts()
    run = part.runs[0]
    earlier = finished_study.row(run, 1, "loss", "ema", 1.0)
    rows = {**part.rows, run.run_id: (earlier, *part.rows[run.run_id])}
    found = learning_figures.learning(dataclasses.replace(part, rows=rows))
    assert "Seeds: circles 0, squares 1." in found.caption
    for group in GROUPS:
        assert f"{group}. There are no learning curves" in grouped[1].text


def test_each_group_has_a_section_with_its_name(grouped):
    workdir, page = grouped
    assert page.wrong == [] and page.open == []
    for group in GROUPS:
        assert f"IsoFLOP curves: {group}" in page.text
        assert f"Laws: {group}" in page.text
        assert f"{group}. Loss of every finished run" in page.text  # of the figure
    headline = page.text[: page.text.index("runs finished")]
    assert "All 2 groups" not in headline  # their laws of L differ
    first, second = (headline.index(group) for group in GROUPS)
    assert 0 < first < headline.index("At the best size") < second
    assert headline.count("At the best size for each budget") == 2
    assert page.text.count("Published exponents: N, D or L") == 1
    names = {path.stem for path in (workdir / "report" / "figures").glob("*.png")}
    ends = ("learning_rate_2e_3", "learning_rate_4e_3")
    kinds = ("isoflop", "law_N", "law_D", "law_L")
    assert {f"{kind}_{end}" for kind in kinds for end in ends} <= names
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert ids and len(ids) == len(set(ids))
    rows = table_rows(workdir, "minima_learning_rate_4e_3")
    assert {row["group"] for row in rows} == {GROUPS[1]}
    assert len(rows) == len(BUDGETS)


def test_losses_are_listed_with_their_spread_over_seeds(grouped):
    workdir, page = grouped
    rows = table_rows(workdir, "losses")
    assert len(rows) == 2 * 35
    by_key = {(r["group"], r["budget_flops"], r["width"]): r for r in rows}
    assert len(by_key) == 70
    failed = [r for r in rows if r["finished"] == "0"]
    assert len(failed) == 2 and {r["loss"] for r in failed} == {""}
    for (group, budget, width), row in by_key.items():
        if row["finished"] == "0":
            continue
        assert row["runs"] == row["finished"] == "2"
        assert float(row["deviation"]) == pytest.approx(SEED / 2**0.5)
        low, high = float(row["loss_low"]), float(row["loss_high"])
        assert high - low == pytest.approx(SEED)
        assert float(row["loss"]) == pytest.approx((low + high) / 2)
        if group == GROUPS[1]:
            other = float(by_key[GROUPS[0], budget, width]["loss"])
            assert float(row["loss"]) - other == pytest.approx(WORSE)
    assert "Final losses" in page.text
    assert "2.83×10⁻³" in page.text  # 0.004 / sqrt 2


def test_what_is_true_of_every_group_is_said_once(grouped):
    found = reading.read(grouped[0])
    refusal = records.Refusal(quantity="N_opt", reason="too few budgets", detail="")
    without = {"laws": {"N_opt": refusal}, "held_out": ()}
    none = [dataclasses.replace(f, **without) for f in found.fits]
    same = dataclasses.replace(found, fits=tuple(none))
    text = Page(report.page._headline(same)).text
    assert text.startswith("All 2 groupsThese runs do not say which size is best")
    assert text.count("too few budgets") == 1
    other = dataclasses.replace(refusal, reason="no minimum")
    differing = (none[0], dataclasses.replace(none[1], laws={"N_opt": other}))
    text = Page(report.page._headline(dataclasses.replace(found, fits=differing))).text
    a, b = (text.index(group) for group in GROUPS)
    assert a < text.index("too few budgets") < b < text.index("no minimum")


def test_the_parts_of_a_study(grouped):
    workdir, _ = grouped
    found = reading.read(workdir)
    parts = found.parts()
    assert [p.group for p in parts] == list(GROUPS)
    assert [len(p.runs) for p in parts] == [70, 70]
    assert [p.fit.group for p in parts] == list(GROUPS)
    alike = dataclasses.replace(
        found,
        runs=tuple(
            dataclasses.replace(run, group=group)
            for run, group in zip(found.runs, ("a b", "a-b", "a_b"), strict=False)
        ),
    )
    assert len({p.suffix for p in alike.parts()}) == 3


def test_a_study_of_one_group_is_its_only_part(tmp_path):
    found = reading.read(make_workdir(tmp_path, lean=True))
    assert found.parts() == [found] and not found.varied
    assert found.suffix == "" and found.fit.group == ""


def test_what_was_spent_on_pretraining_has_a_column_where_there_is_some(tmp_path):
    for name, before in (("random", 0.0), ("started", 2.5e9), ("unknown", None)):
        workdir = tmp_path / name
        make_workdir(workdir, kind="few", lean=True)
        specs = records.read_jsonl(workdir / "runs.jsonl")
        specs = [dataclasses.replace(s, pretraining_flops=before) for s in specs]
        records.write_jsonl(workdir / "runs.jsonl", specs)
        with figures_as("svg"):
            page = report.write(workdir).read_text(encoding="utf-8")
        found = {row.get("pretraining_flops") for row in table_rows(workdir, "runs")}
        assert found == {{0.0: None, 2.5e9: "2500000000.0", None: ""}[before]}
        # A column that is empty is not shown.
        assert ("FLOPs of pretraining" in page) == (name == "started")
