"""Where the tables say that nothing reads a field, it does nothing and is refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm import config
from scaling_ldm import data as data_lib
from scaling_ldm.config import reads
from scaling_ldm.data import encoded, pictures
from scaling_ldm.models import from_config
from scaling_ldm.stages import generate
from scaling_ldm.training import (
    mesh,
    objective_checks,
    rate_policies,
    train_step,
)
from scaling_ldm.training import (
    objective as objective_lib,
)
from scaling_ldm.training import (
    optimizer as optimizer_lib,
)

SIZES = {"unet": (32, 1), "autoencoder_kl": (32, 1), "mmdit": (32, 2), "flux": (32, 2)}
DEFAULT = config.Experiment()
BY_ARCHITECTURE = reads.READERS["model.architecture"]
# Another value of each field of a network, and what has to be changed with it.
NETWORK = {
    "data.coarse": {"data.coarse": 2},
    "model.patch_size": {"model.patch_size": 4},
    "model.head_dim": {"model.head_dim": 8},
    "model.heads": {"model.heads": 4, "model.head_dim": 0},
    "model.mlp_ratio": {"model.mlp_ratio": 2},
    "model.activation": {"model.activation": "silu"},
    "model.norm": {"model.norm": "rms"},
    "model.qk_norm": {"model.qk_norm": "rms"},
    "model.positions": {"model.positions": "learned"},
    "model.text_width": {"model.text_width": 8},
    "model.time_width": {"model.time_width": 8},
    "model.classes": {"model.classes": 5},
    "model.compute_dtype": {"model.compute_dtype": "float32"},
    "model.latent_channels": {"model.latent_channels": 2},
    "model.groups": {"model.groups": 16},
    "model.remat": {"model.remat": True},
    "model.remat_policy": {"model.remat": True, "model.remat_policy": "dots"},
    "model.attention": {"model.attention": "plain"},
    "model.unroll": {"model.unroll": "never"},
}
# Of the objective: (what has to be chosen first, another value).
COSINE = {"objective.schedule": "cosine", "objective.prediction": "v"}
OBJECTIVE = {
    "schedule": ({}, "vp_cosine"),
    "schedule_steps": (COSINE, 50),
    "zero_terminal_snr": (COSINE, True),
    "prediction": ({}, "v"),
    "weighting": ({}, "truncated_snr"),
    "min_snr_gamma": ({"objective.weighting": "min_snr"}, 2.0),
    "p2_gamma": ({"objective.weighting": "p2"}, 2.0),
    "p2_k": ({"objective.weighting": "p2"}, 2.0),
    "sigmoid_bias": ({"objective.weighting": "sigmoid"}, 2.0),
    "timestep_sampling": ({}, "uniform"),
    "time_location": ({}, 0.5),
    "time_scale": ({}, 0.5),
    "time_shift": ({}, 2.0),
    "caption_dropout": ({}, 0.5),
    "reconstruction": ({}, "l2"),
    "kl_weight": ({}, 0.5),
}
GENERATE = {
    "run": "a run",
    "weights": "a/folder",
    "captions": ("a red coat",),
    "images": 2,
    "batch_size": 2,
    "sampler": "ddim",
    "spacing": "karras",
    "steps": 3,
    "guidance": 1.5,
    "seed": 1,
    "format": "webp",
}


def changed(experiment, changes):
    """The experiment with {"section.name": value}, whether it can be or not."""
    for where, value in changes.items():
        section, name = where.split(".")
        part = dataclasses.replace(getattr(experiment, section), **{name: value})
        experiment = dataclasses.replace(experiment, **{section: part})
    return experiment


@functools.cache
def base(architecture):
    """Small, and as near to the defaults as it can be."""
    changes = {
        "data.shape": (8, 8, 3),
        "data.text_tokens": 4,
        "encode.text_encoder": "vocabulary",
        "model.architecture": architecture,
        "plan.sizes": (SIZES.get(architecture, (32, 1)),),
    }
    if architecture == "adaln_zero":
        changes["model.classes"] = 16
    if architecture in BY_ARCHITECTURE["model.heads"]:
        changes["model.head_dim"] = 16
    if architecture == "unet":
        changes |= {"model.heads": 2, "model.head_dim": 0}
    return config.resolve(config.to_config_dict(changed(DEFAULT, changes)))


def resolved(experiment):
    return config.resolve(config.to_config_dict(experiment))


def refusals(experiment):
    """What is refused of an experiment, one sentence a field."""
    with pytest.raises(config.ConfigError) as e:
        resolved(experiment)
    lines = re.findall(r"^  - ((config\.\S+) = .*)$", str(e.value), re.MULTILINE)
    assert len({field for _, field in lines}) == len(lines)
    return {field: line for line, field in lines}


def traced(function, *arguments):
    """A traced function as text, with the numbers that it closes over."""
    closed = jax.make_jaxpr(function)(*arguments)
    text = re.sub(r"0x[0-9a-f]+", "", str(closed))
    return text, [np.asarray(const).tobytes() for const in closed.consts]


def arguments(experiment, conditioning):
    """What a loss takes after its parameters, abstract."""
    batch = objective_checks.abstract_batch(experiment, 2)
    batch = {name: batch[name] for name in ("x", *conditioning)}
    uncond = {
        name: jax.ShapeDtypeStruct(batch[name].shape[1:], batch[name].dtype)
        for name in conditioning
        if name != "image"
    }
    return batch, uncond, jax.eval_shape(lambda: jax.random.key(0))


def plain(objective):
    """The loss of an objective without a state, of (params, batch, uncond, key)."""
    return lambda params, *given: objective.loss(
        params, {}, {}, *given[:2], 0, given[2]
    )[0]


@functools.lru_cache(maxsize=16)
def network(experiment):
    """What a network is: its parameters, and its loss traced when it is asked for."""
    device_mesh = mesh.build(config.MeshConfig(), {}, jax.local_devices()[:1])
    compiled = train_step.compile_functions(
        experiment, *experiment.plan.sizes[0], device_mesh
    )
    objective, params = compiled.objective, compiled.abstract_state.params
    shapes = [
        (jax.tree_util.keystr(path), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    given = arguments(experiment, objective.conditioning)
    return shapes, functools.cache(lambda: traced(plain(objective), params, *given))


def shapes_of(*experiments):
    """What the networks are functions of."""
    built = (objective_lib.build(e, *e.plan.sizes[0], False) for e in experiments)
    return [one.init.args for one in built]


def same_shape(one, other):
    """Whether two networks are given the same; kernels differ on accelerators alone."""
    return len({str(shape) for shape in shapes_of(one, other)}) == 1


def same_network(one, other):
    """Whether two experiments train the same; a network is a function of its Shape."""
    (shape,), (other_shape,) = shapes_of(one, other)
    if shape == other_shape and one.model.unroll == other.model.unroll:
        return True
    (shapes, loss), (other_shapes, other_loss) = network(one), network(other)
    return shapes == other_shapes and loss() == other_loss()


def check(experiment, field, changes, architecture, same):
    """Holds one change of one field to the table."""
    readers = BY_ARCHITECTURE.get(field, tuple(config.ARCHITECTURES))
    if architecture in readers:
        resolved(other := changed(experiment, changes))
        assert not same(experiment, other), f"{field} does nothing; the table errs"
        return
    alone = changed(experiment, {field: changes[field]})
    assert same(experiment, alone), f"{field} does something; the table errs"
    said, default = refusals(alone)[f"config.{field}"], reads.value(DEFAULT, field)
    assert said.endswith(
        f"is not read by config.model.architecture = {architecture!r}; it is for: "
        f"{', '.join(readers)}; its default is {default!r}"
    )


def test_every_field_has_another_value_here():
    names = {f"model.{f.name}" for f in dataclasses.fields(config.ModelConfig)}
    assert set(NETWORK) == names - {"model.architecture"} | {"data.coarse"}
    assert {*OBJECTIVE, *reads.WHICH} == {
        f.name for f in dataclasses.fields(config.ObjectiveConfig)
    }
    assert set(GENERATE) == {f.name for f in dataclasses.fields(config.GenerateConfig)}
    sections = {f"objective.{n}" for n in OBJECTIVE} | {
        f"generate.{n}" for n in GENERATE
    }
    for name, section in (
        ("evaluate", config.EvaluateConfig),
        ("frontier", config.FrontierConfig),
        ("advise", config.AdviseConfig),
    ):
        sections |= {f"{name}.{f.name}" for f in dataclasses.fields(section)}
    assert set(BY_ARCHITECTURE) <= set(NETWORK) | sections


# By day, the one that does not denoise. At night, those that do.
BY_DAY = ("autoencoder_kl",)
OBJECTIVES_BY_DAY = ("in_context", "adaln_zero", "autoencoder_kl")


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in BY_DAY else pytest.mark.slow)
        for name in config.ARCHITECTURES
    ],
)
def test_a_networks_fields_do_what_the_table_says(architecture):
    for field, changes in NETWORK.items():
        if (architecture, field) == ("unet", "model.head_dim"):
            changes = {"model.head_dim": 8, "model.heads": 0}  # one of them is 0
        same = same_shape if field == "model.attention" else same_network
        check(base(architecture), field, changes, architecture, same)


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in OBJECTIVES_BY_DAY else pytest.mark.slow)
        for name in config.ARCHITECTURES
    ],
)
def test_an_objectives_fields_do_what_the_table_says(architecture, monkeypatch):
    """With a network that is quick to trace in the place of the experiment's."""
    for name, changes in (
        ("denoiser", {"apply": lambda params, x, t, cond: 0.1 * x}),
        (
            "autoencoder",
            {
                "encode": lambda params, x: 0.1 * jnp.concatenate([x, x], axis=-1),
                "decode": lambda params, z: 0.1 * z,
                "factor": 1,
                "latent_channels": 3,
            },
        ),
    ):
        build = getattr(from_config, name)

        def quick(experiment, *size, build=build, changes=changes):
            blind = dataclasses.replace(experiment, objective=None)  # reads none of it
            return dataclasses.replace(build(blind, *size), **changes)

        monkeypatch.setattr(from_config, name, quick)

    def task(experiment):
        size = experiment.plan.sizes[0]
        return train_step.train_functions(experiment, *size, unroll=False).objective

    params = jax.eval_shape(task(base(architecture)).init, jax.random.key(0))

    @functools.cache
    def loss(experiment):
        learnt = task(experiment)
        given = arguments(experiment, learnt.conditioning)
        return traced(plain(learnt), params, *given)

    for name, (chosen, value) in OBJECTIVE.items():
        check(
            changed(base(architecture), chosen),
            f"objective.{name}",
            {f"objective.{name}": value},
            architecture,
            lambda a, b: loss(a) == loss(b),
        )


