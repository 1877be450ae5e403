"""Pictures on the page: samples beside real ones, and what was measured of them."""

import dataclasses

import numpy as np
import pytest
from finished_study import Page, figures_as, make_workdir, sample, table_rows

from scaling_ldm import records, report
from scaling_ldm.report import evaluation_tables, pictures, reading


@pytest.fixture
def sampled(tmp_path):
    """(workdir, record): a study with 16 samples, two of them without a caption."""
    make_workdir(tmp_path, "unfitted", lean=True)
    sample(tmp_path, records.read_jsonl(tmp_path / "runs.jsonl")[0].run_id)
    path = tmp_path / "samples" / "record.json"
    (record,) = records.read_jsonl(path)
    captions = ("", "a cat", *record.captions[2:])
    record = dataclasses.replace(record, captions=captions, labels=tuple(range(16)))
    records.write_jsonl(path, [record])
    return tmp_path, record


def page_of(study):
    return Page("".join(pictures.samples(study)))


def sources(page):
    return [v for tag, key, v in page.attributes if (tag, key) == ("img", "src")]


def test_each_sample_is_beside_the_real_picture_of_its_caption(sampled):
    workdir, record = sampled
    alone = page_of(reading.read(workdir))
    assert len(sources(alone)) == 16 and "held-out picture" not in alone.text
    real = np.load(workdir / "samples/images.npy")[::-1]
    np.save(workdir / "samples/real.npy", real)
    named = dataclasses.replace(record, real_file="samples/real.npy")
    records.write_jsonl(workdir / "samples" / "record.json", [named])
    study = reading.read(workdir)
    np.testing.assert_array_equal(study.real, real)
    page = page_of(study)
    assert page.wrong == [] and page.open == []
    shown = sources(page)
    assert shown[::2] == sources(alone)
    assert shown[1::2] == sources(alone)[::-1]
    words = [v for tag, key, v in page.attributes if (tag, key) == ("img", "alt")]
    assert words[:4] == ["label 0", "real: label 0", "a cat", "real: a cat"]
    assert "the held-out picture that has this caption." in page.text
    of_latents = {"encode": {"autoencoder": "some"}}
    page = page_of(dataclasses.replace(study, config=of_latents))
    assert "has this caption, as the autoencoder gives it back." in page.text


def test_real_pictures_that_are_lost_are_a_note(sampled):
    workdir, record = sampled
    named = dataclasses.replace(record, real_file="samples/real.npy")
    records.write_jsonl(workdir / "samples" / "record.json", [named])
    study = reading.read(workdir)
    assert study.notes == ("samples/real.npy could not be read: no such file",)
    assert study.real is None and len(sources(page_of(study))) == 16


def test_a_distance_is_placed_between_real_pictures_and_noise(tmp_path, evaluated):
    make_workdir(tmp_path, "unfitted", lean=True)
    run_id = records.read_jsonl(tmp_path / "runs.jsonl")[0].run_id

    def at(step, metric, value, **changed):
        given = {"metric": metric, "value": value, "low": value, "high": value}
        given |= {"run_id": run_id, "step": step, "train_flops": float(step)}
        protocol = {"sampler": "ddim", "metric": metric}
        return evaluated(**given | {"protocol": protocol} | changed)

    found = [
        at(1, "fd_lite0", 90.0),
        at(2, "fd_lite0", 70.0),
        at(2, "kid_lite0", 0.5),
        at(2, "fd_lite0_real", 12.5, images=60),
        at(2, "fd_lite0_noise", 300.0, images=120),
    ]
    records.write_jsonl(tmp_path / "evaluations.jsonl", found)
    (line,) = evaluation_tables.between(reading.read(tmp_path))
    assert line.startswith(f"The lowest FD-Lite0 is 70.0, of run {run_id}.")
    assert "60 real pictures have 12.5" in line
    assert line.endswith("120 pictures of noise have 300.")
    with figures_as("svg"):
        page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert line in page.text
    rows = {(r["metric"], r["step"]): r for r in table_rows(tmp_path, "evaluations")}
    assert len(rows) == 3  # floors are beside the numbers, not among them
    assert rows["fd_lite0", "2"]["real"] == "12.5"
    assert rows["fd_lite0", "2"]["noise"] == "300.0"
    assert rows["fd_lite0", "1"]["real"] == rows["kid_lite0", "2"]["noise"] == ""
    found[-1] = at(2, "fd_lite0_noise", 69.0)
    records.write_jsonl(tmp_path / "evaluations.jsonl", found)
    (line,) = evaluation_tables.between(reading.read(tmp_path))
    assert "no nearer to real ones than noise" in line
