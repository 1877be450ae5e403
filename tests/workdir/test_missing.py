"""Which rows of a plan are missing: --list_missing on stored directories."""

import dataclasses
import shutil

import older_workdirs
import pytest
from processes import run_main

from scaling_ldm import config, records, study
from scaling_ldm.workdir import exit_status, missing, runs

EXAMPLE = older_workdirs.MADE / records.FIRST
NO_JOB = (None, None, None)


@pytest.fixture
def workdir(tmp_path):
    """A finished study of an older release."""
    older_workdirs.unpack(EXAMPLE, tmp_path / "w", finished=True)
    return tmp_path / "w"


def files(workdir):
    return {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}


@pytest.fixture
def listed(capsys):
    """listed(workdir, **fields): status, standard output, standard error."""

    def run(workdir, *, stages=None, only=None, cluster=NO_JOB, **fields):
        given = config.load(EXAMPLE / "study.py")
        for name, value in fields.items():
            given.train[name] = value
        status = study.run(
            given,
            workdir=str(workdir),
            stages=stages,
            only=only,
            cluster=cluster,
            list_missing=True,
        )
        return status, *capsys.readouterr()

    return run


def test_rows_without_a_record_are_listed_and_nothing_is_written(workdir, listed):
    specs = records.read_plan(workdir)
    assert listed(workdir)[:2] == (0, "")
    for row in (0, 2):
        runs.run_files(workdir, specs[row].run_id).record.unlink()
    before = files(workdir)
    status, out, _ = listed(workdir)
    assert status == 0
    assert out == f"0 {specs[0].run_id}\n2 {specs[2].run_id}\n"
    assert files(workdir) == before


def test_a_run_that_failed_is_over(workdir, listed):
    spec = records.read_plan(workdir)[1]
    record = runs.read_record(workdir, spec.run_id)
    failed = dataclasses.replace(record, status="non_finite_loss", detail="step 3")
    runs.write_record(workdir, failed)
    assert listed(workdir)[:2] == (0, "")


def test_what_is_refused_lists_nothing(workdir, listed, tmp_path):
    status, out, err = listed(workdir, seed=77)
    assert (status, out) == (2, "")
    assert "holds another experiment" in err
    status, out, err = listed(tmp_path / "new")
    assert (status, out) == (2, "")
    assert "no plan in" in err
    assert not (tmp_path / "new").exists()
    for more in (
        {"stages": ["plan"]},
        {"only": "1"},
        {"cluster": ("h:1", None, None)},
        {"cluster": (None, None, 0)},
    ):
        status, out, err = listed(workdir, **more)
        assert (status, out) == (2, "")
        assert "--list_missing runs nothing: leave out" in err


def test_a_record_of_another_run_is_refused(workdir, listed):
    one, other = records.read_plan(workdir)[:2]
    path = runs.run_files(workdir, one.run_id).record
    record = runs.read_record(workdir, one.run_id)
    records.write_text(
        path, records.dumps(dataclasses.replace(record, budget_flops=1.0))
    )
    status, out, err = listed(workdir)
    assert (status, out) == (2, "")
    assert "holds a run of another experiment" in err
    shutil.copy(runs.run_files(workdir, other.run_id).record, path)
    status, out, err = listed(workdir)
    assert (status, out) == (exit_status.EXIT["storage"], "")
    assert f"{path} is that of {other.run_id}" in err


def test_training_trains_what_is_listed(workdir):
    """The train stage locks and trains the rows of the same function."""
    numbered = [*enumerate(records.read_plan(workdir))]
    assert missing.rows(workdir, numbered) == []
    runs.run_files(workdir, numbered[3][1].run_id).record.unlink()
    assert missing.rows(workdir, numbered) == [numbered[3]]


def test_no_device_is_started(workdir):
    """The entry point reads the flag; a platform that is not there is not asked."""
    runs.run_files(workdir, records.read_plan(workdir)[1].run_id).record.unlink()
    flags = (f"--config={EXAMPLE / 'study.py'}", f"--workdir={workdir}")
    out, _ = run_main(*flags, "--list_missing", JAX_PLATFORMS="nothing")
    assert out.startswith("1 ")
    assert len(out.splitlines()) == 1
