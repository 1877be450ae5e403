"""Training from weights of a run, of an export, and of published layouts."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from stop_at import stop_at

from scaling_ldm import config, records, study
from scaling_ldm.data import vocabulary
from scaling_ldm.models import from_config
from scaling_ldm.models.weights import dit as dit_weights
from scaling_ldm.models.weights import published as published_weights
from scaling_ldm.models.weights import unet as unet_weights
from scaling_ldm.stages import plan
from scaling_ldm.training import mesh, progress, train_step
from scaling_ldm.workdir import (
    exit_status,
    init_record,
    initial_weights,
    ownership,
    runs,
)

RUN = "2.086e07-16x1"
DONE, BAD = exit_status.EXIT["done"], exit_status.EXIT["bad configuration"]


def ran(given, workdir, *stages):
    cluster = (None, None, None)
    return study.run(
        given, workdir=str(workdir), stages=stages, only=None, cluster=cluster
    )


@pytest.fixture(scope="module")
def recipe(tiny):
    c = tiny.copy_and_resolve_references()
    c.plan.sizes, c.plan.steps, c.plan.budgets_flops = ((16, 1),), 12, ()
    c.plan.minimum_steps = 2
    c.train.optimize_code = False
    c.mesh.fsdp, c.mesh.cpu_devices = 2, 4
    return c


@pytest.fixture(scope="module")
def source(recipe, tmp_path_factory):
    """(workdir, record) of a finished run, and its export."""
    workdir = tmp_path_factory.mktemp("before") / "w"
    assert ran(recipe, workdir, "plan", "train", "export") == DONE
    return workdir, runs.read_record(workdir, RUN)


def later(recipe, init_from, *exceptions, **fields):
    """The recipe from these weights, at a rate that changes nothing."""
    c = recipe.copy_and_resolve_references()
    c.train.init_from, c.train.init_exceptions = str(init_from), exceptions
    c.optimizer.learning_rate = 1e-12
    for where, value in fields.items():
        section, name = where.split("__")
        c[section][name] = value
    return c


def identified(c):
    """The experiment with its weights' identity, for a directory that is not there."""
    return ownership.as_made(config.resolve(c), pathlib.Path("nowhere"))


@pytest.fixture(scope="module")
def second(recipe, source, tmp_path_factory):
    """The workdir of a run that starts from the source's, and its export."""
    workdir = tmp_path_factory.mktemp("second") / "w"
    given = later(recipe, f"{source[0]}#{RUN}")
    assert ran(given, workdir, "plan", "train", "export") == DONE
    return workdir


@pytest.mark.parametrize(
    "kind",
    [
        "export",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("run", "raw", "step")),
    ],
)
def test_training_starts_from_what_is_named(recipe, source, tmp_path, kind, request):
    workdir, before = source
    name = {
        "run": "",
        "raw": f"{workdir}#{RUN}:raw",
        "step": f"{workdir}#{RUN}@{before.steps // 2}",
        "export": workdir / "export",
    }[kind]
    new = request.getfixturevalue("second") if kind == "run" else tmp_path / "w"
    if name:
        assert ran(later(recipe, name), new, "plan", "train") == DONE
    (spec,) = records.read_jsonl(new / "runs.jsonl")
    record = runs.read_record(new, spec.run_id)
    assert record.status == "finished"
    steps = before.steps // (2 if kind == "step" else 1)
    spent = before.flops * steps / before.steps
    assert spec.pretraining_flops == record.pretraining_flops == spent
    assert record.flops == spec.planned_flops  # its own alone
    held = init_record.read(new)
    assert held["pretraining_flops"] == spent
    (from_,) = records.read_jsonl(workdir / "runs.jsonl")
    first = {w: runs.last_loss(workdir, from_, w) for w in ("raw", "ema")}
    wanted = first["raw" if kind == "raw" else "ema"]
    if kind != "step":
        for weights in first:
            loss = runs.last_loss(new, spec, weights)
            assert loss == pytest.approx(wanted, rel=1e-6)
    assert first["raw"] != first["ema"]


