"""The encoders with transformers' random weights give its numbers, both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm.models.encoders import bert, clip, t5
from scaling_ldm.models.weights import bert as bert_weights
from scaling_ldm.models.weights import clip as clip_weights
from scaling_ldm.models.weights import files, hub, layout
from scaling_ldm.models.weights import t5 as t5_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
BATCH, TOKENS, VOCABULARY = 3, 9, 50

CLIP_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "projection_dim": 20,
    "bos_token_id": 0,
}
CLIP_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "projection_dim": 20,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 12,  # 4 x 12 is not 32
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def noisy(net):
    """No parameter is 0 or 1, so that each has an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return net.eval()


def text(tokens=TOKENS):
    """Ids and mask; the last id of each caption is the largest."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCABULARY - 2, (BATCH, tokens)).astype(np.int32)
    lengths = np.asarray([tokens, tokens - 3, 2])
    mask = np.arange(tokens)[None] < lengths[:, None]
    ids[np.arange(BATCH), lengths - 1] = VOCABULARY - 1
    return np.where(mask, ids, 1), mask


def pictures():
    return np.random.default_rng(1).normal(size=(BATCH, 12, 12, 3)).astype("f")


def relative(ours, wanted):
    wanted = wanted.detach().numpy()
    return np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max()


def run(net, ids, mask, **options):
    with torch.no_grad():
        return net(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=None if mask is None else torch.from_numpy(mask).long(),
            **options,
        )


def saved(net, path, config=None):
    """The tensors of `net` in a directory that `open_directory` reads."""
    path.mkdir(exist_ok=True)
    layout.save(
        {name: value.numpy() for name, value in net.state_dict().items()},
        path / "model.safetensors",
    )
    (path / "config.json").write_text(json.dumps(config or net.config.to_dict()))
    return path


def goes_round(module, params, config, tmp_path, wanted=None):
    """Saves and loads: the bits are the same."""
    module.save(params, tmp_path / "out.safetensors", config)
    back = module.load(tmp_path / "out.safetensors", config)
    jax.tree.map(assert_array_equal, back, params)
    if wanted is not None:
        given = layout.load(tmp_path / "out.safetensors")
        assert given.keys() == wanted.keys()
        for name, value in given.items():
            assert_array_equal(value, wanted[name], err_msg=name)


def reloaded(kind, config, path, tmp_path):
    """Loads our file with transformers, which must use all of it and miss nothing."""
    place = tmp_path / "reloaded"
    place.mkdir()
    config.save_pretrained(place)
    (place / "model.safetensors").write_bytes(path.read_bytes())
    net, report = kind.from_pretrained(place, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
    return net.eval()


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("projection", ["relu", "gated-gelu", "gated-silu"])
def test_t5(projection, unroll, tmp_path):
    config = transformers.T5Config(**T5, feed_forward_proj=projection)
    net = noisy(transformers.T5EncoderModel(config))
    place = saved(net, tmp_path / "t5")
    config, params = t5_weights.open_directory(place, unroll=unroll)
    ids, mask = text(30)  # beyond max_distance
    got = jax.jit(lambda *a: t5.apply(config, *a))(params, ids, mask)
    wanted = run(net, ids, mask).last_hidden_state
    assert relative(got, wanted) <= 1e-4
    without = jax.jit(lambda *a: t5.apply(config, *a, None))(params, ids)
    assert relative(without, run(net, ids, None).last_hidden_state) <= 1e-4
    goes_round(t5_weights, params, config, tmp_path)
    kind = transformers.T5EncoderModel
    again = reloaded(kind, net.config, tmp_path / "out.safetensors", tmp_path)
    assert_array_equal(run(again, ids, mask).last_hidden_state, wanted)


def test_distances_fall_into_torchs_buckets():
    from transformers.models.t5.modeling_t5 import T5Attention

    position = torch.arange(700)
    for buckets, most in [(32, 128), (8, 20), (32, 256), (64, 100), (16, 513)]:
        wanted = T5Attention._relative_position_bucket(
            position[None] - position[:, None],
            num_buckets=buckets,
            max_distance=most,
        )
        assert_array_equal(t5.distance_buckets(700, buckets, most), wanted.numpy())


def test_the_encoder_of_a_whole_t5(tmp_path):
    config = transformers.T5Config(**T5, feed_forward_proj="gated-gelu")
    net = noisy(transformers.T5ForConditionalGeneration(config))
    config, params = t5_weights.open_directory(saved(net, tmp_path / "t5"))
    ids, mask = text()
    got = t5.apply(config, params, ids, mask)
    wanted = run(net.get_encoder(), ids, mask).last_hidden_state
    assert relative(got, wanted) <= 1e-4


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_shards_and_half_precision_are_read(precision, tmp_path):
    config = transformers.T5Config(**T5)
    net = noisy(transformers.T5EncoderModel(config)).to(precision)
    net.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config, params = t5_weights.open_directory(tmp_path)
    words = params["entry"]["word_embedding"]
    assert words.dtype == np.float32
    assert_array_equal(words, net.shared.weight.float().detach().numpy())
    kept = t5_weights.load(tmp_path, config, dtype=None)["entry"]["word_embedding"]
    half = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
    assert kept.dtype == half[precision]
    ids, mask = text()
    wanted = run(net.float(), ids, mask).last_hidden_state
    assert relative(t5.apply(config, params, ids, mask), wanted) <= 1e-4
    low = dataclasses.replace(config, dtype=jnp.bfloat16)
    rough = t5.apply(low, params, ids, mask)
    assert rough.dtype == jnp.float32
    theirs = run(net.bfloat16(), ids, mask).last_hidden_state.float().numpy()
    assert 1e-4 < relative(rough, wanted) < 2 * relative(theirs, wanted)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("end", [clip.LEGACY_END, VOCABULARY - 1, 7])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_text(activation, end, unroll, tmp_path):
    config = transformers.CLIPTextConfig(
        **CLIP_TEXT, hidden_act=activation, eos_token_id=end
    )
    net = noisy(transformers.CLIPTextModelWithProjection(config))
    place = saved(net, tmp_path / "clip")
    config, params = clip_weights.open_directory(place, unroll=unroll)
    assert config.projection == 20
    ids, mask = text()
    ids[:, 4] = ids[:, 1] = np.where(end == 7, 7, ids[:, 1])  # the first one counts
    for given in (None, mask):
        wanted = run(net, ids, given, output_hidden_states=True)
        got = jax.jit(lambda p, m: clip.apply(config, p, ids, m))(params, given)
        assert relative(got, wanted.last_hidden_state) <= 1e-4
        got = clip.embed_text(config, params, ids, given)
        assert relative(got, wanted.text_embeds) <= 1e-4
        norm = net.text_model.final_layer_norm
        for skip in (1, 2):
            raw = wanted.hidden_states[-1 - skip]
            spec = dataclasses.replace(config, skip=skip, final_norm=False)
            assert relative(clip.apply(spec, params, ids, given), raw) <= 1e-4
            spec = dataclasses.replace(config, skip=skip)
            assert relative(clip.apply(spec, params, ids, given), norm(raw)) <= 1e-4
    goes_round(clip_weights, params, config, tmp_path, net.state_dict())
    kind = transformers.CLIPTextModelWithProjection
    again = reloaded(kind, net.config, tmp_path / "out.safetensors", tmp_path)
    assert_array_equal(run(again, ids, mask).text_embeds, wanted.text_embeds)


@pytest.mark.parametrize("flat", [False, True])
def test_clip_text_without_projection(flat, tmp_path):
    """Stable Diffusion's text tower, as saved before and since transformers 5.6."""
    net = noisy(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_TEXT)))
    place = saved(net, tmp_path / "clip")
    given = files.stored(place)
    assert not any(name.startswith("text_model.") for name in given)
    if not flat:
        given = {f"text_model.{name}": np.asarray(v) for name, v in given.items()}
        layout.save(given, place / "model.safetensors")
    config, params = clip_weights.open_directory(place)
    assert not config.projection
    ids, mask = text()
    wanted = run(net, ids, mask).last_hidden_state
    assert relative(clip.apply(config, params, ids, mask), wanted) <= 1e-4
    goes_round(clip_weights, params, config, tmp_path)
    kind = transformers.CLIPTextModel
    again = reloaded(kind, net.config, tmp_path / "out.safetensors", tmp_path)
    assert_array_equal(run(again, ids, mask).last_hidden_state, wanted)


