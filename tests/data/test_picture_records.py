"""ArrayRecord files of tf.train.Example, as this library and TFDS write them."""

import io
import json

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from picture_layouts import (
    COUNT,
    make_originals,
    outcomes,
    png,
    upload,
    write_records,
    write_tfds,
)
from PIL import Image

from scaling_ldm import config
from scaling_ldm.data import pictures
from scaling_ldm.data.pictures import examples, wire


@pytest.fixture(scope="module")
def originals():
    return make_originals()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_records_that_are_bad(tmp_path, originals):
    good = png(originals[0].image)
    rows = [
        {"jpg": good, "Text": "upper case"},
        {"jpg": good[:99], "Text": "cut"},
        {"jpg": good},
        {"Text": "no picture"},
        {"jpg": good, "Text": b"\xff"},
        {"jpg": 3, "Text": "a number"},
    ]
    writer = examples.array_record_module.ArrayRecordWriter(
        str(tmp_path / "x.array_record"), "group_size:1"
    )
    for row in rows:
        writer.write(wire.encode_example(row))
    writer.write(b"\x0a\xff\xff no message")
    writer.close()
    got = outcomes(pictures.open_pictures("array_record", str(tmp_path)))
    said = [
        "upper case",
        "cannot be decoded",
        "it has no caption",
        "it has no picture: no bytes in 'jpg'",
        "its caption is not UTF-8",
        "it has no picture: no bytes in 'jpg'",
        "no tf.train.Example",
    ]
    for i, words in enumerate(said):
        assert got[f"x.array_record:{i}"].startswith(words)
    with pytest.raises(
        config.ConfigError, match="no column 'x'.*it has: 'jpg', 'Text'"
    ):
        pictures.open_pictures("array_record", str(tmp_path), image="x")


def test_records_that_are_no_examples_or_files(tmp_path):
    path = tmp_path / "x.array_record"
    writer = examples.array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"\xff\xff")
    writer.close()
    with pytest.raises(
        config.ConfigError, match="no tf.train.Example.*write_array_rec"
    ):
        pictures.open_pictures("array_record", str(tmp_path))
    path.with_name("empty.array_record").write_bytes(path.read_bytes()[:-500])
    with pytest.raises(
        config.ConfigError, match="1 of 2 files .*\n  empty.array_record"
    ):
        pictures.open_pictures("array_record", str(tmp_path))


