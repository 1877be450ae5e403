"""Evaluation and frontier: protocols, references, records and cells that are kept."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy import linalg
from untrained import finish

from scaling_ldm import config, evaluation, records
from scaling_ldm.evaluation import extractors, measures, protocol, reference
from scaling_ldm.metrics import Moments
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.records import joined, table
from scaling_ldm.stages import evaluate, frontier, generate, plan
from scaling_ldm.training import inference, mesh, progress
from scaling_ldm.workdir import runs, samples

WIDTH = 12  # of the stand-in's features


def judge(cfg, weights=None):
    """A stand-in for a feature network: fixed random features of 8 x 8 pictures."""
    rng = np.random.default_rng(0 if weights is None else weights)
    params = rng.normal(size=(8 * 8 * 3, WIDTH)).astype(np.float32) / 800

    def apply(params, x):
        x = x.reshape(x.shape[0], 8, 8 * 3).reshape(x.shape[0], 8 * 8 * 3)
        return Features(jax.numpy.tanh(x @ params), None)

    return extractors.FeatureNetwork(
        apply, params, lambda x: x, "none", pathlib.Path(__file__)
    )


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setitem(extractors._LOADERS, "lite0", judge)
    monkeypatch.setattr(extractors, "weights_path", lambda cfg: pathlib.Path(__file__))


@pytest.fixture(scope="module")
def trained(tiny, one_device, tmp_path_factory):
    """(experiment, workdir, specs) of two sizes and a small grid of cells.

    What is drawn and measured is what matters here, so the weights are random.
    """
    workdir = tmp_path_factory.mktemp("evaluate")
    c = tiny.copy_and_resolve_references()
    c.generate.images, c.generate.batch_size, c.generate.steps = 24, 16, 2
    c.plan.sizes, c.plan.budgets_flops, c.plan.steps = ((8, 1), (16, 1)), (), 12
    c.plan.sizes_per_budget = 0
    c.evaluate.network, c.evaluate.reference_images = "lite0", 40
    c.evaluate.metrics = ("fd", "fd_infinity", "kid", "precision_recall")
    c.evaluate.bootstrap, c.evaluate.batch_size = 8, 16
    c.frontier.images, c.frontier.samplers = 16, ("ddim", "dpm++2m")
    c.frontier.steps, c.frontier.guidances = (2, 4), (1.5, 3.0)
    experiment = config.resolve(c)
    specs = plan.plan(experiment)
    plan.write(specs, workdir)
    for number, spec in enumerate(specs):
        finish(experiment, workdir, spec, at=(6,), loss=0.5 - number / 10, seed=number)
    generate.run(experiment, workdir, specs)
    return experiment, workdir, specs


def changed(experiment, **sections):
    return dataclasses.replace(
        experiment,
        **{
            name: dataclasses.replace(getattr(experiment, name), **fields)
            for name, fields in sections.items()
        },
    )


# --- The stage.


def test_the_distance_is_that_of_the_pictures_and_held_out_reals(trained):
    experiment, workdir, specs = trained
    found = {r.metric: r for r in evaluate.run(experiment, workdir, specs)}
    assert set(found) == {
        "fd_lite0",
        "fd_lite0_infinity",
        "kid_lite0",
        "precision_lite0",
        "recall_lite0",
    }

    def mean_and_covariance(images):
        x = np.tanh(images.reshape(len(images), -1).astype("f") @ judge(None).params)
        return x.mean(0), np.cov(x.astype(np.float64), rowvar=False)

    real, _ = zip(*reference.held_out(experiment, (8, 8), 40), strict=True)
    real = np.concatenate(real)
    assert real.shape == (40, 8, 8, 3)
    (m, a), (n, b) = (
        mean_and_covariance(np.concatenate(list(samples.read_images(workdir)))),
        mean_and_covariance(real),
    )
    root = linalg.sqrtm(a @ b).real
    wanted = np.sum((m - n) ** 2) + np.trace(a + b - 2 * root)
    fd = found["fd_lite0"]
    assert fd.value == pytest.approx(wanted, rel=1e-4)
    assert fd.low < fd.value < fd.high and fd.level == 0.9
    assert (fd.images, fd.nfe, fd.step) == (24, 4, 12)
    assert fd.run_id == runs.best(workdir, specs).run_id
    assert fd.flops > 0
    assert fd.protocol["guidance"] == experiment.generate.guidance
    assert fd.protocol["reference_images"] == 40
    (path,) = (workdir / "evaluate").glob("reference-*.npz")
    assert fd.protocol["reference"] == Moments.load(path)[1]["digest"]
    floors = ("fd_lite0_real", "fd_lite0_noise")
    kept = {r.metric: r for r in records.read_evaluations(workdir)}
    real, noise = (kept.pop(name).value for name in floors)
    assert kept == found and 0 < real < noise
    held = records.read_jsonl(workdir / "evaluations.jsonl")
    assert {type(record) for record in held} == {records.EvalRecord}
    rows = {r.metric: r for r in records.read_table(workdir) if r.metric in found}
    same = "run_id step protocol_hash value low high level".split()
    for metric, r in found.items():  # the number is in the table, and there alone
        assert [getattr(rows[metric], n) for n in same] == [getattr(r, n) for n in same]


def test_a_number_in_doubt_says_so_in_its_record_and_its_line(trained, monkeypatch):
    """Subsets of 7 of 24 pictures are too few for a line in 1/n at 12 dimensions."""
    experiment, workdir, specs = trained
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    for r in evaluate.run(experiment, workdir, specs):
        (line,) = [line for line in said if f" {r.metric} " in line]
        if r.metric.endswith("infinity"):
            assert r.doubt.startswith("extrapolated from subsets of 7 rows")
            assert line.endswith(f"\n    in doubt: {r.doubt}")
        else:
            assert r.doubt == "" and "doubt" not in line


def test_features_are_in_the_order_of_their_pictures(trained):
    """In whole batches and in a last batch that is filled up; on four devices."""
    experiment, _, _ = trained
    device_mesh = mesh.build(experiment.mesh, {}, use=jax.devices())
    assert device_mesh.size == 4
    images = np.random.default_rng(0).integers(256, size=(21, 8, 8, 3), dtype=np.uint8)
    wanted = np.tanh(images.reshape(21, -1).astype("f") @ judge(None).params)
    with jax.set_mesh(device_mesh):
        found = extractors.Extractor(experiment.evaluate, device_mesh)(images)
    np.testing.assert_allclose(found.features, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_measured_is_not_measured_again(trained, monkeypatch):
    experiment, workdir, specs = trained
    first = evaluate.run(experiment, workdir, specs)
    monkeypatch.setattr(
        extractors.Extractor, "__call__", lambda *_: pytest.fail("measured again")
    )
    assert evaluate.run(experiment, workdir, specs) == first


def test_checkpoints_on_the_way_are_measured_where_asked_for(trained):
    experiment, workdir, specs = trained
    every = changed(experiment, evaluate={"through_training": True, "metrics": ("fd",)})
    found = evaluate.run(every, workdir, specs)
    best = runs.best(workdir, specs)
    assert {(r.run_id, r.step) for r in found} == {
        (spec.run_id, step) for spec in specs for step in (6, 12)
    }
    flops = {(r.run_id, r.step): r.train_flops for r in found}
    assert flops[best.run_id, 6] == 6 * best.flops_per_step
    values = {(r.run_id, r.step): r.value for r in found}
    assert len(set(values.values())) == len(values)  # other weights, other pictures


@pytest.mark.parametrize(
    ("field", "value"),
    [("images", 30), ("guidance", 7.5), ("sampler", "ddim"), ("steps", 3), ("seed", 9)],
)
def test_pictures_of_other_settings_are_refused(trained, field, value):
    """Their numbers would be stored under the wrong protocol."""
    experiment, workdir, specs = trained
    other = changed(experiment, generate={field: value})
    with pytest.raises(config.ConfigError, match=f"{field} = .*add generate"):
        evaluate.run(other, workdir, specs)


def test_pictures_of_another_run_are_refused(trained, monkeypatch):
    experiment, workdir, specs = trained
    best = runs.best(workdir, specs)
    (other,) = (spec for spec in specs if spec != best)
    shutil.rmtree(workdir / "evaluate" / "features")  # of all that was measured before
    monkeypatch.setattr(runs, "best", lambda workdir, specs: other)
    with pytest.raises(config.ConfigError, match="run_id = .*add generate"):
        evaluate.run(experiment, workdir, specs)


def test_without_a_network_nothing_is_measured(trained, tmp_path):
    experiment, _, specs = trained
    assert (
        evaluate.run(changed(experiment, evaluate={"network": "none"}), tmp_path, specs)
        == []
    )


def test_a_given_reference_is_used_and_another_networks_refused(
    trained, tmp_path, monkeypatch
):
    experiment, workdir, specs = trained
    (wanted,) = evaluate.run(
        changed(experiment, evaluate={"metrics": ("fd",)}), workdir, specs
    )
    (path,) = (workdir / "evaluate").glob("reference-*.npz")
    given = {"metrics": ("fd",), "reference": str(path)}
    (again,) = evaluate.run(changed(experiment, evaluate=given), workdir, specs)
    assert again == wanted  # the same statistics, wherever they are from
    (workdir / "evaluations.jsonl").unlink()
    (anew,) = evaluate.run(changed(experiment, evaluate=given), workdir, specs)
    assert anew == wanted
    with pytest.raises(config.ConfigError, match="statistics alone"):
        evaluate.run(
            changed(experiment, evaluate=given | {"metrics": ("kid",)}), workdir, specs
        )
    monkeypatch.setitem(
        extractors._LOADERS,
        "lite0",
        lambda cfg: judge(cfg)._replace(resize="another"),
    )
    with pytest.raises(
        config.ConfigError, match="resize 'none' there, 'another' wanted"
    ):
        evaluate.run(changed(experiment, evaluate=given), workdir, specs)


@pytest.mark.slow
def test_twenty_thousand_pictures_are_not_held_in_memory():
    """Beyond their features, which are few here: see the benchmark.

    As a user has it: the threads that the tests give XLA hold memory of their own. From
    few batches to some, buffers grow by half of the pictures; after that, by little.
    """
    here = pathlib.Path(__file__).parents[1]
    ours = {"XLA_FLAGS", "PJRT_NPROC"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, here / "benchmarks" / "memory.py"]
        + ["--pictures", "4000", "20000"],
        env=env | {"PYTHONPATH": str(here.parent)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["features_bytes"] < 0.05 * found["pictures_bytes"]
    assert found["growth_bytes"] < 0.4 * found["pictures_bytes"]


# --- Stopped, and gone on with.


class Stop(Exception):
    """Raised where a process would be killed."""


def counting(monkeypatch, stop_after=None):
    """Pictures per call of the network; the process ends after so many calls."""
    calls, extract = [], extractors.Extractor.__call__

    def counted(self, images):
        if len(calls) == stop_after:
            raise Stop
        calls.append(len(images))
        return extract(self, images)

    monkeypatch.setattr(extractors.Extractor, "__call__", counted)
    return calls


def numbers(found):
    return [(r.run_id, r.step, r.metric, r.value, r.low, r.high) for r in found]


UNMEASURED = shutil.ignore_patterns("evaluate", "evaluations.jsonl", "frontier")


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """(what is measured, workdir, numbers): every checkpoint's, without interruption.

    Batches of real pictures are of 16.
    """
    experiment, workdir, specs = trained
    wanted = changed(
        experiment,
        evaluate={"metrics": ("fd", "kid"), "through_training": True},
        generate={"batch_size": 8},
    )
    generate.run(wanted, workdir, specs)
    folder = tmp_path_factory.mktemp("measured") / "w"
    shutil.copytree(workdir, folder, ignore=UNMEASURED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(extractors._LOADERS, "lite0", judge)
        patch.setattr(reference, "BATCH", 16)
        return wanted, folder, numbers(evaluate.run(wanted, folder, specs))


@pytest.fixture
def anew(trained, measured, tmp_path, monkeypatch):
    """(what is measured, workdir, specs, its numbers): nothing of them is kept."""
    wanted, workdir, found = measured
    shutil.copytree(workdir, tmp_path / "anew", ignore=UNMEASURED)
    monkeypatch.setattr(reference, "BATCH", 16)
    return wanted, tmp_path / "anew", trained[2], found


@pytest.fixture
def done(trained, measured, tmp_path, monkeypatch):
    """As `anew`, with everything that was measured."""
    wanted, workdir, found = measured
    shutil.copytree(workdir, tmp_path / "done")
    monkeypatch.setattr(reference, "BATCH", 16)
    return wanted, tmp_path / "done", trained[2], found


@pytest.mark.parametrize(
    "stop_after",
    (4, *(pytest.param(calls, marks=pytest.mark.slow) for calls in (1, 9))),
)
def test_stopped_anywhere_it_goes_on_with_the_next_batch(anew, monkeypatch, stop_after):
    wanted, workdir, specs, found = anew
    extract = extractors.Extractor.__call__
    first = counting(monkeypatch, stop_after)
    with pytest.raises(Stop):
        evaluate.run(wanted, workdir, specs)
    monkeypatch.setattr(extractors.Extractor, "__call__", extract)
    second = counting(monkeypatch)
    assert numbers(evaluate.run(wanted, workdir, specs)) == found
    # 40 real pictures, 24 that are drawn, 24 of each of three other checkpoints.
    # The noise that stands beside a distance comes after the first one.
    assert first + second == [16, 16, 8] + [16, 8] * 2 + [8, 8, 8] * 3


def test_another_metric_takes_the_features_that_are_there(anew, monkeypatch):
    """Real pictures are in batches of another size; the numbers are the same."""
    wanted, workdir, specs, found = anew
    monkeypatch.setattr(reference, "BATCH", 256)
    wanted = changed(wanted, evaluate={"through_training": False})
    fd = changed(wanted, evaluate={"metrics": ("fd",)})
    evaluate.run(fd, workdir, specs)
    calls = counting(monkeypatch)
    assert numbers(evaluate.run(wanted, workdir, specs)) == found[:2]
    assert not calls


def test_a_lost_batch_is_extracted_again(done, monkeypatch):
    wanted, workdir, specs, found = done
    (workdir / "evaluations.jsonl").unlink()
    batches = sorted((workdir / "evaluate" / "features").glob("*/00001.npz"))
    assert len(batches) == 6
    for path in batches:
        path.unlink()
    calls = counting(monkeypatch)
    assert numbers(evaluate.run(wanted, workdir, specs)) == found
    assert calls == [16, 8] + [8] * 2 + [8, 8] * 3


def test_it_goes_on_in_the_middle_of_a_file_of_pictures(trained):
    """Another generate.batch_size may have changed the size of the files."""
    _, workdir, _ = trained
    whole = np.concatenate(list(samples.read_images(workdir)))
    assert [len(images) for images in samples.read_images(workdir)] == [16, 8]
    for start, batches in ((0, [16, 8]), (5, [11, 8]), (16, [8]), (20, [4]), (24, [])):
        found = list(evaluate._saved(workdir, start))
        assert [len(images) for images, _ in found] == batches
        assert [after for _, after in found] == [16, 24][2 - len(batches) :]
        rest = [images for images, _ in found]
        assert np.array_equal(np.concatenate([whole[:start], *rest]), whole)


def test_real_pictures_of_another_size_have_statistics_of_their_own(trained, tmp_path):
    experiment, _, _ = trained
    sides = []

    class Extract:
        identity = {"network": "first pixels", "weights": "", "resize": ""}

        def __call__(self, images):
            sides.append(images.shape[1])
            return Features(images.reshape(len(images), -1)[:, :9].astype("f"), None)

    def digest(side):
        return reference.statistics(experiment, tmp_path, Extract(), side).digest

    found = [digest(side) for side in ((8, 8), (16, 16), (8, 8))]
    assert found[0] == found[2] != found[1]
    assert sides == [8, 16]  # nothing twice


def test_a_lost_file_of_pictures_is_no_evaluation_of_fewer(anew):
    wanted, workdir, specs, _ = anew
    (workdir / "samples" / "shards" / "00001.npy").unlink()
    with pytest.raises(
        config.ConfigError,
        match=r"\(16 of 24 pictures in samples/shards\): add generate",
    ):
        evaluate.run(wanted, workdir, specs)
    assert not (workdir / "evaluations.jsonl").exists()


def test_a_cut_off_file_of_pictures_is_said_to_be_one(anew):
    wanted, workdir, specs, _ = anew
    path = workdir / "samples" / "shards" / "00001.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(records.Damaged, match="00001.npy holds no pictures"):
        evaluate.run(wanted, workdir, specs)


def test_statistics_that_are_damaged_or_of_other_pictures_are_made_again(done):
    wanted, workdir, specs, found = done
    wanted = changed(wanted, evaluate={"through_training": False})
    found = found[:2]  # of the first model, whose pictures are drawn
    (path,) = (workdir / "evaluate").glob("reference-*.npz")
    whole = path.read_bytes()
    other = Moments.of([np.zeros((3, WIDTH), np.float32)])
    for spoil in (
        lambda: path.write_bytes(whole[:-100]),
        lambda: other.save(path, {"digest": "of others"}),
    ):
        spoil()
        (workdir / "evaluations.jsonl").unlink()
        assert numbers(evaluate.run(wanted, workdir, specs)) == found
        assert path.read_bytes() == whole


def test_rounding_makes_no_other_reference(done, monkeypatch):
    """Batches of another size, or another device, round features differently."""
    wanted, workdir, specs, _ = done
    once = changed(wanted, evaluate={"through_training": False, "metrics": ("fd",)})
    (before,) = evaluate.run(once, workdir, specs)
    shutil.rmtree(workdir / "evaluate")
    (workdir / "evaluations.jsonl").unlink()
    extract = extractors.Extractor.__call__

    def rounded(self, images):
        found = extract(self, images)
        return found._replace(features=found.features * np.float32(1 + 1e-6))

    monkeypatch.setattr(extractors.Extractor, "__call__", rounded)
    (after,) = evaluate.run(once, workdir, specs)
    assert after.value != before.value
    assert evaluation.difference(after, before) == pytest.approx(0, abs=1e-4)
    assert len(before.protocol["reference"]) == 16


def test_a_damaged_batch_is_said_to_be_one(done):
    wanted, workdir, specs, _ = done
    second = [*(workdir / "evaluate" / "features").glob("*/00001.npz")]
    for path in second:
        kept = path.read_bytes()
        shutil.copy(path.with_name("00000.npz"), path)
        (workdir / "evaluations.jsonl").unlink(missing_ok=True)
        with pytest.raises(records.Damaged, match="00001.npz is that of .*/00000$"):
            evaluate.run(wanted, workdir, specs)
        path.write_bytes(kept)
    for path in second:
        path.write_bytes(path.read_bytes()[:-300])
    (workdir / "evaluations.jsonl").unlink(missing_ok=True)
    with pytest.raises(records.Damaged, match="00001.npz holds no features"):
        evaluate.run(wanted, workdir, specs)


def test_progress_is_said_of_real_pictures_and_of_every_checkpoint(anew, monkeypatch):
    wanted, workdir, specs, _ = anew
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    evaluate.run(changed(wanted, train={"show_every_seconds": 0}), workdir, specs)
    text = "\n".join(said)
    assert "evaluate  32 of 40 real pictures at most  left 0:" in text
    assert text.count("evaluate  8 of 24 pictures\n") == 3  # no basis yet
    assert text.count("evaluate  16 of 24 pictures  left ") == 3
    assert text.count("evaluate  fd  8 of 8 resamples  left 0:00") == 4
    assert text.count("evaluate  24 of 24 pictures  left 0:00") == 4
    heads = [line for line in said if line.startswith("evaluate  ") and "step" in line]
    assert [line.split(":")[0] for line in heads] == [
        f"evaluate  {n} of 4" for n in range(1, 5)
    ]
    # The first model's pictures are there; drawing those of the second compiles.
    assert [" left " in line for line in heads] == [False, False, False, True]


# --- Protocols.


@pytest.fixture
def record(evaluated):
    """record(part=...): a number measured by a protocol that differs in it."""

    def make(**changes):
        parts = dict.fromkeys(protocol.PARTS, 1) | changes
        return evaluated(
            value=float(parts["guidance"]),
            protocol=parts,
            protocol_hash=protocol.digest(parts),
        )

    return make


@pytest.mark.parametrize("part", protocol.PARTS)
def test_numbers_that_differ_in_any_part_are_not_compared_unless_it_is_named(
    record, part
):
    a, b = record(), record(**{part: 3})
    assert a.protocol_hash != b.protocol_hash
    with pytest.raises(evaluation.ProtocolError, match=f"{part}: 1 and 3"):
        evaluation.difference(a, b)
    assert evaluation.difference(b, a, differing=[part]) == b.value - a.value
    assert evaluation.difference(a, record()) == 0
    without = {protocol.digest(r.protocol, without=[part]) for r in (a, b)}
    assert len(without) == 1


def test_a_part_that_is_none_or_missing_is_an_error(record):
    with pytest.raises(ValueError, match="not parts of a protocol: guidence"):
        evaluation.difference(record(), record(), differing=["guidence"])
    parts = dict.fromkeys(protocol.PARTS, 1)
    for wrong in (parts | {"mood": 1}, {k: 1 for k in protocol.PARTS[1:]}):
        with pytest.raises(ValueError, match="has the parts"):
            protocol.digest(wrong)


@pytest.mark.parametrize(
    "change", [{"confidence": 0.99}, {"bootstrap": 9}, {"seed": 7}], ids=str
)
def test_other_resampling_is_measured_again(trained, change):
    experiment, workdir, specs = trained
    generate.run(experiment, workdir, specs)
    before = evaluate.run(experiment, workdir, specs)
    after = evaluate.run(changed(experiment, evaluate=change), workdir, specs)
    fd = [next(r for r in found if r.metric == "fd_lite0") for found in (before, after)]
    assert fd[0].value == fd[1].value
    assert (fd[0].low, fd[0].high) != (fd[1].low, fd[1].high)
    with pytest.raises(evaluation.ProtocolError, match="resampling"):
        evaluation.difference(*fd)
    assert evaluation.difference(*fd, "resampling") == 0.0


def test_any_finished_run_is_drawn_and_measured_by_its_name(trained):
    experiment, workdir, specs = trained
    values = set()
    for spec in specs:
        named = changed(experiment, generate={"run": spec.run_id})
        assert generate.run(named, workdir, specs).run_id == spec.run_id
        found = evaluate.run(named, workdir, specs)
        assert {record.run_id for record in found} == {spec.run_id}
        values.add(found[0].value)
    assert len(values) == len(specs) == 2
    other = changed(experiment, generate={"run": "another"})
    with pytest.raises(config.ConfigError, match=f"'another': .*{specs[0].run_id}"):
        generate.run(other, workdir, specs)
    generate.run(experiment, workdir, specs)  # the next test's pictures


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"generate": {"images": 3}}, "images = 3: fd needs at least 4"),
        (
            {"generate": {"images": 9}, "evaluate": {"metrics": ("fd_infinity",)}},
            "images = 9: fd_infinity needs at least 16",
        ),
        (
            {"evaluate": {"metrics": ("fd_infinity",), "bootstrap": 0}},
            "bootstrap = 0: fd_infinity needs at least 2",
        ),
        ({"evaluate": {"reference": "none.npz"}}, "reference = 'none.npz': no such"),
    ],
    ids=str,
)
def test_what_could_not_be_measured_is_refused_first(trained, fields, said):
    experiment, _, _ = trained
    evaluate.check(experiment)
    with pytest.raises(config.ConfigError, match=said):
        evaluate.check(changed(experiment, **fields))


@pytest.mark.parametrize("metric", list(measures.METRICS))
def test_the_fewest_pictures_are_enough(metric):
    cfg = config.EvaluateConfig(network="lite0", bootstrap=2, metrics=(metric,))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(measures.METRICS[metric].minimum_images, 8)).astype(
        np.float32
    )
    real = Moments.of([rng.normal(size=(50, 8)).astype(np.float32)])
    seen = measures.Generated(features=rows, logits=rows, captions=rows + 1)
    rows = rng.normal(size=(50, 8)).astype(np.float32)
    given = reference.RealStatistics(
        moments=real, load=lambda: rows, images=50, digest=""
    )
    found = measures.measure(cfg, metric, seen, given)
    assert all(np.isfinite(e.value) for e in found.values())


# --- The frontier.


def test_of_each_size_the_best_run_is_in_the_frontier(monkeypatch, trained):
    """The fields of the study are read once for all sizes."""
    _, workdir, specs = trained
    again = [dataclasses.replace(spec, run_id=f"{spec.run_id}-b") for spec in specs]
    loss = {spec.run_id: i for i, spec in enumerate([specs[0], *again, specs[1]])}
    reads, experiment_of = [], table.experiment_of

    def read(workdir):
        reads.append(experiment_of(workdir))
        return reads[-1]

    def last_loss(_, spec, experiment):
        assert experiment is reads[0]
        return loss[spec.run_id]

    monkeypatch.setattr(table, "experiment_of", read)
    monkeypatch.setattr(runs, "finished", lambda _, group: group)
    monkeypatch.setattr(runs, "last_loss", last_loss)
    found = frontier._best_of_sizes(workdir, [*specs, *again])
    assert [spec.run_id for spec in found] == [specs[0].run_id, again[1].run_id]
    assert len(reads) == 1


def test_every_cell_is_measured_once_and_the_best_is_resampled(trained, monkeypatch):
    experiment, workdir, specs = trained
    found = frontier.run(experiment, workdir, specs)
    assert len(found.cells) == 2 * 2 * 2 * 2
    grouped = {}
    for cell in found.cells:
        grouped.setdefault((cell.model, cell.sampler, cell.steps), []).append(cell)
    for group in grouped.values():
        best = min(group, key=lambda cell: cell.value)
        assert abs(np.mean(best.deviations)) < 1e-9 * best.value
        assert len(set(best.deviations)) > 1
        for cell in group:  # the others borrow its relative spread
            np.testing.assert_allclose(
                np.divide(cell.deviations, cell.value),
                np.divide(best.deviations, best.value),
            )
    stored = [
        records.loads(path.read_text())
        for path in (workdir / "frontier" / "cells").iterdir()
    ]
    assert len(stored) == 16
    values = {joined.place_of_cell(cell): cell.value for cell in found.cells}
    for cell in stored:
        assert type(cell) is records.Cell  # its value is in the table alone
        group = grouped[cell.model, cell.sampler, cell.steps]
        best = values[joined.place_of_cell(cell)] == min(o.value for o in group)
        assert len(cell.deviations) == (8 if best else 0)
    rows = [r for r in records.read_table(workdir) if r.metric.endswith("_cell")]
    held = {(r.run_id, r.metric, r.protocol_hash): r for r in rows}
    assert {place: r.value for place, r in held.items()} == values
    for cell in stored:  # the interval of one that was resampled
        row = held[joined.place_of_cell(cell)]
        assert (row.low < row.value < row.high) == bool(cell.deviations)
        assert (row.level < 1) == bool(cell.deviations)
    largest = max(found.cells, key=lambda cell: cell.params)
    assert largest.relative_cost == 1.0
    assert min(cell.relative_cost for cell in found.cells) < 0.7
    small, large = sorted({(cell.params, cell.memory_bytes) for cell in found.cells})
    assert small[1] - 4 * small[0] > 1000  # what a picture takes beside parameters
    assert large[1] - small[1] > 4 * (large[0] - small[0])
    assert len({cell.protocol for cell in found.cells}) == 1
    assert all(cell.nfe == 2 * cell.steps and cell.seconds > 0 for cell in found.cells)
    assert records.read_frontier(workdir) == found

    monkeypatch.setattr(
        extractors.Extractor, "__call__", lambda *_: pytest.fail("measured again")
    )
    assert frontier.run(experiment, workdir, specs).cells == found.cells


def test_memory_is_of_both_sides_of_guidance_or_of_the_decoder(trained):
    """All parameters stay on the device; the memory of a computation is used again."""
    experiment, workdir, specs = trained
    model = runs.trained_model(experiment, workdir, specs[0])
    device_mesh = mesh.build(experiment.mesh, {})
    of_latents = changed(experiment, encode={"autoencoder": "icons_f4"})
    of_latents = changed(of_latents, data={"shape": (8, 8, 4)})
    hows = [changed(experiment, generate={"guidance": g}).generate for g in (0.0, 3.0)]
    with jax.set_mesh(device_mesh):
        drawing = inference.PictureSampler(experiment, workdir, model, device_mesh, 4)
        own = sum(x.nbytes for x in jax.tree.leaves(model.load(device_mesh)))
        alone, guided = map(drawing.memory, hows)
        decoder = inference.PictureDecoder(of_latents, device_mesh)
        held = sum(x.nbytes for x in jax.tree.leaves(decoder.params))
        decoding = decoder.memory()
        drawing = inference.PictureSampler(experiment, workdir, model, device_mesh, 4)
        drawing._decoder = decoder
        both = drawing.memory(hows[1])
    assert own < alone < guided < own + 2.5 * (alone - own)
    assert held + 32 * 32 * 3 * 4 < decoding < held + 10e6
    assert both == max(guided + held, decoding + own) == decoding + own


def test_a_lost_cell_comes_back_the_same_and_is_drawn_once(trained, monkeypatch):
    experiment, workdir, specs = trained
    before = frontier.run(experiment, workdir, specs).cells
    folder = workdir / "frontier" / "cells"
    gone = sorted(folder.iterdir())[::3]
    for path in gone:
        path.unlink()
    calls, extract = [], extractors.Extractor.__call__

    def counted(self, images):
        calls.append(len(images))
        return extract(self, images)

    monkeypatch.setattr(extractors.Extractor, "__call__", counted)
    after = frontier.run(experiment, workdir, specs).cells
    assert len(calls) == len(gone)
    assert [dataclasses.replace(c, seconds=0.0) for c in after] == [
        dataclasses.replace(c, seconds=0.0) for c in before
    ]


def test_the_file_of_another_cell_is_refused(trained):
    experiment, workdir, specs = trained
    frontier.run(experiment, workdir, specs)
    one, other, *_ = sorted((workdir / "frontier" / "cells").iterdir())
    kept = one.read_bytes()
    shutil.copy(other, one)
    with pytest.raises(records.Damaged, match=f"{one.name} is the cell"):
        frontier.run(experiment, workdir, specs)
    one.write_bytes(kept)


def test_a_cell_that_cannot_be_sampled_is_refused_before_anything_runs(trained):
    experiment, _, _ = trained
    frontier.check(experiment)
    table = {"schedule": "scaled_linear", "prediction": "epsilon"}
    impossible = changed(experiment, objective=table, frontier={"steps": (2, 5000)})
    with pytest.raises(config.ConfigError, match="config.frontier cannot sample"):
        frontier.check(impossible)


def test_no_run_no_frontier(trained, tmp_path, monkeypatch):
    experiment, _, specs = trained
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    assert frontier.run(experiment, tmp_path, specs) is None
    assert evaluate.run(experiment, tmp_path, specs) == []
    assert said == ["no finished run for a frontier", "no finished run to evaluate"]
    none = changed(experiment, frontier={"images": 0})
    assert frontier.run(none, tmp_path, specs) is None


def test_side_is_that_of_the_pictures(trained):
    experiment, _, _ = trained
    assert reference.picture_size(experiment) == (8, 8)
    latent = changed(experiment, encode={"autoencoder": "icons_f4"})
    assert reference.picture_size(latent) == (32, 32)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"evaluate.metrics": ("fid",)}, "may hold fd, fd_infinity"),
        ({"frontier.samplers": ("ddim", "ddim")}, "may hold ddim"),
        ({"evaluate.bootstrap": 1}, "one resample shows no spread"),
        ({"frontier.steps": (8, 4)}, "must be positive and increase"),
        ({"evaluate.network": "none", "frontier.images": 8}, "a frontier needs"),
        ({"evaluate.metrics": ("inception_score",)}, "inception_score, which needs"),
        ({"evaluate.network": "none", "evaluate.seed": 3}, "is not read"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, fields, said):
    given = tiny.copy_and_resolve_references()
    given.evaluate.network = "lite0"
    given.update_from_flattened_dict(fields)
    with pytest.raises(config.ConfigError, match=said):
        config.resolve(given)