def test_parameters_and_averages_are_set_and_the_optimizer_is_new(recipe, source):
    workdir, _ = source
    e = identified(later(recipe, f"{workdir}#{RUN}"))
    (spec,) = plan.plan(e)
    device_mesh = mesh.build(e.mesh, {})
    with jax.set_mesh(device_mesh):
        compiled = train_step.compile_functions(
            train_step.compiled_part(e), 16, 1, device_mesh
        )
        fresh = compiled.init(jax.random.key(0))
        params = initial_weights.load(e, spec, device_mesh, fresh.params)
        state = compiled.start(jax.random.key(0), params)
        (model,) = (
            runs.trained_model(config.resolve(recipe), workdir, s)
            for s in records.read_jsonl(workdir / "runs.jsonl")
        )
        wanted = model.load(device_mesh)
    for tree in (state.params, state.averages["ema"]):
        jax.tree.map(assert_array_equal, tree, wanted)
        for leaf, like in zip(
            jax.tree.leaves(tree), jax.tree.leaves(fresh.params), strict=True
        ):
            assert leaf.sharding == like.sharding
    jax.tree.map(assert_array_equal, state.opt, fresh.opt)
    assert int(state.step) == 0


@pytest.mark.slow
def test_pretraining_adds_up_over_several_studies(recipe, source, second):
    _, before = source
    for name in (f"{second}#{RUN}", second / "export"):
        (spec,) = plan.plan(identified(later(recipe, name)))
        assert spec.pretraining_flops == 2 * before.flops
    card = json.loads((second / "export" / "training.json").read_text())
    assert card["pretraining_flops"] == before.flops


def test_the_recipe_has_the_bytes_and_not_the_place(recipe, source, tmp_path):
    workdir, _ = source
    plain = later(recipe, "")
    first = identified(later(recipe, workdir / "export"))
    assert first.recipe_hash != config.resolve(plain).recipe_hash
    moved = tmp_path / "elsewhere"
    shutil.copytree(workdir / "export", moved)
    assert identified(later(recipe, moved)).recipe_hash == first.recipe_hash
    path = moved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(config.ConfigError, match="the weights are not those of"):
        identified(later(recipe, moved))
    (moved / "training.json").unlink()
    changed = identified(later(recipe, moved))
    assert changed.recipe_hash != first.recipe_hash
    (spec,) = plan.plan(changed)
    assert spec.pretraining_flops is None  # without a card it is unknown
    raw, ema = (identified(later(recipe, f"{workdir}#{RUN}{w}")) for w in (":raw", ""))
    assert raw.recipe_hash != ema.recipe_hash
    shutil.copytree(workdir, tmp_path / "study")  # a run has its bytes elsewhere, too
    there = identified(later(recipe, f"{tmp_path / 'study'}#{RUN}"))
    assert there.recipe_hash == ema.recipe_hash
    given = later(recipe, workdir / "export", train__init_checksum="ab")
    with pytest.raises(
        config.ConfigError, match="'ab', but the checksum of the weights"
    ):
        identified(given)


@pytest.mark.slow
def test_a_run_continues_when_its_source_is_gone(
    recipe, source, tmp_path, monkeypatch, capsys
):
    shutil.copytree(source[0], tmp_path / "before")
    c = later(recipe, f"{tmp_path / 'before'}#{RUN}")
    c.optimizer.learning_rate = 1e-3
    assert ran(c, tmp_path / "whole", "plan", "train") == DONE
    stop_at(monkeypatch, 5)
    assert ran(c, tmp_path / "w", "plan", "train") == 75
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "before")
    assert ran(c, tmp_path / "w", "plan", "train") == DONE
    (spec,) = records.read_jsonl(tmp_path / "w" / "runs.jsonl")
    one, two = (runs.read_record(tmp_path / w, spec.run_id) for w in ("w", "whole"))
    assert one.restarts == 1
    loss = runs.last_loss(tmp_path / "w", spec)
    assert loss == runs.last_loss(tmp_path / "whole", spec)
    assert one.recipe_hash == two.recipe_hash
    assert one.pretraining_flops == two.pretraining_flops > 0
    # A study is read without its source, and its weights are not looked for.
    monkeypatch.setattr(initial_weights, "identified", lambda *_: pytest.fail())
    assert ran(c, tmp_path / "w", "fit") == DONE
    monkeypatch.undo()
    # What has no checkpoint cannot start any more.
    shutil.rmtree(tmp_path / "w" / "runs")
    capsys.readouterr()
    assert ran(c, tmp_path / "w", "train") == BAD
    assert "no such folder or file, and" in capsys.readouterr().err
    assert ran(c, tmp_path / "new", "plan") == BAD
    assert f"{RUN}': no such folder or file" in capsys.readouterr().err


