"""The stage that fits: any metric of the table, in every group, or a refusal."""

import dataclasses

import finished_study
import pytest
from damages import unsealed
from finished_study import Page, make_workdir, table_rows

from scaling_ldm import config, records, report
from scaling_ldm import study as entry
from scaling_ldm.records import table
from scaling_ldm.report import reading
from scaling_ldm.stages import fit
from scaling_ldm.workdir import exit_status


def fitted(workdir, metrics=("loss",), weights="", protocols=(), **options):
    """The results of the stage, which are those of laws.json."""
    cfg = config.FitConfig(
        metrics=metrics, weights=weights, protocols=protocols, bootstrap=50, **options
    )
    kept = config.OptimizerConfig(averages=("ema",))  # as in finished_study
    e = dataclasses.replace(config.Experiment(), fit=cfg, optimizer=kept)
    found = fit.run(e, workdir, records.read_jsonl(workdir / "runs.jsonl"))
    assert list(records.read_jsonl(workdir / "laws.json")) == found
    return found


@pytest.fixture
def study(tmp_path):
    """study(kind): a working directory without training curves."""
    return lambda kind="plain": make_workdir(tmp_path / "w", kind, lean=True)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(workdir, results by metric, page): losses, bounds and numbers of pictures."""
    workdir = make_workdir(tmp_path_factory.mktemp("reported") / "w", lean=True)
    rows = [r for r in records.read_table(workdir) if r.metric == "loss"]
    for row in rows:
        path = workdir / "runs" / row.run_id / table.FILE
        bound = {"metric": "vlb", "value": 10 * row.value, "protocol_hash": "v"}
        table.put_rows(path, [dataclasses.replace(row, **bound)])
    for metric in ("fd_lite0", "recall_lite0"):
        finished_study.evaluate(workdir, metric, "ema")
    found = fitted(workdir, ("loss", "fd_lite0", "vlb", "recall_lite0"))
    page = Page(report.write(workdir).read_text(encoding="utf-8"))
    return workdir, {result.metric: result for result in found}, page


def test_each_metric_has_its_laws_from_the_ends_of_runs(study):
    workdir = study()
    finished_study.add_curves(workdir)  # losses before the end are not fitted
    before = fitted(workdir)[0]
    finished_study.evaluate(workdir, "fd_lite0", "ema")
    # Neither of an earlier checkpoint, nor of weights in a folder.
    early = {"step": 3, "value": 7.0, "low": 7.0, "high": 7.0}
    finished_study.evaluate(workdir, "fd_lite0", "ema", **early)
    finished_study.evaluate(workdir, "fd_lite0", "ema", checksum="c", value=7.0)
    loss, fd = fitted(workdir, ("loss", "fd_lite0"))
    assert loss == before and loss.protocol_hash
    assert (fd.metric, fd.weights, fd.protocol_hash) == ("fd_lite0", "ema", "a" * 16)
    for quantity, scale in (("N_opt", 1), ("D_opt", 1), ("L_opt", 100)):
        law, of_loss = fd.laws[quantity], loss.laws[quantity]
        assert isinstance(law, (records.PowerLaw, records.OffsetLaw))
        assert law.exponent == pytest.approx(of_loss.exponent, rel=1e-6)
        assert law.coef == pytest.approx(scale * of_loss.coef, rel=1e-6)
    (left_out,) = fd.excluded
    assert "c1.6e+12-w160-d4: non_finite_loss" in left_out


@pytest.mark.slow
def test_the_report_shows_the_laws_of_each_metric(reported):
    workdir, _, page = reported
    assert page.wrong == [] and page.open == []
    for words in ("validation loss, average ema", "FD-Lite0, average ema"):
        assert f"Laws: {words}" in page.text
        assert f"{words}For ten times the compute" in page.text.replace("; ", "")
    names = {path.stem for path in (workdir / "report" / "figures").glob("*.png")}
    kinds = ("isoflop", "law_N", "law_D", "law_L")
    assert {f"{kind}{end}" for kind in kinds for end in ("", "_fd_lite0")} <= names
    loss, fd = (table_rows(workdir, f"minima{end}") for end in ("", "_fd_lite0"))
    assert [float(r["l_opt"]) for r in fd] == pytest.approx(
        [100 * float(r["l_opt"]) for r in loss]
    )
    runs = table_rows(workdir, "runs")
    assert float(runs[0]["fd_lite0"]) == 100 * float(runs[0]["loss_average"])
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))


def test_the_fields_of_the_fit_reach_it(study):
    workdir = study()
    (auto,) = fitted(workdir)
    (cubic,) = fitted(workdir, estimator="cubic", extend=2.0, huber=1e-3)
    (windowed,) = fitted(workdir, estimator="parabola", window=3.0)
    assert auto.estimator in ("parabola", "shape") and cubic.estimator == "cubic"
    top = auto.laws["N_opt"].x_max
    assert auto.laws["N_opt"].band[-1][0] == pytest.approx(4 * top)
    assert cubic.laws["N_opt"].band[-1][0] == pytest.approx(2 * top)
    assert any("outside the window" in line for line in windowed.excluded)
    for found, width in ((auto, None), (cubic, 1e-3)):
        if isinstance(found.parametric, records.Parametric):
            assert found.parametric.huber_delta == width


def test_raw_weights_and_the_training_loss(study):
    workdir = study()
    (loss,) = fitted(workdir, weights="raw")
    assert (loss.metric, loss.weights) == ("loss", "raw")
    (trained,) = fitted(workdir, ("train_loss_smoothed",))
    assert (trained.metric, trained.weights) == ("train_loss_smoothed", "raw")
    by_budget = zip(loss.parabolas, trained.parabolas, strict=True)
    assert [b.l_opt - a.l_opt for a, b in by_budget] == pytest.approx([0.01] * 5)


def test_a_metric_that_no_run_has_is_refused_by_name(study):
    workdir = study()
    finished_study.evaluate(workdir, "fd_lite0", "ema")
    before = (workdir / "laws.json").read_text()
    there = "there are fd_lite0, loss, train_loss_smoothed"
    with pytest.raises(config.ConfigError, match=rf"no run has fd_lite1 .*\? {there}"):
        fitted(workdir, ("loss", "fd_lite1"))
    said = "config.fit.weights = 'ema2': no run has validation loss of ema2 .*ema, raw"
    with pytest.raises(config.ConfigError, match=said):
        fitted(workdir, weights="ema2")
    assert (workdir / "laws.json").read_text() == before


def test_an_unknown_metric_ends_the_command_as_bad_configuration(study, capsys):
    workdir = study()
    (workdir / "experiment.json").unlink()
    e = config.default()
    e.fit.metrics, e.fit.bootstrap = ("fid",), 50
    stages = entry._Study(
        config.resolve(e), workdir, ("fit",), True, None, (None, None, None)
    )
    with pytest.raises(config.ConfigError) as refused:
        stages._fit()
    assert exit_status.of(refused.value) == exit_status.EXIT["bad configuration"]


def test_before_anything_is_trained_every_run_is_named(study):
    workdir = study()
    for path in workdir.glob("runs/*/*"):
        path.unlink()
    (result,) = fitted(workdir, ("fid",))
    assert len(result.excluded) == 35
    assert all(line.endswith(": not trained yet") for line in result.excluded)


def test_two_protocols_are_refused_unless_one_has_every_run(study):
    workdir = study()
    finished_study.evaluate(workdir, "fd_lite0", "ema")
    lines = (workdir / "evaluations.jsonl").read_text().splitlines(keepends=True)
    plain = [unsealed(line.encode()).decode() for line in lines]
    other = [line.replace("a" * 16, "b" * 16) for line in plain]
    (workdir / "evaluations.jsonl").write_text("".join(lines[:20] + other[20:]))
    (result,) = fitted(workdir, ("fd_lite0",))
    law = result.laws["N_opt"]
    assert isinstance(law, records.Refusal)
    said = f"{'a' * 16} (20 runs), {'b' * 16} (14 runs)"
    assert law.reason == "measured by several protocols" and said in law.detail
    assert result.protocol_hash == ""
    page = Page(report.write(workdir).read_text(encoding="utf-8"))
    assert said in page.text
    (workdir / "evaluations.jsonl").write_text("".join(lines + other[20:]))
    (result,) = fitted(workdir, ("fd_lite0",))
    assert result.protocol_hash == "a" * 16
    assert isinstance(result.laws["N_opt"], records.PowerLaw)


def test_of_two_protocols_that_every_run_has_one_is_chosen(study):
    """Without a choice nothing is fitted, and the result says how they differ."""
    workdir = study()
    finished_study.evaluate(workdir, "fd_lite0", "ema", protocol={"ema": 1, "steps": 8})
    other = {"ema": 1, "steps": 50}
    changes = {"protocol": other, "protocol_hash": "b" * 16, "value": 3.0}
    finished_study.evaluate(workdir, "fd_lite0", "ema", **changes)
    (result,) = fitted(workdir, ("fd_lite0",))
    law = result.laws["N_opt"]
    assert isinstance(law, records.Refusal) and result.protocol_hash == ""
    differ = f"They differ in steps: 8 in {'a' * 16}, 50 in {'b' * 16}."
    assert "2 have all of 34 runs" in law.detail and differ in law.detail
    assert "config.fit.protocols" in law.detail
    (chosen,) = fitted(workdir, ("fd_lite0",), protocols=("aaa",))
    assert chosen.protocol_hash == "a" * 16
    assert isinstance(chosen.laws["N_opt"], records.PowerLaw)
    # The choice is of one metric; the loss was measured by one protocol alone.
    loss, fd = fitted(workdir, ("loss", "fd_lite0"), protocols=("bb",))
    assert loss.protocol_hash and fd.protocol_hash == "b" * 16
    said = r"no number that is fitted has a protocol cc\.\.\.; there are aaaa"
    with pytest.raises(config.ConfigError, match=said):
        fitted(workdir, ("fd_lite0",), protocols=("cc",))


@pytest.mark.slow
def test_bounds_of_held_out_data_are_fitted_like_losses(reported):
    _, found, page = reported
    law, same = (found[metric].laws["L_opt"] for metric in ("vlb", "loss"))
    assert law.coef == pytest.approx(10 * same.coef)
    assert law.exponent == pytest.approx(same.exponent)
    assert "Laws: variational bound in bits per dim, average ema" in page.text


@pytest.mark.slow
def test_more_is_better_has_no_laws(reported, study, capsys):
    _, found, page = reported
    assert isinstance(found["loss"].laws["N_opt"], records.PowerLaw)
    reasons = {law.reason for law in found["recall_lite0"].laws.values()}
    assert reasons == {"larger is better"}
    assert page.wrong == [] and "larger is better" in page.text
    workdir = study("few")
    finished_study.evaluate(workdir, "recall_lite0", "ema")
    capsys.readouterr()
    fitted(workdir, ("recall_lite0",))
    assert "refused: N_opt: larger is better" in capsys.readouterr().err


def test_rows_that_contradict_one_another_are_a_refusal(study):
    workdir = study()
    spec = records.read_jsonl(workdir / "runs.jsonl")[0]
    path = workdir / "runs" / spec.run_id / table.FILE
    again = finished_study.row(spec, spec.steps, "loss", "ema", 9.0)
    table.append_rows(path, [again])
    with pytest.raises(config.ConfigError, match="cannot be fitted: .* is .* and 9.0"):
        fitted(workdir)
    notes = reading.read(workdir).notes
    (note,) = [note for note in notes if "are not used" in note]
    assert spec.run_id in note and str(workdir) not in note


@pytest.mark.slow
def test_learning_curves_are_drawn_of_rows_before_the_end(reported, study):
    without = reported[0] / "report" / "figures"
    assert "There are no learning curves: no run was measured" in reported[2].text
    assert without.exists() and not (without / "learning.png").exists()
    workdir = study("few")
    figure = workdir / "report" / "figures" / "learning.png"
    finished_study.add_curves(workdir)
    page = Page(report.write(workdir).read_text(encoding="utf-8"))
    assert figure.exists() and page.wrong == []
    assert "no learning curves" not in page.text and "Seeds: " not in page.text
    assert "Learning curves: validation loss, average ema, against" in page.text
    rows = table_rows(workdir, "strata")
    assert len(rows) == 13 and {"t0", "t9"} <= rows[0].keys()
    ends = {r["run_id"]: r["loss_average"] for r in table_rows(workdir, "runs")}
    for spec in records.read_jsonl(workdir / "runs.jsonl"):
        held, _ = table.read_rows(workdir / "runs" / spec.run_id / table.FILE)
        of_end = [
            str(r.value)
            for r in held
            if (r.metric, r.weights, r.step) == ("loss", "ema", spec.steps)
        ]
        assert [ends[spec.run_id]] == (of_end or [""])  # a failed run has none
    every = table_rows(workdir, "measurements")
    assert len(every) == len(records.read_table(workdir))
    assert len({r["run_id"] for r in every}) == 14  # of the failed run, too