class Unread:
    """Stands for a section of which nothing may be read but what is given."""

    def __init__(self, **given):
        vars(self).update(given)


def test_an_autoencoder_samples_nothing(tmp_path):
    experiment = base("autoencoder_kl")
    blind = dataclasses.replace(experiment, generate=Unread())
    assert generate.run(blind, tmp_path, []) is None
    for name, value in GENERATE.items():
        alone = changed(experiment, {f"generate.{name}": value})
        assert "it is for: in_context" in refusals(alone)[f"config.generate.{name}"]
        changes = {f"generate.{name}": value, "generate.spacing": "karras"}
        resolved(changed(base("in_context"), changes))


def test_features_decide_their_width_where_no_network_reads_them():
    features = {"data.source": "memory", "encode.text_encoder": "a/folder"}
    resolved(changed(base("adaln_zero"), features | {"model.text_width": 9}))
    assert "model.text_width = 9" in str(
        refusals(changed(base("adaln_zero"), {"model.text_width": 9}))
    )


@pytest.mark.parametrize("source", config.DATA_SOURCES)
def test_a_sources_fields_do_what_the_table_says(source, monkeypatch, unchecked):
    experiment = changed(
        base("in_context"),
        {"data.source": source, "data.path": "here", "encode.pictures": 9},
    )
    monkeypatch.setattr(pictures, "open_pictures", lambda *a, **options: (a, options))
    readers = reads.READERS["data.source"]["data.split"]
    for field in ("split", "captions", "label"):
        reads_it = source in reads.READERS["data.source"][f"data.{field}"]
        for value in ("train", "test"):
            other = changed(experiment, {f"data.{field}": value})
            asked = pictures.of_experiment(other)[1]
            options = {n: v for n, v in asked.items() if n.startswith(field[:7])}
            assert (value in options.values()) == reads_it
            assert (encoded.identity(other).get(field) == value) == reads_it
            assert set(options) <= set(pictures.options_of(source))
    assert ("split" in encoded.identity(experiment)) == (source in readers)
    if source == "icons":
        assert "it is for: image_folder, " in refusals(experiment)["config.data.path"]
        with pytest.raises(config.ConfigError, match="no path is taken"):
            pictures.PICTURES["icons"]("here")
    else:
        resolved(experiment)
    other = changed(experiment, {"data.split": "test"})
    if source in readers:
        resolved(other)
    else:
        said = refusals(other)["config.data.split"]
        assert said.endswith("it is for: tfds, huggingface; its default is 'train'")