@pytest.mark.slow
def test_other_weights_under_the_same_name_are_refused(
    recipe, source, tmp_path, capsys
):
    shutil.copytree(source[0] / "export", tmp_path / "e")
    c = later(recipe, tmp_path / "e")
    assert ran(c, tmp_path / "w", "plan") == DONE
    path = tmp_path / "e" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (tmp_path / "e" / "training.json").unlink()
    assert ran(c, tmp_path / "w", "train") == BAD
    assert "config.train.init_checksum: " in capsys.readouterr().err


@pytest.mark.slow
def test_weights_that_change_before_a_run_starts_are_refused(recipe, source, tmp_path):
    shutil.copytree(source[0] / "export", tmp_path / "e")
    e = identified(later(recipe, tmp_path / "e"))
    (spec,) = plan.plan(e)
    path = tmp_path / "e" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (tmp_path / "e" / "training.json").unlink()
    with pytest.raises(config.ConfigError, match="config.train.init_checksum = "):
        initial_weights.load(e, spec, mesh.build(e.mesh, {}), None)


def test_what_does_not_fit_is_refused_with_everything_that_differs(
    recipe, source, tmp_path, capsys
):
    c = later(recipe, source[0] / "export", model__activation="relu")
    c.plan.sizes = ((16, 2), (24, 1))
    c.plan.sizes_per_budget = 2
    c.data.vocab_size = 128
    assert ran(c, tmp_path / "w", "plan") == BAD
    said = capsys.readouterr().err
    assert "does not fit the network that is trained" in said
    assert "16 x 2: blocks/mlp_up/kernel: (1, 16, 64) there, (2, 16, 64) here" in said
    assert "24 x 1: entry/time/up/kernel: (8, 16) there, (8, 24) here" in said
    assert "16 x 2: network.activation: 'gelu' there, 'relu' here" in said
    assert "16 x 2: entry/word_embedding: (256, 8) there, (128, 8) here" in said
    assert not (tmp_path / "w" / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("{}", "name one of its runs, as in"),
        ("{}#none", "no run 'none' in"),
        ("{}#" + RUN + "@3", "has no checkpoint of step 3; it has"),
        ("{}#" + RUN + "@last", "the step 'last' is not a number"),
        ("{}#" + RUN + ":best", "weights 'best'; known: raw, ema"),
        ("{}/runs/" + RUN, f"the folder of a run; name the run as .*#{RUN}"),
        ("{}/nothing", "no such folder or file"),
        ("{}/export#a", "is not the working directory of a study"),
    ],
)
def test_a_name_of_nothing_is_refused(recipe, source, name, why):
    with pytest.raises(config.ConfigError, match=why):
        identified(later(recipe, name.format(source[0])))


@pytest.mark.parametrize("name", ["hdfs://b/w#run", "hdfs://b/w", "gs://b/export"])
def test_a_url_that_is_not_supported_has_one_message(name):
    c = config.default()
    c.train.init_from = name
    experiment, said = config.resolve(c), []
    for look in (initial_weights.is_there, initial_weights.find):
        with pytest.raises(config.ConfigError) as raised:
            look(experiment)
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"{name.partition('#')[0]}: config.train.init_from ")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"init_exceptions": ("exit/*",)}, "is not PATTERN=TREATMENT; treatments: "),
        ({"init_exceptions": ("exit/*=old",)}, "is not PATTERN=TREATMENT"),
        ({"init_from": "", "init_exceptions": ("a=new",)}, "is not read without"),
        ({"init_from": "", "init_checksum": "ab"}, "is not read without"),
    ],
)
def test_exceptions_are_checked(recipe, fields, why):
    c = later(recipe, "a")
    c.train.update(fields)
    with pytest.raises(config.ConfigError, match=why):
        config.resolve(c)


def test_weights_are_no_axis(recipe):
    c = recipe.copy_and_resolve_references()
    c.plan.axes = {"train.init_from": ("", "a")}
    with pytest.raises(config.ConfigError, match="start from the same weights"):
        config.resolve(c)


def test_weights_of_another_objective_are_said(recipe, source, monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "say", lines.append)
    c = later(recipe, source[0] / "export", objective__prediction="v")
    e = identified(c)
    (spec,) = plan.plan(e)
    device_mesh = mesh.build(e.mesh, {})
    with jax.set_mesh(device_mesh):
        fresh = train_step.compile_functions(
            train_step.compiled_part(e), 16, 1, device_mesh
        ).init(jax.random.key(0))
        initial_weights.load(e, spec, device_mesh, fresh.params)
    assert lines == [
        f"{spec.run_id} starts from weights of objective.prediction: 'flow' there, "
        "'v' here"
    ]


