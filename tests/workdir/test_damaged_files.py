"""Files of a working directory that are no records: who reads one names it."""

import json
import re
import shutil

import older_workdirs
import pytest
from damages import DAMAGES, damages, said_about, unsealed

from scaling_ldm import config, records, study
from scaling_ldm.data.shards import file_digest
from scaling_ldm.report import reading as pages
from scaling_ldm.stages import advise
from scaling_ldm.training import goodput, progress
from scaling_ldm.training.run_files import RunFiles
from scaling_ldm.workdir import (
    exit_status,
    init_record,
    missing,
    ownership,
    runs,
    samples,
)

EXAMPLE = older_workdirs.MADE / records.FIRST
RUN = "1.600e09-16x1"
ROW = dict(
    group="", step=3, metric="loss", value=1.0, low=1.0, high=1.0, level=1.0,
    weights="raw", protocol_hash="",
)  # fmt: skip

ATTEMPT = dict(
    run_id=RUN, began=1e9, seconds=2.0, ended="stopped", first_step=0, last_step=4,
    parts={"STEP": 1.5, "OTHER": 0.5}, compiled=3, cache_hits=0, processes=2, devices=2,
    data_seconds=(0.1, 0.2), host_seconds=(0.2, 0.4),
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A stored directory of two runs, with every file that a study may have."""
    workdir = tmp_path_factory.mktemp("small") / "w"
    older_workdirs.unpack(EXAMPLE, workdir, finished=True)
    plan_file = workdir / "runs.jsonl"
    kept = [s for s in records.read_jsonl(plan_file) if s.run_id.endswith("e09-16x1")]
    records.write_jsonl(plan_file, kept[:2])
    for folder in (workdir / "runs").iterdir():
        if folder.name not in {spec.run_id for spec in kept[:2]}:
            shutil.rmtree(folder)
    for cell in sorted((workdir / "frontier" / "cells").iterdir())[1:]:
        cell.unlink()
    record = runs.read_record(workdir, RUN)
    row = {name: getattr(record, name) for name in records.table._OF_RECORD}
    rows = [records.Measurement(**row, **ROW | {"step": step}) for step in (3, 4)]
    records.table.append_rows(RunFiles(workdir / "runs" / RUN).measurements, rows)
    attempts = [records.Attempt(**ATTEMPT | {"number": number}) for number in (0, 1)]
    records.write_jsonl(RunFiles(workdir / "runs" / RUN).attempts, attempts)
    records.write_json(workdir / "complete.json", {"inputs": "0"})
    init_record.write(workdir, "there", "0", None)
    paths = samples.shard_folder(workdir).glob("*")
    shards = {path.name: file_digest(path) for path in paths}
    checksums = {"of": "", "shards": shards}
    records.write_json(workdir / "samples" / "checksums.json", checksums)
    return workdir


def experiment():
    given = config.load(EXAMPLE / "study.py")
    given.advise.budget = 1.0
    return config.resolve(given)


def resumed(workdir):
    """Training that goes on reads the lines of its run."""
    files = RunFiles(workdir / "runs" / RUN)
    progress.MetricLog(files, 10**9, tensorboard=False).close()
    records.table.drop_rows(files.measurements, 10**9)


def missing_rows(workdir):
    """As --list_missing and the launchers find them."""
    return missing.rows(workdir, enumerate(records.read_plan(workdir)))


def study_of(workdir):
    return study._Study(experiment(), workdir, ("fit",), True, None, (None,) * 3)


# What reads a file of a directory.
READERS = {
    "experiment.json": (ownership.unknown, records.read_table),
    "runs.jsonl": (
        lambda w: study_of(w)._specs(),
        records.read_table,
        missing_rows,
    ),
    "complete.json": (lambda w: ownership.is_complete(experiment(), w),),
    "init.json": (init_record.read,),
    "frontier.json": (lambda w: advise.run(experiment(), w, lambda _: []),),
    "evaluations.jsonl": (records.read_table,),
    f"runs/{RUN}/record.json": (
        lambda w: runs.read_record(w, RUN),
        records.read_table,
        lambda w: runs.best(w, records.read_jsonl(w / "runs.jsonl")),
        missing_rows,
    ),
    f"runs/{RUN}/metrics.jsonl": (resumed,),
    f"runs/{RUN}/measurements.jsonl": (resumed, records.read_table),
    f"runs/{RUN}/attempts.jsonl": (
        lambda w: goodput.Ledger(RUN, RunFiles(w / "runs" / RUN)),
    ),
    "samples/record.json": (samples.read_record,),
    "samples/checksums.json": (
        lambda w: samples.are_of(w, ""),
        lambda w: list(samples.read_images(w)),
    ),
}
# Lines are appended to these: a last one without its end is dropped, with a word.
APPENDED = ("metrics.jsonl", "measurements.jsonl")
REPORTED = {
    "experiment.json",
    "environment.json",
    "laws.json",
    "frontier.json",
    "evaluations.jsonl",
    f"runs/{RUN}/record.json",
    f"runs/{RUN}/metrics.jsonl",
    f"runs/{RUN}/measurements.jsonl",
    f"runs/{RUN}/attempts.jsonl",
    "samples/record.json",
}


@pytest.fixture
def damaged(small):
    """damaged(name, damage) -> the path of the file; it is mended afterwards."""
    kept = {}

    def change(name, damage):
        path = small / name
        kept[path] = path.read_bytes()
        path.write_bytes(damage(kept[path]))
        return path

    yield change
    for path, data in kept.items():
        path.write_bytes(data)


def may_be_empty(path):
    """Whether it is a file of lines that now has none, as before its first line."""
    lines = path.suffix == ".jsonl" and path.name != "attempts.jsonl"
    return lines and path.stat().st_size == 0


@damages
@pytest.mark.parametrize("name", READERS)
def test_who_reads_a_file_that_is_no_record_names_it(small, damaged, name, damage):
    path = damaged(name, damage)
    said = [said_about(path, lambda read=read: read(small)) for read in READERS[name]]
    nothing_lost = may_be_empty(path)
    if path.name == "runs.jsonl":  # an empty plan is no plan
        assert said[0]
    elif path.name in APPENDED and damage in (DAMAGES["cut off"], DAMAGES["nested"]):
        assert not any(said)
    elif not nothing_lost:
        assert all(said)


@pytest.mark.parametrize(
    "name", ["record.json", "measurements.jsonl", "attempts.jsonl"]
)
def test_the_file_of_another_run_is_refused(small, damaged, name):
    of_other = lambda data: unsealed(data).replace(  # noqa: E731
        RUN.encode(), b"2.400e09-16x1"
    )
    path = damaged(f"runs/{RUN}/{name}", of_other)
    for read in READERS[f"runs/{RUN}/{name}"]:
        if read is not resumed:  # it looks at steps alone
            assert "2.400e09-16x1" in said_about(path, lambda read=read: read(small))


def another_digit(data):
    """The last digit before the first seal becomes another one."""
    end = data.index(b'"seal"')
    at = max(i for i in range(end) if data[i : i + 1].isdigit())
    return data[:at] + (b"7" if data[at : at + 1] != b"7" else b"3") + data[at + 1 :]


@pytest.mark.parametrize(
    "name",
    [
        "runs.jsonl",
        "complete.json",
        "init.json",
        f"runs/{RUN}/measurements.jsonl",
        f"runs/{RUN}/attempts.jsonl",
        "samples/checksums.json",
    ],
)
def test_a_digit_that_changed_is_noticed(small, damaged, name):
    """In files that today's library wrote; the record is valid with either digit."""
    path = damaged(name, another_digit)
    for read in READERS[name]:
        if read is not resumed:  # it looks at steps alone
            said = said_about(path, lambda read=read: read(small))
            assert "changed after it was written" in said
    path.write_bytes(unsealed(path.read_bytes()))
    said = said_about(path, lambda: READERS[name][-1](small))
    assert "after it was written" not in said


def test_a_run_whose_loss_is_lost_is_not_passed_over_as_the_best(small, damaged):
    lost = lambda data: json.dumps(  # noqa: E731
        json.loads(data) | {"validation_loss_ema": "nan"}
    ).encode()
    record = damaged(f"runs/{RUN}/record.json", lost)
    specs = records.read_jsonl(small / "runs.jsonl")
    said = said_about(record, lambda: runs.best(small, specs))
    assert f"runs/{RUN}/measurements.jsonl lacks the held-out loss" in said
    assert "put a copy back; or remove" in said and said.count("put a copy back") == 1


@damages
@pytest.mark.parametrize("name", sorted(REPORTED))
def test_the_report_says_which_file_it_could_not_read(small, damaged, name, damage):
    whole = pages.read(small).notes
    path = damaged(name, damage)
    notes = [note for note in pages.read(small).notes if note not in whole]
    if may_be_empty(path):
        return
    if path.name == "measurements.jsonl" and damage in (
        DAMAGES["cut off"],
        DAMAGES["nested"],
    ):
        return
    # What it holds depends on the version; all of it is shown, whatever it is.
    any_object = (DAMAGES["an empty object"], DAMAGES["another record"])
    if path.name == "environment.json" and damage in any_object:
        return
    assert any(path.name in note for note in notes)
    assert all(len(note.splitlines()) == 1 for note in notes)


def test_a_directory_without_damage_is_read_without_a_word(small):
    for name, readers in READERS.items():
        for read in readers:
            assert not said_about(small / name, lambda read=read: read(small))


def test_garbage_in_the_middle_keeps_the_lines_after_it(small, damaged, capsys):
    path = damaged(f"runs/{RUN}/metrics.jsonl", lambda data: data)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) > 3
    path.write_bytes(lines[0] + b"garbage\n" + b"".join(lines[1:]))
    held = path.read_bytes()
    assert "metrics.jsonl:2" in said_about(path, lambda: resumed(small))
    assert path.read_bytes() == held
    # A last line that was cut off is dropped, and that is said.
    for cut in (whole[:-1], whole[:-20], whole[:-20] + bytes(300), whole + bytes(9)):
        path.write_bytes(cut)
        resumed(small)
        kept = whole if cut.startswith(whole) else b"".join(lines[:-1])
        assert path.read_bytes() == kept
        said = capsys.readouterr().err
        assert said == f"the last line of {path} was cut off and is dropped\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", "many"),
        ("flops", None),
        ("run_id", 3),
        ("mfu", "fast"),
        ("params", True),
    ],
)
def test_a_field_of_another_type_is_no_record(small, damaged, field, value):
    change = lambda data: json.dumps(json.loads(data) | {field: value}).encode()  # noqa: E731
    path = damaged(f"runs/{RUN}/record.json", change)
    assert field in said_about(path, lambda: runs.read_record(small, RUN))


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (b'"STEP"', b'"STEQ"', r"parts has unknown \['STEQ'\]"),
        (b'"data_seconds": [0.1, 0.2]', b'"data_seconds": [0.1]', "are of 2 processes"),
    ],
)
def test_parts_of_time_that_nothing_measures_are_no_record(
    small, damaged, was, now, said
):
    whole = pages.read(small)
    change = lambda data: unsealed(data).replace(was, now)  # noqa: E731
    path = damaged(f"runs/{RUN}/attempts.jsonl", change)
    found = pages.read(small)
    assert RUN in whole.attempts and RUN not in found.attempts
    (note,) = {*found.notes} - {*whole.notes}
    assert re.search(said, note) and path.name in note


@pytest.mark.slow
@damages
@pytest.mark.parametrize("name", sorted({*READERS, *REPORTED, "samples/settings.json"}))
def test_a_command_ends_with_one_line(small, tmp_path, name, damage, capsys):
    """Stages that read a study, over a directory with one damaged file."""
    workdir = tmp_path / "w"
    shutil.copytree(small, workdir)
    (workdir / "complete.json").unlink(missing_ok=name != "complete.json")
    path = workdir / name
    if path.exists():
        path.write_bytes(damage(path.read_bytes()))
    given = config.load(EXAMPLE / "study.py")
    given.fit.bootstrap, given.advise.budget = 50, 1.0
    for stages in (("fit",), ("advise",)):
        status = study.run(
            given,
            workdir=str(workdir),
            stages=stages,
            only=None,
            cluster=(None, None, None),
        )
        said = capsys.readouterr().err
        assert (
            status in exit_status.EXIT.values() and status != exit_status.EXIT["defect"]
        )
        assert "Traceback" not in said
        if status in (2, 3):
            (line,) = [x for x in said.splitlines() if x.startswith("error: ")]
            assert path.name in line
