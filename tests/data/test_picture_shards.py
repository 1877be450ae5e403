"""WebDataset shards: bad samples, broken shards, and the cached index."""

import io
import json
import tarfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from picture_layouts import (
    COUNT,
    assert_are,
    make_originals,
    outcomes,
    png,
    tar,
    write_shards,
)
from PIL import Image

from scaling_ldm import config
from scaling_ldm.data import pictures
from scaling_ldm.data.pictures import tar_index, tar_shards


@pytest.fixture(scope="module")
def originals():
    return make_originals()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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
        "a": "its label is 'dog', no whole number",
        "b": "of several",
        "c": "a part of it is a link",
    }
    # Each of two pictures of one name is counted.
    assert len(got) == len(said) == len(found) - 1
    for key, words in said.items():
        assert got[f"s.tar:{key}"].startswith(words)
    assert found.read(12).label == 7
    tally = pictures.Tally(allowed=0.5)
    with pytest.raises(config.ConfigError, match="11 of 14 records are bad") as caught:
        for _, item in pictures.read_ahead(found, range(14), 2):
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


def sample(key, caption, ending=".png"):
    return [(key + ending, PNG), (key + ".txt", caption.encode())]


PNG = png(np.zeros((2, 2, 3), np.uint8))


def captions_of(path):
    """(names without the shard, captions or reasons) in order."""
    found = pictures.open_pictures("webdataset", str(path))
    got = [item for _, item in pictures.read_ahead(found, range(len(found)), 0)]
    return [
        (item.name.split(":")[1], getattr(item, "caption", None) or item.reason)
        for item in got
    ]


def test_a_name_with_dots_is_a_sample_of_its_own(tmp_path):
    members = [*sample("img", "a"), *sample("img.v2", "b"), *sample("v1.0001", "c")]
    members += [("v1.0001.npy", b"not read"), ("v1.0002.png", PNG)]
    tar(tmp_path / "s.tar", members)
    assert captions_of(tmp_path) == [
        ("img", "a"),
        ("img.v2", "b"),
        ("v1.0001", "c"),
        ("v1.0002", "it has no caption: neither .txt, .caption nor .json"),
    ]


def test_further_parts_of_a_sample_are_told_and_not_bad(tmp_path):
    members = []
    for key in ("0", "1"):
        members += [(f"{key}.mask.png", PNG), (f"{key}.jpg", PNG), (f"{key}.heic", PNG)]
        members += [(f"{key}.meta.json", b"{}"), (f"{key}.txt", b"a caption")]
    tar(tmp_path / "s.tar", members)
    assert captions_of(tmp_path) == [("0", "a caption"), ("1", "a caption")]
    found = pictures.open_pictures("webdataset", str(tmp_path))
    assert "4 more pictures are not read: further parts" in found.captions_from


def test_a_picture_is_known_by_its_bytes_not_by_its_ending(tmp_path):
    endings = (".JPE", ".jfif", ".heic", ".avif", ".jp2")
    members = [m for i, end in enumerate(endings) for m in sample(str(i), end, end)]
    members += [("5.heic", b"\0\0\0\x18ftypheic" + bytes(9)), ("5.txt", b"c")]
    tar(tmp_path / "s.tar", members)
    got = captions_of(tmp_path)
    assert got[:5] == [(str(i), ending) for i, ending in enumerate(endings)]
    assert got[5][1] == "a picture of the format HEIC, which is not read; make it PNG"


def test_parts_that_are_not_neighbours(tmp_path):
    pairs = [sample(key, key) for key in "012"]
    scattered = [first for first, _ in pairs] + [second for _, second in pairs]
    tar(tmp_path / "s.tar", scattered)
    assert captions_of(tmp_path) == [(key, key) for key in "012"]
    # Two samples of one name are two samples, but not if any part could be of either.
    tar(tmp_path / "s.tar", [*sample("0", "a"), *sample("1", "b"), *sample("0", "c")])
    assert captions_of(tmp_path) == [("0", "a"), ("1", "b"), ("0", "c")]
    tar(tmp_path / "s.tar", [*scattered, *sample("0", "c")])
    got = captions_of(tmp_path)
    assert [name for name, _ in got] == ["0", "1", "2", "0"]
    assert all(got[i][1].startswith("its parts are not neighbours") for i in (0, 3))


def test_every_picture_of_one_name_is_counted(tmp_path):
    tar(tmp_path / "s.tar", [("0.png", PNG)] * 9 + sample("1", "good"))
    got = captions_of(tmp_path)
    assert len(got) == 10 and got[9] == ("1", "good")
    assert {said for _, said in got[:9]} == {"it has two pictures, captions or labels"}