ENCODE = {
    "path": "there",
    "pictures": 9,
    "choose": "first",
    "batch_size": 9,
    "records_per_shard": 9,
    "dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "largest_bad_fraction": 0.5,
    "workers": 9,
}


def test_with_nothing_to_encode_the_other_fields_are_refused(tmp_path):
    others = {"data.shuffle_window", "data.reader_threads", "data.cache_gigabytes"}
    assert {f"encode.{name}" for name in ENCODE} | others == set(reads.RECORDS)
    experiment = base("in_context")
    assert not experiment.encoded
    names = Unread(autoencoder="none", text_encoder="vocabulary")
    blind = dataclasses.replace(experiment, encode=names)
    train, _ = data_lib.sources(blind, tmp_path)
    assert train.rows(np.arange(2))["x"].shape == (2, 8, 8, 3)
    for name, value in ENCODE.items():
        said = refusals(changed(experiment, {f"encode.{name}": value}))
        assert "is not read with nothing to encode" in said[f"config.encode.{name}"]
    for name in others:
        said = refusals(changed(experiment, {name: 9}))
        assert "is not read with nothing to encode" in said[f"config.{name}"]


def test_without_a_frozen_network_its_arithmetic_is_refused():
    plain = changed(base("in_context"), {"data.source": "memory"})
    for name, value in ENCODE.items():
        other = changed(plain, {f"encode.{name}": value})
        if f"encode.{name}" not in reads.FROZEN:
            resolved(other)
            continue
        assert encoded.identity(other) == encoded.identity(plain)
        said = refusals(other)[f"config.encode.{name}"]
        assert "is not read without a frozen network" in said
        resolved(changed(other, {"encode.autoencoder": "owner/autoencoder"}))


