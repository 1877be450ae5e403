"""The stage that compares: two studies whose difference is known, or a refusal."""

import csv
import dataclasses
import json
import shutil

import finished_study
import pytest
from finished_study import BUDGETS, Page, figures_as, make_workdir

from scaling_ldm import config, records
from scaling_ldm import study as entry
from scaling_ldm.config import command_line
from scaling_ldm.records import LawComparison, Refusal, table
from scaling_ldm.report import comparison_page
from scaling_ldm.workdir import exit_status

FALL = 0.05  # the second study's loss falls faster by this exponent


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two studies of one plan; the second's losses are (C / the middle)^-FALL as high.

    They cross in the middle.
    """
    root = tmp_path_factory.mktemp("pair")
    a, b = root / "runs" / "a", root / "runs" / "b"
    make_workdir(a, "unfitted", lean=True)
    shutil.copytree(a, b)
    changed(b, lambda row: row.value * (row.budget_flops / BUDGETS[2]) ** -FALL)
    return a, b


def changed(workdir, value=lambda row: row.value, of=("ema", "raw"), **fields):
    """Every loss of these weights becomes value(row), and its fields others."""
    for path in workdir.glob(f"runs/*/{table.FILE}"):
        rows, _ = table.read_rows(path)
        path.unlink()
        rows = [
            dataclasses.replace(r, value=value(r), **fields) if r.weights in of else r
            for r in rows
        ]
        table.append_rows(path, rows)


@pytest.fixture
def copies(pair, tmp_path):
    """The same two studies, to be changed."""
    for of in pair:
        shutil.copytree(of, tmp_path / of.name)
    return tmp_path / "a", tmp_path / "b"


def compared(workdir, *studies, status="done", page=False, **changes):
    """The result of the command; without its page, whose figure takes a second."""
    c = config.default()
    c.compare.studies = tuple(map(str, studies))
    c.fit.bootstrap = 200
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    with pytest.MonkeyPatch.context() as patch:
        if not page:
            patch.setattr(comparison_page, "write", lambda at: at)
        found = entry.run(
            c,
            workdir=str(workdir),
            stages=["compare"],
            only=None,
            cluster=(None, None, None),
        )
    assert found == exit_status.EXIT[status]
    if status == "bad configuration":
        return None
    return records.read_jsonl(workdir / "compare.json")


def test_two_studies_have_their_difference_and_a_page(pair, tmp_path):
    before = {p: p.read_bytes() for of in pair for p in of.rglob("*") if p.is_file()}
    with figures_as("svg"):
        (found,) = compared(tmp_path / "w", *pair, page=True)
    assert isinstance(found, LawComparison)
    assert (found.first, found.second) == ("a", "b") and found.paired
    assert found.data == "tokens" and found.weights == "ema" and found.protocol_hash
    law = found.laws["L_opt"]
    assert law.difference == pytest.approx(-FALL, abs=1e-9)
    assert law.difference_interval.low <= -FALL <= law.difference_interval.high
    assert found.laws["N_opt"].difference == pytest.approx(0, abs=1e-9)
    assert found.verdict == "they cross"
    assert found.crossing.budget_flops == pytest.approx(BUDGETS[2], rel=1e-6)
    assert found.crossing.better_beyond == "second"
    # One run had diverged: the other one of its pair is left out, too.
    left_out = [line for line in found.excluded if "w160" in line or "160 x" in line]
    assert len(left_out) >= 2
    page = Page((tmp_path / "w/compare/index.html").read_text(encoding="utf-8"))
    assert page.wrong == [] and page.open == []
    assert "b against a" in page.text and "Runs are paired" in page.text
    assert [row[0] for row in page.cells("difference")] == ["N_opt", "D_opt", "L_opt"]
    with open(tmp_path / "w/compare/tables/laws.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[2]["difference"]) == law.difference
    after = {p: p.read_bytes() for of in pair for p in of.rglob("*") if p.is_file()}
    assert before == after  # the studies are read alone
    assert not list(tmp_path.glob("w/runs*")) + list(tmp_path.glob("w/encoded"))


def test_runs_of_other_seeds_are_not_paired(copies, tmp_path):
    _, b = copies
    specs = records.read_jsonl(b / "runs.jsonl")
    records.write_jsonl(
        b / "runs.jsonl", [dataclasses.replace(s, seed=1) for s in specs]
    )
    changed(b, seed=1)
    (found,) = compared(tmp_path / "w", *copies)
    assert isinstance(found, LawComparison) and not found.paired
    assert found.correlation is None
    law = found.laws["L_opt"]
    assert law.difference == pytest.approx(-FALL, abs=1e-3)
    (paired,) = compared_again(tmp_path, copies, b)
    wide, narrow = (x.laws["L_opt"].difference_interval for x in (found, paired))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def compared_again(tmp_path, copies, b):
    """The same with the seeds that both have."""
    specs = records.read_jsonl(b / "runs.jsonl")
    records.write_jsonl(
        b / "runs.jsonl", [dataclasses.replace(s, seed=0) for s in specs]
    )
    changed(b, seed=0)
    return compared(tmp_path / "w2", *copies)


def unlike(workdir, *studies, **changes):
    """Why two studies are not compared."""
    (found,) = compared(workdir, *studies, status="no answer", page=True, **changes)
    assert isinstance(found, Refusal) and found.quantity == "comparison"
    page = Page((workdir / "compare/index.html").read_text(encoding="utf-8"))
    assert f"Refused: {found.why}" in page.text
    return found.reason, found.detail


def experiment_with(workdir, **sections):
    path = workdir / "experiment.json"
    held = json.loads(path.read_text())
    held["config"] |= sections
    path.write_text(json.dumps(held))


def test_another_protocol_is_refused_with_its_parts(copies, tmp_path):
    a, b = copies
    experiment_with(a, data={"shape": [32, 32, 3]}, validation={"samples": 64})
    experiment_with(b, data={"shape": [64, 64, 3]}, validation={"samples": 64})
    changed(b, protocol_hash="f" * 16)
    reason, detail = unlike(tmp_path / "w", a, b)
    assert reason == "measured unlike"
    assert detail == "data.shape: [32, 32, 3] in a, [64, 64, 3] in b"


def test_protocols_that_differ_in_nothing_known_are_refused_by_hash(copies, tmp_path):
    changed(copies[1], protocol_hash="f" * 16)
    reason, detail = unlike(tmp_path / "w", *copies)
    assert reason == "measured unlike" and f"{'f' * 16!r} in b" in detail


def test_other_weights_and_other_held_out_pictures_are_refused(copies, tmp_path):
    a, b = copies
    records.write_json(a / "split.json", {"held_out": {"": "50 of 1,000"}})
    experiment_with(b, optimizer={"averages": ["power_0.1"]})
    changed(b, of=("ema",), weights="power_0.1")
    reason, detail = unlike(tmp_path / "w", a, b)
    assert reason == "measured unlike"
    assert "weights: 'ema' in a, 'power_0.1' in b" in detail
    assert "held-out pictures: {'': '50 of 1,000'} in a, None in b" in detail


def test_compute_that_leaves_out_pretraining_is_refused(copies, tmp_path):
    a, b = copies
    specs = records.read_jsonl(b / "runs.jsonl")
    spent = [dataclasses.replace(s, pretraining_flops=1e10) for s in specs]
    records.write_jsonl(b / "runs.jsonl", spent)
    reason, detail = unlike(tmp_path / "w", a, b)
    assert detail == (
        "C: 'all training FLOPs' in a, 'training FLOPs after pretraining of 1e+10 "
        "FLOPs' in b"
    )


def test_tokens_of_another_picture_make_d_a_number_of_pictures(copies, tmp_path):
    a, b = copies
    specs = records.read_jsonl(b / "runs.jsonl")
    records.write_jsonl(
        b / "runs.jsonl",
        [
            dataclasses.replace(s, text_tokens=0, tokens=s.image_tokens, seed=1)
            for s in specs
        ],
    )
    changed(b, seed=1)
    (found,) = compared(tmp_path / "w", a, b)
    assert found.data == "pictures"
    (note,) = found.notes  # and none that 6 N D is not C
    assert note == "D is counted in pictures: a picture is 80 tokens in a and 64 in b"
    assert found.laws["D_opt"].ratio == pytest.approx(1, abs=1e-3)


def test_more_is_better_and_no_common_budget_are_refused(copies, tmp_path):
    a, b = copies
    finished_study.evaluate(a, "recall_lite0", "ema")
    finished_study.evaluate(b, "recall_lite0", "ema")
    more = {"fit__metrics": ("recall_lite0",)}
    assert unlike(tmp_path / "w", a, b, **more)[0] == "larger is better"
    for path in b.glob("runs/c1e+11-*"):
        shutil.rmtree(path)
    specs = [s for s in records.read_jsonl(b / "runs.jsonl") if s.budget_flops > 5e11]
    records.write_jsonl(b / "runs.jsonl", specs)
    reason, detail = unlike(tmp_path / "w2", a, b)
    assert reason == "fewer than 3 budgets" and "2 budgets have a parabola" in detail


def test_what_cannot_be_read_ends_the_command(pair, tmp_path, capsys):
    bad = {"status": "bad configuration"}
    compared(tmp_path / "w", pair[0], tmp_path / "nothing", **bad)
    assert "nothing holds no plan" in capsys.readouterr().err
    compared(tmp_path / "w", pair[0], **bad)
    assert "a alone cannot be compared" in capsys.readouterr().err
    compared(tmp_path / "w", *pair, compare__groups=("large",), **bad)
    assert "no study has 'large'" in capsys.readouterr().err
    compared(tmp_path / "w", *pair, compare__budgets=(2.0, 1.0), **bad)
    assert "must be positive and increase" in capsys.readouterr().err
    compared(tmp_path / "w", pair[0], pair[0], **bad)
    assert "each at most once" in capsys.readouterr().err
    compared(tmp_path / "w", *pair, fit__window=4.0, **bad)
    assert "config.fit.window = 4 is not read by compare" in capsys.readouterr().err


def test_a_comparison_needs_no_experiment_file_and_has_a_folder_of_its_own():
    command_line.check_left("", [], ["compare"])
    with pytest.raises(config.ConfigError, match="no experiment is given"):
        command_line.check_left("", [], ["compare", "fit"])
    c = config.default()
    assert command_line.default_workdir(c) == "runs/experiment"
    c.compare.studies = ("runs/a", "gs://bucket/b/")
    assert command_line.default_workdir(c) == "runs/b_against_a"
    c.name = "mine"
    assert command_line.default_workdir(c) == "runs/mine"
    assert command_line.default_workdir({}) == "runs/experiment"


def test_another_folder_of_pictures_is_a_note(copies, tmp_path):
    for workdir, path in zip(copies, ("here", "there"), strict=True):
        experiment_with(workdir, data={"path": path})
    (found,) = compared(tmp_path / "w", *copies)
    assert found.paired
    assert "data.path is 'here' in a and 'there' in b" in found.notes[0]


def test_groups_of_one_study_are_held_against_the_first(copies, tmp_path):
    a, b = copies
    specs = records.read_jsonl(a / "runs.jsonl")
    every = []
    for of, group in ((a, "plain"), (b, "wide"), (b, "wider")):
        for spec in specs:
            run_id = f"{spec.run_id}-{group}"
            given = {"run_id": run_id, "group": group}
            every.append(dataclasses.replace(spec, **given))
            folder = tmp_path / "one" / "runs" / run_id
            (record,) = records.read_jsonl(of / "runs" / spec.run_id / "record.json")
            records.write_jsonl(
                folder / "record.json", [dataclasses.replace(record, run_id=run_id)]
            )
            rows, _ = table.read_rows(of / "runs" / spec.run_id / table.FILE)
            table.append_rows(
                folder / table.FILE, [dataclasses.replace(r, **given) for r in rows]
            )
    records.write_jsonl(tmp_path / "one" / "runs.jsonl", every)
    first, second = compared(tmp_path / "w", tmp_path / "one")
    (chosen,) = compared(
        tmp_path / "w2", tmp_path / "one", compare__groups=("wider", "plain")
    )
    assert (first.first, first.second) == ("plain", "wide")
    assert (second.first, second.second) == ("plain", "wider")
    assert (chosen.first, chosen.second) == ("wider", "plain")
    assert chosen.laws["L_opt"].difference == pytest.approx(FALL, abs=1e-9)
