"""A study of a mix of two sets of pictures, from its records to its loss."""

import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm import config, data, records
from scaling_ldm.data import pictures, seals, shard_table, shards
from scaling_ldm.data.vocabulary import RESERVED
from scaling_ldm.evaluation import reference
from scaling_ldm.stages import encode, plan, train
from scaling_ldm.training import held_out, loop, mesh

COUNTS = {"own": 40, "prior": 25}
# Of other words, so that each part by itself would give them other ids.
WORDS = {"own": "red cat on {}", "prior": "the blue dog {}"}


@pytest.fixture(scope="module", autouse=True)
def in_memory():
    """Pictures of "own" are dark, those of "prior" are bright."""
    rng = np.random.default_rng(0)
    for name, low in (("own", 0), ("prior", 150)):
        count = COUNTS[name]
        pictures.memory(
            rng.integers(low, low + 100, (count, 8, 8, 3), np.uint8),
            [WORDS[name].format(f"n{i}") for i in range(count)],
            [i % 3 for i in range(count)],
            name=f"{name} of test_mix_study",
        )


@pytest.fixture(scope="module")
def wanted(tiny):
    """wanted(section={field: value}, ...): an Experiment on a mix of both."""

    def make(**sections):
        c = tiny.copy_and_resolve_references()
        c.data.validation_fraction, c.data.validation_minimum = 0.3, 0
        c.encode.text_encoder = "vocabulary"
        c.data.mix = {"own": 3, "prior": 1}
        c.data.parts = {
            name: {"source": "memory", "path": f"{name} of test_mix_study"}
            for name in COUNTS
        }
        for section, values in sections.items():
            c[section].update(values)
        return config.resolve(c)

    return make


