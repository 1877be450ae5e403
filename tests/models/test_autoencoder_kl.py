"""Autoencoders: published counts, parts of the network, files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import config, flops
from scaling_ldm.models import encoders, layers
from scaling_ldm.models.encoders import autoencoder_kl, presets
from scaling_ldm.models.weights import autoencoder_kl as weights
from scaling_ldm.models.weights import layout
from scaling_ldm.training import mesh

SMALL = autoencoder_kl.AutoencoderConfig(
    channels=(8, 16), blocks=1, latent_channels=3, groups=4, scale=0.5, shift=0.25
)
BATCH = 8


SHAPES = functools.cache(
    lambda: jax.eval_shape(lambda: autoencoder_kl.init(SMALL, jax.random.key(0)))
)
ENCODE = jax.jit(functools.partial(autoencoder_kl.encode, SMALL))
DECODE = jax.jit(functools.partial(autoencoder_kl.decode, SMALL))


def drawn():
    """Random parameters, also of norms and biases; compiles no initialiser."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(scale=0.2, size=s.shape).astype("f"), SHAPES()
    )


def pictures():
    rng = np.random.default_rng(1)
    return rng.uniform(-1, 1, size=(BATCH, 8, 6, 3)).astype("f")


def loss(spec):
    """Encodes, samples and decodes."""
    net = encoders.autoencoder(spec)

    def value(params, x):
        moments = net.encode(params, x)
        noise = jnp.cos(7.0 * moments[..., : spec.latent_channels])
        out = net.decode(params, autoencoder_kl.sample(moments, noise))
        return jnp.mean(jnp.sin(out))

    return jax.jit(jax.value_and_grad(value))


@pytest.fixture(scope="module")
def reference():
    params = drawn()
    return params, loss(SMALL)(params, pictures())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "sd" else pytest.mark.slow)
        for name in presets.AUTOENCODERS
    ],
)
def test_counts_of_the_family(name):
    preset = presets.AUTOENCODERS[name]
    net = encoders.autoencoder(preset.config)
    assert net.factor == 8
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == preset.params
    x = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    z = jax.ShapeDtypeStruct((1, 32, 32, net.latent_channels), jnp.float32)
    counted = [flops.count(net.encode, params, x), flops.count(net.decode, params, z)]
    wanted = [preset.encode_gflops, preset.decode_gflops]
    assert_allclose([c.total / 1e9 for c in counted], wanted, atol=0.005)


def test_every_parameter_gets_a_gradient(reference):
    for path, leaf in jax.tree_util.tree_leaves_with_path(reference[1][1]):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        if "['k']['bias']" not in name:  # the softmax ignores what all scores share
            assert np.abs(leaf).max() > 1e-7, name


@pytest.mark.slow
def test_a_mesh_changes_nothing(reference, monkeypatch):
    monkeypatch.setattr(mesh, "MIN_SHARDED_SIZE", 1)
    params, (value, gradient) = reference
    device_mesh = mesh.build(config.MeshConfig(fsdp=4), {})
    with jax.set_mesh(device_mesh):
        placed = jax.device_put(params, mesh.shardings(device_mesh, params))
        got, slopes = loss(SMALL)(placed, mesh.put(device_mesh, pictures()))
        kernel = slopes["encoder"]["middle_residual0"]["conv1"]["kernel"]
    assert "fsdp" in jax.typeof(kernel).sharding.spec
    assert_allclose(got, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-6), slopes, gradient
    )


def test_pictures_of_any_size():
    params, x = drawn(), pictures()[:, :2, :4]
    moments = ENCODE(params, x)
    assert moments.shape == (BATCH, 1, 2, 6)
    out = DECODE(params, moments[..., :3])
    assert out.shape == x.shape and out.dtype == jnp.float32
    with pytest.raises(ValueError, match="7 x 8 pixels: both must be multiples of 2"):
        ENCODE(params, jnp.zeros((1, 7, 8, 3)))


def test_rows_do_not_mix():
    params, x = drawn(), pictures()
    moments = ENCODE(params, x)
    other = np.where(np.arange(BATCH)[:, None, None, None] == 2, x, -x)
    again = ENCODE(params, other)
    assert_allclose(again[2], moments[2], rtol=1e-5, atol=1e-6)
    assert np.abs(again[3] - moments[3]).max() > 0.1


def test_log_variances_are_clipped_and_sampled():
    params = drawn()
    params["encoder"]["quant"]["bias"][3:] = (-1e3, 1e3, 0.0)
    moments = np.asarray(ENCODE(params, pictures()))
    assert np.all(moments[..., 3] == -30) and np.all(moments[..., 4] == 20)
    noise = np.full((BATCH, 4, 3, 3), 2.0, "f")
    got = autoencoder_kl.sample(moments, noise)
    assert_allclose(got, moments[..., :3] + 2 * np.exp(moments[..., 3:] / 2), rtol=1e-6)


def test_latents_are_shifted_then_scaled():
    net, z = encoders.autoencoder(SMALL), pictures()
    assert_allclose(net.to_latent(z), (z - 0.25) * 0.5, rtol=1e-6)
    assert_allclose(net.from_latent(net.to_latent(z)), z, atol=1e-6)


def test_bfloat16_computes_close_to_float32():
    params, x = drawn(), pictures()
    want = np.asarray(ENCODE(params, x))
    half = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    encode = jax.jit(functools.partial(autoencoder_kl.encode, half))
    for given in (x, jnp.asarray(x, jnp.bfloat16)):
        got = encode(params, given)
        assert got.dtype == jnp.float32
        error = np.abs(got - want).max() / np.abs(want).max()
        assert 1e-5 < error < 5e-2


