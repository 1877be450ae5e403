"""The table of measurements: rows appended whole, joined, written for others."""

import csv
import dataclasses
import json
import math
import pathlib
import shutil
import subprocess
import sys

import pytest

from scaling_ldm import records
from scaling_ldm.records import measurements, table

TINY = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "tiny_study"
SPECS = records.read_jsonl(TINY / "runs.jsonl")


def row(**changes):
    given = {"step": 7, "metric": "loss", "value": 0.5, "weights": "raw"}
    return measurements.measurement(
        SPECS[0], **given | {"protocol_hash": "p"} | changes
    )


@pytest.fixture
def study(tmp_path):
    """study(rows, name): a working directory with these rows of the first run."""

    def made(rows, name="w", specs=SPECS[:1]):
        workdir = tmp_path / name
        records.write_jsonl(workdir / "runs.jsonl", specs)
        path = workdir / "runs" / SPECS[0].run_id / table.FILE
        table.append_rows(path, rows)
        return workdir, path

    return made


def test_a_row_says_what_its_step_has_cost():
    spec, found = SPECS[0], row()
    assert found.flops == 7 * spec.flops_per_step
    assert found.images == 7 * spec.batch_size
    assert found.tokens == 7 * spec.tokens // spec.steps
    assert (found.low, found.high, found.level) == (0.5, 0.5, 1.0)
    end = row(step=spec.steps, low=0.4, high=0.7, level=0.9)
    assert (end.flops, end.tokens) == (spec.planned_flops, spec.tokens)
    assert (end.low, end.high, end.level) == (0.4, 0.7, 0.9)


def test_rows_are_appended_whole_and_a_cut_off_line_is_no_row(study):
    workdir, path = study([row(), row(metric="loss_t0", value=math.nan)])
    table.append_rows(path, [row(step=8)])
    lines = path.read_text().splitlines()
    assert [json.loads(line)["version"] for line in lines] == [records.SCHEMA] * 3
    assert [r.step for r in records.read_table(workdir)] == [7, 7, 8]
    path.write_bytes(path.read_bytes()[:-5])
    rows, rest = table.read_rows(path)
    assert [r.step for r in rows] == [7, 7] and rest == lines[2][:-4]
    assert [r.step for r in records.read_table(workdir)] == [7, 7]
    path.write_text("no row\n" + path.read_text())
    with pytest.raises(records.Damaged, match=r"measurements.jsonl:1: not a record"):
        records.read_table(workdir)
    path.write_text(records.dumps(records.Interval(low=0, high=1, level=0.9)) + "\n")
    with pytest.raises(records.Damaged, match="holds no Measurement"):
        records.read_table(workdir)


def test_rows_of_later_steps_and_a_cut_off_line_are_dropped(study, tmp_path):
    _, path = study([row(step=step, value=math.nan) for step in (2, 4, 4, 7)])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert table.drop_rows(path, 7) == "" and path.read_bytes() == whole
    path.write_bytes(whole[:-5])
    assert table.drop_rows(path, 7) == lines[3][:-5].decode()
    assert path.read_bytes() == b"".join(lines[:3])
    # A file of another version stays as it is but for what is dropped.
    older = lines[0].replace(b", ", b",  ")
    path.write_bytes(older + b"".join(lines[1:]))
    assert table.drop_rows(path, 2) == "" and path.read_bytes() == older
    assert table.drop_rows(path, 1) == "" and path.read_bytes() == b""
    assert table.drop_rows(tmp_path / "nothing", 1) == ""
    path.write_bytes(b"no row\n" + whole)
    with pytest.raises(records.Damaged, match=r"measurements.jsonl:1: not a record"):
        table.drop_rows(path, 2)


def test_the_table_is_sorted_and_joins_studies(study):
    one, _ = study([row(step=9), row(step=8)])
    two, _ = study([row(step=8), row(step=7, weights="ema")], "two")
    found = records.read_table(two, one)
    assert [(r.step, r.weights) for r in found] == [(7, "ema"), (8, "raw"), (9, "raw")]
    assert records.read_table(one, two, one) == found