@pytest.mark.parametrize("unroll", [False, True])
def test_clip_vision(unroll, tmp_path):
    config = transformers.CLIPVisionConfig(**CLIP_VISION)
    net = noisy(transformers.CLIPVisionModelWithProjection(config))
    place = saved(net, tmp_path / "clip")
    config, params = clip_weights.open_vision_directory(place, unroll=unroll)
    x = pictures()
    with torch.no_grad():
        wanted = net(torch.from_numpy(x).permute(0, 3, 1, 2))
    got = jax.jit(lambda *a: clip.apply_vision(config, *a))(params, x)
    assert relative(got, wanted.last_hidden_state) <= 1e-4
    assert relative(clip.embed_image(config, params, x), wanted.image_embeds) <= 1e-4
    goes_round(clip_weights, params, config, tmp_path, net.state_dict())
    kind = transformers.CLIPVisionModelWithProjection
    again = reloaded(kind, net.config, tmp_path / "out.safetensors", tmp_path)
    with torch.no_grad():
        last = again(torch.from_numpy(x).permute(0, 3, 1, 2)).image_embeds
    assert_array_equal(last, wanted.image_embeds)


def test_both_towers_of_one_file(tmp_path):
    config = transformers.CLIPConfig(
        text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=20
    )
    net = noisy(transformers.CLIPModel(config))
    given = net.state_dict()
    # As in checkpoints of older versions.
    positions = "text_model.embeddings.position_ids"
    tensors = {name: value.numpy() for name, value in given.items()}
    place = saved(net, tmp_path / "clip")
    layout.save(
        {**tensors, positions: np.arange(12)[None]}, place / "model.safetensors"
    )
    config, params = clip_weights.open_directory(place)
    vision, vision_params = clip_weights.open_vision_directory(place)
    ids, mask = text()
    x = pictures()
    with torch.no_grad():
        wanted = net(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            pixel_values=torch.from_numpy(x).permute(0, 3, 1, 2),
        )

    def unit(v):
        return v / np.linalg.norm(v, axis=-1, keepdims=True)

    ours = unit(np.asarray(clip.embed_text(config, params, ids, mask)))
    assert relative(ours, wanted.text_embeds) <= 1e-4
    ours = unit(np.asarray(clip.embed_image(vision, vision_params, x)))
    assert relative(ours, wanted.image_embeds) <= 1e-4
    both = clip_weights.tensors(params, config)
    both |= clip_weights.tensors(vision_params, vision)
    assert both.keys() == given.keys() - {"logit_scale"}
    for name, value in both.items():
        assert_array_equal(value, given[name], err_msg=name)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_bert(prefix, unroll, tmp_path):
    net = noisy(transformers.BertModel(transformers.BertConfig(**BERT)))
    tensors = {prefix + k: v.numpy() for k, v in net.state_dict().items()}
    if prefix:  # as bert-base-uncased is published
        tensors = {
            name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            if "LayerNorm" in name
            else name: value
            for name, value in tensors.items()
        }
        tensors["cls.predictions.bias"] = np.zeros(VOCABULARY, "f")
    tensors[prefix + "embeddings.position_ids"] = np.arange(12)[None]
    place = saved(net, tmp_path / "bert")
    layout.save(tensors, place / "model.safetensors")
    config, params = bert_weights.open_directory(place, unroll=unroll)
    ids, mask = text()
    wanted = run(net, ids, mask)
    got = jax.jit(lambda *a: bert.apply(config, *a))(params, ids, mask)
    assert relative(got, wanted.last_hidden_state) <= 1e-4
    first = bert.first_token(config, params, got)
    assert relative(first, wanted.pooler_output) <= 1e-4
    without = bert.apply(config, params, ids, None)
    assert relative(without, run(net, ids, None).last_hidden_state) <= 1e-4
    goes_round(bert_weights, params, config, tmp_path, net.state_dict())
    kind = transformers.BertModel
    again = reloaded(kind, net.config, tmp_path / "out.safetensors", tmp_path)
    assert_array_equal(run(again, ids, mask).pooler_output, wanted.pooler_output)


def test_bert_without_pooler(tmp_path):
    config = transformers.BertConfig(**BERT)
    net = noisy(transformers.BertModel(config, add_pooling_layer=False))
    config, params = bert_weights.open_directory(saved(net, tmp_path / "bert"))
    assert not config.pooler
    ids, mask = text()
    wanted = run(net, ids, mask).last_hidden_state
    assert relative(bert.apply(config, params, ids, mask), wanted) <= 1e-4


@pytest.mark.skipif(hub.minilm_directory() is None, reason="MiniLM is not installed")
def test_minilm(tmp_path):
    place = hub.minilm_directory()
    net = transformers.BertModel.from_pretrained(place).eval()
    config, params = bert_weights.open_directory(place)
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30000, (4, 20)).astype(np.int32)
    mask = np.arange(20)[None] < np.asarray([20, 11, 5, 2])[:, None]
    wanted = run(net, ids, mask)
    got = bert.apply(config, params, ids, mask)
    assert relative(got, wanted.last_hidden_state) <= 1e-4
    pooled = bert.first_token(config, params, got)
    assert relative(pooled, wanted.pooler_output) <= 1e-4
    goes_round(bert_weights, params, config, tmp_path, net.state_dict())
