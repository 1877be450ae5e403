"""EfficientNet-Lite0: counts, its own convolutions, folded norms, a packaged file."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
from jax import lax
from matplotlib import cbook
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import config, flops
from scaling_ldm.data import pictures as sources
from scaling_ldm.metrics import Moments, frechet
from scaling_ldm.models.encoders import convolutions, efficientnet_lite
from scaling_ldm.models.weights import batch_norm, files, layout
from scaling_ldm.models.weights import efficientnet_lite as weights
from scaling_ldm.training import mesh

APPLY = jax.jit(efficientnet_lite.apply)


def pictures(size=32, batch=8):
    rng = np.random.default_rng(1)
    return rng.uniform(0, 255, size=(batch, size, size, 3)).astype("f")


def drawn(shapes, seed=0):
    """Random leaves as large as flax makes them; no bias is zero."""
    rng = np.random.default_rng(seed)

    def leaf(s):
        scale = math.prod(s.shape[:-1]) ** -0.5 if len(s.shape) > 1 else 0.3
        return rng.normal(scale=scale, size=s.shape).astype("f")

    return jax.tree.map(leaf, shapes)


def state_dict(seed=0):
    """Random tensors with the names of the package, also its counters."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for pair in weights.pairs():
        value = rng.normal(size=pair.theirs).astype("f")
        if pair.name.endswith("running_var"):
            value = np.exp(0.3 * value)
            counter = pair.name.replace("running_var", "num_batches_tracked")
            tensors[counter] = np.asarray(1, np.int64)
        tensors[pair.name] = value
    return tensors


@pytest.fixture(scope="module")
def params():
    return drawn(efficientnet_lite.shapes())


def test_counts():
    read = {pair.name: math.prod(pair.theirs) for pair in weights.pairs()}
    learned = [n for name, n in read.items() if "running" not in name]
    assert sum(learned) == 4_652_008  # as published: 4.7M
    tree = jax.eval_shape(efficientnet_lite.init, jax.random.key(0))
    assert tree == efficientnet_lite.shapes()
    folded = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    norms = sum(n for name, n in read.items() if "running_mean" in name)
    assert folded == 4_652_008 - norms  # a bias instead of a scale and a bias
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert flops.count(efficientnet_lite.apply, tree, x).total == 770_375_104


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 5), (1, 4)])
def test_shifted_pictures_are_a_grouped_convolution(kernel, stride, size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype("f")
    taps = rng.normal(size=(kernel, kernel, 3)).astype("f")
    padding = convolutions.same(size, kernel, stride)
    wanted = lax.padtype_to_pads(size, (kernel, kernel), (stride, stride), "SAME")
    assert padding == list(wanted)
    layer = {"kernel": taps, "bias": np.asarray([1.0, 2.0, 3.0], "f")}

    @jax.jit
    def both(layer, x):
        want = convolutions._grouped(x, layer["kernel"], stride, padding)
        got = convolutions.depthwise(layer, x, stride, padding)
        return got, want + layer["bias"][None, None, None]

    got, want = both(layer, x)
    assert_allclose(got, want, atol=1e-5)


def test_a_dense_layer_is_a_convolution_of_one_pixel():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5)).astype("f")
    layer = drawn(
        {
            name: jax.ShapeDtypeStruct(s, "f")
            for name, s in (("kernel", (5, 6)), ("bias", (6,)))
        }
    )
    wide = {**layer, "kernel": layer["kernel"][None, None]}
    want = convolutions.convolution(wide, x, 1, ((0, 0), (0, 0)))
    assert_allclose(convolutions.dense(layer, x), want, atol=1e-5)


@pytest.mark.slow
def test_init_lets_a_signal_through():
    out = APPLY(efficientnet_lite.init(jax.random.key(0)), pictures())
    assert np.ptp(out.features, axis=0).max() > 0.05


def test_any_size_and_rows_do_not_mix(params):
    x = pictures()
    whole = APPLY(params, x)
    assert whole.features.shape == (8, 1280) and whole.logits.shape == (8, 1000)
    assert whole.features.dtype == whole.logits.dtype == jnp.float32
    part = APPLY(params, x[2:3])
    assert_allclose(part.features[0], whole.features[2], rtol=1e-4, atol=1e-5)
    assert_allclose(part.logits[0], whole.logits[2], rtol=1e-4, atol=1e-5)
    assert APPLY(params, pictures(33, 1)).features.shape == (1, 1280)


