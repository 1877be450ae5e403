"""Feature networks give torch's numbers and have the FLOPs that torch counts."""

import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm import flops
from scaling_ldm.models.encoders import efficientnet_lite, inception
from scaling_ldm.models.weights import efficientnet_lite as lite_weights
from scaling_ldm.models.weights import inception as inception_weights
from scaling_ldm.models.weights import torch_file

torch = pytest.importorskip("torch")
flop_counter = pytest.importorskip("torch.utils.flop_counter")

pytestmark = pytest.mark.parity
PLACE = pathlib.Path(__file__).parents[1] / "benchmarks" / "torch_features.py"
SPEC = importlib.util.spec_from_file_location("torch_features", PLACE)
torch_features = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(torch_features)

LITE_SIZES = (32, 96, 57)


def pictures(size, batch=2):
    rng = np.random.default_rng(1)
    return rng.uniform(0, 255, size=(batch, size, size, 3)).astype("f")


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def assert_same(ours, theirs):
    """The error relative to the largest value, which is not small."""
    for got, want in zip(ours, theirs, strict=True):
        want = want.detach().numpy()
        assert got.shape == want.shape and np.abs(want).max() > 0.1
        assert np.abs(np.asarray(got) - want).max() <= 1e-4 * np.abs(want).max()
        assert want.std(axis=0).max() > 1e-3 * np.abs(want).max()  # rows differ


def lite(net, size):
    return net((channels_first(pictures(size)) - 127) / 128)


def stored(net, path):
    """Writes a state dict in the format that the name of the file says."""
    if path.suffix == ".safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(net.state_dict(), path)
    else:
        zipped = path.stem != "plain"
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("file", ["zip.pth", "plain.pth", "a.safetensors"])
def test_lite0_on_random_weights(tmp_path, file):
    net = torch_features.randomise(torch_features.EfficientNetLite0())
    params = lite_weights.load(stored(net, tmp_path / file))
    for size in LITE_SIZES if file == "zip.pth" else LITE_SIZES[:1]:
        ours = jax.jit(efficientnet_lite.apply)(params, pictures(size))
        assert_same(ours, lite(net, size))


@pytest.mark.skipif(lite_weights.find() is None, reason="the package is not installed")
def test_lite0_on_its_weights():
    path = lite_weights.find()
    net = torch_features.EfficientNetLite0()
    theirs = torch.load(path, weights_only=True)
    net.load_state_dict(theirs)
    for name, tensor in torch_file.load(path).items():
        np.testing.assert_array_equal(tensor, theirs[name].numpy())
    params = lite_weights.load(path)
    for size in (96, 224):
        ours = jax.jit(efficientnet_lite.apply)(params, pictures(size))
        assert_same(ours, lite(net.eval(), size))


def counted(net, size):
    """torch's parameters, channels with a norm, and FLOPs, on the meta device."""
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.empty((2, 3, size, size), device="meta"))
    params = sum(p.numel() for p in net.parameters())
    norms = sum(
        module.num_features
        for module in net.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    )
    return params, norms, counter.get_total_flops()


@pytest.mark.parametrize("size", [96, 224, 57])
def test_lite0_costs_the_same(size):
    with torch.device("meta"):
        net = torch_features.EfficientNetLite0()
    params, norms, wanted = counted(net, size)
    tree = efficientnet_lite.shapes()
    assert params - norms == sum(math.prod(s.shape) for s in jax.tree.leaves(tree))
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    assert flops.count(efficientnet_lite.apply, tree, x).total == wanted


@pytest.fixture(scope="module")
def inception_net():
    return torch_features.randomise(torch_features.Inception())


@pytest.mark.parametrize("protocol", inception.PROTOCOLS)
def test_inception_on_random_weights(tmp_path, inception_net, protocol):
    given = pictures(inception.SIZE)
    params = inception_weights.load(stored(inception_net, tmp_path / "zip.pth"))
    if protocol == "torch_fidelity":
        normal = (channels_first(given) - 128) / 128
    else:
        normal = 2 * (channels_first(given) / 255) - 1
    features, logits = inception_net(normal)
    apply = jax.jit(inception.apply, static_argnames=("protocol", "bias"))
    assert_same(apply(params, given, protocol, bias=True), (features, logits))
    without = apply(params, given, protocol)
    assert_same(without, (features, logits - inception_net.fc.bias))


@pytest.mark.parametrize("file", ["plain.pth", "a.safetensors"])
def test_inception_from_other_files(tmp_path, inception_net, file):
    want = inception_weights.load(stored(inception_net, tmp_path / "zip.pth"))
    got = inception_weights.load(stored(inception_net, tmp_path / file))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_inception_costs_the_same():
    with torch.device("meta"):
        net = torch_features.Inception()
    params, norms, wanted = counted(net, inception.SIZE)
    tree = inception.shapes()
    assert params - norms == sum(math.prod(s.shape) for s in jax.tree.leaves(tree))
    x = jax.ShapeDtypeStruct((2, inception.SIZE, inception.SIZE, 3), jnp.float32)
    assert flops.count(inception.apply, tree, x).total == wanted


SIDES = [(256, 256), (32, 32), (299, 300), (512, 400), (1, 7)]


@pytest.mark.parametrize("sides", SIDES)
def test_resize_as_torch(sides):
    x = np.random.default_rng(0).uniform(0, 255, (2, *sides, 3)).astype("f")
    want = torch.nn.functional.interpolate(
        channels_first(x), size=(299, 299), mode="bilinear", align_corners=False
    )
    got = np.asarray(jax.jit(inception.resize_torch)(x)).transpose(0, 3, 1, 2)
    assert np.abs(got - want.numpy()).max() <= 1e-4 * 255


@pytest.mark.parametrize("sides", SIDES)
def test_resize_as_tensorflow_1(sides):
    """Bilinear resizing in torch: gathers the four pixels around each place."""
    x = np.random.default_rng(0).uniform(0, 255, (2, *sides, 3)).astype("f")
    want = channels_first(x).double()
    for axis, side in zip((2, 3), sides, strict=True):
        place = torch.arange(299, dtype=torch.float64) * side / 299
        low = place.floor().long()
        high = (low + 1).clamp(max=side - 1)
        share = (place - low).reshape([299 if i == axis else 1 for i in range(4)])
        want = torch.lerp(
            want.index_select(axis, low), want.index_select(axis, high), share
        )
    got = np.asarray(jax.jit(inception.resize_tf1)(x)).transpose(0, 3, 1, 2)
    assert np.abs(got - want.numpy()).max() <= 1e-4 * 255
