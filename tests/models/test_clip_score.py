"""CLIP's features and scores without torch; its numbers are in parity/."""

import dataclasses
import doctest
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling_ldm.models.encoders import clip, clip_features, clip_score
from scaling_ldm.models.weights import clip as weights
from scaling_ldm.models.weights import layout
from scaling_ldm.training import mesh

BATCH, SIDE, TOKENS = 8, 8, 6
WORDS = ("a", "cat", "red", "dog")
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
LETTERS = [*"abcdegort", *(f"{letter}</w>" for letter in "abcdegort")]
MERGES = ["c a", "ca t</w>", "r e", "re d</w>", "d o", "do g</w>"]
VOCABULARY = [*LETTERS, "ca", "cat</w>", "re", "red</w>", "do", "dog</w>", *SPECIAL]
END = len(VOCABULARY) - 1

IMAGE = clip.ClipVisionConfig(
    width=64, depth=2, heads=2, hidden=64, image_size=SIDE, patch_size=4, projection=16
)
TEXT = clip.ClipTextConfig(
    width=64,
    depth=2,
    heads=2,
    hidden=64,
    vocab_size=len(VOCABULARY),
    max_tokens=TOKENS,
    projection=16,
    end_token=END,
)
CAPTIONS = ["a red cat", "dog", "", "red", "cat dog", "a", "dog cat", "a red dog"]


def drawn(init, config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(scale=0.15, size=s.shape).astype("f"),
        jax.eval_shape(lambda: init(config, jax.random.key(0))),
    )


def pictures():
    return np.random.default_rng(1).uniform(0, 255, (BATCH, SIDE, SIDE, 3)).astype("f")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint's directory: both towers, their configuration, a tokenizer."""
    directory = tmp_path_factory.mktemp("clip")
    tensors = weights.tensors(drawn(clip.init, TEXT), TEXT)
    tensors |= weights.tensors(drawn(clip_features.init, IMAGE), IMAGE)
    layout.save(tensors, directory / "model.safetensors")
    common = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = {
        "model_type": "clip",
        "projection_dim": 16,
        "text_config": {
            **common,
            "vocab_size": len(VOCABULARY),
            "max_position_embeddings": TOKENS,
            "eos_token_id": END,
        },
        "vision_config": {**common, "image_size": SIDE, "patch_size": 4},
    }
    (directory / "config.json").write_text(json.dumps(config))
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    (directory / "vocab.json").write_text(json.dumps(ids))
    merges = "\n".join(["#version: 0.2", *MERGES])
    (directory / "merges.txt").write_text(merges)
    settings = {"tokenizer_class": "CLIPTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def network(place):
    return weights.open_both(place)


def test_cosines_are_of_rows():
    a = np.asarray([[1, 0], [3, 4], [1, 1]], "f")
    b = np.asarray([[2, 0], [-3, -4], [0, 5]], "f")
    assert_allclose(clip_score.cosine(a, b), [1, -1, 0.5**0.5], rtol=1e-6)


def test_conventions_differ_by_their_factors():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 50, 4))
    cosines = np.asarray(clip_score.cosine(images, texts))
    assert cosines.min() < -0.3 and cosines.max() > 0.3
    got = clip_score.clip_score(images, texts)
    assert got.dtype == jnp.float32
    assert_allclose(got, 100 * cosines, rtol=1e-6)
    cut = np.where(cosines > 0, 2.5 * cosines, 0)
    assert_allclose(clip_score.clip_s(images, texts), cut, rtol=1e-6)
    assert_allclose(clip_score.clip_t(images, texts), cosines.mean(), rtol=1e-5)
    every = clip_score.cosine(np.repeat(images, 7, axis=0), np.tile(texts[:7], (50, 1)))
    assert_allclose(clip_score.clip_i(images, texts[:7]), np.mean(every), rtol=1e-4)


