"""The report of a synthetic study whose laws are known."""

import base64
import csv
import dataclasses
import json
import math
import pathlib
import re
import shutil
import struct
import subprocess
import sys
from html import parser

import numpy as np
import pytest
from matplotlib.figure import Figure

from scaling_ldm import frontier, records, report
from scaling_ldm.laws import fit
from scaling_ldm.records import (
    Cell,
    Crossing,
    Refusal,
    RunSpec,
    SampleRecord,
    TrainRecord,
)
from scaling_ldm.report import format, frontier_figures, style, table
from scaling_ldm.report import page as html
from scaling_ldm.report import study as reading

BUDGETS = (1e11, 2e11, 4e11, 8e11, 1.6e12)
EXPONENT = 0.47  # of the N law that the losses are made from
TROUBLE = "<script>alert('caption')</script> & \"quoted\""
VOID = {"meta", "br", "img", "hr", "link", "input"}


def make_workdir(
    workdir: pathlib.Path, kind: str = "plain", lean: bool = False
) -> pathlib.Path:
    """A finished study: 5 budgets x 7 sizes, one failed run, samples and a fit.

    Args:
      workdir: where to write.
      kind: "plain"; "refused": the smallest budget's minimum is outside its grid;
        "few": two budgets only, so that every law is refused; "unfitted": no
        laws.json and no samples.
      lean: without training curves and samples, whose figures take time.
    """
    rng = np.random.default_rng(0)
    budgets = BUDGETS[:2] if kind == "few" else BUDGETS
    specs, trained = [], []
    for budget in budgets:
        best = 1.4e5 * (budget / 4e11) ** EXPONENT
        floor = 0.31 * (budget / 4e11) ** -0.09
        centre = best * 8 if kind == "refused" and budget == budgets[0] else best
        for i, width in enumerate((32, 48, 64, 80, 96, 128, 160)):
            n = int(centre * 5 ** ((i - 3) / 3))
            loss = floor + 0.035 * math.log(n / best) ** 2 + rng.normal(0, 0.003)
            spec, record = _run(budget, n, width, loss)
            if budget == budgets[-1] and i == 6:
                record = dataclasses.replace(
                    record,
                    status="non_finite_loss",
                    detail="loss became nan at step 37 of 900",
                    **{
                        k: getattr(record, k) / 20
                        for k in ("flops", "hardware_flops", "six_nd", "seconds")
                    },
                    validation_loss=math.nan,
                    validation_loss_ema=math.nan,
                )
            specs.append(spec)
            trained.append(record)
    records.write_jsonl(workdir / "runs.jsonl", specs)
    for spec, record in zip(specs, trained, strict=True):
        folder = workdir / "runs" / spec.run_id
        records.write_jsonl(folder / "record.json", [record])
        if lean:
            continue
        steps = np.arange(1, 61) * record.steps / 60
        curve = record.train_loss_smoothed * (1 + 3 * np.exp(-steps / steps[-1] * 14))
        curve *= 1 + 0.4 * (steps / steps[-1] + 0.02) ** -0.25 - 0.4
        curve += rng.normal(0, 0.01, 60)
        lines = [
            {"step": s, "loss": y, "flops": s * spec.flops_per_step, "seconds": s / 50}
            for s, y in zip(steps.round().tolist(), curve.tolist(), strict=True)
        ]
        if record.status != "finished":
            lines = [*lines[:3], {**lines[3], "loss": "nan"}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        records.write_text(folder / "metrics.jsonl", text)
    experiment = {
        "name": "icons",
        "question": "How should a small budget be split between size and data?",
        "config": {
            "model": {"record": "Model", "depth": 4, "note": TROUBLE},
            "optim": {"beta2": 0.99},
        },
        "config_hash": "0123456789abcdef",
    }
    records.write_text(workdir / "experiment.json", json.dumps(experiment))
    environment = {"versions": {"numpy": np.__version__}, "host": {"cores": 2}}
    records.write_text(workdir / "environment.json", json.dumps(environment))
    if kind == "unfitted":
        return workdir
    result = fit.fit_records(trained, bootstrap=200)
    records.write_text(workdir / "laws.json", records.dumps(result))
    if not lean:
        _sample(workdir, specs[-2].run_id)
    return workdir


def _run(budget: float, n: int, width: int, loss: float) -> tuple[RunSpec, TrainRecord]:
    batch, positions = 32, 80
    per_step = int(6.6 * n * batch * positions)
    steps = round(budget / per_step)
    tokens = steps * batch * positions
    same = {
        "run_id": f"c{budget:.2g}-w{width}-d4",
        "study": "icons",
        "budget_flops": budget,
        "width": width,
        "depth": 4,
        "params": n + 9000,
        "params_without_embeddings": n,
        "steps": steps,
        "images": steps * batch,
        "tokens": tokens,
        "learning_rate": 3e-3 * 64 / width,
        "seed": 0,
        "recipe_hash": "abcdef0123456789",
    }
    spec = RunSpec(
        **same,
        planned_flops=float(steps * per_step),
        flops_per_step=per_step,
        hardware_flops_per_step=per_step,
        heads=width // 16,
        batch_size=batch,
        image_tokens=steps * batch * 64,
        text_tokens=steps * batch * 16,
        warmup_steps=20,
        state_bytes=16 * n,
        activation_bytes=10**6,
        memory_bytes_per_device=10**7,
        accelerator="cpu",
        hours=0.01,
        utilisation=0.3,
    )
    record = TrainRecord(
        **same,
        status="finished",
        detail="",
        steps_planned=steps,
        flops=float(steps * per_step),
        hardware_flops=1.25 * steps * per_step,
        six_nd=6.0 * n * tokens,
        validation_loss=loss + 0.01,
        validation_loss_ema=loss,
        train_loss_smoothed=loss + 0.02,
        seconds=steps * per_step / 6e10,
        device="cpu",
        devices=2,
        flops_per_second=6e10,
        mfu=None,
        mfu_reason="no peak is listed for this device",
        restarts=0,
    )
    return spec, record


def _sample(workdir: pathlib.Path, run_id: str) -> None:
    size = np.arange(32)
    images = np.full((16, 32, 32, 3), 245, np.uint8)
    for i, image in enumerate(images):
        r = np.hypot(size[:, None] - 15.5, size[None] - 15.5)
        image[r < 5 + i % 8] = (40 * (i % 5), 30, 200 - 12 * i)
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    np.save(workdir / "samples" / "images.npy", images)
    words = ("a blue circle", "a red magnifying glass on white", "a dark green cloud")
    record = SampleRecord(
        run_id=run_id,
        checksum="",
        sampler="euler",
        spacing="auto",
        steps=32,
        guidance=2.0,
        nfe=64,
        flops=3.1e11,
        seconds=5.4,
        weights="ema",
        seed=0,
        images=16,
        captions=(TROUBLE, *(words[i % 3] for i in range(15))),
        images_file="samples/images.npy",
    )
    records.write_jsonl(workdir / "samples" / "record.json", [record])


class Page(parser.HTMLParser):
    """Checks that elements nest, and keeps what a test wants to ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.wrong, self.attributes, self.words = [], [], [], []
        self.tags, self.tables = [], []
        self.feed(text)
        self.close()
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.wrong.append((tag, self.getpos()))
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def cells(self, heading: str) -> list[list[str]]:
        """Body and foot rows of the first table that has this column heading."""
        found = next(t for t in self.tables if heading in t[0])
        return found[1:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    workdir = make_workdir(tmp_path_factory.mktemp("plain"))
    index = report.write(workdir)
    return workdir, index, Page(index.read_text(encoding="utf-8"))


def _rows(workdir, name):
    with open(workdir / "report" / "tables" / f"{name}.csv", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_page_is_balanced_and_needs_nothing_from_elsewhere(plain):
    workdir, index, page = plain
    assert index == workdir / "report" / "index.html"
    assert page.wrong == [] and page.open == []
    assert not {"script", "link", "iframe", "object", "style2"} & set(page.tags)
    loads = {"src", "href", "xlink:href", "data", "srcset"}
    for tag, key, value in page.attributes:
        if key in loads:
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


def test_colours_are_defined_for_light_and_dark(plain):
    text = plain[1].read_text(encoding="utf-8")
    light, dark = text.split("prefers-color-scheme: dark", 1)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert any(name.startswith("--c") for name in used)
    for name in used:
        assert f"{name}: #" in light, name
        assert f"{name}: #" in dark, name


def test_headline_states_the_laws_and_the_held_out_error(plain):
    workdir, _, page = plain
    result = records.loads((workdir / "laws.json").read_text())
    law = result.laws["N_opt"]
    assert abs(law.exponent - EXPONENT) < 0.1  # the study is what it should be
    low, high = law.exponent_interval.low, law.exponent_interval.high
    assert f"N ∝ C{law.exponent:.3f} [{low:.3f}, {high:.3f}]" in page.text
    loss = result.laws["L_opt"].exponent
    assert f"L ∝ C{loss:.4f}".replace("-", "−") in page.text
    held = {h.quantity: h for h in result.held_out}
    shown = f"N {100 * held['N_opt'].relative_error:+.2f}%".replace("-", "−")
    if abs(held["N_opt"].relative_error) >= 0.1:
        shown = f"N {100 * held['N_opt'].relative_error:+.1f}%".replace("-", "−")
    assert shown in page.text
    assert "C = 1.60×10¹² FLOPs" in page.text
    assert "90% bootstrap intervals" in page.text
    assert page.text.index("How should") < page.text.index("N ∝ C")


def test_held_out_table_agrees_with_the_fit(plain):
    workdir, _, page = plain
    result = records.loads((workdir / "laws.json").read_text())
    rows = _rows(workdir, "held_out")
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
    rows = _rows(workdir, "ledger")
    assert {r["run_id"] for r in rows} == set(trained)
    for row in rows:
        r = trained[row["run_id"]]
        assert float(row["model_flops"]) == r.flops
        assert float(row["hardware_flops"]) == r.hardware_flops
        assert float(row["six_nd_over_model"]) == pytest.approx(r.six_nd / r.flops)
        assert float(row["device_hours"]) == pytest.approx(2 * r.seconds / 3600)
        assert row["mfu"] == ""
    assert "MFU is absent on cpu: no peak is listed for this device" in page.text
    found = [t for t in page.tables if "device-hours" in t[0]]
    by_budget, by_run = (t[-1] for t in found)
    assert by_budget[2:] == by_run[2:]
    last = by_run
    spent = sum(r.flops for r in trained.values())
    hours = sum(2 * r.seconds / 3600 for r in trained.values())
    assert last[0] == "all 35"
    assert last[2] == format.scientific(spent)
    assert last[9] == f"{hours:.3f}"


def test_every_csv_is_rectangular_and_the_page_shows_its_rows(plain):
    workdir, _, page = plain
    paths = sorted((workdir / "report" / "tables").glob("*.csv"))
    names = "config environment excluded held_out laws ledger minima parametric plan"
    expected = {*names.split(), "costs", "published", "runs", "samples"}
    optional = {"parametric"}  # only where the fit did not refuse it
    assert expected - optional <= {p.stem for p in paths} <= expected
    for path in paths:
        with open(path, encoding="utf-8") as f:
            lengths = {len(row) for row in csv.reader(f)}
        assert len(lengths) == 1, path.name
    config = {r["key"]: r["value"] for r in _rows(workdir, "config")}
    assert config == {"model.depth": "4", "model.note": TROUBLE, "optim.beta2": "0.99"}
    runs = _rows(workdir, "runs")
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
    rows = [r for r in _rows(workdir, "laws") if "2410.08184" in r["source"]]
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
    index = report.write(make_workdir(tmp_path))
    assert index.read_bytes() == plain[1].read_bytes()
    written = list((plain[0] / "report").rglob("*.*"))
    assert len(written) > 20
    for path in written:
        twin = tmp_path / path.relative_to(plain[0])
        assert path.read_bytes() == twin.read_bytes(), path.name

    (tmp_path / "laws.json").unlink()
    (tmp_path / "samples" / "record.json").unlink()
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert page.wrong == []
    assert "--stages fit" in page.text
    assert "No samples were drawn" in page.text
    names = {p.stem for p in (tmp_path / "report" / "figures").iterdir()}
    assert names == {"isoflop", "training"}
    assert not (tmp_path / "report" / "tables" / "held_out.csv").exists()


def test_refused_budget_is_grey_and_explained(tmp_path):
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


def test_refused_laws_are_the_headline(tmp_path):
    index = report.write(make_workdir(tmp_path, "few", lean=True))
    page = Page(index.read_text(encoding="utf-8"))
    assert page.wrong == []
    result = records.loads((tmp_path / "laws.json").read_text())
    refusal = result.laws["N_opt"]
    assert isinstance(refusal, Refusal)
    assert f"No law for the best size N: {refusal.reason}" in page.text
    assert "N ∝" not in page.text
    assert "Not predicted:" in page.text


def test_plan_only_and_damaged_files_are_notes_not_crashes(tmp_path):
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
        "samples/images.npy) could not be read",
        "environment.json could not be read",
        f"1 of 35 runs have no record yet ({first.name})",
    ):
        assert words in text, words

    plan = tmp_path / "other"
    records.write_jsonl(plan / "runs.jsonl", reading.read(tmp_path).runs)
    text = Page(report.write(plan).read_text(encoding="utf-8")).text
    assert "35 of 35 runs have no record yet" in text
    assert "No run has been trained yet" in text


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
        reading.smooth(values)[-1], np.average(values, weights=weights), rtol=1e-12
    )
    np.testing.assert_allclose(reading.smooth(np.full(9, 0.4)), 0.4, rtol=1e-12)


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
    ],
)
def test_numbers_are_rounded_as_promised(shown, text):
    assert shown == text


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


FRONTIER_FIGURES = {"frontier", "best_size", "best_guidance"}
FRONTIER_TABLES = {"frontier", "best_at_budget", "crossings", "best_guidance", "cells"}


def _cells(samplers: tuple[str, ...]) -> list[Cell]:
    """Sizes of cost 1, 2 and 4; the second wins from cost e^3, the third never."""
    cells = []
    noise = np.linspace(-0.3, 0.3, 40)
    for sampler in samplers:
        for k, (start, slope) in enumerate(((20, 2), (26, 4), (90, 4))):
            for steps in (1, 2, 4, 8, 16, 32, 64):
                for guidance in (1.5, 2.0, 3.0, 4.0):
                    value = start - slope * math.log(2**k * steps) + 4 - guidance
                    cells.append(
                        Cell(
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
                            replicates=tuple(value + noise),
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
        rows = _rows(workdir, name)
        assert rows and None not in rows[0], name


def test_the_page_says_what_the_frontier_says(sampled):
    _, found, page = sampled
    for line_ in found.sentences:
        assert line_ in page.text
    assert (
        "168 cells of 500 images; fd, lower is better, under protocol p0" in page.text
    )
    assert (
        "The evaluation of 1M costs 1; seconds were measured on NVIDIA L4" in page.text
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
    page = Page(report.write(tmp_path / "copy").read_text(encoding="utf-8"))
    first = page.text.index(found.sentences[0])
    assert first < page.text.index("there are no laws to fit")
    where = page.text.index("Quality against the cost of sampling")
    assert first < where < page.text.index("Samples") < page.text.index("Every run (")
    assert page.text.count(found.sentences[0]) == 1
    assert page.text.count(found.sentences[1]) == 1
    absent = ("IsoFLOP", "No law", "laws.json", "budgets 1", "Held-out", "laws are")
    for words in (*absent, "the budget by", "of the budget", "C = "):
        assert words not in page.text, words
    assert "against the step." in page.text  # all sizes in one panel
    assert "Finished runs spent exactly what was planned." in page.text
    figures = {p.stem for p in (tmp_path / "copy" / "report" / "figures").glob("*.pdf")}
    assert figures == FRONTIER_FIGURES | {"training"}
    png = (tmp_path / "copy" / "report" / "figures" / "training.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == (1040, 720)  # of one panel, at 200 dpi


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
    text = html._prose(words)
    assert re.findall(r'<span class="whole">(.*?)</span>', text) == whole
    assert "".join(Page(f"<p>{text}</p>").words) == words
    assert ".whole { white-space: nowrap; }" in style.sheet("")


def test_a_long_table_beside_a_figure_is_folded_away():
    columns = (table.cell("n", "n", str),)
    for rows in (1, 12, 13):
        of = tuple({"n": n} for n in range(rows))
        text = html._shown(
            "Title", table.Table(name="a", caption="", rows=of, columns=columns)
        )
        folded = text.startswith(f"<details><summary>Title ({rows})</summary>")
        assert folded == (rows == 13) and text.startswith("<h3>Title</h3>") != folded
        assert text.count("<td>") == rows
    assert html._shown("Title", None) == ""


@pytest.mark.parametrize(("side", "width"), [(1, 100), (8, 96), (32, 96), (64, 128)])
def test_a_small_picture_leaves_room_for_the_words_under_it(tmp_path, side, width):
    make_workdir(tmp_path, "unfitted", lean=True)
    _sample(tmp_path, records.read_jsonl(tmp_path / "runs.jsonl")[0].run_id)
    np.save(tmp_path / "samples/images.npy", np.zeros((3, side, side, 3), np.uint8))
    text = "".join(html._samples(reading.read(tmp_path)))
    assert f"repeat(auto-fill, {width}px)" in text


def test_frontier_tables_are_those_of_the_record(sampled):
    workdir, found, page = sampled
    pareto = [c for front in found.fronts for c in front.pareto]
    rows = _rows(workdir, "frontier")
    assert [float(r["cost"]) for r in rows] == [c.cost for c in pareto]
    assert [float(r["expected_low"]) for r in rows] == [c.interval.low for c in pareto]
    rows = _rows(workdir, "crossings")
    assert len(rows) == len(found.crossings)
    for row, c in zip(rows, found.crossings, strict=True):
        if isinstance(c, Crossing):
            assert (float(row["at"]), row["larger"]) == (c.at, c.larger)
            assert float(row["at_high"]) == c.interval.high
        else:
            assert row["at"] == "" and row["refused"].startswith(c.reason)
    rows = _rows(workdir, "best_at_budget")
    assert len(rows) == 9 * len(found.fronts)
    for row in rows:
        shares = [float(row[f"probability_run{k}"]) for k in range(3)]
        assert sum(shares) == pytest.approx(1)
    rows = _rows(workdir, "best_guidance")
    assert {r["doubt"] for r in rows} == {"the highest tried"}
    assert len(_rows(workdir, "cells")) == len(found.cells) == 168
    shown = page.cells("the larger over the smaller")
    first = found.crossings[0]
    assert shown[0][3].startswith(f"{first.at:.1f} [")


def test_rings_are_where_the_plotted_lines_reach_a_new_low():
    """Of noisy cells: rings are points of the lines, fall, and are the table's."""
    rng = np.random.default_rng(0)
    cells = []
    for c in _cells(("ddim",)):
        value = c.value + rng.normal()
        noise = tuple(value + rng.normal(size=40))
        cells.append(dataclasses.replace(c, value=value, replicates=noise))
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
    cells = [dataclasses.replace(c, replicates=()) for c in found.cells]
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
    rows = {row["step"]: row for row in _rows(tmp_path, "evaluations")}
    assert [rows["1"][k] for k in how] == ["dpm++2m", "12", "1.5", "0"]
    assert [rows["2"][k] for k in how] == [""] * 4
    shown = page.cells("evaluations a picture")
    ends = sorted(tuple(row[-5:-1]) for row in shown)
    assert ends == sorted([("dpm++2m", "12", "1.5", "0"), (format.NONE,) * 4])


def test_measured_numbers_are_shown_with_their_interval_and_protocol(
    tmp_path, evaluated
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
    rows = _rows(tmp_path, "evaluations")
    assert [row["step"] for row in rows] == ["10", "20"]
    (tmp_path / "evaluations.jsonl").write_text("{")
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "evaluations.jsonl could not be read" in page.text
    assert "Measured pictures" not in page.text
