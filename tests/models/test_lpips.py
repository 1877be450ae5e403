"""LPIPS without torch: what a distance is, sizes, files, devices."""

import dataclasses
import doctest
import functools
import importlib
import math
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import flops
from scaling_ldm.models.encoders import lpips
from scaling_ldm.models.weights import layout
from scaling_ldm.models.weights import lpips as weights
from scaling_ldm.training import mesh

BATCH, SIDE = 8, 16
TINY = lpips.LpipsConfig(
    name="alex",
    layers=(
        lpips.Layer(index=0, outputs=8, kernel=5, stride=2, padding=2, compared=True),
        lpips.Layer(index=3, outputs=12, pool=3),
        lpips.Layer(index=5, outputs=8, compared=True),
    ),
)


def drawn(config):
    rng = np.random.default_rng(0)

    def leaf(s):
        value = rng.normal(scale=0.3, size=s.shape).astype("f")
        return np.abs(value) if s.shape[-1] == 1 else value

    return jax.tree.map(leaf, lpips.shapes(config))


def pictures(seed):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 255, (BATCH, SIDE, SIDE, 3)).astype("f")


DISTANCE = jax.jit(functools.partial(lpips.distance, TINY))
PARAMS = drawn(TINY)


def test_a_distance_is_symmetric_and_zero_for_equal_pictures():
    x, y = pictures(1), pictures(2)
    there, back = DISTANCE(PARAMS, x, y), DISTANCE(PARAMS, y, x)
    assert there.shape == (BATCH,) and there.dtype == jnp.float32
    assert (there > 1e-3).all() and np.ptp(there) > 1e-4
    assert_array_equal(there, back)
    assert_array_equal(DISTANCE(PARAMS, x, x), np.zeros(BATCH))


def test_a_distance_grows_with_noise():
    x, noise = pictures(1), pictures(2) - 127.5
    found = [DISTANCE(PARAMS, x, x + a * noise).mean() for a in (0.1, 0.3, 0.9)]
    assert 0 < found[0] < found[1] < found[2]


def test_the_backbone_reads_pictures_of_its_own_scale():
    """Grey at (shift + 1) / 2 of 255 becomes zero, so only biases remain."""
    first = dataclasses.replace(TINY, layers=TINY.layers[:1])
    params = drawn(first)
    grey = np.broadcast_to((lpips.SHIFT + 1) * 127.5, (1, SIDE, SIDE, 3))
    found = lpips._compared(first, params, jnp.asarray(grey))[0]
    bias = np.maximum(params["backbone"]["0"]["bias"], 0)
    wanted = np.broadcast_to(bias / np.linalg.norm(bias), found.shape)
    assert_allclose(found, wanted, atol=1e-5)


def test_gradients_are_finite_where_nothing_answers():
    """A place at which every channel is zero has no direction."""
    first = dataclasses.replace(TINY, layers=TINY.layers[:1])
    params = drawn(first)
    params["backbone"]["0"]["bias"][:] = -0.1
    x = jnp.asarray(pictures(1))
    grey = jnp.asarray(np.broadcast_to((lpips.SHIFT + 1) * 127.5, x.shape))
    assert not lpips._compared(first, params, grey)[0].any()
    # Operation by operation: compiled as a whole, 0 / 0 may be simplified away.
    slope = jax.grad(lambda *a: lpips.distance(first, params, *a).sum(), argnums=(0, 1))
    dead, alive = slope(grey, x)
    assert np.isfinite(dead).all() and np.isfinite(alive).all()
    assert np.abs(alive).max() > 0


def test_a_mesh_changes_nothing():
    x, y = pictures(1), pictures(2)
    wanted = DISTANCE(PARAMS, x, y)
    axes = (jax.sharding.AxisType.Explicit,) * 2
    devices = jax.make_mesh((2, 2), ("replica", "fsdp"), axis_types=axes)
    with jax.set_mesh(devices):
        placed = jax.device_put(PARAMS, mesh.shardings(devices, PARAMS))
        rows = jax.NamedSharding(devices, jax.P(("replica", "fsdp")))
        run = jax.jit(functools.partial(lpips.distance, TINY))
        got = run(placed, *jax.device_put((x, y), rows))
        assert jax.typeof(got).sharding.spec[0] == ("replica", "fsdp")
        got = np.asarray(got)
    assert_allclose(got, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "backbone", "heads", "smallest", "gigaflops"),
    [  # torchvision's parameters of `features`; FLOPs of two pictures of 224
        ("vgg", 14_714_688, 1472, 16, 2 * 30.693),
        ("alex", 2_469_696, 1152, 31, 2 * 1.311),
    ],
)
def test_counts(name, backbone, heads, smallest, gigaflops):
    config = lpips.BACKBONES[name]
    assert config.smallest == smallest
    tree = jax.eval_shape(lambda: lpips.init(config, jax.random.key(0)))
    assert tree == lpips.shapes(config)

    def total(part):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree[part]))

    assert (total("backbone"), total("heads")) == (backbone, heads)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    distance = functools.partial(lpips.distance, config)
    assert_allclose(flops.count(distance, tree, x, x).total / 1e9, gigaflops, rtol=1e-3)
    x = jax.ShapeDtypeStruct((1, smallest, smallest, 3), jnp.float32)
    assert jax.eval_shape(distance, tree, x, x).shape == (1,)


