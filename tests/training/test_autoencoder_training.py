"""An autoencoder: planned, trained and saved like a denoiser; its exported weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import config, records, study
from scaling_ldm.data import sources
from scaling_ldm.diffusion.losses import reconstruct
from scaling_ldm.models import encoders, from_config
from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.weights import autoencoder_kl as autoencoder_weights
from scaling_ldm.models.weights import files, layout, native
from scaling_ldm.stages import export
from scaling_ldm.training import mesh
from scaling_ldm.workdir import runs


@pytest.fixture(scope="module")
def recipe(tiny):
    c = tiny.copy_and_resolve_references()
    c.name = "small_autoencoder"
    c.data.shape = (8, 8, 3)
    c.model = config.default().model  # which has no patches, heads or texts
    c.model.architecture, c.model.compute_dtype = "autoencoder_kl", "float32"
    c.model.groups, c.model.latent_channels = 4, 2
    c.plan.sizes, c.plan.steps, c.plan.budgets_flops = ((8, 2),), 12, ()
    c.mesh.cpu_devices = 4
    c.train.optimize_code = False
    return c


@pytest.fixture(scope="module")
def trained(recipe, one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("autoencoder")
    stages = ("plan", "train", "generate", "export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "PICTURES", 512)
        code = study.run(
            recipe, workdir=str(workdir), stages=stages, only=None, cluster=(None,) * 3
        )
    assert code == 0
    return config.resolve(recipe), workdir


def averaged(experiment, workdir):
    (spec,) = records.read_jsonl(workdir / "runs.jsonl")
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        params = runs.trained_model(experiment, workdir, spec).load(device_mesh)
    return spec, jax.device_get(params)


def test_the_divergence_is_that_of_gaussians():
    mean, log_variance = np.array([0.5, -1.0]), np.array([0.3, -0.7])
    moments = jnp.asarray(np.concatenate([mean, log_variance]), jnp.float32)
    got = reconstruct.kl_divergence(jnp.broadcast_to(moments, (3, 2, 2, 4)))
    draws = mean + np.exp(log_variance / 2) * np.random.default_rng(0).normal(
        size=(400_000, 2)
    )
    log_ratio = (draws**2 - ((draws - mean) / np.exp(log_variance / 2)) ** 2) / 2
    want = 4 * (log_ratio - log_variance / 2).mean(0).sum()
    assert_allclose(got, want, rtol=1e-2)
    assert_allclose(reconstruct.kl_divergence(jnp.zeros((2, 4, 4, 6))), 0)


@pytest.mark.parametrize("distance", ["l1", pytest.param("l2", marks=pytest.mark.slow)])
def test_the_loss_weighs_distance_and_divergence_per_value(recipe, distance):
    network = from_config.autoencoder(config.resolve(recipe), 8, 2)
    params = network.init(jax.random.key(0))
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype("f")
    key = jax.random.key(1)

    def loss(kl_weight):
        return reconstruct.loss(
            network,
            params,
            {"x": x},
            {},
            key,
            reconstruction=distance,
            kl_weight=kl_weight,
        )

    moments = network.encode(params, x)
    noise = jax.random.normal(key, (2, 4, 4, 2))
    difference = network.decode(params, autoencoder_kl.sample(moments, noise)) - x
    power = {"l1": 1, "l2": 2}[distance]
    assert_allclose(loss(0.0), np.mean(np.abs(difference) ** power), rtol=1e-5)
    extra = np.mean(reconstruct.kl_divergence(moments)) / (8 * 8 * 3)
    assert_allclose(loss(2.0) - loss(0.0), 2 * extra, rtol=1e-3)


@pytest.mark.slow
def test_training_lowers_the_held_out_error(trained):
    experiment, workdir = trained
    spec, params = averaged(experiment, workdir)
    network = from_config.autoencoder(experiment, spec.width, spec.depth)
    _, held_out = sources(experiment, workdir)
    x = held_out.rows(np.arange(experiment.validation.samples))["x"]
    losses = jax.jit(functools.partial(reconstruct.per_example_loss, network))
    after = float(np.mean(losses(params, x)))
    first = jax.jit(network.init)(jax.random.key(0))
    before = float(np.mean(losses(first, x)))
    assert after < 0.8 * before
    record = runs.read_record_of(workdir, spec)
    assert_allclose(runs.last_loss(workdir, spec), after, rtol=1e-4)
    assert record.tokens == record.images * 16  # one per latent pixel
    assert spec.steps == 12
    assert spec.budget_flops == spec.planned_flops == 12 * spec.flops_per_step


@pytest.mark.slow
def test_the_export_is_the_network_with_latents_of_unit_variance(trained):
    experiment, workdir = trained
    spec, params = averaged(experiment, workdir)
    cfg, read = autoencoder_weights.load(workdir / "export")
    jax.tree.map(assert_array_equal, read, params)
    network = encoders.autoencoder(cfg)
    train, _ = sources(experiment, workdir)
    x = train.rows(np.arange(256))["x"]
    moments = jax.jit(network.encode)(read, x)
    noise = jax.random.normal(jax.random.key(0), (256, 4, 4, 2))
    latents = network.to_latent(autoencoder_kl.sample(moments, noise))
    assert_allclose(np.mean(latents), 0, atol=0.1)
    assert_allclose(np.std(latents), 1, rtol=0.1)
    card = json.loads((workdir / "export" / "training.json").read_text())
    error = float(np.float64(10) ** (-card["held_out_psnr_db"] / 10) * 4)
    assert_allclose(error, card["held_out_mean_squared_error"], rtol=2e-3)
    assert card["pictures"] == 12 * 8
    assert card["weights_sha256"] == files.checksum(workdir / "export")
    assert (card["run_id"], card["step"]) == (spec.run_id, 12)


def test_another_networks_export_has_its_own_names(tiny, tmp_path):
    experiment = config.resolve(tiny)
    denoiser = from_config.denoiser(experiment, 16, 2, unroll=False)
    shapes = jax.eval_shape(lambda: denoiser.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
    native.save(params, tmp_path, {"width": 16, "depth": 2})
    jax.tree.map(assert_array_equal, native.load(tmp_path, shapes), params)
    deeper = from_config.denoiser(experiment, 16, 3, unroll=False)
    other = jax.eval_shape(lambda: deeper.init(jax.random.key(0)))
    with pytest.raises(layout.WeightsError, match="shape of blocks/attention/"):
        native.load(tmp_path, other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plan": {"sizes": ((10, 2),)}}, "not a multiple of config.model.groups = 4"),
        ({"plan": {"sizes": ((8, 5),)}}, "there are 1 to 4 resolutions"),
        ({"data": {"shape": (10, 10, 3)}, "plan": {"sizes": ((8, 3),)}}, "be halved 2"),
        (
            {"encode": {"autoencoder": "icons_f4", "pictures": 9}},
            "learns pictures: config.encode.autoencoder = 'icons_f4' must be 'none'",
        ),
        ({"objective": {"reconstruction": "l3"}}, "known: l1, l2"),
        ({"data": {"coarse": 2}}, "'autoencoder_kl'; it is for: unet"),
    ],
)
def test_impossible_autoencoders_are_refused(recipe, change, said):
    c = recipe.copy_and_resolve_references()
    for section, values in change.items():
        c[section].update(values)
    with pytest.raises(config.ConfigError, match=said):
        config.resolve(c)


def test_a_fixed_number_of_steps_plans_every_size(tiny):
    from scaling_ldm.stages import plan

    c = tiny.copy_and_resolve_references()
    c.plan.steps, c.plan.budgets_flops = 20, ()
    c.plan.sizes = ((16, 1), (16, 2), (24, 1))
    rows = plan.plan(config.resolve(c))
    assert [row.steps for row in rows] == [20] * 3
    assert len({row.budget_flops for row in rows}) == 3