def test_a_damaged_record_is_bad_and_the_others_are_not(tmp_path, originals):
    (path,) = examples.write_array_record(tmp_path / "x", originals * 20)
    data = bytearray(path.read_bytes())
    # In the middle of some record's picture.
    at = data.index(b"IDAT", len(data) // 3) + 30
    data[at : at + 4] = bytes(255 - byte for byte in data[at : at + 4])
    path.write_bytes(data)
    found = pictures.open_pictures("array_record", str(tmp_path))
    bad = [
        item
        for _, item in pictures.read_ahead(found, range(len(found)), 2)
        if isinstance(item, pictures.BadRecord)
    ]
    assert len(bad) == 1 and bad[0].reason.startswith("its bytes are damaged")


def test_array_records_far_away_need_a_cache(tmp_path, originals):
    write_records(tmp_path, originals)
    with pytest.raises(config.ConfigError, match="cache=FOLDER, where its 2 files are"):
        pictures.open_pictures("array_record", upload(tmp_path))


def test_pairs_of_bytes_are_kept_as_they_are(tmp_path, originals):
    out = io.BytesIO()
    Image.fromarray(originals[0].image).save(out, "JPEG")
    examples.write_array_record(tmp_path / "x", [(out.getvalue(), "a jpeg")])
    found = pictures.open_pictures("array_record", str(tmp_path / "x*"))
    want = pictures.decode(out.getvalue(), "")
    assert_array_equal(found.read(0).image, want)


@pytest.fixture(scope="module")
def message():
    """tf.train.Example as protobuf's own library has it."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="e.proto", syntax="proto3")

    def add(parent, name, fields):
        made = parent.add(name=name)
        for number, (label, key, type_, of) in enumerate(fields, 1):
            made.field.add(
                name=key, number=number, label=label, type=type_, type_name=of
            )
        return made

    one, many, inner = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED, kind.TYPE_MESSAGE
    add(file.message_type, "Bytes", [(many, "value", kind.TYPE_BYTES, None)])
    add(file.message_type, "Floats", [(many, "value", kind.TYPE_FLOAT, None)])
    add(file.message_type, "Ints", [(many, "value", kind.TYPE_INT64, None)])
    lists = [("b", ".Bytes"), ("f", ".Floats"), ("i", ".Ints")]
    add(file.message_type, "Feature", [(one, key, inner, of) for key, of in lists])
    made = add(file.message_type, "Features", [(many, "feature", inner, "")])
    entry = [(one, "key", kind.TYPE_STRING, None), (one, "value", inner, ".Feature")]
    add(made.nested_type, "FeatureEntry", entry).options.map_entry = True
    made.field[0].type_name = ".Features.FeatureEntry"
    add(file.message_type, "Example", [(one, "features", inner, ".Features")])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))


def test_the_wire_format_agrees_with_protobuf(message):
    example = message()
    feature = example.features.feature
    feature["caption"].b.value.extend([b"one", b"", "zwei é".encode()])
    feature["picture"].b.value.append(bytes(range(256)) * 100)
    feature["label"].i.value.extend([0, 1, -1, 127, 128, 2**63 - 1, -(2**63)])
    feature["score"].f.value.extend([0.5, 1.5])
    feature["nothing"].b.SetInParent()
    assert wire.parse_example(example.SerializeToString()) == {
        "caption": [b"one", b"", "zwei é".encode()],
        "picture": [bytes(range(256)) * 100],
        "label": [0, 1, -1, 127, 128, 2**63 - 1, -(2**63)],
        "score": None,
        "nothing": [],
    }
    written = wire.encode_example({"a": b"\0\xff", "é": "text é", "n": -5, "m": 300})
    back = message.FromString(written).features.feature
    assert back["a"].b.value == [b"\0\xff"] and back["é"].b.value == ["text é".encode()]
    assert list(back["n"].i.value) == [-5] and list(back["m"].i.value) == [300]


@given(st.binary(max_size=60), st.integers(0, 60))
def test_broken_messages_are_value_errors(noise, cut):
    whole = wire.encode_example({"image": b"0123456789", "label": 300, "text": "abc"})
    for data in (noise, whole[:cut] + noise, whole[:cut] + noise + whole[cut:]):
        try:
            wire.parse_example(data)
        except ValueError:
            pass


def test_a_message_that_is_cut_off_is_no_example():
    whole = wire.encode_example({"image": b"0123456789", "label": 300})
    for cut in range(1, len(whole)):
        with pytest.raises(ValueError):
            wire.parse_example(whole[:cut])


def test_tfds_classes_caption_what_has_no_text(tmp_path, originals):
    write_tfds(tmp_path / "toy/1.0.0", originals)
    folder = tmp_path / "toy/1.0.0"
    features = json.loads((folder / "features.json").read_text())
    del features["featuresDict"]["features"]["captions"]
    (folder / "features.json").write_text(json.dumps(features))
    found = pictures.open_pictures("tfds", str(tmp_path))  # the only version below
    got = [(p.caption, p.label) for p in map(found.read, range(3))]
    assert got == [("red fox", 0), ("grey wolf", 1), ("owl", 2)]
    (folder / "kind.labels.txt").unlink()
    with pytest.raises(
        config.ConfigError, match="no kind.labels.txt|no toy/1.0.0/kind"
    ):
        pictures.open_pictures("tfds", str(tmp_path))


def test_tfds_splits_and_what_it_refuses(tmp_path, originals):
    write_tfds(tmp_path / "a", originals)
    with pytest.raises(config.ConfigError, match="no split 'test'; it has: train"):
        pictures.open_pictures("tfds", str(tmp_path / "a"), split="train+test")
    both = pictures.open_pictures("tfds", str(tmp_path / "a"), split="train+train")
    assert len(both) == 2 * COUNT
    with pytest.raises(config.ConfigError, match="'titles'.*it has: 'captions/text'"):
        pictures.open_pictures("tfds", str(tmp_path / "a"), caption="titles")
    write_tfds(tmp_path / "b", originals)
    with pytest.raises(config.ConfigError, match="several prepared data sets.*: a, b"):
        pictures.open_pictures("tfds", str(tmp_path))
    (tmp_path / "a/toy-train.array_record-00001-of-00002").unlink()
    with pytest.raises(
        config.ConfigError, match="1 of 2 files of split train are miss"
    ):
        pictures.open_pictures("tfds", str(tmp_path / "a"))
    info = json.loads((tmp_path / "b/dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (tmp_path / "b/dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        config.ConfigError, match="prepared as tfrecord.*convert_format"
    ):
        pictures.open_pictures("tfds", str(tmp_path / "b"))