@pytest.mark.slow  # Inception, of the same convolutions, is on one by day
def test_a_mesh_changes_nothing(params):
    x = pictures()
    want = APPLY(params, x)
    device_mesh = mesh.build(config.MeshConfig(fsdp=4), {})
    with jax.set_mesh(device_mesh):
        placed = jax.device_put(params, mesh.shardings(device_mesh, params))
        assert "fsdp" in jax.typeof(placed["head"]["kernel"]).sharding.spec
        got = APPLY(placed, mesh.put(device_mesh, x))
    assert jax.typeof(got.features).sharding.spec[0] == mesh.AXES
    for a, b in zip(got, want, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_norms_are_folded():
    rng = np.random.default_rng(0)
    names = ("scale", "bias", "mean", "variance")
    norm = {name: rng.uniform(0.5, 2.0, size=6).astype("f") for name in names}
    kernel = rng.normal(size=(3, 3, 4, 6)).astype("f")
    x = rng.normal(size=(2, 5, 5, 4)).astype("f")
    padding = ((1, 1), (1, 1))
    plain = {"kernel": kernel, "bias": np.zeros(6, "f")}
    y = np.asarray(convolutions.convolution(plain, x, 1, padding))
    want = (y - norm["mean"]) / np.sqrt(norm["variance"] + 0.01)
    want = want * norm["scale"] + norm["bias"]
    folded = batch_norm.fold(
        {"a": {"kernel": kernel, "norm": norm}, "b": {"c": x}}, 0.01
    )
    got = convolutions.convolution(folded["a"], x, 1, padding)
    assert_allclose(got, want, atol=1e-5)
    assert folded["b"]["c"] is x
    norm["variance"][3] = -1
    with pytest.raises(layout.WeightsError, match="variance is below zero"):
        batch_norm.fold({"kernel": kernel, "norm": norm}, 0.01)


def test_weights_are_read_by_name(tmp_path):
    tensors = state_dict()
    params = weights.read(tensors)
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        lambda s: s.shape, efficientnet_lite.shapes()
    )
    assert_array_equal(params["logits"]["kernel"], tensors["_fc.weight"].T)
    gain = tensors["_blocks.3._bn1.weight"] / np.sqrt(
        tensors["_blocks.3._bn1.running_var"] + 1e-3
    )
    kernel = tensors["_blocks.3._depthwise_conv.weight"][:, 0].transpose(1, 2, 0)
    got = params["blocks"]["3"]["depthwise"]["kernel"]
    assert_allclose(got, kernel * gain, rtol=1e-5)
    layout.save(tensors, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        jax.tree.map(assert_array_equal, weights.load(path), params)


def test_every_difference_is_listed():
    tensors = state_dict()
    tensors["spare"] = tensors.pop("_conv_head.weight")
    tensors["_bn1.bias"] = tensors["_bn1.bias"][:7]
    with pytest.raises(layout.WeightsError) as caught:
        weights.read(tensors)
    text = str(caught.value)
    assert "not EfficientNet-Lite0's (3 differ)" in text
    assert "missing: _conv_head.weight" in text and "unknown: spare" in text
    assert "shape of _bn1.bias: (7,), wanted (1280,)" in text


def test_files_that_are_none(tmp_path):
    with pytest.raises(layout.WeightsError, match="no such file"):
        weights.load(tmp_path / "none.pth")
    (tmp_path / "evil.pth").write_bytes(b"\x80\x02cos\nsystem\nX\x01\0\0\0a\x85R.")
    with pytest.raises(layout.WeightsError, match="names os.system"):
        weights.load(tmp_path / "evil.pth")


def test_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    place = tmp_path / weights.PACKAGE
    (place / "models").mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert weights.find() is None
    (place / weights.FILE).write_bytes(b"weights")
    assert weights.find() == place / weights.FILE
    monkeypatch.setattr("sys.path", [])
    assert weights.find() is None


installed = pytest.mark.skipif(
    weights.find() is None, reason="no package with EfficientNet-Lite0 is installed"
)


def real_photo():
    """A photograph that matplotlib ships."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return PIL.Image.open(file).convert("RGB")


@installed
def test_the_packaged_weights():
    assert files.sha256(weights.find()) == weights.SHA256
    params = weights.load(weights.find())
    photo = real_photo()
    side = min(photo.size)
    photo = photo.crop((0, 0, side, side)).resize((224, 224))
    out = APPLY(params, np.asarray(photo, np.float32)[None])
    assert np.argmax(out.logits[0]) == 652  # ImageNet's "military uniform"
    assert_allclose(np.mean(out.features), 0.22319, rtol=1e-2)


def worse(images, kind, level):
    """Real pictures with noise of a deviation, or a blur of a radius, in pixels."""
    if kind == "blur":
        by = PIL.ImageFilter.GaussianBlur(level)
        return np.stack([np.asarray(PIL.Image.fromarray(x).filter(by)) for x in images])
    noise = np.random.default_rng(2).normal(scale=level, size=images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def real():
    """Two sets of real pictures of each kind, uint8 [128, 64, 64, 3]."""
    sets = {}
    icons = sources.open_pictures("icons", count=256, split="validation", seed=0)
    sets["icons"] = np.stack(
        [sources.fit(icons.read(i).image, 64, 64) for i in range(256)]
    )
    photo = real_photo()
    whole, rng = np.asarray(photo), np.random.default_rng(1)
    corners = zip(
        *(rng.integers(n - 64, size=256) for n in whole.shape[:2]), strict=True
    )
    sets["photo"] = np.stack([whole[y : y + 64, x : x + 64] for y, x in corners])
    return {name: (images[::2], images[1::2]) for name, images in sets.items()}


@installed
@pytest.mark.slow
@pytest.mark.parametrize("of", ["icons", "photo"])
def test_the_distance_grows_with_noise_and_with_blur(real, of):
    """Distances grow with distortion (Heusel et al. 2017, figure 3).

    Noise of a deviation of 128 of 255 hides an icon, and comes nearer again.
    """
    params = weights.load(weights.find())

    def features(images):
        parts = images.astype(np.float32).reshape(4, 32, 64, 64, 3)
        return np.concatenate([APPLY(params, part).features for part in parts])

    held, others = real[of]
    reference = frechet.Reference.of(Moments.of([features(held)]))
    for kind, levels in (
        ("noise", (4, 8, 16, 32, 64)),
        ("blur", (0.7, 1.2, 2, 4, 8)),
    ):
        found = [
            frechet.distance_from_features(features(images), reference)
            for images in (others, *(worse(others, kind, n) for n in levels))
        ]
        print(of, kind, [round(x, 1) for x in found])
        assert all(np.diff(found) > 0) and found[-1] > 1.5 * found[0], found
