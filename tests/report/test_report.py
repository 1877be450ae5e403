"""The report of a synthetic study whose laws are known."""

import base64
import csv
import json
import math
import pathlib
import re
import struct
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
from finished_study import (
    BUDGETS,
    EXPONENT,
    TROUBLE,
    Page,
    figures_as,
    make_workdir,
    sample,
    table_rows,
)

from scaling_ldm import records, report
from scaling_ldm.data import stored_split
from scaling_ldm.records import Refusal
from scaling_ldm.report import format, html, reading, study, style, table
from scaling_ldm.workdir import sample_files

HELD_OUT = {"own": "50 of 1,000 pictures are held out by <b>"}
TRAINING = {"": 950}


@pytest.fixture
def only_svg():
    """Reports whose figures are on the page and have no files."""
    with figures_as("svg"):
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    workdir = make_workdir(tmp_path_factory.mktemp("plain"))
    stored_split.write(workdir, HELD_OUT, TRAINING)
    index = report.write(workdir)
    return workdir, index, Page(index.read_text(encoding="utf-8"))


def test_page_is_balanced_and_needs_nothing_from_elsewhere(plain):
    workdir, index, page = plain
    assert index == workdir / "report" / "index.html"
    assert page.wrong == [] and page.open == []
    assert not {"script", "link", "iframe", "object", "style2"} & set(page.tags)
    loads = {"src", "href", "xlink:href", "data", "srcset"}
    for tag, key, value in page.attributes:
        if key in loads and tag != "a":  # a link loads nothing until it is followed
            assert value.startswith(("data:image/png;base64,", "#")), (tag, key, value)
        assert not key.startswith("on")
    text = index.read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert str(workdir) not in text


def test_every_reference_inside_the_figures_has_its_target(plain):
    _, index, page = plain
    text = index.read_text(encoding="utf-8")
    ids = [value for _, key, value in page.attributes if key == "id"]
    used = set(re.findall(r'(?:url\(|xlink:href=")#([\w-]+)', text))
    assert used and used <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_page_says_what_is_held_out(plain):
    text = plain[1].read_text(encoding="utf-8")
    assert "<p>own: 50 of 1,000 pictures are held out by &lt;b&gt;.</p>" in text


def test_the_page_says_how_often_runs_repeat_their_pictures(plain):
    study = reading.read(plain[0])
    with open(plain[0] / "report" / "tables" / "runs.csv") as file:
        rows = {row["run_id"]: row for row in csv.DictReader(file)}
    seen = []
    for run in study.runs:
        record = study.records.get(run.run_id)
        seen.append((run.images if record is None else record.images) / 950)
        assert float(rows[run.run_id]["epochs"]) == pytest.approx(seen[-1])
    assert max(seen) > 4
    text = plain[1].read_text(encoding="utf-8")
    assert f"runs see their pictures up to {max(seen):.3g} times" in text


def test_colours_are_defined_for_light_and_dark(plain):
    text = plain[1].read_text(encoding="utf-8")
    light, dark = text.split("prefers-color-scheme: dark", 1)
    used = set(re.findall(r"var\((--[\w-]+)\)", text)) - {"--own"}  # a width
    assert any(name.startswith("--c") for name in used)
    for name in used:
        assert f"{name}: #" in light, name
        assert f"{name}: #" in dark, name


def test_links_are_to_files_of_the_report(plain):
    workdir, index, page = plain
    links = [v for tag, key, v in page.attributes if (tag, key) == ("a", "href")]
    assert "figures/isoflop.pdf" in links and "tables/runs.csv" in links
    assert len(links) == page.tags.count("svg") + page.tags.count("table")
    for link in links:
        assert (index.parent / urllib.parse.unquote(link)).is_file(), link