@pytest.fixture(scope="module")
def workdir(wanted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    encode.run(wanted(), folder)
    return folder


@pytest.fixture(scope="module")
def sources(wanted, workdir):
    return data.sources(wanted(), workdir)


def test_each_part_is_encoded_once(wanted, workdir, capsys):
    folders = [workdir / "encoded" / name for name in COUNTS]
    for folder, count in zip(folders, COUNTS.values(), strict=True):
        assert json.loads((folder / "manifest.json").read_text())["records"] == count
    before = [(p, p.stat().st_mtime_ns) for p in sorted(workdir.rglob("*"))]
    encode.run(wanted(), workdir)
    assert capsys.readouterr().err.count("encoded already") == 2
    assert before == [(p, p.stat().st_mtime_ns) for p in sorted(workdir.rglob("*"))]


def test_rows_are_of_their_part_and_read_with_one_vocabulary(sources):
    source, _ = sources
    rows, captions = source.rows(np.arange(400)), source.captions(np.arange(400))
    assert_array_equal(rows["part"], rows["x"].mean((1, 2, 3)) > 0)
    assert np.bincount(rows["part"]).tolist() == [300, 100]
    words = source._sources[0]._vocabulary.words
    for caption, ids in zip(captions, rows["text"], strict=True):
        assert [words[i] for i in ids if i] == caption.split()
    for k, name in enumerate(COUNTS):
        mine = [c for c, part in zip(captions, rows["part"], strict=True) if part == k]
        length = len(source._sources[k])
        assert length < COUNTS[name]
        first, second = mine[:length], mine[length : 2 * length]
        assert len(set(first)) == length and set(first) == set(second)
        assert first != second


def test_parts_have_orders_of_their_own(sources):
    """Also parts of equal length."""
    own, prior = (source._seed for source in sources[0]._sources)
    assert own != prior


def test_the_loss_is_of_one_fixed_set(wanted, workdir, sources):
    """Of the first part; or of the named one, or of all in their shares."""
    positions = np.arange(64)
    found = {"": sources[1]}
    for part in ("own", "prior", "mix"):
        _, found[part] = data.sources(wanted(validation={"part": part}), workdir)
    rows = {part: source.rows(positions) for part, source in found.items()}
    assert_array_equal(rows[""]["x"], rows["own"]["x"])
    counts = [np.bincount(r["part"], minlength=2).tolist() for r in rows.values()]
    assert counts == [[64, 0], [64, 0], [0, 64], [48, 16]]
    trained = set(sources[0].captions(np.arange(1000)))
    for source in found.values():
        assert trained.isdisjoint(source.captions(positions))
    _, every = data.sources(wanted(validation={"part": "mix"}), workdir)
    first = found["own"].rows(np.arange(48))["x"]
    assert_array_equal(every.rows(positions)["x"][rows["mix"]["part"] == 0], first)


def test_real_pictures_are_of_the_part_that_is_measured(wanted):
    for part, bright in (("own", False), ("prior", True)):
        experiment = wanted(validation={"part": part})
        (found,) = [b for b, _ in reference.held_out(experiment, (8, 8), most=5)]
        assert len(found) == 5 and (found.mean() > 127) == bright


@pytest.mark.slow
def test_a_run_trains_on_the_mix(wanted, workdir, monkeypatch):
    experiment, arrays = wanted(), set()
    batch = loop.TrainingRun._next_batch

    def seen(self, batches, chunk):
        found = batch(self, batches, chunk)
        arrays.update(found)
        return found

    monkeypatch.setattr(loop.TrainingRun, "_next_batch", seen)
    specs = plan.plan(experiment)
    (record,) = train.run(experiment, workdir, list(enumerate(specs)), len(specs))
    assert record.status == "finished"
    assert arrays == {"x", "text", "mask"}  # the part stays on the host
    held = records.read_json(workdir / "data.json")["identity"]["parts"]
    for name in COUNTS:
        text = (workdir / "encoded" / name / "manifest.json").read_text()
        assert held[name] == json.loads(text)["identity"]
    # Other records of one part are other data.
    (workdir / "runs" / record.run_id / "record.json").unlink()
    store = shards.Store(str(workdir / "encoded" / "prior"))
    manifest = seals.stored_manifest(store)
    other = manifest | {"identity": manifest["identity"] | {"set": "other"}}
    store.write_json(shards.MANIFEST, seals.sealed(other))
    try:
        with pytest.raises(config.ConfigError, match="read other records than these"):
            train.run(experiment, workdir, list(enumerate(specs)), len(specs))
    finally:
        store.write_json(shards.MANIFEST, seals.sealed(manifest))


def test_an_objective_that_asks_for_the_part_gets_it(wanted, workdir, sources, tiny):
    experiment, names = wanted(), ("x", "part")
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        (batch,) = held_out.held_out_batches(experiment, device_mesh, sources[1], names)
    assert batch.batch["part"].shape == (16,) and not batch.batch["part"].any()
    plain = config.resolve(tiny)
    _, icons = data.sources(plain, workdir)
    with pytest.raises(config.ConfigError, match="the objective reads part, and the"):
        held_out.held_out_batches(plain, device_mesh, icons, names)


def test_records_of_a_part_that_do_not_fit_are_refused_by_name(
    wanted, workdir, tmp_path
):
    with pytest.raises(config.ConfigError, match="part 'own' of .*no records in"):
        data.sources(wanted(), tmp_path)
    elsewhere = {
        name: dict(own) | {"encode.path": str(workdir / "encoded" / name)}
        for name, own in wanted().data.parts
    }
    data.sources(wanted(data={"parts": elsewhere}), tmp_path)
    swapped = elsewhere | {
        "prior": elsewhere["prior"] | {"path": "own of test_mix_study"}
    }
    with pytest.raises(config.ConfigError, match="part 'prior' of (.|\n)* set: "):
        encode.run(wanted(data={"parts": swapped}), tmp_path)
    store = shards.Store(str(workdir / "encoded" / "prior"))
    manifest = seals.stored_manifest(store)
    manifest["layout"]["text_dtype"] = "bfloat16"
    forged = str(tmp_path / "forged")
    shards.Store(forged).write_json(shards.MANIFEST, seals.sealed(manifest))
    shards.Store(forged).write(shard_table.FILE, store.read(shard_table.FILE))
    other = elsewhere | {"prior": elsewhere["prior"] | {"encode.path": forged}}
    said = (
        "parts 'own' and 'prior' of config.data.mix differ in text_dtype: float16 and"
    )
    with pytest.raises(config.ConfigError, match=said):
        data.sources(wanted(data={"parts": other}), tmp_path)


def test_labels_are_those_of_every_part_or_there_are_none(wanted, workdir, tmp_path):
    labelled = {
        "model": {"architecture": "adaln_zero", "classes": 3, "text_width": 256}
    }
    train_source, validation = data.sources(wanted(**labelled), workdir)
    assert train_source.classes == validation.classes == 3
    assert set(train_source.rows(np.arange(30))["label"]) == {0, 1, 2}
    assert train_source.uncond["label"] == 3
    parts = dict(wanted().data.parts) | {"prior": {"source": "icons"}}
    labelled["data"] = {"parts": parts}
    labelled["encode"] = {"pictures": 60}
    encode.run(wanted(**labelled), tmp_path)
    with pytest.raises(config.ConfigError, match="whose parts have to have the same"):
        data.sources(wanted(**labelled), tmp_path)


def test_icons_and_other_pictures_mix(wanted, tmp_path):
    """Of icons without labels in common with the others; the rows have none."""
    parts = dict(wanted().data.parts)
    parts["prior"] = {"source": "icons", "encode.pictures": 60}
    experiment = wanted(data={"parts": parts})
    encode.run(experiment, tmp_path)
    source, _ = data.sources(experiment, tmp_path)
    rows = source.rows(np.arange(80))
    assert set(rows) == {"x", "text", "mask", "part"} and source.classes == 0
    assert np.bincount(rows["part"]).tolist() == [60, 20]
    assert (rows["text"] > len(RESERVED) - 1).any(1).all()
    captions = source.captions(np.arange(80))
    for caption, part in zip(captions, rows["part"], strict=True):
        assert caption.startswith("red cat on n") == (part == 0)
