"""Every objective on every architecture: it trains, and all cost the same."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling_ldm import config
from scaling_ldm.diffusion import prediction
from scaling_ldm.diffusion.losses import validation
from scaling_ldm.training import held_out, mesh, train_step
from scaling_ldm.training import objective as objective_lib

OBJECTIVES = {
    "epsilon": {"schedule": "scaled_linear", "prediction": "epsilon"},
    "v_to_pure_noise": {
        "schedule": "scaled_linear",
        "zero_terminal_snr": True,
        "prediction": "v",
        "weighting": "min_snr",
    },
    "x0": {"schedule": "cosine", "prediction": "x0", "weighting": "truncated_snr"},
    "flow": {"timestep_sampling": "logit_normal", "time_shift": 2.0},
    "v": {"schedule": "vp_cosine", "prediction": "v", "weighting": "sigmoid"},
}
DENOISERS = [name for name in config.ARCHITECTURES if name != "autoencoder_kl"]
# By day, objectives that others do not train, on networks that compile fast; flow is
# that of every other test of training. The rest of the product is slow.
BY_DAY = {("in_context", "epsilon"), ("adaln_zero", "x0")}
PRODUCT = [
    pytest.param(
        architecture,
        name,
        id=f"{architecture}-{name}",
        marks=() if (architecture, name) in BY_DAY else pytest.mark.slow,
    )
    for name in OBJECTIVES
    for architecture in DENOISERS
]
ROWS = 16


def build(tiny, architecture, name):
    c = tiny.copy_and_resolve_references()
    c.model.architecture = architecture
    c.model.classes = 7 if architecture == "adaln_zero" else 0
    size = (16, 1)
    if architecture in ("mmdit", "flux"):
        size = (16, 2)
    plain = config.ModelConfig()  # what a network does not read stays as it is there
    if architecture == "adaln_zero":
        c.model.text_width = plain.text_width
    if architecture == "unet":
        c.model.heads, c.model.head_dim, size = 4, 0, (32, 2)
        c.model.patch_size, c.model.time_width = plain.patch_size, plain.time_width
        c.plan.sizes = (size,)
    c.objective.update({"timestep_sampling": "uniform"} | OBJECTIVES[name])
    experiment = config.resolve(c)
    return experiment, train_step.train_functions(experiment, *size, unroll=False)


def flat_colours(names):
    """Pictures of one colour each, named by caption and label; the empty condition."""
    rng = np.random.default_rng(0)
    label = np.arange(ROWS, dtype=np.int32) % 7
    colour = rng.uniform(-1, 1, (7, 1, 1, 3))[label]
    text = np.stack([label + 3, label + 10, 0 * label, 0 * label], 1)
    batch = {
        "x": np.broadcast_to(colour, (ROWS, 8, 8, 3)).astype(np.float32),
        "text": text,
        "mask": text > 0,
        "label": label,
    }
    uncond = {
        "text": np.array([2, 0, 0, 0], np.int32),
        "mask": np.arange(4) < 1,
        "label": np.int32(7),
    }
    return {n: batch[n] for n in ("x", *names)}, {n: uncond[n] for n in names}


def second_moment(objective, t, x0):
    """The error of the untrained network, which predicts zero."""
    alpha, sigma = objective.schedule.alpha(t), objective.schedule.sigma(t)
    a, b = prediction.kind(objective.prediction).target(alpha, sigma)
    return np.mean(np.square(a)) * np.mean(x0**2) + np.mean(np.square(b))


@pytest.mark.parametrize(("architecture", "name"), PRODUCT)
def test_thirty_steps_lower_the_validation_error(tiny, architecture, name):
    experiment, functions = build(tiny, architecture, name)
    learnt = objective_lib.diffusion_objective(experiment.objective)
    assert learnt.prediction == OBJECTIVES[name].get("prediction", "flow")
    batch, uncond = flat_colours(functions.objective.conditioning)
    t = validation.stratified_times(ROWS, learnt, seed=0)
    errors = jax.jit(
        lambda params: functions.objective.per_example_loss(
            params, batch, t, np.arange(ROWS), jax.random.key(1)
        )
    )
    # A U-Net swings at the rate that transformers like, most where SNR weighs the loss.
    peak = 3e-3 if architecture == "unet" else 1e-2
    hyper = {"key": jax.random.key(0), "peak": np.float32(peak)}
    hyper["warmup"] = np.float32(1)
    state = jax.jit(functions.init)(jax.random.key(0))
    step = jax.jit(functions.step)
    before = np.mean(errors(state.params))
    assert_allclose(before, second_moment(learnt, t, batch["x"]), rtol=0.1)
    for _ in range(30):
        state, metrics = step(state, batch, uncond, hyper)
        assert np.isfinite(metrics["loss"])
    assert np.mean(errors(state.params)) < 0.87 * before


def test_the_objective_costs_nothing_that_is_counted(tiny):
    costs = [
        train_step.cost(*build(tiny, "in_context", name), batch_size=ROWS)
        for name in OBJECTIVES
    ]
    assert costs[0].flops.total > 0
    assert {c.flops.total for c in costs} == {costs[0].flops.total}
    assert {c.state_bytes for c in costs} == {costs[0].state_bytes}


def test_the_held_out_times_are_those_of_the_objective(tiny):
    class Source:
        def rows(self, index):
            return {"x": np.zeros((len(index), 8, 8, 3), np.float32)}

    experiment, _ = build(tiny, "in_context", "x0")
    device_mesh = mesh.build(experiment.mesh, {})
    batches = held_out.held_out_batches(experiment, device_mesh, Source(), ("x",))
    cfg = experiment.validation
    learnt = objective_lib.diffusion_objective(experiment.objective)
    want = validation.stratified_times(cfg.samples, learnt, seed=cfg.seed)
    assert_allclose(np.concatenate([b.times for b in batches]), want)
    assert want.max() > 900