def test_headline_states_the_laws_and_the_held_out_error(plain):
    workdir, _, page = plain
    result = records.loads((workdir / "laws.json").read_text())
    law = result.laws["N_opt"]
    assert abs(law.exponent - EXPONENT) < 0.1  # the study is what it should be
    low, high = law.exponent_interval.low, law.exponent_interval.high
    assert f"N ∝ C{law.exponent:.3f} [{low:.3f}, {high:.3f}]" in page.text
    loss = result.laws["L_opt"]  # its exponent is never without its offset
    i = loss.offset_interval
    said = f"L − {format.loss(loss.offset)} [{format.loss(i.low)}, "
    said += f"{format.loss(i.high)}]{', not identified' * (not loss.identified)} ∝ C"
    assert said + format.plain(loss.exponent) in page.text
    held = {h.quantity: h for h in result.held_out}
    shown = f"N {100 * held['N_opt'].relative_error:+.2f}%".replace("-", "−")
    if abs(held["N_opt"].relative_error) >= 0.1:
        shown = f"N {100 * held['N_opt'].relative_error:+.1f}%".replace("-", "−")
    assert shown in page.text
    assert "C = 1.60×10¹² FLOPs" in page.text
    assert "90% bootstrap intervals" in page.text
    assert page.text.index("How should") < page.text.index("N ∝ C")
    plain_words = page.text.index("For ten times the compute, the best network takes")
    assert plain_words < page.text.index("N ∝ C")
    assert (
        "Not convincing: the fit has 2 doubts (below); runs see their pict" in page.text
    )


def test_held_out_table_agrees_with_the_fit(plain):
    workdir, _, page = plain
    result = records.loads((workdir / "laws.json").read_text())
    rows = table_rows(workdir, "held_out")
    assert [r["quantity"] for r in rows] == ["N_opt", "D_opt", "L_opt"]
    for row, held in zip(rows, result.held_out, strict=True):
        assert float(row["predicted"]) == held.predicted
        assert float(row["predicted_low"]) == held.predicted_interval.low
        assert float(row["measured"]) == held.measured
        inside = held.predicted_interval.low <= held.measured
        inside = inside and held.measured <= held.predicted_interval.high
        assert row["inside"] == ("yes" if inside else "no")
    shown = page.cells("inside the interval")
    assert shown[2][3] == f"{result.held_out[2].measured:.4f}"


def test_both_forms_of_the_loss_law_stand_side_by_side(plain):
    workdir, _, page = plain
    result = records.loads((workdir / "laws.json").read_text())
    rows = table_rows(workdir, "loss_forms")
    assert [r["form"] for r in rows] == ["L = A C^b (E = 0)", "L = E + A C^b"]
    for row, one in zip(rows, result.loss_forms, strict=True):
        assert float(row["left_out_error"]) == one.left_out_error
        assert float(row["predicted"]) == one.held_out.predicted
        assert float(row["exponent"]) == one.law.exponent
        assert float(row["offset"]) == getattr(one.law, "offset", 0.0)
    shown = page.cells("error of a budget left out")
    assert [line[0] for line in shown] == [r["form"] for r in rows]


def test_all_estimators_and_budgets_left_out_are_on_the_page(plain):
    workdir, _, page = plain
    result = records.loads((workdir / "laws.json").read_text())
    rows = table_rows(workdir, "estimates")
    assert [r["estimator"] for r in rows] == [e.estimator for e in result.estimates]
    assert [r["of_the_laws"] for r in rows] == ["yes", *[""] * (len(rows) - 1)]
    first = result.estimates[0]
    assert float(rows[0]["n_opt_0"]) == first.minima[0][1]
    assert float(rows[0]["exponent_low"]) == first.exponent_interval.low
    shown = page.cells("error of L, a run left out")
    assert [line[0] for line in shown] == [r["estimator"] for r in rows]
    assert f"Disagreement index {result.disagreement:.2g}" in page.text
    left_out = table_rows(workdir, "left_out")
    assert [float(r["predicted"]) for r in left_out] == [
        one.predicted for one in result.left_out
    ]