def test_random_heads_are_not_below_zero():
    first = dataclasses.replace(TINY, layers=TINY.layers[:1])
    head = lpips.init(first, jax.random.key(0))["heads"]["0"]["kernel"]
    assert head.min() >= 0 and head.std() > 0.01


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((1, 40, 40, 3), (1, 40, 41, 3), r"\(1, 40, 40, 3\) and of \(1, 40, 41, 3\)"),
        ((1, 30, 40, 3), (1, 30, 40, 3), "alex compares .* at least 31 x 31"),
        ((1, 40, 40, 1), (1, 40, 40, 1), "of 3 channels"),
    ],
)
def test_pictures_that_cannot_be_compared_are_refused(x, y, message):
    config = lpips.ALEXNET
    with pytest.raises(ValueError, match=message):
        lpips.distance(config, lpips.shapes(config), np.zeros(x, "f"), np.zeros(y, "f"))


def test_weights_go_round_bit_for_bit(tmp_path):
    path = tmp_path / "lpips.safetensors"
    weights.save(PARAMS, path, TINY)
    jax.tree.map(assert_array_equal, weights.load(path, path, TINY), PARAMS)


def test_a_classifier_is_left_out_and_differences_are_listed(tmp_path):
    tensors = layout.write(weights.pairs(TINY), PARAMS)
    heads = {name: value for name, value in tensors.items() if name.startswith("lin")}
    assert heads["lin1.model.1.weight"].shape == (1, 8, 1, 1)
    rest = {name: value for name, value in tensors.items() if name not in heads}
    rest["classifier.6.weight"] = np.zeros((10, 4), "f")
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    layout.save(rest, paths[0])
    layout.save(heads, paths[1])
    jax.tree.map(assert_array_equal, weights.load(*paths, TINY), PARAMS)
    heads["lin2.model.1.weight"] = heads.pop("lin0.model.1.weight")
    layout.save(heads, paths[1])
    other = dataclasses.replace(
        TINY, layers=(*TINY.layers[:2], dataclasses.replace(TINY.layers[2], outputs=9))
    )
    with pytest.raises(layout.WeightsError) as caught:
        weights.load(*paths, other)
    text = str(caught.value)
    assert "not those of LPIPS (alex) (5 differ)" in text
    assert "missing: lin0.model.1.weight" in text
    assert "unknown: lin2.model.1.weight" in text
    assert "features.5.weight: (8, 12, 3, 3), wanted (9, 12, 3, 3)" in text


def test_heads_are_found_in_the_package_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert weights.find_heads(lpips.VGG16) is None
    package = tmp_path / "lpips"
    (package / "weights" / "v0.1").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('torch is not here')")
    importlib.invalidate_caches()
    assert weights.find_heads(lpips.VGG16) is None
    (package / "weights" / "v0.1" / "vgg.pth").write_bytes(b"")
    assert weights.find_heads(lpips.VGG16) == package / "weights/v0.1/vgg.pth"
    assert weights.find_heads(lpips.ALEXNET) is None


def write_torch(path, tensors):
    """A state dict in a torch zip, as both files are published; pickled by hand."""
    # Protocol 2: an empty dict, a mark, then names and tensors in turn.
    pickled = [b"\x80\x02}("]

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def whole(*values):
        return b"".join(b"J" + value.to_bytes(4, "little") for value in values)

    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for key, (name, value) in enumerate(tensors.items()):
            value = np.ascontiguousarray(value, "<f4")
            strides = [n // value.itemsize for n in value.strides]
            pickled += [
                text(name),
                b"ctorch._utils\n_rebuild_tensor_v2\n((",
                text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)),
                text("cpu") + whole(value.size) + b"tQ" + whole(0),
                b"(" + whole(*value.shape) + b"t(" + whole(*strides) + b"t",
                b"\x89ccollections\nOrderedDict\n)RtR",
            ]
            file.writestr(f"archive/data/{key}", value.tobytes())
        file.writestr("archive/data.pkl", b"".join(pickled) + b"u.")


@pytest.mark.slow  # its steps are tested above
def test_the_modules_example_runs(tmp_path, monkeypatch):
    """The example of the module, with random weights in files as published."""
    params = drawn(lpips.ALEXNET)
    tensors = layout.write(weights.pairs(lpips.ALEXNET), params)
    heads = {name: value for name, value in tensors.items() if name.startswith("lin")}
    rest = {name: value for name, value in tensors.items() if name not in heads}
    rest["classifier.6.weight"] = np.zeros((10, 4), "f")
    write_torch(tmp_path / "alexnet-owt-7be5be79.pth", rest)
    write_torch(tmp_path / "lpips/weights/v0.1/alex.pth", heads)
    (tmp_path / "lpips/__init__.py").write_text("raise ImportError('no torch here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).uniform(0, 255, (2, 2, 40, 40, 3)).astype("f")
    names = {"x_BHWC": x, "y_BHWC": y}
    example = doctest.DocTestParser().get_doctest(lpips.__doc__, names, "", "", 0)
    found = doctest.DocTestRunner().run(example, clear_globs=False)
    assert found.failed == 0 and found.attempted >= 5
    got = example.globs["distances_B"]
    assert_array_equal(got, lpips.distance(lpips.ALEXNET, params, x, y))
    assert got.shape == (2,) and (got > 1e-3).all()
