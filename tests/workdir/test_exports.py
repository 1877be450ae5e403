"""Weights in a folder: the card beside them, pictures and numbers from them."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from untrained import finish

import scaling_ldm
from scaling_ldm import config, data, records, study
from scaling_ldm.config import identity
from scaling_ldm.data import pictures, vocabulary
from scaling_ldm.evaluation import extractors
from scaling_ldm.models.encoders import bert
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.models.weights import bert as bert_files
from scaling_ldm.models.weights import files, layout
from scaling_ldm.models.weights import unet as unet_weights
from scaling_ldm.records import measurements
from scaling_ldm.stages import evaluate, generate, train
from scaling_ldm.training import mesh, progress
from scaling_ldm.workdir import exports, runs, samples

WORDS = vocabulary.Vocabulary((*vocabulary.RESERVED, "a", "red", "t", "shirt"))
# Building the U-Net's study takes half a minute.
NAMES = ("native", pytest.param("unet", marks=pytest.mark.slow))


def judge(cfg):
    """A stand-in for a feature network: fixed random features of 8 x 8 pictures."""
    params = np.random.default_rng(0).normal(size=(192, 6)).astype("f") / 800

    def apply(params, x):
        x = x.reshape(x.shape[0], 8, 24).reshape(x.shape[0], 192)
        return Features(jax.numpy.tanh(x @ params), None)

    return extractors.FeatureNetwork(
        apply, params, lambda x: x, "none", pathlib.Path(__file__)
    )


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(extractors._LOADERS, "lite0", judge)
        patch.setattr(extractors, "weights_path", lambda cfg: pathlib.Path(__file__))
        yield


def recipe(tiny):
    c = tiny.copy_and_resolve_references()
    c.plan.sizes, c.plan.steps, c.plan.budgets_flops = ((8, 1),), 4, ()
    c.plan.minimum_steps = 2
    c.mesh.cpu_devices = 4
    c.train.optimize_code = False
    c.generate.images, c.generate.batch_size, c.generate.steps = 24, 16, 2
    # None of which is a default: an export has to say them.
    c.generate.sampler, c.generate.spacing, c.generate.guidance = "ddim", "logsnr", 2.0
    c.evaluate.network, c.evaluate.reference_images = "lite0", 16
    c.evaluate.metrics, c.evaluate.bootstrap = ("fd", "kid"), 4
    return c


def with_a_unet(c, folder):
    """The recipe of a U-Net on pictures in memory, its captions read by a BERT."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    captions = [f"{a} {b}" for a in "abcde" for b in "abcdefghijkl"]
    pictures.memory(images, captions, [0] * 60, name="test_exported")
    cfg = bert.BertConfig(
        width=8, depth=1, heads=2, hidden=8, vocab_size=40, max_tokens=8
    )
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype("f"),
        jax.eval_shape(lambda: bert.init(cfg, jax.random.key(0))),
    )
    folder.mkdir()
    bert_files.save(params, folder / "model.safetensors", cfg)
    described = {
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 40,
        "max_position_embeddings": 8,
    }
    (folder / "config.json").write_text(json.dumps(described))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijkl"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    c.data.source, c.data.path = "memory", "test_exported"
    c.data.validation_fraction, c.data.validation_minimum = 0.4, 0
    c.encode.text_encoder = str(folder)
    c.model = config.default().model
    c.model.architecture, c.model.heads, c.model.head_dim = "unet", 4, 0
    c.model.text_width, c.model.compute_dtype = 8, "float32"
    c.plan.sizes = ((32, 1),)
    return c