def test_figures_exist_as_png_and_pdf(plain):
    workdir, _, page = plain
    folder = workdir / "report" / "figures"
    names = ["isoflop", "law_D", "law_L", "law_N", "samples", "training"]
    assert sorted(p.stem for p in folder.glob("*.png")) == names
    assert sorted(p.stem for p in folder.glob("*.pdf")) == names
    for name in names:
        head = (folder / f"{name}.png").read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:24])
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and min(width, height) > 300
        assert (folder / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
    assert page.tags.count("svg") == 5  # samples are pictures with captions


def test_ledger_and_its_totals_are_those_of_the_records(plain):
    workdir, _, page = plain
    trained = {
        r.run_id: r
        for path in (workdir / "runs").glob("*/record.json")
        for r in records.read_jsonl(path)
    }
    rows = table_rows(workdir, "ledger")
    assert {r["run_id"] for r in rows} == set(trained)
    for row in rows:
        r = trained[row["run_id"]]
        assert float(row["model_flops"]) == r.flops
        assert float(row["hardware_flops"]) == r.hardware_flops
        assert float(row["six_nd_over_model"]) == pytest.approx(r.six_nd / r.flops)
        assert float(row["device_hours"]) == pytest.approx(2 * r.seconds / 3600)
        assert row["mfu"] == ""
    assert "MFU is absent on cpu: no peak is listed for this device" in page.text
    found = [t for t in page.tables if "device time" in t[0]]
    by_budget, by_run = (t[-1] for t in found)
    assert by_budget[2:] == by_run[2:]
    last = by_run
    spent = sum(r.flops for r in trained.values())
    hours = sum(2 * r.seconds / 3600 for r in trained.values())
    assert last[0] == "all 35"
    assert last[2] == format.scientific(spent)
    minutes, seconds = divmod(round(3600 * hours), 60)
    assert last[9] == f"{minutes} min {seconds} s".replace(" ", "\N{NO-BREAK SPACE}")
    assert f"device time{minutes} min {seconds} s" in page.text


def test_every_csv_is_rectangular_and_the_page_shows_itsrows(plain):
    workdir, _, page = plain
    paths = sorted((workdir / "report" / "tables").glob("*.csv"))
    names = "config environment excluded held_out laws ledger loss_forms minima"
    expected = {*names.split(), "costs", "parametric", "published", "runs", "samples"}
    expected |= {"measurements", "estimates", "left_out"}
    optional = {"parametric"}  # only where the fit did not refuse it
    assert expected - optional <= {p.stem for p in paths} <= expected
    for path in paths:
        with open(path, encoding="utf-8") as f:
            lengths = {len(row) for row in csv.reader(f)}
        assert len(lengths) == 1, path.name
    config = {r["key"]: r["value"] for r in table_rows(workdir, "config")}
    assert config == {"model.depth": "4", "model.note": TROUBLE, "optim.beta2": "0.99"}
    runs = table_rows(workdir, "runs")
    assert len(runs) == 35 == len(page.cells("width × depth"))
    assert {r["status"] for r in runs} == {"finished", "non_finite_loss"}
    failed = next(r for r in runs if r["status"] != "finished")
    assert float(failed["actual_over_planned"]) == pytest.approx(-0.95)
    assert "−95.0%" in page.text


def test_failed_run_is_named_with_its_reason(plain):
    text = plain[2].text
    assert "Run c1.6e+12-w160-d4 ended as non_finite_loss" in text
    assert text.count("loss became nan at step 37 of 900") == 3  # box, table, excluded
    assert "34 of 35" in text


def test_published_law_is_beside_with_both_constants(plain):
    workdir, _, page = plain
    rows = [r for r in table_rows(workdir, "laws") if "2410.08184" in r["source"]]
    assert {r["quantity"] for r in rows} == {"N_opt", "D_opt", "L_opt"}
    n = next(r for r in rows if r["quantity"] == "N_opt")
    assert (float(n["coef"]), float(n["exponent"])) == (0.0009, 0.5681)
    assert float(n["at_top_budget"]) == pytest.approx(0.0009 * 1.6e12**0.5681)
    assert "1.0×10¹⁷ to 6.0×10¹⁸" in page.text
    assert "extrapolated" in page.text


def test_pictures_carry_the_pixels_and_captions_are_escaped(plain):
    workdir, index, page = plain
    text = index.read_text(encoding="utf-8")
    assert "<script" not in text
    assert page.text.count("alert('caption')") == 2  # caption and configuration
    sources = [v for t, k, v in page.attributes if t == "img" and k == "src"]
    assert len(sources) == 16
    matplotlib_image = pytest.importorskip("matplotlib.image")
    target = workdir / "first.png"
    target.write_bytes(base64.b64decode(sources[0].split(",", 1)[1]))
    pixels = matplotlib_image.imread(target)[..., :3] * 255
    stored = np.load(workdir / "samples" / "images.npy")[0]
    np.testing.assert_allclose(pixels, stored, atol=0.01)


def test_same_inputs_same_bytes_and_later_reports_leave_nothing_stale(plain, tmp_path):
    stored_split.write(make_workdir(tmp_path), HELD_OUT, TRAINING)
    index = report.write(tmp_path)
    assert index.read_bytes() == plain[1].read_bytes()
    written = list((plain[0] / "report").rglob("*.*"))
    assert len(written) > 20
    for path in written:
        twin = tmp_path / path.relative_to(plain[0])
        assert path.read_bytes() == twin.read_bytes(), path.name

    (tmp_path / "laws.json").unlink()
    (tmp_path / "samples" / "record.json").unlink()
    with figures_as("svg"):
        page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert page.wrong == []
    assert "--stages fit" in page.text
    for empty in ("Samples", "Held-out budget", "Points left out", "Parametric"):
        assert empty not in page.text
    names = {p.stem for p in (tmp_path / "report" / "figures").iterdir()}
    assert names == {"isoflop", "training"}
    assert not (tmp_path / "report" / "tables" / "held_out.csv").exists()


def test_refused_budget_is_grey_and_explained(tmp_path, only_svg):
    index = report.write(make_workdir(tmp_path, "refused", lean=True))
    page = Page(index.read_text(encoding="utf-8"))
    result = records.loads((tmp_path / "laws.json").read_text())
    refusal = result.parabolas[0]
    assert isinstance(refusal, Refusal)
    row = page.cells("N at the minimum")[0]
    assert row[0] == "1.00×10¹¹"
    assert refusal.reason in row[-1] and refusal.detail in row[-1]
    found = reading.read(tmp_path)
    assert found.minima()[BUDGETS[0]] == refusal


def test_refused_laws_are_the_headline(tmp_path, only_svg):
    index = report.write(make_workdir(tmp_path, "few", lean=True))
    page = Page(index.read_text(encoding="utf-8"))
    assert page.wrong == []
    result = records.loads((tmp_path / "laws.json").read_text())
    refusal = result.laws["N_opt"]
    assert isinstance(refusal, Refusal)
    assert f"Refused: N_opt, D_opt, L_opt: {refusal.why}." in page.text
    assert "N ∝" not in page.text
    assert "do not say which size is best at a larger budget" in page.text
    (predicted,) = {h.why for h in result.held_out}
    assert "Refused: N_opt held out at 2e+11 FLOPs, D_opt held" in page.text
    assert f"L_opt held out at 2e+11 FLOPs: {predicted}." in page.text
    rows = table_rows(tmp_path, "held_out")
    assert [(r["quantity"], float(r["budget_flops"])) for r in rows] == [
        (f"{q}_opt held out", 2e11) for q in "NDL"
    ]


def test_plan_only_and_damaged_files_are_notes_not_crashes(tmp_path, only_svg):
    make_workdir(tmp_path)
    first = sorted((tmp_path / "runs").iterdir())[0]
    (first / "record.json").write_text("{")
    with open(first / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 99')
    (tmp_path / "laws.json").write_text('{"record": "FitResult"}')
    (tmp_path / "samples" / "images.npy").write_bytes(b"no array")
    (tmp_path / "experiment.json").unlink()
    (tmp_path / "environment.json").write_text("[]")
    text = Page(report.write(tmp_path).read_text(encoding="utf-8")).text
    for words in (
        f"runs/{first.name}/record.json could not be read",
        f"runs/{first.name}/metrics.jsonl: 1 unreadable line passed over",
        "laws.json could not be read",
        "samples/images.npy could not be read",
        "environment.json could not be read",
        f"1 of 35 runs have no record yet ({first.name})",
    ):
        assert words in text, words

    for name in ("images.npy", "record.json"):
        make_workdir(tmp_path / name)
        sample_files.add_files(tmp_path / name, "", ["images.npy", "record.json"])
        whole = reading.read(tmp_path / name)
        assert whole.images is not None and not whole.notes
        path = tmp_path / name / "samples" / name
        path.write_bytes(path.read_bytes().replace(b"red", b"tan") + b" ")
        found = reading.read(tmp_path / name)
        assert found.images is None
        assert found.notes == (
            f"samples/{name} is not as it was written: the stage generate makes it "
            "again",
        )

    plan = tmp_path / "other"
    records.write_jsonl(plan / "runs.jsonl", reading.read(tmp_path).runs)
    text = Page(report.write(plan).read_text(encoding="utf-8")).text
    assert "35 of 35 runs have no record yet" in text
    assert "No run has been trained yet" in text


def test_a_workdir_may_be_a_relative_path(tmp_path, monkeypatch):
    make_workdir(tmp_path / "w")
    whole = reading.read(tmp_path / "w")
    monkeypatch.chdir(tmp_path)
    found = reading.read(pathlib.Path("w"))
    assert found.records == whole.records and found.records
    assert found.curves.keys() == whole.curves.keys() and found.curves
    assert found.notes == whole.notes


def test_no_plan_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"runs\.jsonl.*scaling_ldm\.main"):
        report.write(tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_step_logged_again_after_a_restart_counts_once(tmp_path):
    make_workdir(tmp_path, "unfitted")
    first = sorted((tmp_path / "runs").iterdir())[0]
    lines = [(1, 5.0), (2, 4.0), (3, 3.5), (2, 3.9), (3, 3.0)]
    (first / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": s, "loss": y, "flops": s, "seconds": s}) + "\n"
            for s, y in lines
        )
    )
    curve = reading.read(tmp_path).curves[first.name]
    np.testing.assert_array_equal(curve[:, 0], [1, 2, 3])
    np.testing.assert_array_equal(curve[:, 1], [5.0, 3.9, 3.0])


def test_smoothing_is_a_weighted_mean_of_the_past():
    values = np.array([3.0, 1.0, 2.0])
    weights = 0.9 ** np.array([2, 1, 0])
    np.testing.assert_allclose(
        study.smooth(values)[-1], np.average(values, weights=weights), rtol=1e-12
    )
    np.testing.assert_allclose(study.smooth(np.full(9, 0.4)), 0.4, rtol=1e-12)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (format.plain(0.56812), "0.568"),
        (format.plain(-0.027319), "−0.0273"),
        (format.plain(0.99996), "1.00"),
        (format.plain(12345.6), "12300"),
        (format.plain(math.nan), "nan"),
        (format.plain(None), "–"),
        (format.scientific(1.6e12), "1.60×10¹²"),
        (format.scientific(0.0009, 1), "9×10⁻⁴"),
        (format.scientific(9.999e11), "1.00×10¹²"),
        (format.prefixed(999_700), "1.00\N{NO-BREAK SPACE}M"),
        (format.prefixed(12_345), "12.3\N{NO-BREAK SPACE}k"),
        (format.prefixed(320), "320"),
        (format.loss(0.312345), "0.3123"),
        (format.percent(-0.0314159), "−3.14%"),
        (format.percent(0.314159), "+31.4%"),
        (format.duration(1.9999e-5), "20.0\N{NO-BREAK SPACE}\N{MICRO SIGN}s"),
        (format.duration(0.0016612), "1.66\N{NO-BREAK SPACE}ms"),
        (format.duration(0.0), "0\N{NO-BREAK SPACE}s"),
        (format.duration(59.94), "59.9\N{NO-BREAK SPACE}s"),
        (format.duration(None), "–"),
    ],
)
def test_numbers_are_rounded_as_promised(shown, text):
    assert shown == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.96, "1 min 0 s"),
        (336.6, "5 min 37 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (8099.0, "2 h 15 min"),
        (359_999.0, "100 h 0 min"),
        (4.43e6, "1230 h"),
    ],
)
def test_a_long_time_is_shown_in_its_units(seconds, text):
    assert format.duration(seconds) == text.replace(" ", "\N{NO-BREAK SPACE}")


