"""Every source of pictures keeps one contract; then what each alone promises."""

import io
import json
import pathlib
import sys
import tarfile
import uuid

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image

from scaling_ldm import config
from scaling_ldm.data import pictures
from scaling_ldm.data.pictures import examples, tar_shards, wire

COUNT = 13


@pytest.fixture(scope="module")
def originals():
    """Painted icons with captions that are not ASCII, and labels."""
    source = pictures.open_pictures("icons", count=COUNT)
    found = [source.read(i) for i in range(COUNT)]
    return [
        pictures.Picture(
            image=p.image[i:], caption=f"{p.caption} é{i}", name="", label=i % 3
        )
        for i, p in enumerate(found)
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


# --- One layout of each source, of the same pictures


def write_folder(root, originals):
    rows = ["file_name,caption,kind"]
    for i, p in enumerate(originals):
        (root / f"sub{i % 2}").mkdir(parents=True, exist_ok=True)
        (root / f"sub{i % 2}/{i:03d}.png").write_bytes(png(p.image))
        rows.append(f'sub{i % 2}/{i:03d}.png,"{p.caption}",{p.label}')
    (root / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    return {"label": "kind"}


def write_shards(root, originals):
    for shard in range(2):
        members = []
        for i, p in list(enumerate(originals))[shard * 7 : shard * 7 + 7]:
            members += [
                (f"x/{i:06d}.png", png(p.image)),
                (f"x/{i:06d}.txt", p.caption.encode()),
                (f"x/{i:06d}.cls", str(p.label).encode()),
                (f"x/{i:06d}.embedding.npy", b"not read"),
            ]
        tar(root / f"shard-{shard:05d}.tar", members)
    return {}


def write_records(root, originals):
    examples.write_array_record(root / "set", originals, shards=2)
    return {"label": "label"}


def write_tfds(root, originals, split="train"):
    text = {"pythonClassName": "tensorflow_datasets...Text", "text": {}}
    features = {
        "picture": {"pythonClassName": "tensorflow_datasets...Image", "image": {}},
        "captions": {
            "sequence": {"feature": {"featuresDict": {"features": {"text": text}}}}
        },
        "kind": {"classLabel": {"numClasses": "3"}},
        "score": {"tensor": {"dtype": "float32"}},
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "features.json").write_text(
        json.dumps({"featuresDict": {"features": features}})
    )
    (root / "kind.labels.txt").write_text("red_fox\ngrey wolf\nowl\n")
    lengths = [7, len(originals) - 7]
    info = {
        "name": "toy",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(n) for n in lengths],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (root / "dataset_info.json").write_text(json.dumps(info))
    for shard, part in enumerate((originals[:7], originals[7:])):
        path = root / f"toy-{split}.array_record-{shard:05d}-of-00002"
        writer = examples.array_record_module.ArrayRecordWriter(
            str(path), "group_size:1"
        )
        for p in part:
            features = {
                "picture": png(p.image),
                "captions/text": p.caption,
                "kind": p.label,
            }
            writer.write(wire.encode_example(features))
        writer.close()
    return {}


def table(originals):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table(
        {
            "image": pa.array(
                [{"bytes": png(p.image), "path": None} for p in originals], image
            ),
            "text": [[p.caption, "another"] for p in originals],
            "kind": [p.label for p in originals],
        }
    )


def write_parquet(root, originals):
    (root / "data").mkdir(parents=True)
    for shard, part in enumerate((originals[:7], originals[7:])):
        path = root / f"data/train-{shard:05d}-of-00002.parquet"
        pq.write_table(table(part), path, row_group_size=3)
    return {"label": "kind"}


def write_saved(root, originals):
    root.mkdir(parents=True, exist_ok=True)
    names = []
    for shard, part in enumerate((originals[:7], originals[7:])):
        names.append(f"data-{shard:05d}-of-00002.arrow")
        rows = table(part)
        with pa.ipc.new_stream(str(root / names[-1]), rows.schema) as out:
            out.write_table(rows, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names]}
    (root / "state.json").write_text(json.dumps(state))
    (root / "cache-123.arrow").write_bytes(b"an index of datasets.map, not data")
    return {"label": "kind"}


LAYOUTS = {
    "folder": ("image_folder", write_folder),
    "shards": ("webdataset", write_shards),
    "records": ("array_record", write_records),
    "tfds": ("tfds", write_tfds),
    "parquet": ("huggingface", write_parquet),
    "saved": ("huggingface", write_saved),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path, originals):
    """(source, path, options, order of the originals)."""
    source, write = LAYOUTS[request.param]
    options = write(tmp_path / "set", originals)
    order = list(range(COUNT))
    if request.param == "folder":
        order = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    if request.param == "records":  # which go to the files in turn
        order = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    return source, str(tmp_path / "set"), options, order


def upload(path):
    """A copy of a local folder in fsspec's memory."""
    fs, base = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for file in pathlib.Path(path).rglob("*"):
        if file.is_file():
            name = file.relative_to(path).as_posix()
            fs.pipe_file(f"{base}/{name}", file.read_bytes())
    return f"memory:/{base}"


def assert_are(found, originals, order):
    assert len(found) == len(order)
    for index, picture in pictures.read_ahead(found, range(len(found)), 3):
        want = originals[order[index]]
        assert not isinstance(picture, pictures.BadRecord), picture
        assert picture.caption == want.caption
        assert_array_equal(picture.image, want.image)
        assert picture.label == want.label
        assert picture.held_out is None
    names = {found.read(i).name for i in range(len(found))}
    assert len(names) == len(order)


def test_pictures_captions_and_labels_come_back_in_order(layout, originals):
    source, path, options, order = layout
    found = pictures.open_pictures(source, path, **options)
    assert_are(found, originals, order)
    with pytest.raises(IndexError):
        found.read(COUNT)


def test_far_away_is_the_same_set(layout, originals, tmp_path):
    source, path, options, order = layout
    here = pictures.open_pictures(source, path, **options)
    if "cache" in pictures.options_of(source):
        options = options | {"cache": str(tmp_path / "copies")}
    there = pictures.open_pictures(source, upload(path), **options)
    assert_are(there, originals, order)
    assert there.identity == here.identity


def test_identity_is_of_the_set_not_of_its_place(layout, originals, tmp_path):
    source, path, options, _ = layout
    first = pictures.open_pictures(source, path, **options).identity
    moved = pathlib.Path(path).rename(tmp_path / "elsewhere")
    assert pictures.open_pictures(source, str(moved), **options).identity == first
    without = {k: v for k, v in options.items() if k != "label"}
    if without != options:
        other = pictures.open_pictures(source, str(moved), **without)
        assert other.identity != first
    write = next(w for s, w in LAYOUTS.values() if s == source)
    changed = [
        *originals[:-1],
        pictures.Picture(
            image=255 - originals[0].image[:9], caption="new", name="", label=0
        ),
    ]
    write(tmp_path / "changed", changed)
    again = pictures.open_pictures(source, str(tmp_path / "changed"), **options)
    assert again.identity != first


NOTHING = {
    "image_folder": "none of its 1 files is a picture; known endings: .jpg",
    "webdataset": "no files that end in .tar",
    "array_record": "none of its 1 files has .array_record",
    "tfds": "no features.json in it",
    "huggingface": "none of its 1 files is .parquet or .arrow",
    "memory": "no pictures in memory under the name",
}


@pytest.mark.parametrize("source", sorted(pictures.PICTURES.keys() - {"icons"}))
def test_nothing_there_is_told(source, tmp_path):
    with pytest.raises(config.ConfigError, match="no such file or folder|in memory"):
        pictures.open_pictures(source, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(config.ConfigError, match="there are no files|in memory"):
        pictures.open_pictures(source, str(tmp_path / "empty"))
    (tmp_path / "empty/readme.md").write_text("no pictures")
    with pytest.raises(config.ConfigError, match=NOTHING[source]):
        pictures.open_pictures(source, str(tmp_path / "empty"))


def outcomes(found):
    """{last part of the name: caption, or why it is bad}."""
    result = {}
    for _, item in pictures.read_ahead(found, range(len(found)), 2):
        bad = isinstance(item, pictures.BadRecord)
        result[item.name.split("/")[-1]] = item.reason if bad else item.caption
    return result


# --- Folders


def test_folder_captions_beside_the_pictures(tmp_path, originals):
    for i in range(4):
        (tmp_path / f"{i}.PNG").write_bytes(png(originals[i].image))
        if i != 2:
            (tmp_path / f"{i}.txt").write_bytes(originals[i].caption.encode())
    (tmp_path / "3.txt").write_bytes("a café".encode("latin-1"))
    (tmp_path / "1.PNG").write_bytes(b"")
    got = outcomes(pictures.open_pictures("image_folder", str(tmp_path)))
    assert got["0.PNG"] == originals[0].caption
    assert got["1.PNG"] == "it is empty (0 bytes)"
    assert got["2.PNG"] == "it has no caption: no 2.txt"
    assert got["3.PNG"].startswith("its caption is not UTF-8")


def test_folder_names_are_classes(tmp_path, originals):
    for folder, i in (("red_fox/a", 0), ("grey-wolf", 1), ("red_fox/b", 2)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.png").write_bytes(png(originals[i].image))
    found = pictures.open_pictures("image_folder", str(tmp_path))
    got = [(p.caption, p.label) for p in map(found.read, range(3))]
    assert got == [("grey wolf", 0), ("red fox", 1), ("red fox", 1)]


def test_folder_table_of_objects(tmp_path, originals):
    rows = [
        {"path": "./a.png", "text": "ein Hund\u2028zwei"},
        {"path": "b.png", "text": ""},
        {"path": "gone.png", "text": "c"},
        {"path": "d.png"},
    ]
    for name in "abde":
        (tmp_path / f"{name}.png").write_bytes(png(originals[0].image))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    got = outcomes(pictures.open_pictures("image_folder", str(tmp_path)))
    assert got == {
        "a.png": "ein Hund\u2028zwei",
        "b.png": "its caption is empty",
        "d.png": "it has no caption",
        "e.png": "it has no caption: not in metadata.jsonl",
        "gone.png": "metadata.jsonl names it, but it is not there",
    }


def test_folder_table_with_bytes_that_are_not_utf_8(tmp_path, originals):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(originals[0].image))
    (tmp_path / "captions.csv").write_bytes(
        b'\xef\xbb\xbffile_name,text\na.png,a caf\xe9\nb.png,"one, two"\n'
    )
    got = outcomes(pictures.open_pictures("image_folder", str(tmp_path)))
    assert got["a.png"].startswith("its caption is not UTF-8")
    assert got["b.png"] == "one, two"


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({}, {}, "no captions: neither captions.csv"),
        (
            {"captions.csv": "x", "metadata.csv": "x"},
            {},
            "could each hold the captions",
        ),
        ({}, {"captions": "c.csv"}, "captions=c.csv, which is not in it; tables there"),
        ({}, {"captions": "folders"}, "a.png lies in no folder"),
        (
            {"captions.csv": "file_name,alt\na.png,x\n"},
            {},
            "it has: 'alt'; name one wi",
        ),
        ({"captions.csv": "id,text\n1,x\n"}, {}, "for the file .*it has: 'id', 'text'"),
        (
            {"captions.csv": "file,text,caption\na.png,x,y\n"},
            {},
            "'text', 'caption' could each be the caption; name one with caption=",
        ),
        (
            {"captions.csv": "file,text\na.png,x\n"},
            {"caption": "alt"},
            "no column 'alt'",
        ),
        ({"captions.csv": "file,text\na.png,x, y\n"}, {}, "line 2: more fields"),
        ({"captions.csv": "file,text\n"}, {}, "no rows below its header line"),
        (
            {"captions.csv": "file,text\na.png,x\na.png,y\n"},
            {},
            "line 3: a.png is there a",
        ),
        ({"captions.jsonl": '{"file": "a.png"\n'}, {}, "line 1: no JSON"),
        ({"captions.jsonl": "[1]\n"}, {}, "line 1: not an object"),
        ({"captions.jsonl": '{"file": 1, "text": "x"}'}, {}, "line 1: no file"),
    ],
)
def test_folder_refuses_what_is_not_clear(tmp_path, originals, files, options, said):
    (tmp_path / "a.png").write_bytes(png(originals[0].image))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(config.ConfigError, match=said):
        pictures.open_pictures("image_folder", str(tmp_path), **options)


