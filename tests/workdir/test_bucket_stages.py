"""Stages and jobs of two processes whose working directory is a bucket of a store.

Every study is also done in a folder, undisturbed. What can be compared to the bit is.
"""

import json

import buckets
import numpy as np
import pytest
from processes import MainProcess, run_main, start_job

from scaling_ldm.workdir import exit_status

pytestmark = pytest.mark.slow

PICTURES = (
    "--config=experiments/tiny.py",
    "--config.data.shape=(8, 8, 4)",
    "--config.data.text_tokens=15",
    "--config.data.vocab_size=1024",
    "--config.encode.autoencoder=icons_f4",
    "--config.encode.text_encoder=vocabulary",
    "--config.encode.pictures=96",
    "--config.encode.records_per_shard=16",
    "--config.encode.batch_size=16",
    "--config.plan.budgets_flops=(1.6e9,)",
    "--config.plan.sizes=((16, 1),)",
    "--config.plan.sizes_per_budget=1",
    "--config.plan.minimum_steps=2",
    "--config.validation.samples=8",
    "--config.validation.batch_size=8",
    "--config.generate.images=12",
    "--config.generate.batch_size=4",
    "--config.generate.steps=2",
    "--config.evaluate.network=lite0",
    "--config.evaluate.input_size=64",
    "--config.evaluate.metrics=('fd', 'kid')",
    "--config.evaluate.reference_images=24",
    "--config.evaluate.batch_size=12",
    "--config.evaluate.bootstrap=4",
    "--config.frontier.images=8",
    "--config.frontier.samplers=('ddim',)",
    "--config.frontier.steps=(2,)",
    "--config.frontier.guidances=(1.5, 3.0)",
    "--config.train.show_every_seconds=0",
)
STAGES = "--stages=plan,encode,train,generate,evaluate,frontier"
# Differ between two commands; a seal is of all values.
TIMED = ("seconds", "device", "memory_bytes", "seal")


@pytest.fixture
def bucket(request, tmp_path):
    with buckets.opened(tmp_path / "store", request.param) as bucket:
        yield bucket


def without_times(value):
    """A JSON value without what two equal commands do not share."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMED}
    if not isinstance(value, list):
        return value
    by_time = {"cost": "seconds"}.items()  # of a front, or a crossing
    return [
        without_times(v)
        for v in value
        if not (isinstance(v, dict) and by_time <= v.items())
    ]


def read(path):
    """The JSON values of a file's lines, or of the file."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [without_times(json.loads(line)) for line in lines]


def assert_same_files(here, local, pattern, least):
    """The files of a pattern have the same names and, but for times, the same values.

    Args:
      least: how many there are at least.
    """
    names = [p.relative_to(local).as_posix() for p in sorted(local.glob(pattern))]
    assert len(names) >= least, pattern
    assert names == sorted(
        p.relative_to(here).as_posix() for p in here.glob(pattern) if p.is_file()
    )
    for name in names:
        if name.endswith((".json", ".jsonl")):
            assert read(here / name) == read(local / name), name
        elif name.endswith(".npz"):
            with np.load(here / name) as ours, np.load(local / name) as theirs:
                assert set(ours) == set(theirs), name
                for key in ours:
                    np.testing.assert_array_equal(ours[key], theirs[key], name)
        else:
            assert (here / name).read_bytes() == (local / name).read_bytes(), name


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """The study of pictures in a folder."""
    workdir = tmp_path_factory.mktemp("encoded")
    run_main(*PICTURES, STAGES, f"--workdir={workdir}")
    return workdir