def test_a_group_norm_is_exact_far_from_zero():
    x = 30 + np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype("f")
    norm = layers.GroupNorm(4, 1e-6, jnp.float32)
    scale, bias = np.arange(1, 9, dtype="f"), np.arange(8, dtype="f")
    got = norm.apply({"params": {"scale": scale, "bias": bias}}, x)
    groups = x.astype(np.float64).reshape(2, 64, 4, 2)
    mean = groups.mean((1, 3), keepdims=True)
    deviation = np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    want = ((groups - mean) / deviation).reshape(x.shape) * scale + bias
    assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_first_values_have_unit_gain_and_depend_on_key_and_path():
    leaf = jax.ShapeDtypeStruct
    conv = {"kernel": leaf((3, 3, 64, 64), "f"), "bias": leaf((64,), "f")}
    shapes = {"a": {"conv": conv, "norm": {"scale": leaf((64,), "f")}}, "b": conv}
    params = layers.initialise(shapes, jax.random.key(0))
    kernel = np.asarray(params["a"]["conv"]["kernel"])
    assert_allclose(kernel.std(), (9 * 64) ** -0.5, rtol=0.02)
    assert np.abs(kernel).max() < 2.3 * (9 * 64) ** -0.5  # truncated
    assert_allclose(kernel.mean(), 0, atol=1e-3)
    assert_array_equal(params["a"]["norm"]["scale"], 1)
    assert_array_equal(params["b"]["bias"], 0)
    assert abs(np.corrcoef(kernel.ravel(), params["b"]["kernel"].ravel())[0, 1]) < 0.02
    # Other leaves and their order do not matter; the key does.
    alone = {"a": {"conv": {"kernel": conv["kernel"]}}}
    again = layers.initialise(alone, jax.random.key(0))["a"]["conv"]["kernel"]
    assert_array_equal(again, kernel)
    other = layers.initialise(alone, jax.random.key(1))["a"]["conv"]["kernel"]
    assert abs(np.corrcoef(kernel.ravel(), other.ravel())[0, 1]) < 0.02
    # Heads share one input: [in, heads, head] sums over the first axis alone.
    wide = layers.initialise(alone, jax.random.key(0), lambda path, shape: shape[0])
    wide = wide["a"]["conv"]["kernel"]
    assert_allclose(wide.std(), 3**-0.5, rtol=0.02)
    with pytest.raises(ValueError, match="a/table: no initial value"):
        layers.initialise({"a": {"table": jnp.zeros(2)}}, jax.random.key(0))


def test_options_decide_which_parameters_there_are():
    spec = dataclasses.replace(SMALL, channels=(4,), blocks=1)
    fewer = dataclasses.replace(spec, middle_attention=False, quant_conv=False)
    params = jax.jit(encoders.autoencoder(fewer).init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    more = jax.eval_shape(encoders.autoencoder(spec).init, jax.random.key(0))
    for side in ("encoder", "decoder"):
        extra = more[side].keys() - params[side].keys()
        assert extra == {"middle_attention", "quant"}
    out = jax.jit(encoders.autoencoder(fewer).encode)(params, pictures()[:1])
    assert 0.1 < np.abs(out).max() < 10  # initial values keep activations of order one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (8, 18)}, "divisible by 4 groups"),
        ({"channels": ()}, "one or more widths"),
        ({"scale": 0.0}, "scaled by 0"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        encoders.autoencoder(dataclasses.replace(SMALL, **change))


@pytest.mark.parametrize("name", presets.AUTOENCODERS)
def test_configurations_go_round(name):
    cfg = presets.AUTOENCODERS[name].config
    assert weights.from_config(weights.to_config(cfg)) == cfg


def test_a_directory_goes_round_bit_for_bit(tmp_path):
    params = drawn()
    weights.save(params, tmp_path / "net", SMALL)
    cfg, back = weights.load(tmp_path / "net")
    assert cfg == SMALL
    jax.tree.map(assert_array_equal, back, params)


def test_another_network_is_refused(tmp_path):
    given = weights.to_config(SMALL) | {
        "act_fn": "relu",
        "use_post_quant_conv": False,
        "latents_mean": [0.0] * 3,
        "spare": 1,
    }
    with pytest.raises(layout.WeightsError) as caught:
        weights.from_config(given)
    for reason in (
        "act_fn is 'relu', wanted 'silu'",
        "use_post_quant_conv is False, wanted True",
        "latents_mean is [0.0, 0.0, 0.0], wanted None",
        "spare: not known",
    ):
        assert reason in str(caught.value)
    with pytest.raises(layout.WeightsError, match="not a folder with a config.json"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(weights.to_config(SMALL)))
    with pytest.raises(layout.WeightsError, match="holds no weights to read"):
        weights.load(tmp_path)


def test_old_names_and_half_precision_are_read():
    params = drawn()
    today = layout.write(weights.pairs(SMALL), params)
    old, moved = {}, 0
    for name, tensor in today.items():
        for was, now in weights._OLD.items():
            if f"attentions.0.{now}." in name:
                name, moved = name.replace(f".{now}.", f".{was}."), moved + 1
                if tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
        old[name] = tensor.astype(np.float16)
    assert moved == 16
    back = weights.read(old, SMALL)
    jax.tree.map(
        lambda a, b: assert_array_equal(a, b.astype(np.float16).astype("f")),
        back,
        params,
    )
    both = today | {
        "encoder.mid_block.attentions.0.query.bias": np.zeros(16, "f"),
        "spare": np.zeros(1),
    }
    del both["decoder.conv_in.bias"]
    with pytest.raises(layout.WeightsError) as caught:
        weights.read(both, SMALL)
    assert "(3 differ)" in str(caught.value)
    assert "unknown: encoder.mid_block.attentions.0.query.bias" in str(caught.value)