# --- Shards


def test_shards_with_bad_samples(tmp_path, originals):
    good = png(originals[0].image)
    out = io.BytesIO()
    Image.fromarray(originals[1].image).save(out, "JPEG")
    members = [
        ("0.jpg", out.getvalue()),
        ("0.json", json.dumps({"caption": "from json", "width": 3}).encode()),
        ("1.png", good[: len(good) // 2]),
        ("1.txt", b"a cut picture"),
        ("2.png", b""),
        ("2.txt", b"an empty one"),
        ("3.png", good),
        ("3.npy", b"no caption"),
        ("4.txt", b"no picture"),
        ("5.png", good),
        ("5.txt", "caf\u00e9".encode("latin-1")),
        ("6.png", good),
        ("6.jpg", good),
        ("6.txt", b"two pictures"),
        ("7.png", good),
        ("7.json", b'{"alt": "x"}'),
        ("8.png", good),
        ("8.json", b"{"),
        ("9.json", b'{"text": "x"}'),
        ("9.txt", b"the text goes first"),
        ("9.png", good),
        ("a.png", good),
        ("a.txt", b"x"),
        ("a.cls", b"dog"),
        ("b.png", good),
        ("b.json", b'{"captions": ["of several", "the first"]}'),
        ("b.cls", b"7\n"),
    ]
    tar(tmp_path / "s.tar", members)
    with tarfile.open(tmp_path / "s.tar", "a") as out:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        out.addfile(link)
        text = tarfile.TarInfo("c.txt")
        text.size = 1
        out.addfile(text, io.BytesIO(b"x"))
    found = pictures.open_pictures("webdataset", str(tmp_path))
    got = outcomes(found)
    said = {
        "0": "from json",
        "1": "cannot be decoded: OSError: ",
        "2": "it is empty (0 bytes)",
        "3": "it has no caption: neither .txt",
        "4": "it has no picture",
        "5": "its caption is not UTF-8",
        "6": "it has two pictures",
        "7": ".json: no column with a usual name for the caption",
        "8": "its .json cannot be read",
        "9": "the text goes first",
        "a": "its label is b'dog', no whole number",
        "b": "of several",
        "c": "a part of it is a link",
    }
    assert len(got) == len(said) == len(found)
    for key, words in said.items():
        assert got[f"s.tar:{key}"].startswith(words)
    assert found.read(11).label == 7
    tally = pictures.Tally(allowed=0.5)
    with pytest.raises(config.ConfigError, match="10 of 13 records are bad") as caught:
        for _, item in pictures.read_ahead(found, range(13), 2):
            tally.add(item)
        tally.finish()
    assert "s.tar:5: its caption is not UTF-8" in str(caught.value)
    chosen = pictures.open_pictures("webdataset", str(tmp_path), caption="alt")
    assert outcomes(chosen)["s.tar:7"] == "x"


def test_shards_with_long_and_foreign_names(tmp_path, originals):
    keys = ["a" * 150, "ordner/über" + "b" * 120, "v1.5/x"]
    members = []
    for key in keys:
        members += [(f"{key}.png", png(originals[0].image)), (f"{key}.txt", b"c")]
    tar(tmp_path / "s.tar", members)
    found = pictures.open_pictures("webdataset", str(tmp_path / "s.tar"))
    assert [found.read(i).name for i in range(3)] == [f"s.tar:{key}" for key in keys]


def test_shards_far_apart_parts_are_read_one_by_one(tmp_path, originals, monkeypatch):
    monkeypatch.setattr(tar_shards, "_GAP", 1000)
    members = [
        ("0.txt", b"first"),
        ("0.npy", b"\0" * 5000),
        ("0.png", png(originals[0].image)),
        ("0.json", b'{"caption": "not needed"}'),
    ]
    tar(tmp_path / "s.tar", members)
    found = pictures.open_pictures("webdataset", str(tmp_path))
    sizes = []
    read = found._folder.read
    monkeypatch.setattr(
        found._folder, "read", lambda n, a, s: sizes.append(s) or read(n, a, s)
    )
    assert_array_equal(found.read(0).image, originals[0].image)
    assert sizes == [len(members[2][1]), 5]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: b"", "empty file"),
        (lambda d: b"<html>not found</html>" * 99, "shard-00001.tar: "),
        (
            lambda d: d[: len(d) // 2 - 300],
            "unexpected end of data|no header|truncated",
        ),
        (lambda d: d[:512] + d[1024:], "no header where one should be"),
        (lambda d: b"\x1f\x8b" + d, "shard-00001.tar: "),
    ],
    ids=["empty", "html", "cut", "slipped", "gzip"],
)
def test_broken_shards_are_named(tmp_path, originals, spoil, said):
    write_shards(tmp_path, originals)
    shard = tmp_path / "shard-00001.tar"
    shard.write_bytes(spoil(shard.read_bytes()))
    with pytest.raises(config.ConfigError, match="1 of 2 shards are broken") as caught:
        pictures.open_pictures("webdataset", str(tmp_path))
    assert "shard-00001.tar" in str(caught.value)
    with pytest.raises(config.ConfigError, match=said):
        pictures.open_pictures("webdataset", str(tmp_path))