@pytest.mark.slow  # test_architecture.py imports it beside other light modules
def test_reading_a_study_needs_no_accelerator_stack():
    code = (
        "import sys, scaling_ldm.report; "
        "print(sorted({'jax', 'flax', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    root = pathlib.Path(report.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        ("64 x 3 at 256 px", ["64 x 3", "256 px"]),
        ("(2334 [2218, 2412])", ["[2218, 2412]"]),
        ("on v100-sxm2-32gb, tpu-v4", ["v100-sxm2-32gb", "tpu-v4"]),
        ("8.247e12-64x3 of 60M-2B.", ["8.247e12-64x3", "60M-2B"]),
        ("a well-known text, 1 - 2 <b> [<i>, 2]", []),
        ("a" * 17 + "1-2", []),  # too long for any line to keep
    ],
)
def test_what_belongs_together_is_not_broken_between_lines(words, whole):
    text = html.prose(words)
    assert re.findall(r'<span class="whole">(.*?)</span>', text) == whole
    assert "".join(Page(f"<p>{text}</p>").words) == words
    assert ".whole { white-space: nowrap; }" in style.sheet("")


def test_a_long_table_beside_a_figure_is_folded_away():
    columns = (table.cell("n", "n", str),)
    for rows in (1, 12, 13):
        of = tuple({"n": n} for n in range(rows))
        text = html.shown(
            "Title", table.Table(name="a", caption="", rows=of, columns=columns)
        )
        folded = text.startswith(f"<details><summary>Title ({rows})</summary>")
        assert folded == (rows == 13) and text.startswith("<h3>Title</h3>") != folded
        assert text.count("<td>") == rows
    assert html.shown("Title", None) == ""


