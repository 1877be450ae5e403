"""The stage with every network that config offers, from files as they are published."""

import functools
import json

import jax
import numpy as np
import pytest

from scaling_ldm import config, evaluate, mesh, records
from scaling_ldm.encoders import dinov2
from scaling_ldm.evaluate import networks, protocol
from scaling_ldm.metrics import resize
from scaling_ldm.weights import dinov2 as dinov2_weights

DINOV2 = dinov2.Shape(
    width=64, depth=2, heads=2, hidden=128, image_size=70, patch_size=14
)


def drawn(shapes, seed):
    """Random leaves of a tree of shapes, without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(scale=0.15, size=s.shape).astype("f"), shapes
    )


def write_dinov2(folder, seed):
    """As transformers saves a Dinov2Model."""
    folder.mkdir()
    shapes = jax.eval_shape(lambda: dinov2.init(DINOV2, jax.random.key(0)))
    params = drawn(shapes, seed)
    dinov2_weights.save(params, folder / "model.safetensors", DINOV2)
    stated = {
        "model_type": "dinov2",
        "hidden_size": DINOV2.width,
        "num_hidden_layers": DINOV2.depth,
        "num_attention_heads": DINOV2.heads,
        "mlp_ratio": DINOV2.hidden // DINOV2.width,
        "image_size": DINOV2.image_size,
        "patch_size": DINOV2.patch_size,
    }
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    return write_dinov2(tmp_path_factory.mktemp("networks") / "dinov2", 0)


# --- How pictures come to a network's size is a part of the protocol.


def extracted(network, weights, images):
    """The identity and the features of some pictures."""
    cfg = config.Evaluate(network=network, weights=str(weights), batch_size=8)
    device_mesh = mesh.build(config.Mesh(), {})
    with jax.set_mesh(device_mesh):
        extract = networks.Extractor(cfg, device_mesh)
        return extract.identity, extract(images).features


def measured(identity, value):
    parts = dict.fromkeys(protocol.PARTS, 1) | identity
    return records.EvalRecord(
        run_id="a",
        step=1,
        train_flops=1.0,
        metric="fd_dinov2",
        value=float(value),
        low=0.0,
        high=1.0,
        level=0.9,
        images=4,
        nfe=2,
        flops=1.0,
        protocol=parts,
        protocol_hash=protocol.digest(parts),
    )


def other_order(monkeypatch):
    monkeypatch.setattr(networks, "ORDER", "pillow13")


def other_offset(monkeypatch):
    opened = functools.partial(dinov2_weights.open_directory, offset=0.1)
    monkeypatch.setattr(dinov2_weights, "open_directory", opened)


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (other_order, "order horizontal", "order pillow13"),
        (other_offset, "offset 0", "offset 0.1"),
    ],
)
def test_numbers_of_another_resize_are_not_compared(
    dinov2_folder, monkeypatch, change, before, after
):
    """Both choices change the features, so that neither may be left unsaid."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(4, 600, 230, 3), dtype=np.uint8)
    identity, features = extracted("dinov2", dinov2_folder, images)
    change(monkeypatch)
    other, moved = extracted("dinov2", dinov2_folder, images)
    assert 1e-6 < np.abs(moved - features).max() / np.abs(features).max()
    assert before in identity["resize"] and after in other["resize"]
    assert {k for k in identity if identity[k] != other[k]} == {"resize"}
    a, b = measured(identity, 1), measured(other, 2)
    assert a.protocol_hash != b.protocol_hash
    with pytest.raises(evaluate.ProtocolError, match=f"{before}.*{after}"):
        evaluate.difference(a, b)


@pytest.mark.parametrize("order", resize.ORDERS)
def test_the_order_that_is_named_is_the_one_used(dinov2_folder, monkeypatch, order):
    monkeypatch.setattr(networks, "ORDER", order)
    cfg = config.Evaluate(network="dinov2", weights=str(dinov2_folder))
    judge = networks._JUDGES["dinov2"](cfg)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(2, 600, 230, 3), dtype=np.uint8)
    wanted, other = (
        resize.resize(images, (224, 224), "bicubic", order=each)
        for each in sorted(resize.ORDERS, key=lambda each: each != order)
    )
    np.testing.assert_array_equal(judge.fit(images), wanted)
    assert (wanted != other).any()