@pytest.mark.parametrize("bucket", buckets.STORES, indirect=True)
def test_encode_generate_evaluate_and_frontier_are_those_of_a_folder(bucket, encoded):
    url, records = f"--workdir={bucket.url}/study", "study/encoded"
    first = MainProcess(*PICTURES, STAGES, url)
    buckets.wait_until(lambda: f"{records}/shard-00002.json" in bucket.names(), 200)
    first.kill()
    assert f"{records}/manifest.json" not in bucket.names()
    said = MainProcess(*PICTURES, STAGES, url).end(timeout=900)
    assert " shards are there" in said
    here = bucket.folder() / "study"
    for pattern, least in (
        ("encoded/*", 8),
        ("runs/*/measurements.jsonl", 1),
        ("samples/shards/*.npy", 3),
        ("samples/images.npy", 1),
        ("samples/real.npy", 1),
        ("samples/record.json", 1),
        ("evaluate/reference-*.npz", 1),
        ("evaluate/features/*/*", 4),
        ("evaluations.jsonl", 1),
        ("frontier/cells/*.json", 2),
        ("frontier.json", 1),
    ):
        assert_same_files(here, encoded, pattern, least)
    again = run_main(*PICTURES, STAGES, url)[1]
    assert "encoded already: 96 pictures" in again
    assert "are there already" in again
    before = bucket.objects()
    run_main(*PICTURES, "--stages=evaluate,frontier", url)
    after = bucket.objects()
    for name in ("evaluations.jsonl", "frontier.json"):
        assert after[f"study/{name}"] == before[f"study/{name}"]


STEPS = 60
JOB = (
    "--config=experiments/tiny.py",
    "--config.data.shape=(8, 8, 3)",
    "--config.data.text_tokens=4",
    "--config.plan.sizes=((16, 1),)",
    f"--config.plan.budgets_flops=({STEPS * 3648512.0},)",
    "--config.plan.sizes_per_budget=1",
    "--config.plan.minimum_steps=10",
    "--config.train.checkpoints_per_run=6",
    "--config.train.keep_checkpoints=2",
    "--config.train.log_every_steps=1",
    "--config.train.steps_per_dispatch=1",
    "--config.train.show_every_seconds=0.0",
    "--config.validation.samples=8",
    "--config.validation.batch_size=8",
    "--config.mesh.heartbeat_seconds=10",
    "--config.mesh.cpu_devices=1",
    "--config.mesh.fsdp=2",  # so that each process writes its part of the arrays
    "--stages=plan,train",
)


@pytest.fixture
def started():
    """Jobs; what still runs in the end is killed."""
    jobs = []
    yield jobs
    for process in jobs:
        process.popen.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The job of two processes in a folder."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "w"
    for process in start_job(2, *JOB, f"--workdir={workdir}"):
        process.end()
    return workdir


def complete(bucket):
    """The steps of complete checkpoints."""
    marks = (name.partition("/checkpoints/")[2].split("/") for name in bucket.names())
    return sorted(int(m[0]) for m in marks if m[1:] == ["commit_success.txt"])


@pytest.mark.parametrize(
    "bucket, killed",
    [("gs", (0,)), ("gs", (1,)), ("gs", (0, 1)), ("s3", (0, 1))],
    indirect=["bucket"],
    ids=("gs-first", "gs-second", "gs-both", "s3-both"),
)
def test_a_job_of_two_processes_that_is_killed_continues(
    bucket, undisturbed, started, killed
):
    url = f"--workdir={bucket.url}/study"
    job = start_job(2, *JOB, url)
    started.extend(job)
    buckets.wait_until(lambda: len(complete(bucket)) >= 2, 200)
    for number in killed:
        job[number].popen.kill()
    for number in {0, 1} - set(killed):
        said = job[number].end(exit_status.EXIT["lost a process"], timeout=90)
        assert "Traceback" not in said
    assert max(complete(bucket)) < STEPS
    job = start_job(2, *JOB, url)
    started.extend(job)
    said = [process.end() for process in job]
    assert " continues from step " in said[0]
    here = bucket.folder() / "study"
    (rows,) = undisturbed.glob("runs/*/metrics.jsonl")
    ours = read(here / rows.relative_to(undisturbed))
    losses = [[(r["step"], r["loss"]) for r in x] for x in (ours, read(rows))]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))
    assert losses[0] == losses[1]
    assert_same_files(here, undisturbed, "runs/*/measurements.jsonl", 1)
    record = json.loads(
        (here / rows.parent.relative_to(undisturbed) / "record.json").read_text()
    )
    assert (record["devices"], record["restarts"]) == (2, 1)
    assert len(complete(bucket)) == 2
    assert not [name for name in bucket.names() if name.endswith("lock.json")]
