"""A study whose working directory is a bucket of an emulated store, in processes."""

import json
import os
import re
import subprocess
import sys
import time

import buckets
import pytest
from processes import MainProcess, run_main

from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.workdir import lock, lock_file

pytestmark = pytest.mark.slow

STUDY = (
    "--config=experiments/tiny.py",
    "--config.plan.budgets_flops=(1.6e9,)",
    "--config.plan.sizes=((16, 1), (32, 1))",
    "--config.plan.sizes_per_budget=2",
    "--config.train.checkpoints_per_run=4",
    "--config.train.keep_checkpoints=2",
    "--config.train.show_every_seconds=0",
)
DRAW = """
import hashlib, sys, scaling_ldm
pictures = scaling_ldm.load(sys.argv[1]).sample("a red coat", n=2, steps=2)
print(hashlib.sha256(pictures.tobytes()).hexdigest())
"""
FILES = ("laws.json", "runs.jsonl", "experiment.json")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same study in a folder, never disturbed."""
    workdir = tmp_path_factory.mktemp("local")
    run_main(*STUDY, f"--workdir={workdir}")
    return workdir


@pytest.fixture(params=buckets.STORES)
def bucket(request, tmp_path):
    with buckets.opened(tmp_path / "store", request.param) as bucket:
        yield bucket


def committed(bucket, name):
    """What marks the complete checkpoints of a study, in their step folders."""
    mark = re.compile(rf"{name}/runs/[^/]+/checkpoints/\d+/commit_success.txt")
    return [found for found in bucket.names() if mark.fullmatch(found)]


def assert_same_study(bucket, name, local):
    """The objects hold what the files of the undisturbed study hold."""
    here = bucket.folder() / name
    for file in FILES:
        assert (here / file).read_text() == (local / file).read_text(), file
    rows = sorted(p.relative_to(local) for p in local.glob("runs/*/measurements.jsonl"))
    assert len(rows) == 2
    for path in rows:
        assert (here / path).read_text() == (local / path).read_text(), path
        steps = [
            [
                json.loads(line)["step"]
                for line in (root / path.parent / "metrics.jsonl")
                .read_text()
                .splitlines()
            ]
            for root in (here, local)
        ]
        assert steps[0] == steps[1]
        # The emulator leaves empty folders of what is removed.
        files = (root / path.parent / "checkpoints" for root in (here, local))
        kept = [
            {p.relative_to(folder).parts[0] for p in folder.rglob("*") if p.is_file()}
            for folder in files
        ]
        assert kept[0] == kept[1]
    assert (here / "report" / "index.html").stat().st_size > 10_000
    assert (here / "samples" / "grid.png").stat().st_size > 1_000
    assert not (here / "lock.json").exists()
    assert not os.path.exists(bucket.url.split("//")[0])


def assert_same_export(bucket, local):
    """The study's export is that of the folder; both are loaded, and draw the same."""
    places, drawn = (f"{bucket.url}/study", str(local)), []
    for place in places:
        run_main(*STUDY, f"--workdir={place}", "--stages=export")
        draw = [sys.executable, "-c", DRAW, place]
        done = subprocess.run(draw, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        drawn.append(done.stdout)
    assert len(drawn[0]) == 65 and drawn[0] == drawn[1]
    here = bucket.folder() / "study" / "export"
    theirs = {p.relative_to(local / "export"): p for p in (local / "export").rglob("*")}
    assert len(theirs) >= 3
    for name, path in theirs.items():
        if path.is_file():
            assert (here / name).read_bytes() == path.read_bytes(), name


def test_a_study_that_is_killed_continues_and_is_that_of_a_folder(bucket, local):
    url = f"--workdir={bucket.url}/study"
    first = MainProcess(*STUDY, url)
    buckets.wait_until(lambda: len(committed(bucket, "study")) >= 2, 200)
    first.kill()
    assert "study/lock.json" in bucket.names()
    second = MainProcess(*STUDY, url)
    said = second.end()
    assert "which is gone: this process takes over" in said
    assert " continues from step " in said
    assert_same_study(bucket, "study", local)
    assert "nothing to do: tiny is finished" in run_main(*STUDY, url)[1]
    assert_same_export(bucket, local)


def test_a_second_command_is_refused_while_the_first_works(bucket):
    url = f"--workdir={bucket.url}/study"
    first = MainProcess(*STUDY, url, "--stages=plan,train")
    first.wait_for("run 1 of 2")
    _, said = run_main(*STUDY, url, "--stages=plan", expect=2)
    assert f"{bucket.url}/study is in use by process {first.popen.pid}" in said
    first.end()


def test_a_store_that_goes_away_stops_the_study_and_loses_nothing(bucket, local):
    url = f"--workdir={bucket.url}/study"
    first = MainProcess(*STUDY, url)
    buckets.wait_until(lambda: len(committed(bucket, "study")) >= 1, 200)
    bucket.mode, begin = "down", time.monotonic()
    said = first.end(expect=3, timeout=400)
    print(f"ended after {time.monotonic() - begin:.0f} s:", said[-500:])
    assert "Traceback" not in said
    assert "run the same command to continue" in said.splitlines()[-1]
    bucket.mode = "open"
    MainProcess(*STUDY, url).end()
    assert_same_study(bucket, "study", local)


@pytest.mark.parametrize(
    "mode, name, said",
    [
        ("read only", "bucket/new", "No permission to write there"),
        ("open", "nobucket/new", "No such bucket"),
        ("down", "bucket/new", "The store does not answer"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(bucket, mode, name, said):
    bucket.mode = mode
    begin = time.monotonic()
    url = bucket.url.replace("bucket", name)
    _, error = run_main(*STUDY, f"--workdir={url}", "--stages=plan", expect=3)
    (line,) = [x for x in error.splitlines() if x]
    assert line.startswith(f"error: {said}") and url in line
    assert time.monotonic() - begin < 60
    assert bucket.writes == 0 or mode == "open"
    assert bucket.objects() == {}


def test_a_study_becomes_read_only_and_keeps_what_it_has(bucket):
    url = f"--workdir={bucket.url}/study"
    run_main(*STUDY, url, "--stages=plan")
    before = bucket.objects()
    assert "study/runs.jsonl" in before
    bucket.mode = "read only"
    _, error = run_main(*STUDY, url, expect=3)
    assert error.splitlines()[-1].startswith("error: No permission to write there")
    assert bucket.objects() == before


def test_a_lock_that_another_holder_has_written_is_not_written_over(bucket):
    path = ObjectPath.of(f"{bucket.url}/a study/{lock.NAME}")
    with lock.holding([path]):
        held, version, before = lock._held[path], path.version(), path.written_at()
        time.sleep(1.1)  # s3:// says the time in whole seconds
        held.beat()
        assert path.written_at() > before and path.version() != version
        assert lock_file.text(path) == held._text
        with pytest.raises(FileExistsError):
            path.write_over(version, b"late", lock_file.SECONDS)
        with pytest.raises(FileExistsError):
            path.unlink_version(version, lock_file.SECONDS)
        assert lock_file.text(path) == held._text
    assert bucket.objects() == {}
