"""DINOv2 without torch: sizes, positions, files, devices; numbers are in parity/."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import flops
from scaling_ldm.models.encoders import blocks, dinov2, presets
from scaling_ldm.models.weights import dinov2 as weights
from scaling_ldm.models.weights import layout
from scaling_ldm.training import mesh

BATCH, SIDE = 8, 12
PLAIN = dinov2.DinoConfig(
    width=64, depth=2, heads=2, hidden=96, image_size=20, patch_size=4
)
CONFIGS = {
    "plain": PLAIN,
    "gated": dataclasses.replace(PLAIN, gated=True, mask_token=False, unroll=True),
}


def drawn(config):
    """Random parameters without compiling an initialiser."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(scale=0.15, size=s.shape).astype("f"),
        jax.eval_shape(lambda: dinov2.init(config, jax.random.key(0))),
    )


def pictures(height=SIDE, width=SIDE):
    rng = np.random.default_rng(1)
    return rng.uniform(0, 255, (BATCH, height, width, 3)).astype("f")


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    config = CONFIGS[request.param]
    params = drawn(config)
    found = jax.jit(functools.partial(dinov2.apply, config))(params, pictures())
    assert found.logits is None
    return config, params, found.features


def test_features(case):
    config, params, features = case
    assert features.shape == (BATCH, config.width) and features.dtype == jnp.float32
    tokens = jax.jit(functools.partial(dinov2.tokens, config))(params, pictures())
    assert tokens.shape == (BATCH, 1 + 3 * 3, config.width)
    assert_allclose(tokens[:, 0], features, atol=1e-5)
    made = jax.eval_shape(lambda: dinov2.init(config, jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype("f")}


def test_scales_begin_at_one_and_layers_differ():
    block, x = dinov2.DinoBlock(PLAIN), jnp.zeros((1, 1, PLAIN.width))
    params = jax.jit(lambda key: blocks.init(block, 2, key, x))(jax.random.key(0))
    assert (params["mlp_scale"] == 1).all()
    kernel = params["mlp"]["up"]["kernel"]
    assert kernel.std() > 0.05 and not np.allclose(kernel[0], kernel[1])


def test_a_mesh_changes_nothing(case):
    config, params, features = case
    axes = (jax.sharding.AxisType.Explicit,) * 2
    devices = jax.make_mesh((2, 2), ("replica", "fsdp"), axis_types=axes)
    with jax.set_mesh(devices):
        placed = jax.device_put(params, mesh.shardings(devices, params))
        kernel = placed["blocks"]["mlp"]["up"]["kernel"]
        assert "fsdp" in jax.typeof(kernel).sharding.spec
        rows = jax.NamedSharding(devices, jax.P(("replica", "fsdp")))
        x = jax.device_put(pictures(), rows)
        got = jax.jit(functools.partial(dinov2.apply, config))(placed, x).features
        assert jax.typeof(got).sharding.spec[0] == ("replica", "fsdp")
        got = np.asarray(got)
    assert_allclose(got, features, atol=1e-5)


def test_half_precision_is_near(case):
    config, params, features = case
    low = dataclasses.replace(config, dtype=jnp.bfloat16)
    got = jax.jit(functools.partial(dinov2.apply, low))(params, pictures()).features
    assert got.dtype == jnp.float32
    assert 1e-4 < np.abs(got - features).max() / np.abs(features).max() < 0.05


def test_the_class_token_sees_every_patch(case):
    config, params, features = case
    apply = jax.jit(functools.partial(dinov2.apply, config))
    for row, column in [(0, 0), (0, -1), (-1, 0), (-1, -1)]:
        x = pictures()
        x[:, row, column] += 60
        far = np.abs(apply(params, x).features - features).max(axis=1)
        assert (far > 1e-5).all()


def table(config):
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.normal(size=(1 + config.grid**2, 3)).astype("f"))


def test_positions_of_the_tables_own_size_are_the_tables():
    given = table(PLAIN)
    assert_array_equal(dinov2.positions(PLAIN, given, 5, 5), given)


def test_positions_are_interpolated():
    given = table(PLAIN)
    found = dinov2.positions(PLAIN, given, 5, 3)
    assert found.shape == (1 + 15, 3)
    assert_array_equal(found[0], given[0])
    grid = np.asarray(given[1:]).reshape(5, 5, 3)
    middle = np.asarray(found[1:]).reshape(5, 3, 3)[:, 1]
    assert_allclose(middle, grid[:, 2], atol=1e-6)  # the centres coincide
    flat = jnp.full_like(given, 2.5)  # weights sum to 1, at the edges too
    for config in (PLAIN, dataclasses.replace(PLAIN, offset=0.1)):
        assert_allclose(dinov2.positions(config, flat, 7, 2), flat[:15], rtol=1e-6)


def test_halfway_between_rows_a_line_goes_on():
    config = dataclasses.replace(PLAIN, image_size=40)
    line = np.arange(10, dtype="f")
    given = np.concatenate([[0], np.repeat(line, 10)])[:, None].astype("f")
    found = dinov2.positions(config, jnp.asarray(given), 5, 10)[1:].reshape(5, 10)
    assert_allclose(found[1:4, 0], [2.5, 4.5, 6.5], atol=1e-5)