def test_rows_that_disagree_are_refused_by_name(study):
    one, _ = study([row(value=math.nan)])
    assert len(records.read_table(one, study([row(value=math.nan)], "two")[0])) == 1
    other, _ = study([row(value=0.25, low=0.25, high=0.25)], "other")
    said = rf"{SPECS[0].run_id} at step 7: loss of weights raw \(protocol p\) is nan in"
    with pytest.raises(records.MeasurementConflict, match=f"{said} .*w and 0.25 in"):
        records.read_table(one, other)
    with pytest.raises(records.MeasurementConflict, match=r"another config\.name"):
        records.read_table(one, other)
    both, _ = study([row(), row(high=0.6)], "both")
    with pytest.raises(records.MeasurementConflict, match="; high differ$"):
        records.read_table(both)


def test_rows_of_a_newer_version_and_a_missing_study_are_refused(study, tmp_path):
    workdir, path = study([row()])
    path.write_text(path.read_text().replace(records.SCHEMA, "99.0.0"))
    with pytest.raises(records.NewerVersion, match="99.0.0 or later"):
        records.read_table(workdir)
    with pytest.raises(FileNotFoundError, match="there is no study"):
        records.read_table(tmp_path / "nothing")


@pytest.mark.parametrize("field", ["seed", "params", "params_without_embeddings"])
def test_rows_of_another_studys_run_of_the_same_name_are_refused(study, field):
    other = {field: getattr(SPECS[0], field) + 1}
    workdir, path = study([row(), dataclasses.replace(row(step=8), **other)])
    said = f"{path}:2 is a row of another run of this name: its {field} is "
    with pytest.raises(records.Damaged) as e:
        records.read_table(workdir)
    assert str(e.value).startswith(said)
    assert str(e.value).endswith(f"{other[field]}, not {getattr(SPECS[0], field)}")
    gone, _ = study([dataclasses.replace(row(), **other)], "gone", specs=[SPECS[1]])
    assert len(records.read_table(gone)) == 1  # of a run that the plan lacks


def test_a_row_is_in_the_group_that_the_plan_has_today(study):
    grouped = dataclasses.replace(SPECS[0], group="learning_rate 1e-3")
    workdir, _ = study([row()], specs=[grouped])
    assert [r.group for r in records.read_table(workdir)] == ["learning_rate 1e-3"]
    gone, _ = study([row()], "gone", specs=[SPECS[1]])
    assert [r.group for r in records.read_table(gone)] == [""]


def test_rows_of_the_first_version_are_made_of_its_records():
    found = records.read_table(TINY)
    assert len(found) == 12 * 3 + 4
    spec = SPECS[-1]
    text = (TINY / "runs" / spec.run_id / "record.json").read_text()
    held = json.loads(text)
    mine = {
        (r.metric, r.weights): r
        for r in found
        if r.run_id == spec.run_id and not r.metric.startswith(("fd", "kid", "prec"))
    }
    assert {key: r.value for key, r in mine.items() if key[0] != "recall_lite0"} == {
        ("loss", "raw"): held["validation_loss"],
        ("loss", "ema"): held["validation_loss_ema"],
        ("train_loss_smoothed", "raw"): held["train_loss_smoothed"],
    }
    for r in mine.values():
        same = measurements.measurement(
            spec,
            step=spec.steps,
            metric=r.metric,
            value=r.value,
            weights=r.weights,
            protocol_hash=r.protocol_hash,
        )
        assert r == same
    quality = {r.metric: r for r in found if "lite0" in r.metric}
    for record in records.read_jsonl(TINY / "evaluations.jsonl"):
        r = quality[record.metric]
        assert (r.run_id, r.step, r.weights) == (record.run_id, record.step, "ema")
        assert (r.value, r.low, r.high) == (record.value, record.low, record.high)
        assert r.flops == record.train_flops
        assert r.protocol_hash == record.protocol_hash