@pytest.mark.slow
def test_ids_of_other_words_are_refused_unless_they_are_learnt_anew(recipe, source):
    workdir, _ = source
    there = vocabulary.read(runs.run_files(workdir, RUN).vocabulary)
    swapped = (*there.words[:-2], *there.words[:-3:-1])
    here = vocabulary.Vocabulary(swapped)
    embedding = "entry/word_embedding"
    run = identified(later(recipe, f"{workdir}#{RUN}"))
    assert initial_weights.find(run).words == there.words
    name = str(workdir / "export")
    e = identified(later(recipe, name))
    (spec,) = records.read_jsonl(workdir / "runs.jsonl")
    device_mesh = mesh.build(e.mesh, {})
    with pytest.raises(config.ConfigError) as caught:
        initial_weights.load(e, spec, device_mesh, None, here)
    said = str(caught.value)
    first = f"id {len(there) - 2} is {there.words[-2]!r} there, {there.words[-1]!r}"
    assert first in said and f"'{embedding}=new'" in said
    anew = identified(later(recipe, name, f"{embedding}=new"))
    fresh = from_config.parameter_shapes(from_config.network_config(anew, 16, 1))
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f"), fresh)
    with jax.set_mesh(device_mesh):
        got = initial_weights.load(anew, spec, device_mesh, fresh, here)
    assert not np.any(got["entry"]["word_embedding"])
    assert np.any(got["entry"]["patch"]["kernel"])


# Published layouts


@pytest.fixture(scope="module")
def labelled(recipe):
    """A recipe whose network is a DiT."""
    c = recipe.copy_and_resolve_references()
    plain = config.ModelConfig()
    c.model.architecture, c.model.classes = "adaln_zero", 16
    c.model.text_width, c.model.time_width = plain.text_width, plain.time_width
    return c


def published(labelled, kind):
    """The config of the experiment's network as that layout has it, and parameters."""
    network = from_config.network_config(config.resolve(labelled), 16, 1)
    network = dataclasses.replace(
        network,
        grid=dit_weights.GRID,
        out_channels=6,
        time_ends=1 if kind == "diffusers" else 0,
        mlp_epsilon=1e-5 if kind == "diffusers" else 1e-6,
    )
    rng = np.random.default_rng(0)
    return network, jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype("f"),
        from_config.parameter_shapes(network),
    )


ALLOWED = {
    "diffusers": ("network.mlp_epsilon=here", "network.time_ends=here"),
    "official": ("network.heads=here",),  # which its file does not say
}


@pytest.mark.parametrize("kind", dit_weights.LAYOUTS)
def test_a_published_dit_is_read(labelled, tmp_path, kind, monkeypatch, capsys):
    network, params = published(labelled, kind)
    path = tmp_path / "dit.safetensors"
    dit_weights.save(params, path, network, kind)
    if kind == "diffusers":
        content = json.dumps(dit_weights.to_config(network))
        (tmp_path / "config.json").write_text(content)
        path = tmp_path
    c = later(labelled, path)
    with pytest.raises(config.ConfigError) as e:
        plan.plan(identified(c))
    lines = {line.split(": ")[1] for line in str(e.value).splitlines()[1:]}
    differing = {one.removesuffix("=here") for one in ALLOWED[kind]}
    assert lines == {
        "network.grid",
        "exit/patch/kernel",
        "exit/patch/bias",
        *initial_weights.OBJECTIVE,  # no scheduler_config.json is beside it
        *differing,
    }
    allowed = "network.grid=here", "exit/patch/*=new", "objective.*=here"
    c = later(labelled, path, *allowed, *ALLOWED[kind])
    experiment = identified(c)
    (spec,) = plan.plan(experiment)
    assert spec.pretraining_flops is None
    device_mesh = mesh.build(experiment.mesh, {})
    fresh = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 7, "f"),
        from_config.parameter_shapes(from_config.network_config(experiment, 16, 1)),
    )
    find = published_weights.find  # as of a file with several state dicts
    monkeypatch.setattr(
        published_weights,
        "find",
        lambda *a: dataclasses.replace(find(*a), part="'ema' of dit.pt, not model"),
    )
    with jax.set_mesh(device_mesh):
        fresh = mesh.place_params(device_mesh, fresh)
        got = initial_weights.load(experiment, spec, device_mesh, fresh)
    said = f"{spec.run_id} starts from 'ema' of dit.pt, not model\n"
    assert said in capsys.readouterr().err
    jax.tree.map(assert_array_equal, got["blocks"], params["blocks"])
    jax.tree.map(assert_array_equal, got["entry"], params["entry"])
    assert_array_equal(got["exit"]["patch"]["kernel"], 7)


V = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"prediction_type": "epsilon"}, ["prediction: 'epsilon' there, 'v' here"]),
        ({"beta_schedule": "linear"}, ["schedule: Discrete"]),
        *(
            pytest.param(change, ["schedule: Discrete"], marks=pytest.mark.slow)
            for change in (
                {"beta_start": 0.001},
                {"beta_end": 0.02},
                {"num_train_timesteps": 500},
                {"rescale_betas_zero_snr": True},
                {"trained_betas": [0.1, 0.2]},
            )
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            ["prediction: 'flow' there, 'v' here", "schedule: RectifiedFlow"],
        ),
    ],
)
def test_what_published_weights_have_learnt_is_compared(
    labelled, tmp_path, change, said, capsys
):
    """It is in the scheduler's file beside them; tensors do not show it."""
    network, params = published(labelled, "diffusers")
    place, scheduler = tmp_path / "transformer", tmp_path / "scheduler"
    for folder in (place, scheduler):
        folder.mkdir()
    dit_weights.save(params, place / "dit.safetensors", network, "diffusers")
    content = json.dumps(dit_weights.to_config(network))
    (place / "config.json").write_text(content)
    (scheduler / "scheduler_config.json").write_text(json.dumps(V | change))
    c = later(labelled, place, "network.*=here", "exit/patch/*=new")
    c.objective.schedule, c.objective.prediction = "scaled_linear", "v"
    experiment = identified(c)
    (spec,) = plan.plan(experiment)
    initial_weights._say_what_differs(
        spec, initial_weights.find(experiment), experiment
    )
    lines = [
        line.removeprefix("objective.")
        for line in capsys.readouterr()
        .err.strip()
        .partition(" weights of ")[2]
        .split("; ")
        if line
    ]
    assert len(lines) == len(said)
    assert all(map(str.startswith, lines, said))


@pytest.mark.slow
def test_a_published_u_net_gets_a_coarse_picture(recipe, tmp_path):
    c = recipe.copy_and_resolve_references()
    c.model = config.default().model
    c.model.architecture, c.model.heads, c.model.head_dim = "unet", 4, 0
    c.model.text_width, c.model.compute_dtype = 8, "float32"
    c.plan.sizes, c.plan.steps, c.plan.budgets_flops = ((32, 1),), 4, ()
    c.encode.text_encoder = str(tmp_path)  # captions are features, as published
    c.encode.pictures = 60
    e = config.resolve(c)
    network = from_config.network_config(e, 32, 1)
    assert network.vocab_size == 0
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype("f"),
        from_config.parameter_shapes(network),
    )
    folder = tmp_path / "unet"
    folder.mkdir()
    path = folder / "diffusion_pytorch_model.safetensors"
    unet_weights.save(params, path, network)
    (folder / "config.json").write_text(json.dumps(unet_weights.to_config(network)))
    c.train.init_from = str(folder)
    with pytest.raises(config.ConfigError, match="objective.prediction: not said ther"):
        plan.plan(identified(c))
    c.train.init_exceptions = ("objective.*=here",)
    assert plan.plan(identified(c))[0].pretraining_flops is None
    c.data.coarse = 2
    with pytest.raises(config.ConfigError, match="enter/kernel: .3, 3, 3, 32. there"):
        plan.plan(identified(c))
    c.train.init_exceptions = "enter/kernel=zero", "objective.*=here"
    experiment = identified(c)
    (spec,) = plan.plan(experiment)
    fresh = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, "f"),
        from_config.parameter_shapes(from_config.network_config(experiment, 32, 1)),
    )
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        fresh = mesh.place_params(device_mesh, fresh)
        got = initial_weights.load(experiment, spec, device_mesh, fresh)
    kernel = np.asarray(got["enter"]["kernel"])
    assert_array_equal(kernel[:, :, :3], params["enter"]["kernel"])
    assert_array_equal(kernel[:, :, 3:], 0)


def test_a_folder_of_another_layout_is_refused(recipe, tmp_path):
    with pytest.raises(config.ConfigError, match="holds no weights to read"):
        identified(later(recipe, tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "OtherModel"}')
    with pytest.raises(config.ConfigError, match="is of OtherModel; known: UNet2D"):
        identified(later(recipe, tmp_path))