def test_an_offset_moves_positions_back():
    """An offset acts as if the table covered that part of a patch more."""
    config = dataclasses.replace(PLAIN, image_size=40, offset=1.0)
    line = np.repeat(np.arange(10, dtype="f"), 10)
    given = jnp.asarray(np.concatenate([[0], line])[:, None], jnp.float32)
    found = dinov2.positions(config, given, 4, 9)[1:].reshape(4, 9)
    assert_allclose(found[1:, 0], [2.5, 4.5, 6.5], atol=1e-5)


@pytest.mark.parametrize("name", presets.DINOV2)
def test_parameters_of_published_networks(name):
    preset = presets.DINOV2[name]
    shapes = jax.eval_shape(lambda: dinov2.init(preset.config, jax.random.key(0)))
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(shapes)) == preset.params
    ratio = weights.hidden_width(preset.config.width, 4, preset.config.gated)
    assert ratio == preset.config.hidden
    assert len(weights.pairs(preset.config)) > 18 * preset.config.depth


def test_flops_are_of_products_only():
    """Interpolated positions add no FLOPs, so 224 and 518 pixels are counted alike."""
    config = presets.DINOV2["dinov2_l14"].config
    apply = functools.partial(dinov2.apply, config)
    params = jax.eval_shape(lambda: dinov2.init(config, jax.random.key(0)))
    for side in (dinov2.SIZE, config.image_size):
        x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        patches = (side // 14) ** 2
        count = 1 + patches
        block = 2 * count * 12 * 1024**2 + 4 * count**2 * 1024
        wanted = 2 * patches * 3 * 14**2 * 1024 + 24 * block
        assert flops.count(apply, params, x).total == wanted


@pytest.mark.parametrize("side", [(12, 13, 3), (12, 12, 4)])
def test_pictures_that_do_not_fit_are_refused(side):
    with pytest.raises(ValueError, match=r"3 channels and sides that 4 divides"):
        dinov2.apply(PLAIN, drawn(PLAIN), np.zeros((1, *side), "f"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "width 64 is not divisible by 5 heads"),
        ({"activation": "gelu2"}, "activation 'gelu2'; known: relu"),
        ({"image_size": 21}, "image_size 21 is not divisible by patch_size 4"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dinov2.init(dataclasses.replace(PLAIN, **change), jax.random.key(0))


def test_weights_go_round_bit_for_bit(case, tmp_path):
    config, params, _ = case
    weights.save(params, tmp_path / "model.safetensors", config)
    back = weights.load(tmp_path, config)
    jax.tree.map(assert_array_equal, back, params)


def test_both_layouts_and_a_classifiers_are_read(tmp_path):
    config = CONFIGS["gated"]
    params = drawn(config)
    tensors = layout.write(weights.pairs(config, weights._MODULES), params)
    assert "encoder.layer.1.mlp.gate_proj.weight" in tensors
    tensors = {f"dinov2.{name}": value for name, value in tensors.items()}
    tensors["classifier.weight"] = np.zeros((2, 128), "f")
    layout.save(tensors, tmp_path / "model.safetensors")
    jax.tree.map(assert_array_equal, weights.load(tmp_path, config), params)


def test_every_difference_is_listed(tmp_path):
    params = drawn(PLAIN)
    weights.save(params, tmp_path / "model.safetensors", PLAIN)
    tensors = layout.load(tmp_path)
    tensors["embeddings.register_tokens"] = tensors.pop("embeddings.mask_token")
    del tensors["encoder.layer.1.layer_scale2.lambda1"]
    layout.save(tensors, tmp_path / "model.safetensors")
    other = dataclasses.replace(PLAIN, hidden=95)
    with pytest.raises(layout.WeightsError) as caught:
        weights.load(tmp_path, other)
    text = str(caught.value)
    assert "not this DINOv2's (9 differ)" in text
    assert "missing: embeddings.mask_token" in text
    assert "missing: encoder.layer.1.layer_scale2.lambda1" in text
    assert "unknown: embeddings.register_tokens" in text
    assert text.count("wanted (95, 64)") == 2


def test_configurations():
    import transformers

    theirs = transformers.Dinov2Config(hidden_size=1536, use_swiglu_ffn=True).to_dict()
    config = weights.from_config(theirs, offset=0.1)
    assert (config.hidden, config.gated, config.offset) == (4096, True, 0.1)
    plain = weights.from_config(transformers.Dinov2Config().to_dict())
    assert plain == weights.from_config({})
    with pytest.raises(
        layout.WeightsError, match="model_type is 'dinov2_with_registers'"
    ):
        weights.from_config({"model_type": "dinov2_with_registers", "qkv_bias": False})
    with pytest.raises(layout.WeightsError, match="image_size is .*one number"):
        weights.from_config({"image_size": [20, 24]})