def test_a_run_of_the_first_version_that_is_evaluated_keeps_its_losses(tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(TINY, workdir)
    before = records.read_table(workdir)
    path = workdir / "runs" / SPECS[0].run_id / table.FILE
    more = row(step=SPECS[0].steps, metric="fd", weights="ema")
    table.append_rows(path, [more])
    assert set(records.read_table(workdir)) == {*before, more}


def test_a_lost_loss_of_the_first_version_is_no_row(tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(TINY, workdir)
    path = workdir / "runs" / SPECS[0].run_id / "record.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"validation_loss": "nan"}))
    mine = [r for r in records.read_table(workdir) if r.run_id == SPECS[0].run_id]
    assert {(r.metric, r.weights) for r in mine} == {
        ("loss", "ema"),
        ("train_loss_smoothed", "raw"),
    }


def test_protocols_of_losses_depend_on_what_is_measured():
    held = json.loads((TINY / "experiment.json").read_text())["config"]

    def of(metric="loss", overrides=(), **changes):
        changed = {s: held[s] | changes.get(s, {}) for s in held if s in changes}
        return table.loss_protocol_hash(metric, held | changed, dict(overrides))

    assert of() == of(optimizer={"learning_rate": 1.0}, train={"seed": 3})
    assert of() == of(overrides={"optimizer.learning_rate": 1.0})
    assert of() == of(objective={"weighting": "min_snr"})
    assert of() != of(validation={"samples": 65})
    assert of() != of(objective={"prediction": "v"})
    assert of(overrides={"objective.prediction": "v"}) == of(
        objective={"prediction": "v"}
    )
    trained = "train_loss_smoothed"
    assert of(trained) != of()
    assert of(trained) == of(trained, validation={"samples": 65})
    assert of(trained) != of(trained, objective={"weighting": "min_snr"})


def test_csv_and_parquet_hold_every_field(tmp_path):
    named = dataclasses.replace(row(value=math.inf), group='rate 1, "b"\nand more')
    rows = [*records.read_table(TINY), named]
    records.write_csv(rows, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        back = list(csv.DictReader(file))
    fields = dataclasses.fields(records.Measurement)
    kinds = {"str": str, "int": int, "float": float}
    assert [
        records.Measurement(**{f.name: kinds[f.type](r[f.name]) for f in fields})
        for r in back
    ] == rows
    parquet = pytest.importorskip("pyarrow.parquet")
    records.write_parquet(iter(rows), tmp_path / "t.parquet")
    read = parquet.read_table(tmp_path / "t.parquet")
    assert [records.Measurement(**r) for r in read.to_pylist()] == rows
    assert {str(read.schema.field(name).type) for name in ("step", "params")} == {
        "int64"
    }
    records.write_parquet([], tmp_path / "empty.parquet")
    assert parquet.read_table(tmp_path / "empty.parquet").schema == read.schema


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"scaling_ldm\[huggingface\]"):
        records.write_parquet([row()], tmp_path / "t.parquet")


def test_the_table_is_read_with_the_standard_library_alone():
    code = (
        f"from scaling_ldm import records; t = records.read_table({str(TINY)!r}); "
        "import sys; bad = {'jax', 'numpy', 'pyarrow', 'ml_collections'} & "
        "set(sys.modules); assert t and not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("data", "mix", [["own", 0.8], ["prior", 0.2]]),
        ("data", "shuffle_window", 4),
        ("validation", "part", "prior"),
        ("objective", "kind", "mine.py:build"),
        ("objective", "digest", "abc"),
    ],
)
def test_what_changes_the_measured_loss_is_another_protocol(section, field, value):
    def protocol(experiment):
        return measurements.loss_protocol("loss", experiment, {})

    as_before = {
        "data": {"mix": [], "parts": [], "shuffle_window": 0},
        "objective": {"kind": "auto"},
    }
    assert protocol(as_before) == protocol({"data": {}, "objective": {}})
    assert protocol({section: {field: value}}) != protocol({})
