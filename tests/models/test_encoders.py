"""What every text encoder promises; comparisons with others are in parity/."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import flops
from scaling_ldm.models import encoders
from scaling_ldm.models.encoders import bert, blocks, clip, presets, t5
from scaling_ldm.training import mesh

BATCH, TOKENS, VOCABULARY = 8, 6, 64

CONFIGS = {
    "t5": t5.T5Config(
        width=64,
        depth=2,
        heads=2,
        head_width=24,
        hidden=64,
        vocab_size=VOCABULARY,
        gated=True,
        activation="gelu_new",
        buckets=8,
        max_distance=20,
    ),
    "clip": clip.ClipTextConfig(
        width=64,
        depth=2,
        heads=2,
        hidden=64,
        vocab_size=VOCABULARY,
        max_tokens=8,
        projection=16,
        end_token=VOCABULARY - 1,
    ),
    "bert": bert.BertConfig(
        width=64,
        depth=2,
        heads=2,
        hidden=64,
        vocab_size=VOCABULARY,
        max_tokens=8,
    ),
}
VISION = clip.ClipVisionConfig(
    width=64,
    depth=2,
    heads=2,
    hidden=64,
    image_size=8,
    patch_size=4,
    projection=16,
)


def drawn(init):
    """Random parameters without compiling an initialiser."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(scale=0.15, size=s.shape).astype("f"),
        jax.eval_shape(lambda: init(jax.random.key(0))),
    )


def captions():
    rng = np.random.default_rng(1)
    lengths = 2 + np.arange(BATCH) % (TOKENS - 1)
    ids = rng.integers(3, VOCABULARY - 1, (BATCH, TOKENS)).astype(np.int32)
    ids[np.arange(BATCH), lengths - 1] = VOCABULARY - 1
    return ids, np.arange(TOKENS)[None] < lengths[:, None]


def pictures():
    return np.random.default_rng(2).normal(size=(BATCH, 8, 8, 3)).astype("f")


@pytest.fixture(
    scope="module",
    params=["t5", "clip", pytest.param("bert", marks=pytest.mark.slow)],
)
def case(request):
    config = CONFIGS[request.param]
    net = encoders.text_encoder(config)
    params = drawn(net.init)
    return config, net, params, jax.jit(net.apply)(params, *captions())


def test_features(case):
    config, net, params, features = case
    assert features.shape == (BATCH, TOKENS, net.width)
    assert features.dtype == jnp.float32
    assert np.isfinite(features).all()
    assert net.max_tokens == config.max_tokens
    made = jax.eval_shape(net.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype("f")}


def test_random_parameters_differ_between_layers():
    x = jnp.zeros((1, 1, 64))
    block = bert.BertBlock(CONFIGS["bert"])
    params = jax.jit(lambda key: blocks.init(block, 2, key, x, None))(jax.random.key(0))
    kernel = params["mlp_up"]["kernel"]
    assert kernel.std() > 0.05 and not np.allclose(kernel[0], kernel[1])


def test_unrolled_layers_do_the_same(case):
    config, _, params, features = case
    again = encoders.text_encoder(dataclasses.replace(config, unroll=True)).apply
    assert_allclose(jax.jit(again)(params, *captions()), features, atol=1e-5)
    single = {**params, "blocks": blocks.unstacked(params["blocks"])}
    assert isinstance(single["blocks"], tuple) and len(single["blocks"]) == 2
    apply = jax.jit(encoders.text_encoder(config).apply)
    assert_allclose(apply(single, *captions()), features, atol=1e-5)


def test_padding_is_not_read(case):
    _, net, params, features = case
    ids, mask = captions()
    other = jax.jit(net.apply)(params, np.where(mask, ids, 5), mask)
    assert_allclose(np.where(mask[..., None], other - features, 0), 0, atol=1e-5)


def test_without_a_mask_everything_is_read(case):
    config, net, params, features = case
    ids, mask = captions()
    apply = jax.jit(net.apply)
    every = apply(params, ids, None)
    assert_allclose(apply(params, ids, np.ones_like(mask)), every, atol=1e-5)
    far = np.abs(every - features).max(axis=(1, 2))
    assert (far[: TOKENS - 2] > 1e-3).all()  # these captions have padding
    before = np.abs(np.where(mask[..., None], every - features, 0)).max()
    assert (before < 1e-5) == isinstance(
        config, clip.ClipTextConfig
    )  # which looks back only


def test_half_precision_is_near(case):
    config, _, params, features = case
    low = encoders.text_encoder(dataclasses.replace(config, dtype=jnp.bfloat16)).apply
    got = jax.jit(low)(params, *captions())
    assert got.dtype == jnp.float32
    error = np.abs(got - features).max() / np.abs(features).max()
    assert 1e-4 < error < 0.05


def device_mesh():
    axes = (jax.sharding.AxisType.Explicit,) * 2
    return jax.make_mesh((2, 2), ("replica", "fsdp"), axis_types=axes)


def on_a_mesh(apply, params, inputs):
    """The output with sharded parameters, rows split over all devices."""
    devices = device_mesh()
    with jax.set_mesh(devices):
        placed = jax.device_put(params, mesh.shardings(devices, params))
        kernels = [placed["blocks"][k] for k in placed["blocks"] if "mlp_up" in k]
        assert "fsdp" in jax.typeof(kernels[0]["kernel"]).sharding.spec
        rows = jax.NamedSharding(devices, jax.P(("replica", "fsdp")))
        got = jax.jit(apply)(placed, *jax.device_put(inputs, rows))
        assert jax.typeof(got).sharding.spec[0] == ("replica", "fsdp")
        return np.asarray(got)


