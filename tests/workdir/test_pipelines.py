"""Folders of diffusers, opened as models that draw."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import scaling_ldm
from scaling_ldm import config
from scaling_ldm.diffusion import noise
from scaling_ldm.models import denoisers, encoders, pretrained
from scaling_ldm.models.denoisers import dit, unet
from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.weights import autoencoder_kl as autoencoder_weights
from scaling_ldm.models.weights import unet as unet_weights
from scaling_ldm.workdir import pipelines, scheduler_config

SD1 = {  # as Stable Diffusion 1 has it: no prediction_type
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
}
COSINE = SD1 | {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
BETAS = SD1 | {"trained_betas": [0.1, 0.2]}
ZERO = SD1 | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def written(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("given", "schedule", "prediction"),
    [
        (SD1, noise.scaled_linear(), "epsilon"),
        (SD1 | LINEAR, noise.linear(), "epsilon"),
        (COSINE, noise.cosine(), "x0"),
        (BETAS, noise.from_betas([0.1, 0.2]), "epsilon"),
        (ZERO, noise.zero_terminal_snr(noise.scaled_linear()), "v"),
        (FLOW, noise.rectified_flow(), "flow"),
    ],
)
def test_a_schedule_is_that_of_its_scheduler(tmp_path, given, schedule, prediction):
    folder = written(tmp_path, "scheduler_config.json", given)
    found = scheduler_config.read("load", folder)
    assert (found.schedule, found.prediction) == (schedule, prediction)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "which says schedule and t"),
        (SD1 | {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        (SD1 | {"beta_end": None}, r"beta_end \(0.00085, None\)"),
        (SD1 | {"prediction_type": "flow"}, "prediction_type 'flow'; known: epsilon"),
        ({"_class_name": "EDMEulerScheduler"}, "beta_schedule None"),
        (FLOW | {"num_train_timesteps": 500}, "num_train_timesteps is 500"),
    ],
)
def test_a_schedule_that_is_not_known_is_refused(tmp_path, given, said):
    if given is not None:
        written(tmp_path, "scheduler_config.json", given)
    with pytest.raises(config.ConfigError, match=said):
        scheduler_config.read("load", tmp_path)


def test_a_pipeline_that_is_not_known_is_refused_by_its_name(tmp_path):
    written(tmp_path, pipelines.INDEX, {"_class_name": "KolorsPipeline"})
    with pytest.raises(config.ConfigError, match="a KolorsPipeline; known: Stable"):
        scaling_ldm.load(tmp_path)
    written(tmp_path, pipelines.INDEX, {"_class_name": "StableDiffusionXLPipeline"})
    with pytest.raises(config.ConfigError, match="its U-Net adds .* 'text_time'"):
        scaling_ldm.load(tmp_path)


@pytest.mark.parametrize(
    ("autoencoder", "change", "said"),
    [
        ("icons_f4", {}, []),
        ("icons_f4", {"scaling_factor": 0.5}, ["scale of latents: 0.5 there, "]),
        ("icons_f4", {"shift_factor": 9.0}, ["shift of latents: 9.0 there, "]),
        ("none", {}, ["latents there, pictures here"]),
    ],
)
def test_what_is_beside_a_network_is_compared(tmp_path, autoencoder, change, said):
    default = config.Experiment()
    encode = dataclasses.replace(default.encode, autoencoder=autoencoder)
    experiment = dataclasses.replace(default, encode=encode)
    folder = tmp_path / "unet"
    folder.mkdir()
    assert scheduler_config.differences(folder, experiment) == []  # nothing is said
    flow = written(tmp_path / "scheduler", scheduler_config.FILE, FLOW)
    place = pretrained.directory("icons_f4", "") / "config.json"
    vae = json.loads(place.read_text()) | change
    written(tmp_path / "vae", "config.json", vae)
    assert default.objective.schedule == "rectified_flow"
    found = scheduler_config.differences(folder, experiment)
    assert len(found) == len(said) and all(map(str.startswith, found, said))
    shutil.rmtree(tmp_path / "vae")
    written(flow, scheduler_config.FILE, ZERO)
    for place in (folder, folder / "model.safetensors"):
        first, second = scheduler_config.differences(place, experiment)
        assert first == "objective.prediction: 'v' there, 'flow' here"
        assert second.startswith("objective.schedule: Discrete")


def test_a_table_is_walked_as_its_scheduler_says(tmp_path):
    def times(**said):
        written(tmp_path, scheduler_config.FILE, SD1 | said)
        found = scheduler_config.read("load", tmp_path)
        return [point.t for point in found.grid(4, 64).points[:-1]]

    assert times() == [750, 500, 250, 0]  # leading, which PNDM takes
    assert times(steps_offset=1) == [751, 501, 251, 1]
    assert times(timestep_spacing="trailing") == [999, 749, 499, 249]
    assert times(timestep_spacing="linspace") == [999, 666, 333, 0]
    assert times(_class_name="EulerDiscreteScheduler") == [999, 666, 333, 0]
    assert times(_class_name="UniPCMultistepScheduler") == [999, 749, 500, 250]
    karras = times(use_karras_sigmas=True)
    assert karras[0] == 999 and karras[-1] < 1
    with pytest.raises(config.ConfigError, match="timestep_spacing 'odd'; known: lea"):
        times(timestep_spacing="odd")


def test_estimates_are_limited_as_the_scheduler_says(tmp_path):
    x0 = np.linspace(-4, 4, 21, dtype=np.float32).reshape(1, -1)

    def limited(name, **said):
        given = SD1 | {"_class_name": name} | said
        written(tmp_path, scheduler_config.FILE, given)
        limit = scheduler_config.read("load", tmp_path).x0_transform
        return None if limit is None else np.asarray(limit(x0))

    def sampler(name, **said):
        given = SD1 | {"_class_name": name} | said
        written(tmp_path, scheduler_config.FILE, given)
        return scheduler_config.read("load", tmp_path).sampler

    # The only one whose epsilon is not that of the limited x0.
    limited_ddim = {"sampler": "ddim", "keeps_epsilon": True}
    assert sampler("DDIMScheduler") == limited_ddim
    assert sampler("DDIMScheduler", thresholding=True) == limited_ddim
    for name, clips in (("DDIMScheduler", False), ("DDPMScheduler", True)):
        assert sampler(name, clip_sample=clips) == {"sampler": "euler"}
    # As in diffusers: these two clip unless told not to, PNDM never does.
    assert limited("PNDMScheduler", clip_sample=True) is None
    assert limited("DDIMScheduler", clip_sample=False) is None
    assert_allclose(limited("DDPMScheduler"), np.clip(x0, -1, 1))
    clipped = limited("DDIMScheduler", clip_sample=True, clip_sample_range=2.0)
    assert_allclose(clipped, np.clip(x0, -2, 2))
    given = {"thresholding": True, "dynamic_thresholding_ratio": 0.5}
    assert_allclose(limited("DDIMScheduler", **given), np.clip(x0, -1, 1))
    median = np.median(np.abs(x0))
    for name in ("DDPMScheduler", "DPMSolverMultistepScheduler"):
        found = limited(name, sample_max_value=9.0, **given)
        assert_allclose(found, np.clip(x0 / median, -1, 1), rtol=1e-6)
    found = limited("DDPMScheduler", sample_max_value=1.5, **given)
    assert_allclose(found, np.clip(x0 / 1.5, -1, 1), rtol=1e-6)


def test_a_flow_is_walked_as_its_scheduler_says(tmp_path):
    def times(**said):
        written(tmp_path, scheduler_config.FILE, FLOW | said)
        found = scheduler_config.read("load", tmp_path)
        return [point.t for point in found.grid(2, 4096).points]

    assert_allclose(times(), [1, 0.001, 0], rtol=1e-6)
    assert_allclose(times(shift=3.0), [1, 0.0089284, 0], rtol=1e-3)
    dynamic = times(use_dynamic_shifting=True, max_shift=1.15)
    assert_allclose(dynamic, [1, np.exp(1.15) / (np.exp(1.15) + 1), 0], rtol=1e-6)
    with pytest.raises(config.ConfigError, match="shift_terminal is 0.1; known: None"):
        times(shift_terminal=0.1)


def test_a_network_is_given_its_own_t_and_its_variance_is_left_out():
    cfg = dit.DiTConfig(
        architecture="adaln_zero",
        width=8,
        depth=1,
        heads=1,
        classes=2,
        image_shape=(4, 4, 1),
        patch_size=4,
        out_channels=2,
    )
    network = pipelines._network(cfg, noise.linear(steps=250))
    # Published networks read t itself, 0 to 249; ours multiply by 1000.
    assert network.time_range == (0.0, 0.25)
    assert pipelines._network(cfg, noise.rectified_flow()).time_range == (0.0, 1.0)
    x, t, cond = jnp.ones((1, 4, 4, 1)), jnp.zeros(1), {"label": jnp.zeros(1, int)}
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.eval_shape(network.apply, params, x, t, cond).shape == x.shape


def drawn(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype("f"), shapes
    )


@pytest.mark.slow
def test_stable_diffusion_is_its_parts_together(tmp_path, write_clip, monkeypatch):
    tokens, folder = 24, tmp_path / "sd"
    how = pipelines.Pipeline(tokens, 50, 7.5, reads_padding=True)
    monkeypatch.setitem(pipelines.PIPELINES, "StableDiffusionPipeline", how)
    written(folder, pipelines.INDEX, {"_class_name": "StableDiffusionPipeline"})
    written(folder / "scheduler", "scheduler_config.json", SD1)
    write_clip(folder / "text_encoder", 0)
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.move(folder / "text_encoder" / name, folder / "tokenizer" / name)
    cfg = unet.UNetConfig(
        base=32,
        heads=4,
        image_shape=(4, 4, 4),
        text_tokens=tokens,
        text_width=64,
        multiples=(1, 2),
        blocks=1,
    )
    net = denoisers.u_net(cfg)
    params = drawn(jax.eval_shape(net.init, jax.random.key(0)), 1)
    written(folder / "unet", "config.json", unet_weights.to_config(cfg))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet_weights.save(params, path, cfg)
    coder = autoencoder_kl.AutoencoderConfig(
        channels=(32, 32),
        blocks=1,
        latent_channels=4,
        image_channels=3,
        groups=32,
        middle_attention=False,
        scale=0.5,
    )
    vae = encoders.autoencoder(coder)
    weights = drawn(jax.eval_shape(vae.init, jax.random.key(0)), 2)
    (folder / "vae").mkdir()
    autoencoder_weights.save(weights, folder / "vae", coder, 8)

    model = scaling_ldm.load(folder)
    assert (model.shape, model.conditioning) == ((4, 4, 4), ("text", "mask"))
    text = pretrained.text_encoder(
        str(folder / "text_encoder"), tokenizer=folder / "tokenizer"
    )
    ids, mask = text.tokenizer.encode(["red", ""], tokens)
    # Features of padding are read like those of text, as the pipeline does.
    features = text.network.apply(text.params, ids, None)
    cond = model.encode_text(["red", ""])
    assert cond["mask"].all() and not mask.all()
    assert_allclose(cond["text"], features, rtol=1e-4, atol=1e-5)
    assert_array_equal(model._captions.uncond["text"], cond["text"][1])
    x = np.random.default_rng(3).normal(size=(2, 4, 4, 4)).astype("f")
    table = noise.scaled_linear()
    alpha, sigma = float(table.alpha(500.0)), float(table.sigma(500.0))
    said = net.apply(params, x, jnp.full(2, 0.5), cond)
    want = (x - sigma * said) / alpha
    assert_allclose(model.denoise(x, 500.0, cond), want, rtol=1e-4, atol=1e-4)
    pictures = model.sample("red", n=2, steps=2, guidance=7.5)
    assert pictures.shape == (2, 8, 8, 3) and pictures.dtype == np.uint8
    whole = vae.decode(weights, vae.from_latent(x))
    levels = np.rint((np.clip(whole, -1, 1) + 1) * 127.5)
    assert np.abs(model.decode(x) - levels).max() <= 1
