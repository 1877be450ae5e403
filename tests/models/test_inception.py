"""The 2015 Inception: counts, pools, resizes, protocols, files."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import config, flops
from scaling_ldm.models.encoders import convolutions, inception
from scaling_ldm.models.weights import inception as weights
from scaling_ldm.models.weights import layout
from scaling_ldm.training import mesh

SMALLEST = 75  # sides that leave one pixel at the end


@pytest.fixture
def small(monkeypatch):
    """The network for the smallest pictures; its parameters and some pictures."""
    monkeypatch.setattr(inception, "SIZE", SMALLEST)
    rng = np.random.default_rng(0)

    def leaf(s):
        scale = (2 / math.prod(s.shape[:-1])) ** 0.5 if len(s.shape) > 1 else 0.3
        return rng.normal(scale=scale, size=s.shape).astype("f")

    params = jax.tree.map(leaf, inception.shapes())
    return params, rng.uniform(0, 255, (8, SMALLEST, SMALLEST, 3)).astype("f")


def state_dict(seed=0):
    """Random tensors with the published names, and with counters as in some files."""
    rng = np.random.default_rng(seed)
    tensors = {
        pair.name: np.exp(0.1 * rng.normal(size=pair.theirs)).astype("f")
        for pair in weights.pairs()
    }
    counters = [name for name in tensors if name.endswith("running_var")]
    for name in counters:
        name = name.replace("running_var", "num_batches_tracked")
        tensors[name] = np.asarray(1, np.int64)
    return tensors


def test_counts():
    read = {pair.name: math.prod(pair.theirs) for pair in weights.pairs()}
    learned = [n for name, n in read.items() if "running" not in name]
    # torchvision's, published as 27,161,264, less both of its classifiers.
    trunk = 27_161_264 - 3_326_696 - 1000 * 2049
    assert sum(learned) == trunk + 1008 * 2049
    tree = jax.eval_shape(inception.init, jax.random.key(0))
    assert tree == inception.shapes()
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    out = jax.eval_shape(inception.apply, tree, x)
    assert (out.features.shape, out.logits.shape) == ((1, 2048), (1, 1008))
    assert flops.count(inception.apply, tree, x).total == 11_426_464_960


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
@pytest.mark.parametrize("size", [(5, 5), (6, 3)])
def test_pools(stride, padding, size):
    x = np.random.default_rng(0).normal(size=(2, *size, 4)).astype("f") - 3

    def window(values, start, combine):
        sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        places = (1, 3, 3, 1), (1, stride, stride, 1)
        return lax.reduce_window(values, start, combine, *places, sides)

    assert_allclose(
        convolutions.max_pool(x, 3, stride, padding), window(x, -np.inf, lax.max)
    )
    inside = window(np.ones_like(x), 0.0, lax.add)
    assert inside.min() == (4 if padding else 9)
    want = window(x, 0.0, lax.add) / inside
    assert_allclose(convolutions.mean_pool(x, 3, stride, padding), want, rtol=1e-5)


def test_a_convolution_without_padding():
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype("f") for s in ((2, 5, 6, 3), (3, 2, 3, 4)))
    layer = {"kernel": kernel, "bias": np.arange(4, dtype="f")}
    got = convolutions.convolution(layer, x, 1, ((0, 0), (0, 0)))
    want = lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert got.shape == (2, 3, 5, 4)
    assert_allclose(got, want + layer["bias"][None, None, None], atol=1e-5)


def test_rows_do_not_mix_and_a_mesh_changes_nothing(small):
    params, x = small
    apply = jax.jit(inception.apply)
    want = apply(params, x)
    assert np.ptp(want.features, axis=0).max() > 0.1
    other = apply(params, np.where(np.arange(8)[:, None, None, None] == 2, x, 255 - x))
    assert_allclose(other.features[2], want.features[2], rtol=1e-4, atol=1e-5)
    assert np.abs(other.features[3] - want.features[3]).max() > 0.05
    device_mesh = mesh.build(config.MeshConfig(fsdp=4), {})
    with jax.set_mesh(device_mesh):
        placed = jax.device_put(params, mesh.shardings(device_mesh, params))
        assert "fsdp" in jax.typeof(placed["fc"]["kernel"]).sharding.spec
        got = apply(placed, mesh.put(device_mesh, x))
    assert jax.typeof(got.features).sharding.spec[0] == mesh.AXES
    for a, b in zip(got, want, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_resizes_on_a_mesh():
    x = np.random.default_rng(0).uniform(0, 255, (8, 6, 5, 3)).astype("f")
    device_mesh = mesh.build(config.MeshConfig(fsdp=4), {})
    for protocol in inception.PROTOCOLS.values():
        resize = jax.jit(functools.partial(protocol.resize, size=9))
        with jax.set_mesh(device_mesh):
            got = resize(mesh.put(device_mesh, x))
        assert_allclose(got, resize(x), rtol=1e-5)


def test_resizes_of_a_ramp():
    """Computed by hand: 4 pixels 0, 10, 20, 30 become 8, 2 or 4."""
    x = np.broadcast_to(np.arange(4)[:, None, None] * 10.0, (1, 4, 4, 1)).astype("f")

    def rows(resize, size):
        out = np.asarray(resize(x, size))
        assert out.shape == (1, size, size, 1) and out.dtype == np.float32
        assert_allclose(out[0, :, 0, 0], out[0, :, -1, 0], rtol=1e-6)
        return out[0, :, 0, 0]

    doubled = rows(inception.resize_tf1, 8)
    assert_allclose(doubled, [0, 5, 10, 15, 20, 25, 30, 30])
    doubled = rows(inception.resize_torch, 8)
    assert_allclose(doubled, [0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30])
    assert_allclose(rows(inception.resize_tf1, 2), [0, 20])
    assert_allclose(rows(inception.resize_torch, 2), [5, 25])
    for protocol in inception.PROTOCOLS.values():
        assert_array_equal(rows(protocol.resize, 4), x[0, :, 0, 0])


@pytest.mark.slow
def test_protocols_differ_and_logits_have_a_bias_or_none(small):
    params, x = small
    apply = jax.jit(inception.apply, static_argnames=("protocol", "bias"))
    fidelity, with_bias = apply(params, x), apply(params, x, bias=True)
    assert_allclose(
        with_bias.logits - fidelity.logits,
        np.broadcast_to(params["fc"]["bias"], (8, 1008)),
        atol=1e-4,
    )
    assert_array_equal(with_bias.features, fidelity.features)
    moved = apply(params, (x - 127.5) / 127.5 * 128 + 128, "torch_fidelity")
    other = apply(params, x, "pytorch_fid")
    assert_allclose(moved.features, other.features, rtol=1e-4, atol=1e-5)
    assert np.abs(other.features - fidelity.features).max() > 1e-3


def test_what_is_refused(small):
    params, x = small
    with pytest.raises(ValueError, match=r"pictures of \(75, 74, 3\)"):
        inception.apply(params, x[:, :, 1:])
    with pytest.raises(ValueError, match="'clean'; known: torch_fidelity, pytorch_fid"):
        inception.apply(params, x, "clean")


def test_weights_are_read_by_name(tmp_path):
    tensors = state_dict()
    layout.save(tensors, tmp_path / "a.safetensors")
    params = weights.load(tmp_path / "a.safetensors")
    want = jax.tree.map(lambda s: s.shape, inception.shapes())
    assert jax.tree.map(np.shape, params) == want
    name = "Mixed_6c.branch7x7_2"
    gain = tensors[f"{name}.bn.weight"] / np.sqrt(
        tensors[f"{name}.bn.running_var"] + 1e-3
    )
    kernel = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0)
    assert kernel.shape == (1, 7, 160, 160)
    got = params["Mixed_6c"]["branch7x7_2"]
    assert_allclose(got["kernel"], kernel * gain, rtol=1e-5)
    mean = tensors[f"{name}.bn.running_mean"]
    assert_allclose(got["bias"], tensors[f"{name}.bn.bias"] - mean * gain, rtol=1e-4)
    assert_array_equal(params["fc"]["kernel"], tensors["fc.weight"].T)


def test_another_inception_is_refused():
    """torchvision's Inception has 1000 classes and an auxiliary classifier."""
    tensors = state_dict()
    tensors["fc.weight"] = tensors["fc.weight"][:1000]
    tensors["fc.bias"] = tensors["fc.bias"][:1000]
    tensors["AuxLogits.fc.weight"] = np.zeros((1000, 768), "f")
    with pytest.raises(layout.WeightsError) as caught:
        weights.read(tensors)
    text = str(caught.value)
    assert "not the 2015 Inception's (3 differ)" in text
    assert "unknown: AuxLogits.fc.weight" in text
    assert "shape of fc.weight: (1000, 2048), wanted (1008, 2048)" in text