def test_a_mesh_changes_nothing(case):
    _, net, params, features = case
    assert_allclose(on_a_mesh(net.apply, params, captions()), features, atol=1e-5)


def text_vector(params, ids, mask):
    config = dataclasses.replace(CONFIGS["clip"], unroll=True)
    return clip.embed_text(config, params, ids, mask)


def sentence_vector(params, ids, mask):
    config = dataclasses.replace(CONFIGS["bert"], unroll=True)
    features = bert.apply(config, params, ids, mask)
    return bert.sentence(features, mask) + bert.first_token(config, params, features)


@pytest.mark.parametrize(
    ("init", "config", "embed", "inputs"),
    [
        pytest.param(
            clip.init, CONFIGS["clip"], text_vector, captions(), marks=pytest.mark.slow
        ),
        (bert.init, CONFIGS["bert"], sentence_vector, captions()),
        (
            clip.init_vision,
            VISION,
            functools.partial(clip.embed_image, VISION),
            (pictures(),),
        ),
    ],
    ids=["clip", "bert", "vision"],
)
def test_a_mesh_changes_no_vector(init, config, embed, inputs):
    params = drawn(functools.partial(init, config))
    wanted = jax.jit(embed)(params, *inputs)
    assert wanted.shape == (BATCH, 64 if config is CONFIGS["bert"] else 16)
    assert_allclose(on_a_mesh(embed, params, inputs), wanted, atol=1e-5)


def test_a_sentence_is_the_mean_of_its_tokens():
    features = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f")
    mask = np.asarray([[True, True, False], [True, True, True]])
    mean = np.stack([features[0, :2].mean(0), features[1].mean(0)])
    wanted = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert_allclose(bert.sentence(features, mask), wanted, rtol=1e-5)


def test_a_clip_text_is_its_end_token():
    config = CONFIGS["clip"]
    params = drawn(functools.partial(clip.init, config))
    ids, mask = captions()
    features = jax.jit(functools.partial(clip.apply, config))(params, ids, None)
    ends = mask.sum(axis=1) - 1
    wanted = features[np.arange(BATCH), ends] @ params["pooled"]["projection"]["kernel"]

    def embed(**changes):
        other = dataclasses.replace(config, **changes)
        return jax.jit(functools.partial(clip.embed_text, other))(params, ids, None)

    assert_allclose(embed(), wanted, atol=1e-5)
    assert_allclose(embed(end_token=clip.LEGACY_END), wanted, atol=1e-5)
    got = embed(end_token=int(ids[0, 0]), projection=0)
    assert_allclose(got[0], features[0, 0], atol=1e-5)


def test_blocks_left_out_are_not_run():
    full = presets.PRESETS["clip_l14_text"].config
    ids = jax.ShapeDtypeStruct((2, 77), np.int32)
    params = jax.eval_shape(lambda: clip.init(full, jax.random.key(0)))
    counts = []
    for skip in (0, 1, 2):
        config = dataclasses.replace(full, skip=skip)
        run = functools.partial(clip.apply, config, mask_BS=None)
        counts.append(flops.count(run, params, ids).total)
    assert counts[0] - counts[1] == counts[1] - counts[2] == counts[0] / 12


def test_the_class_token_sees_every_patch():
    params = drawn(functools.partial(clip.init_vision, VISION))
    embed = jax.jit(functools.partial(clip.embed_image, VISION))
    x = pictures()
    seen = embed(params, x)
    for row, column in [(0, 0), (0, 7), (7, 0), (7, 7)]:
        other = x.copy()
        other[:, row, column] += 1
        assert (np.abs(embed(params, other) - seen).max(axis=1) > 1e-5).all()


@pytest.mark.parametrize("name", presets.PRESETS)
def test_parameters_of_published_encoders(name):
    preset = presets.PRESETS[name]
    vision = isinstance(preset.config, clip.ClipVisionConfig)
    module = {t5.T5Config: t5, bert.BertConfig: bert}.get(type(preset.config), clip)
    init = clip.init_vision if vision else module.init
    shapes = jax.eval_shape(lambda: init(preset.config, jax.random.key(0)))
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(shapes)) == preset.params


def test_distances_share_buckets():
    found = t5.distance_buckets(40, 8, 20)
    assert_array_equal(found[0, :5], [0, 5, 6, 6, 6])  # ahead: the second half
    assert_array_equal(found[:5, 0], [0, 1, 2, 2, 2])
    assert (found[0, 20:] == 7).all() and (found[20:, 0] == 3).all()
    assert_array_equal(np.diagonal(found, 3), found[0, 3])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert", {"heads": 5}, "width 64 is not divisible by 5 heads"),
        ("clip", {"activation": "gelu2"}, "activation 'gelu2'; known: relu, silu"),
        ("clip", {"skip": 2}, "skip 2 of 2 blocks"),
    ],
)
def test_impossible_shapes_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        encoders.text_encoder(dataclasses.replace(CONFIGS[name], **change))


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_too_long_captions_are_refused(name):
    net = encoders.text_encoder(CONFIGS[name])
    with pytest.raises(ValueError, match="9 text tokens.* at most 8"):
        jax.eval_shape(net.apply, drawn(net.init), np.zeros((1, 9), np.int32), None)


def test_pictures_of_another_size_are_refused():
    params = drawn(functools.partial(clip.init_vision, VISION))
    with pytest.raises(ValueError, match=r"pictures of \(8, 12, 3\)"):
        clip.apply_vision(VISION, params, np.zeros((1, 8, 12, 3), "f"))