def test_archives_one_after_another(tmp_path):
    for name, part in (("a", ("1.png", PNG)), ("b", ("1.txt", b"of another 1"))):
        members = [*sample("0", f"0 of {name}"), part]
        tar(tmp_path / name, members)
    first, second = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    (tmp_path / "s.tar").write_bytes(first + bytes(3 << 20) + second)
    lacks = "it has no caption: neither .txt, .caption nor .json"
    assert captions_of(tmp_path / "s.tar") == [
        ("0", "0 of a"),
        ("1", lacks),
        ("0", "0 of b"),
        ("1", "it has no picture"),
    ]
    for junk in (b"<html>" * 99, second[:512] + second[1024:]):
        (tmp_path / "s.tar").write_bytes(first + junk)
        with pytest.raises(config.ConfigError, match="after the end mark|no header"):
            pictures.open_pictures("webdataset", str(tmp_path / "s.tar"))


def test_hostile_parts_are_bad_samples(tmp_path):
    members = []
    for key, label in (("0", b"100000000000"), ("1", b"inf"), ("2", b"9" * 5000)):
        members += [*sample(key, "c"), (f"{key}.cls", label)]
    members += [("3.png", PNG), ("3.json", b"[" * 100_000)]
    members += [("4.png", PNG), ("4.json", b'{"text": ' + b"9" * 5000 + b"}")]
    tar(tmp_path / "s.tar", members)
    got = captions_of(tmp_path)
    assert got[0][1] == ("its label is 100000000000, below 0 or above 2,147,483,646")
    assert got[1][1] == "its label is 'inf', no whole number"
    assert got[2][1].startswith("its label is '999")
    assert got[3][1].startswith("its .json cannot be read: maximum recursion")
    assert got[4][1].startswith("its .json cannot be read: ")
    assert all(len(said) < 200 for _, said in got)


def header(name, size, kind=b"0"):
    """A header of any size, also an impossible one."""
    info = tarfile.TarInfo(name)
    info.type = kind
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = bytes([255 if size < 0 else 128]) + (size % 2**88).to_bytes(
        11, "big"
    )
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data):06o}\0 ".encode()
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        header("0.png", 2**80),
        header("0.png", 5) + bytes(512) + header("1.png", -1024),
        (header("long", 5, b"L") + b"name".ljust(512, b"\0")) * 3000,
    ],
    ids=["large", "negative", "nested"],
)
def test_hostile_headers_are_broken_shards(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data + bytes(1024))
    with pytest.raises(config.ConfigError, match="1 of 1 shards are broken"):
        pictures.open_pictures("webdataset", str(tmp_path))


def test_sets_encoded_before_are_what_they_were(tmp_path):
    members = []
    for i in range(3):
        members += [
            (f"x/{i:06d}.embedding.npy", b"not read"),
            (f"x/{i:06d}.png", b"x" * (9 + i)),
            (f"x/{i:06d}.txt", b"c"),
            (f"x/{i:06d}.cls", b"1"),
        ]
    members += [
        ("readme.md", b"no sample"),
        ("x/7.jpg", b"no caption"),
        ("x/8.mask.png", b"mask"),
        ("x/8.jpg", b"8"),
        ("x/8.json", b"{}"),
    ]
    tar(tmp_path / "s.tar", members)
    found = pictures.open_pictures("webdataset", str(tmp_path))
    # As version 0.1.0 has it.
    assert found.identity == "0277a788c84966d86dc6fc4aebeb1262" and len(found) == 6


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


def without_its_end(data):
    """A download that stopped between two samples."""
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        return data[: opened.getmembers()[-2].offset]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_its_end, "without the end mark of a tar, so it may be cut off"),
        (lambda d: b"", "empty file"),
        (lambda d: b"<html>not found</html>" * 99, "shard-00001.tar: "),
        (
            lambda d: d[: len(d) // 2 - 300],
            "unexpected end of data|no header|truncated",
        ),
        (lambda d: d[:512] + d[1024:], "no header where one should be"),
        (lambda d: b"\x1f\x8b" + d, "shard-00001.tar: "),
    ],
    ids=["between samples", "empty", "html", "cut", "slipped", "gzip"],
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
    read = tar_index.read_headers
    monkeypatch.setattr(
        tar_index, "read_headers", lambda file: calls.append(1) or read(file)
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