@pytest.mark.parametrize(("side", "width"), [(1, 100), (8, 96), (32, 96), (64, 128)])
def test_a_small_picture_leaves_room_for_the_words_under_it(tmp_path, side, width):
    make_workdir(tmp_path, "unfitted", lean=True)
    sample(tmp_path, records.read_jsonl(tmp_path / "runs.jsonl")[0].run_id)
    np.save(tmp_path / "samples/images.npy", np.zeros((3, side, side, 3), np.uint8))
    text = "".join(report.pictures.samples(reading.read(tmp_path)))
    assert f"repeat(auto-fill, min(100%, {width}px))" in text


def test_every_number_says_how_its_pictures_were_sampled(tmp_path, evaluated):
    make_workdir(tmp_path, "unfitted", lean=True)
    run_id = records.read_jsonl(tmp_path / "runs.jsonl")[0].run_id
    how = {"sampler": "dpm++2m", "steps": 12, "guidance": 1.5, "seed": 0}
    found = [
        evaluated(run_id=run_id, step=1, protocol=how),
        evaluated(run_id=run_id, step=2, protocol={"metric": "recon"}, train_flops=2.0),
    ]
    records.write_jsonl(tmp_path / "evaluations.jsonl", found)
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    rows = {row["step"]: row for row in table_rows(tmp_path, "evaluations")}
    assert [rows["1"][k] for k in how] == ["dpm++2m", "12", "1.5", "0"]
    assert [rows["2"][k] for k in how] == [""] * 4
    shown = page.cells("evaluations a picture")
    ends = sorted(tuple(row[-5:-1]) for row in shown)
    assert ends == sorted([("dpm++2m", "12", "1.5", "0"), (format.NONE,) * 4])


def test_measured_numbers_are_shown_with_their_interval_and_protocol(
    tmp_path, evaluated, only_svg
):
    make_workdir(tmp_path, "unfitted", lean=True)
    run_id = records.read_jsonl(tmp_path / "runs.jsonl")[0].run_id
    found = [
        evaluated(
            run_id=run_id,
            step=step,
            train_flops=1e9 * step,
            metric="fd_<lite0>",
            value=value,
            low=value - 3,
            high=value + 4,
            doubt="few < many",
        )
        for step, value in ((20, 51.0), (10, 77.0))
    ]
    records.write_jsonl(tmp_path / "evaluations.jsonl", found)
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert page.wrong == [] and page.open == []
    assert "Measured pictures" in page.text and "fd_<lite0>" in page.text
    assert "51.0 [48.0, 55.0]" in page.text and "0123456789abcdef" in page.text
    assert page.text.count("In doubt: fd_<lite0>: few < many.") == 1
    rows = table_rows(tmp_path, "evaluations")
    assert [row["step"] for row in rows] == ["10", "20"]
    (tmp_path / "evaluations.jsonl").write_text("{")
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "evaluations.jsonl could not be read" in page.text
    assert "Measured pictures" not in page.text