def ran(given, workdir, *stages):
    cluster = (None, None, None)
    return study.run(
        given, workdir=str(workdir), stages=stages, only=None, cluster=cluster
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished study with its export, pictures and numbers."""

    given: object  # the ConfigDict
    workdir: pathlib.Path

    @property
    def export(self):
        return self.workdir / "export"

    @property
    def card(self):
        """Without its seal: it may be edited."""
        card = json.loads((self.export / exports.CARD).read_text())
        del card["seal"]
        return card

    def wanted(self, weights, **changes):
        """The ConfigDict that samples a folder of weights."""
        c = self.given.copy_and_resolve_references()
        c.generate.weights = str(weights)
        if c.data.source == "memory":
            c.encode.path = str(self.workdir / "encoded")
        c.update_from_flattened_dict(changes)
        return c


@pytest.fixture(scope="module")
def every(tiny, tmp_path_factory):
    """every(name) -> Trained, of a transformer ("native") or of a "unet"."""

    @functools.cache
    def trained(name):
        c, folder = recipe(tiny), tmp_path_factory.mktemp(name)
        workdir = folder / "runs" / "study"  # as it is by default
        if name == "native":
            assert ran(c, workdir, "plan", "train") == 0
        else:
            c = with_a_unet(c, folder / "bert")
            assert ran(c, workdir, "plan", "encode") == 0
            (spec,) = records.read_jsonl(workdir / "runs.jsonl")
            finish(config.resolve(c), workdir, spec)  # compiling it takes longer
        assert ran(c, workdir, "generate", "evaluate", "export") == 0
        return Trained(c, workdir)

    return trained


@pytest.fixture
def native(every):
    return every("native")


@pytest.fixture
def unet(every):
    return every("unet")


def drawn(workdir):
    folder = workdir / "samples" / "shards"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def evaluations(workdir):
    """The numbers about pictures, without the floors of distances."""
    found = records.read_evaluations(workdir)
    return [r for r in found if not measurements.is_floor(r.metric)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_numbers_of_an_export_are_those_of_its_run(every, name, tmp_path):
    trained = every(name)
    new = tmp_path / "new"
    assert ran(trained.wanted(trained.export), new, "generate", "evaluate") == 0
    assert not (new / "runs.jsonl").exists() and not (new / "runs").exists()
    assert drawn(new) == drawn(trained.workdir) and len(drawn(new)) == 2
    (spec,) = records.read_jsonl(trained.workdir / "runs.jsonl")
    checksum = files.checksum(trained.export)
    run, own = evaluations(new), evaluations(trained.workdir)
    assert [r.metric for r in own] == ["fd_lite0", "kid_lite0"]
    assert run == [dataclasses.replace(r, checksum=checksum) for r in own]
    assert {(r.run_id, r.step, r.train_flops) for r in run} == {
        (spec.run_id, 4, spec.planned_flops)
    }
    record = records.loads((new / "samples" / "record.json").read_text())
    assert (record.run_id, record.checksum) == (spec.run_id, checksum)
    assert record.weights == "ema"


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_was_trained_and_how_far(every, name):
    trained = every(name)
    experiment, card = config.resolve(trained.given), trained.card
    (spec,) = records.read_jsonl(trained.workdir / "runs.jsonl")
    path = trained.workdir / "runs" / spec.run_id / "record.json"
    record = records.loads(path.read_text())
    wanted = {
        "experiment": "tiny",
        "run_id": spec.run_id,
        "step": 4,
        "recipe_hash": experiment.recipe_hash,
        "width": spec.width,
        "depth": spec.depth,
        "parameters": spec.params,
        "pictures": 4 * 8,
        "training_flops": record.flops,
        "validation_loss": runs.last_loss(trained.workdir, spec),
        "weights_sha256": files.checksum(trained.export),
    }
    assert {key: card[key] for key in wanted} == wanted
    assert card["validation_loss"] > 0
    assert str(trained.workdir.parent) not in json.dumps(card)  # no path of a machine


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_the_cards_are_refused(every, name, tmp_path):
    trained = every(name)
    folder = tmp_path / "changed"
    shutil.copytree(trained.export, folder)
    experiment = config.resolve(trained.wanted(folder))
    assert exports.read_model(experiment, str(folder)).checksum
    (path,) = folder.glob("*.safetensors")
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(config.ConfigError, match=f"not those of {exports.CARD}"):
        exports.read_model(experiment, str(folder))
    # Before anything runs, and before the working directory is taken.
    assert ran(trained.wanted(folder), tmp_path / "new", "generate") == 2
    assert not (tmp_path / "new").exists()


def other(trained, folder):
    """A copy of a U-Net's export with other weights and no card."""
    experiment = config.resolve(trained.given)
    folder.mkdir()
    (folder / "config.json").write_text((trained.export / "config.json").read_text())
    settings = json.loads((folder / "config.json").read_text())
    cfg, _ = unet_weights.from_config(settings, experiment.data.text_tokens)
    params = unet_weights.load(trained.export, cfg)
    params["exit"]["bias"] += 0.5
    unet_weights.save(params, folder / "diffusion_pytorch_model.safetensors", cfg)
    said = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    (folder / "scheduler_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.slow
def test_a_unet_from_elsewhere_needs_no_card(unet, tmp_path):
    folder, new = other(unet, tmp_path / "downloaded"), tmp_path / "new"
    given = unet.wanted(folder)
    assert ran(given, new, "plan", "generate", "evaluate", "report") == 0
    checksum = files.sha256(folder / "diffusion_pytorch_model.safetensors")
    name = f"downloaded-{checksum[:8]}"
    for record in (
        records.loads((new / "samples" / "record.json").read_text()),
        *evaluations(new),
    ):
        assert (record.run_id, record.checksum) == (name, checksum)
    found = evaluations(new)
    assert {(r.step, r.train_flops, r.protocol["ema"]) for r in found} == {
        (0, None, None)
    }
    own = {r.metric: r.value for r in evaluations(unet.workdir)}
    assert all(r.value != own[r.metric] for r in found)
    page = (new / "report" / "index.html").read_text()
    text = re.sub("<[^>]+>", "", page)
    assert name in text and f"unknown weights (SHA-256 {checksum})" in text


@pytest.mark.slow
def test_what_a_network_from_elsewhere_has_learnt_is_compared(unet, tmp_path):
    folder = other(unet, tmp_path / "downloaded")
    experiment = config.resolve(unet.wanted(folder))
    assert exports.read_model(experiment, str(folder)).checksum
    path = folder / "scheduler_config.json"
    table = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    path.write_text(json.dumps(table | {"num_train_timesteps": 1000}))
    with pytest.raises(config.ConfigError) as caught:
        exports.read_model(experiment, str(folder))
    assert "objective.prediction: 'epsilon' there, 'flow' here" in str(caught.value)
    assert "objective.schedule: Discrete" in str(caught.value)
    path.unlink()
    with pytest.raises(config.ConfigError, match="nothing says what its network pre"):
        exports.read_model(experiment, str(folder))


@pytest.mark.slow
def test_a_network_from_elsewhere_of_another_shape_is_refused_in_full(unet, tmp_path):
    folder = other(unet, tmp_path / "downloaded")
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings |= {"attention_head_dim": 8, "cross_attention_dim": 24, "in_channels": 6}
    settings |= {"out_channels": 4, "layers_per_block": 1}
    path.write_text(json.dumps(settings))
    with pytest.raises(config.ConfigError) as caught:
        exports.read_model(config.resolve(unet.wanted(folder)), str(folder))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"config.generate.weights = {str(folder)!r} is not")
    assert [line.strip() for line in lines[1:]] == [
        "heads at each width: [8] there, [4] here",
        "model.text_width: 24 there, 8 here",
        "channels: 4 there, 3 here",
        "channels beside them: 2 there, 0 here",
        "blocks at each: 1 there, 2 here",
    ]


@pytest.mark.slow
def test_tensors_that_do_not_fit_their_configuration_are_all_named(unet, tmp_path):
    folder = other(unet, tmp_path / "downloaded")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = layout.load(path)
    del tensors["conv_in.bias"], tensors["conv_out.bias"]
    layout.save(tensors, path)
    experiment = config.resolve(unet.wanted(folder))
    with pytest.raises(
        config.ConfigError, match=r"weights = [^$]*conv_in.bias\n.*conv_out"
    ):
        generate.run(experiment, tmp_path / "new", [])


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("native", {"model.positions": "rope"}, ["model.positions: 'sinusoidal' th"]),
        (
            "native",
            {"objective.prediction": "v", "objective.schedule": "cosine"},
            ["objective.prediction: 'flow'", "objective.schedule: 'rectified_flow'"],
        ),
        ("native", {"model.patch_size": 2}, ["model.patch_size: 4 there, 2 here"]),
        pytest.param(
            "unet",
            {"objective.prediction": "v"},
            ["objective.prediction: 'flow'"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "unet",
            {"encode.text_encoder": "another/bert"},
            ["text_encoder: 'bert' ("],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_export_is_not_read_as_what_it_is_not(every, name, changes, said):
    """The tensors do not show these differences, or only after they are read."""
    trained = every(name)
    experiment = config.resolve(trained.wanted(trained.export, **changes))
    with pytest.raises(config.ConfigError) as caught:
        generate.check(experiment)
    for words in said:
        assert words in str(caught.value)


def test_how_a_network_runs_and_was_trained_may_differ(native):
    changes = {"model.compute_dtype": "bfloat16", "train.batch_size": 16}
    experiment = config.resolve(native.wanted(native.export, **changes))
    assert experiment.recipe_hash != native.card["recipe_hash"]
    assert exports.read_model(experiment, str(native.export)).step == 4


def test_two_exports_are_different_pictures(native, tmp_path, monkeypatch):
    """Even if their cards have the same run and step."""
    again = tmp_path / "again"
    shutil.copytree(native.export, again)
    path = again / "model.safetensors"
    layout.save({k: v * 1.5 for k, v in layout.load(path).items()}, path)
    card = native.card | {"weights_sha256": files.checksum(again)}
    (again / exports.CARD).write_text(json.dumps(card))
    first, second = (
        config.resolve(native.wanted(folder)) for folder in (native.export, again)
    )
    workdir = tmp_path / "new"
    of_first = generate.run(first, workdir, [])
    before = drawn(workdir)
    measured = evaluate.run(first, workdir, [])
    with pytest.raises(config.ConfigError, match="checksum = .*add generate"):
        evaluate.run(second, workdir, [])
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    assert generate.run(first, workdir, []) == of_first
    assert said == [f"samples of {of_first.run_id} are there already"]
    of_second = generate.run(second, workdir, [])
    assert of_second.run_id == of_first.run_id and drawn(workdir) != before
    values = {r.metric: r.value for r in evaluate.run(second, workdir, [])}
    assert all(values[r.metric] != r.value for r in measured)
    assert len(evaluations(workdir)) == 2 * len(measured)


def test_a_shard_left_by_another_export_is_not_used(native, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(native.export, again)
    path = again / "model.safetensors"
    layout.save({k: v * 1.5 for k, v in layout.load(path).items()}, path)
    card = native.card | {"weights_sha256": files.checksum(again)}
    (again / exports.CARD).write_text(json.dumps(card))
    cut, straight = tmp_path / "cut", tmp_path / "straight"
    generate.run(config.resolve(native.wanted(native.export)), cut, [])
    (cut / "samples" / "record.json").unlink()
    (cut / "samples" / "shards" / "00001.npy").unlink()
    for workdir in (cut, straight):
        generate.run(config.resolve(native.wanted(again)), workdir, [])
    assert drawn(cut) == drawn(straight)


def test_runs_of_the_study_are_measured_beside_an_export(native, tmp_path):
    """Its own best run is then one of the checkpoints on the way."""
    workdir = tmp_path / "study"
    shutil.copytree(native.workdir, workdir)
    c = native.wanted(native.export, **{"evaluate.through_training": True})
    c.evaluate.metrics = ("fd",)
    assert ran(c, workdir, "generate", "evaluate") == 0
    found = {(r.checksum, r.step) for r in evaluations(workdir) if r.metric[:2] == "fd"}
    assert found == {(native.card["weights_sha256"], 4), ("", 4), ("", 2)}


def test_weights_of_before_a_field_are_those_of_its_value_then(native, monkeypatch):
    """A card without a field that came later does not fit its new default."""
    card = json.loads((native.export / exports.CARD).read_text())
    assert card["version"] == records.SCHEMA
    experiment = config.resolve(native.given)
    read = exports.weights_identity(experiment)
    assert exports.read_model(experiment, str(native.export)).step == 4
    monkeypatch.setitem(identity.SINCE, ("model", "gate"), "none")
    for value, said in (("none", ""), ("swish", "model.gate: 'none' there, 'swish'")):
        now = read | {"model.gate": value}
        monkeypatch.setattr(exports, "weights_identity", lambda _, now=now: now)
        if not said:
            exports.read_model(experiment, str(native.export))
            continue
        with pytest.raises(config.ConfigError, match=said):
            exports.read_model(experiment, str(native.export))


@pytest.mark.parametrize("name", [exports.CARD, "config.json"])
def test_an_export_of_a_newer_version_is_refused(native, tmp_path, name):
    newer = tmp_path / "export"
    shutil.copytree(native.export, newer)
    value = json.loads((newer / name).read_text()) | {"version": "9.0.0"}
    (newer / name).write_text(json.dumps(value))
    with pytest.raises(records.NewerVersion, match=f"{name} was written by"):
        exports.read_model(config.resolve(native.given), str(newer))


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (None, "no such folder"),
        ({}, "not a folder with a config.json beside its weights"),
        ({"config.json": "{}"}, "no known layout; pictures can be drawn with"),
        ({"config.json": '{"_class_name": "AutoencoderKL"}'}, "is of AutoencoderKL"),
        ({"config.json": '{"experiment": {}}'}, "no training.json in it: export again"),
    ],
)
def test_a_folder_of_something_else_is_refused_by_the_fields_name(
    tiny, tmp_path, held, said
):
    folder = tmp_path / "weights"
    if held is not None:
        folder.mkdir()
    for name, text in (held or {}).items():
        (folder / name).write_text(text)
    c = recipe(tiny)
    c.generate.weights = str(folder)
    experiment = config.resolve(c)
    with pytest.raises(config.ConfigError, match=f"config.generate.weights.*({said})"):
        samples.model_to_sample(experiment, tmp_path, [])


def test_a_study_in_place_of_its_export_is_told_where_the_export_is(native, tmp_path):
    experiment = config.resolve(native.given)
    with pytest.raises(config.ConfigError) as caught:
        exports.read_model(experiment, str(native.workdir))
    assert str(caught.value) == (
        f"config.generate.weights = {str(native.workdir)!r}: the working directory of "
        f"a study, whose weights are in its export folder: give {str(native.export)!r}"
    )
    shutil.copy(native.workdir / "experiment.json", tmp_path)  # and no export
    with pytest.raises(config.ConfigError) as caught:
        exports.read_model(experiment, str(tmp_path))
    assert str(caught.value).endswith(
        "in its export folder: run --stages export there first, then give "
        f"{str(tmp_path / 'export')!r}"
    )


def test_a_folder_may_be_given_from_home(native, monkeypatch):
    monkeypatch.setenv("HOME", str(native.workdir))
    assert exports.read_model(config.resolve(native.given), "~/export").step == 4


def test_a_card_without_a_field_is_refused(native, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(native.export, folder)
    card = {key: value for key, value in native.card.items() if key != "step"}
    (folder / exports.CARD).write_text(json.dumps(card))
    with pytest.raises(config.ConfigError, match="lacks 'step'"):
        exports.read_model(config.resolve(native.wanted(folder)), str(folder))


def test_several_files_of_weights_have_one_checksum(tmp_path):
    tensors = {"a": np.zeros(2, "f"), "b": np.ones(2, "f")}
    for name in tensors:
        layout.save({name: tensors[name]}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    before = files.checksum(tmp_path)
    assert before == files.checksum(path) and len(before) == 64
    layout.save({"b": np.zeros(2, "f")}, tmp_path / "b.safetensors")
    assert files.checksum(tmp_path) != before


def test_without_a_plan_only_given_weights_are_sampled(native, tmp_path):
    for stage in ("generate", "evaluate"):
        assert ran(native.given, tmp_path / stage, stage) == 2


def test_given_weights_are_not_drawn_from_after_a_training(native, tmp_path):
    given = native.given.copy_and_resolve_references()
    given.generate.weights = str(native.export)
    assert ran(given, tmp_path / "w", "plan", "train", "generate") == 2
    assert not (tmp_path / "w").exists()


# Models that are opened with all that they need


def places(trained):
    (spec,) = records.read_jsonl(trained.workdir / "runs.jsonl")
    run = trained.workdir / "runs" / spec.run_id
    return trained.export, trained.workdir, run, f"{trained.workdir}#{spec.run_id}"


def held_out_source(trained):
    return data.sources(config.resolve(trained.given), trained.workdir)[1]


@pytest.mark.filterwarnings("ignore:.*has not learnt")
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_model_is_the_one_that_generate_draws_with(every, name, tmp_path):
    trained = every(name)
    source, cfg = held_out_source(trained), config.resolve(trained.given).generate
    captions = source.captions(np.arange(24))
    rows = source.rows(np.arange(24))
    opened = [scaling_ldm.load(place) for place in places(trained)]
    for model in opened:
        jax.tree.map(
            np.testing.assert_array_equal,
            model.denoise.params,
            opened[0].denoise.params,
        )
        cond = model.encode_text(captions)
        assert cond.keys() == {"text", "mask"}
        for field, value in cond.items():  # features differ with the batch's rounding
            np.testing.assert_allclose(value, rows[field], atol=2e-3)
        assert model.denoise.time(0.25) == 0.25 and model.about["step"] == 4
        assert len(repr(model)) < 200
    shutil.copytree(trained.export, tmp_path / "moved")  # it needs nothing beside it
    opened.append(scaling_ldm.load(tmp_path / "moved"))
    how = {"sampler": "ddim", "steps": 2, "guidance": 2.0, "grid": "logsnr"}
    assert [model.drawing for model in opened] == [how] * 5
    pictures = opened[-1].sample(captions, batch_size=cfg.batch_size)
    wanted = np.concatenate(list(samples.read_images(trained.workdir)))
    assert pictures.dtype == np.uint8 and pictures.shape == wanted.shape
    apart = np.abs(pictures.astype(int) - wanted)
    assert apart.max() <= 1 and np.mean(apart > 0) < 1e-3


@pytest.mark.slow
def test_an_export_draws_the_same_bits_elsewhere(native, tmp_path):
    """In another process and folder, from what the export says alone."""
    shutil.copytree(native.export, tmp_path / "moved")
    captions = held_out_source(native).captions(np.arange(24))
    rows_of_a_device = config.resolve(native.given).generate.batch_size // 4
    code = (
        "import json, sys, numpy, scaling_ldm\n"
        "model = scaling_ldm.load('moved')\n"
        f"x = model.sample(json.load(sys.stdin), batch_size={rows_of_a_device})\n"
        "numpy.save('drawn.npy', x)"
    )
    root = str(pathlib.Path(scaling_ldm.__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(captions).encode(),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        check=True,
    )
    wanted = np.concatenate(list(samples.read_images(native.workdir)))
    np.testing.assert_array_equal(np.load(tmp_path / "drawn.npy"), wanted)


def test_what_cannot_be_opened_says_what_to_do(native, tmp_path):
    shutil.copytree(native.export, tmp_path / "e")
    (tmp_path / "e" / vocabulary.FILE).unlink()
    (tmp_path / "empty").mkdir()
    shutil.copytree(native.export, tmp_path / "cut")
    card = {key: value for key, value in native.card.items() if key != "width"}
    (tmp_path / "cut" / exports.CARD).write_text(json.dumps(card))
    for place, said in (
        (tmp_path / "no", "no such folder"),
        (tmp_path / "cut", "training.json lacks 'width'"),
        (tmp_path / "empty", "neither an export .* nor a working directory .* nor"),
        (tmp_path / "e", "vocabulary.json is missing: .* export again"),
        (f"{native.workdir}#other", "no run 'other'"),
        (f"{native.workdir}#{places(native)[2].name}@3", "no checkpoint of step 3"),
    ):
        with pytest.raises(config.ConfigError, match=re.escape("load('") + f".*{said}"):
            scaling_ldm.load(place)


def test_a_model_is_not_drawn_from_with_other_words(native, tmp_path):
    """Before, a foreign vocabulary gave pictures of other words without a word."""
    folder = tmp_path / "export"
    shutil.copytree(native.export, folder)
    there = vocabulary.read(folder / vocabulary.FILE)
    swapped = vocabulary.Vocabulary((*there.words[:-2], *there.words[:-3:-1]))
    vocabulary.write(folder / vocabulary.FILE, swapped)
    experiment = config.resolve(native.wanted(folder))
    with pytest.raises(config.ConfigError, match="vocabulary.json holds other words"):
        exports.read_model(experiment, str(folder))
    card = native.card | {"vocabulary": swapped.digest}
    (folder / exports.CARD).write_text(json.dumps(card))
    said = f"learnt the ids of other words.*id {len(there) - 2} is '{there.words[-1]}'"
    with pytest.raises(config.ConfigError, match=said):
        generate.run(experiment, tmp_path / "new", [])


def test_words_of_another_study_are_not_the_runs(native, tmp_path):
    """Its file is whole, and the words have the same ids."""
    workdir = tmp_path / "w"
    shutil.copytree(native.workdir, workdir)
    (spec,) = records.read_jsonl(workdir / "runs.jsonl")
    path = runs.run_files(workdir, spec.run_id).vocabulary
    kept = vocabulary.read(path)
    assert runs.words_of(workdir, spec) == kept.words
    vocabulary.write(path, kept, "0" * 16)
    experiment = config.resolve(native.given)
    inputs = train._Inputs(workdir, mesh.build(experiment.mesh, {}))
    for read in (
        lambda: runs.trained_model(experiment, workdir, spec),
        lambda: inputs.check(experiment, spec),
    ):
        with pytest.raises(records.Damaged) as e:
            read()
        assert str(e.value) == (
            f"{path} is that of another run (recipe {'0' * 16}; wanted "
            f"{spec.recipe_hash})"
        )
    vocabulary.write(path, kept)  # as an older version did
    assert runs.words_of(workdir, spec) == kept.words


def test_a_run_goes_on_only_with_its_own_words(native, tmp_path):
    workdir, experiment = tmp_path / "w", config.resolve(native.given)
    (spec,) = records.read_jsonl(native.workdir / "runs.jsonl")
    inputs = train._Inputs(workdir, mesh.build(experiment.mesh, {}))
    spec = dataclasses.replace(spec, overrides={})
    path = runs.run_files(workdir, spec.run_id).vocabulary
    path.parent.mkdir(parents=True)
    inputs.check(experiment, spec)  # a run of an older version kept none
    shutil.copy(runs.run_files(native.workdir, spec.run_id).vocabulary, path)
    inputs.check(experiment, spec)
    vocabulary.write(path, WORDS)
    with pytest.raises(
        config.ConfigError, match="7 words there, 256 here; id 4 is 'red'"
    ):
        inputs.check(experiment, spec)


@pytest.mark.filterwarnings("ignore:.*has not learnt")
def test_exports_of_before_their_words_were_kept_open(native, tmp_path):
    """The words of painted icons are those of their config."""
    folder = tmp_path / "export"
    shutil.copytree(native.export, folder)
    (folder / vocabulary.FILE).unlink()
    card = native.card
    for later in ("vocabulary", "computes_in"):
        del card[later]
    del card["reads"]["model.time_range"]
    (folder / exports.CARD).write_text(json.dumps(card))
    source, first = held_out_source(native), np.arange(1)
    (text,), rows = source.captions(first), source.rows(first)
    found = scaling_ldm.load(folder).encode_text(text)["text"]
    np.testing.assert_array_equal(found, rows["text"])
    assert exports.read_model(config.resolve(native.given), str(folder)).words is None
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["experiment"]["data"]["source"] = "folder"
    del settings["seal"]
    path.write_text(json.dumps(settings))
    with pytest.raises(config.ConfigError, match="without the words .* export again"):
        scaling_ldm.load(folder)