def test_features_are_of_normalised_pictures(network):
    params = network.params["image"]
    x = pictures()
    found = jax.jit(functools.partial(clip_features.apply, IMAGE))(params, x)
    assert found.features.shape == (BATCH, 16) and found.logits is None
    normal = (x / 255 - clip.MEAN[None, None, None]) / clip.STD[None, None, None]
    wanted = jax.jit(functools.partial(clip.embed_image, IMAGE))(params, normal)
    assert_allclose(found.features, wanted, rtol=1e-4, atol=1e-5)
    assert_allclose(network.pictures(x), found.features, rtol=1e-4, atol=1e-5)
    assert np.ptp(found.features, axis=0).max() > 1e-3
    with pytest.raises(ValueError, match=r"pictures of \(8, 9, 3\)"):
        network.pictures(np.zeros((1, 8, 9, 3), "f"))


def test_captions_have_one_vector_each(network):
    vectors = network.captions(CAPTIONS)
    assert vectors.shape == (len(CAPTIONS), 16) and vectors.dtype == jnp.float32
    ids = np.full((1, TOKENS), END)
    ids[0, :4] = [VOCABULARY.index(w) for w in (SPECIAL[0], "a</w>", "red</w>")] + [
        VOCABULARY.index("cat</w>")
    ]
    embed = jax.jit(functools.partial(clip.embed_text, network.text, mask_BS=None))
    alone = embed(network.params["text"], ids)
    assert_allclose(vectors[:1], alone, atol=1e-5)
    same = network.captions(["a red cat dog dog dog dog", "a red cat dog"])
    assert_allclose(same[0], same[1], atol=1e-5)  # later words are cut
    assert np.abs(vectors[0] - same[0]).max() > 1e-3


def test_a_mesh_changes_nothing(network):
    x = pictures()
    wanted = network.pictures(x), network.captions(CAPTIONS)
    axes = (jax.sharding.AxisType.Explicit,) * 2
    devices = jax.make_mesh((2, 2), ("replica", "fsdp"), axis_types=axes)
    with jax.set_mesh(devices):
        params = jax.device_put(network.params, mesh.shardings(devices, network.params))
        kernel = params["image"]["blocks"]["mlp_up"]["kernel"]
        assert "fsdp" in jax.typeof(kernel).sharding.spec
        placed = dataclasses.replace(network, params=params)
        rows = jax.NamedSharding(devices, jax.P(("replica", "fsdp")))
        got = placed.pictures(jax.device_put(x, rows))
        assert jax.typeof(got).sharding.spec[0] == ("replica", "fsdp")
        texts = jax.device_put(placed.captions(CAPTIONS), rows)
        score = jax.jit(clip_score.clip_score)(got, texts)
        got = [np.asarray(a) for a in (got, texts, score)]
    assert_allclose(got[0], wanted[0], atol=1e-5)
    assert_allclose(got[1], wanted[1], atol=1e-5)
    assert_allclose(got[2], clip_score.clip_score(*wanted), atol=1e-3)


def test_towers_that_do_not_belong_together_are_refused(network):
    replace = functools.partial(dataclasses.replace, network)
    for projection, other in [(8, 16), (0, 0)]:
        image = dataclasses.replace(IMAGE, projection=projection)
        text = dataclasses.replace(TEXT, projection=other)
        with pytest.raises(ValueError, match=f"project to {projection} and {other}"):
            replace(image=image, text=text)
    small = dataclasses.replace(TEXT, vocab_size=20)
    with pytest.raises(ValueError, match="26 words for a network of 20"):
        replace(text=small)


def test_the_modules_example_runs(network, place, tmp_path, monkeypatch):
    """The example of the module, with random weights as transformers saves them."""
    (tmp_path / "clip-vit-large-patch14").symlink_to(place)
    monkeypatch.chdir(tmp_path)
    x = pictures()
    names = {"x_BHWC": x, "references_RHWC": x[:3], "captions": CAPTIONS}
    example = doctest.DocTestParser().get_doctest(clip_score.__doc__, names, "", "", 0)
    found = doctest.DocTestRunner().run(example, clear_globs=False)
    assert found.failed == 0 and found.attempted >= 5
    images = np.asarray(network.pictures(x), np.float64)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts = np.asarray(network.captions(CAPTIONS), np.float64)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    wanted = np.mean(np.sum(images * texts, axis=1))
    assert_allclose(example.globs["clip_t"], wanted, rtol=1e-4, atol=1e-6)
    wanted = np.mean(images @ images[:3].T)
    assert_allclose(example.globs["clip_i"], wanted, rtol=1e-4)