@pytest.mark.parametrize("policy", config.LEARNING_RATE_POLICIES)
def test_a_policys_fields_do_what_the_table_says(policy):
    experiment = changed(base("in_context"), {"optimizer.learning_rate_policy": policy})
    other = changed(experiment, {"optimizer.policy_width": 32})
    rates = {
        rate_policies.peak_learning_rate(e.optimizer, 16, (1, 1, 1))
        for e in (experiment, other)
    }
    factors = {str(rate_policies.scaling(e, 32, 1)) for e in (experiment, other)}
    assert len(rates) == (2 if policy == "by_width" else 1)
    assert len(factors) == (2 if policy in ("mup", "completep") else 1)
    if policy in ("fixed", "tuned"):
        said = refusals(other)["config.optimizer.policy_width"]
        assert "it is for: by_width, mup, completep" in said
    else:
        resolved(other)


@pytest.mark.parametrize("schedule", config.LEARNING_RATE_SCHEDULES)
def test_a_schedules_fields_do_what_the_table_says(schedule):
    experiment = changed(base("in_context"), {"optimizer.schedule": schedule})
    readers = reads.READERS["optimizer.schedule"]

    def rates(e):
        cfg = e.optimizer
        numbers = optimizer_lib.schedule_numbers(cfg, 1.0, 2, 20)
        rate = jax.jit(lambda s, n: optimizer_lib.scheduled_rate(cfg, s, n))
        return [float(rate(np.int32(step), numbers)) for step in range(20)]

    for name, value in (("decay_fraction", 0.5), ("decay_shape", "1-sqrt")):
        other = changed(experiment, {f"optimizer.{name}": value})
        does_something = rates(other) != rates(experiment)
        assert does_something == (schedule in readers[f"optimizer.{name}"])
        if does_something:
            resolved(other)
        else:
            said = refusals(other)[f"config.optimizer.{name}"]
            assert "it is for: wsd" in said


def test_the_decay_of_an_average_that_is_not_kept_is_refused():
    keep = {"optimizer.averages": ("power_0.1",)}
    experiment = changed(base("in_context"), keep)
    other = changed(experiment, {"optimizer.ema_decay": 0.5})
    size = experiment.plan.sizes[0]

    def step(e):
        functions = train_step.train_functions(e, *size, unroll=False)
        given = arguments(e, functions.objective.conditioning)
        hyper = {"key": given[2], "peak": np.float32(1), "warmup": np.float32(1)}
        state = train_step.abstract_state(functions)
        return traced(functions.step, state, *given[:2], hyper)

    assert step(experiment) == step(other)
    said = refusals(other)["config.optimizer.ema_decay"]
    assert "config.optimizer.averages does not name 'ema'" in said
    both = {"optimizer.averages": ("power_0.1", "ema"), "optimizer.ema_decay": 0.5}
    resolved(changed(base("in_context"), both))


def test_a_field_that_two_choices_leave_unread_is_refused_once():
    changes = {"objective.time_shift": 2.0, "objective.schedule": "cosine"}
    said = refusals(changed(base("autoencoder_kl"), changes))
    assert set(said) == {f"config.{field}" for field in changes}
    assert "'autoencoder_kl'" in said["config.objective.time_shift"]