def test_compressed_shards_are_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(config.ConfigError, match=r"a.tar.gz.*gunzip"):
        pictures.open_pictures("webdataset", str(tmp_path))


def test_the_headers_are_read_once(tmp_path, originals, monkeypatch):
    write_shards(tmp_path / "set", originals)
    calls = []
    read = tar_shards._read_headers
    monkeypatch.setattr(
        tar_shards, "_read_headers", lambda file: calls.append(1) or read(file)
    )
    options = {"cache": str(tmp_path / "cache")}

    def openings():
        calls.clear()
        found = pictures.open_pictures("webdataset", str(tmp_path / "set"), **options)
        assert_are(found, originals, range(COUNT))
        return len(calls)

    assert (openings(), openings()) == (2, 0)
    (damaged, _) = (tmp_path / "cache/tar").iterdir()
    damaged.write_bytes(b"PK\x03\x04 half")
    assert openings() == 1
    shard = tmp_path / "set/shard-00000.tar"
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)
    assert (openings(), openings()) == (1, 0)


# --- ArrayRecord, Example, TFDS


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
    with pytest.raises(config.ConfigError, match="1 of 2 files of split train are not"):
        pictures.open_pictures("tfds", str(tmp_path / "a"))
    info = json.loads((tmp_path / "b/dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (tmp_path / "b/dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        config.ConfigError, match="prepared as tfrecord.*convert_format"
    ):
        pictures.open_pictures("tfds", str(tmp_path / "b"))


# --- Hugging Face


def test_tables_splits(tmp_path, originals):
    write_saved(tmp_path / "train", originals)
    write_saved(tmp_path / "test", originals[:9])
    with pytest.raises(config.ConfigError, match=r"several splits \(test, train\)"):
        pictures.open_pictures("huggingface", str(tmp_path))
    with pytest.raises(config.ConfigError, match="no split 'dev'; it has: test, train"):
        pictures.open_pictures("huggingface", str(tmp_path), split="dev")
    assert len(pictures.open_pictures("huggingface", str(tmp_path), split="test")) == 9


def test_tables_bad_rows_and_plain_bytes(tmp_path, originals):
    good = png(originals[0].image)
    rows = {
        "picture": [good, good[:50], None, good, b""],
        "prompt": ["good", "cut", "none", None, "empty"],
        "n": [1, 2, 3, 4, None],
    }
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    got = outcomes(pictures.open_pictures("huggingface", str(tmp_path)))
    said = ["good", "cannot be dec", "it has no pic", "it has no cap", "it is empty"]
    for i, words in enumerate(said):
        assert got[f"x.parquet:{i}"].startswith(words)
    for options, words in (
        ({"image": "n"}, "column 'n' holds int64; pictures are"),
        ({"image": "x"}, "no column 'x'.*it has: 'picture', 'prompt', 'n'"),
        ({"caption": "n"}, "no column 'n' .*it has: 'prompt'"),
        ({"label": "x"}, "no column 'x'"),
    ):
        with pytest.raises(config.ConfigError, match=words):
            pictures.open_pictures("huggingface", str(tmp_path), **options)


def test_tables_pictures_that_are_paths(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": "/photos/a.png"}]
    pq.write_table(
        pa.table({"image": pa.array(rows, image), "text": ["x"]}),
        tmp_path / "x.parquet",
    )
    found = pictures.open_pictures("huggingface", str(tmp_path))
    with pytest.raises(pictures.BadRecord, match="only its path /photos/a.png"):
        found.read(0)


def test_tables_that_are_broken_or_differ(tmp_path, originals):
    write_parquet(tmp_path, originals)
    second = tmp_path / "data/train-00001-of-00002.parquet"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    with pytest.raises(config.ConfigError, match="train-00001.*cannot be read"):
        pictures.open_pictures("huggingface", str(tmp_path))
    pq.write_table(table(originals).drop_columns("text"), second)
    with pytest.raises(config.ConfigError, match="train-00001.* has no column text"):
        pictures.open_pictures("huggingface", str(tmp_path))


def test_a_damaged_row_group_is_bad_rows(tmp_path, originals):
    write_parquet(tmp_path, originals)
    path = tmp_path / "data/train-00000-of-00002.parquet"
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = pictures.open_pictures("huggingface", str(tmp_path))
    got = [item for _, item in pictures.read_ahead(found, range(COUNT), 2)]
    bad = [i for i, item in enumerate(got) if isinstance(item, pictures.BadRecord)]
    assert bad == [3, 4, 5]
    assert "row group 1 is damaged" in got[3].reason


def test_without_pyarrow_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(config.ConfigError, match=r"scaling_ldm\[huggingface\]"):
        pictures.open_pictures("huggingface", str(tmp_path))


def test_row_groups_are_kept_but_few(tmp_path, originals):
    write_parquet(tmp_path, originals * 4)
    found = pictures.open_pictures("huggingface", str(tmp_path))
    for i in range(len(found)):
        found.read(i)
    assert all(len(t._groups) <= 4 for t in found._tables)
    np.testing.assert_array_equal(found.read(0).image, originals[0].image)
