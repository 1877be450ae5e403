"""Layouts of public tools: read rightly, or refused with what to do instead."""

import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_layouts import outcomes, png, tar

from scaling_ldm import config
from scaling_ldm.data import pictures

PNG = png(np.full((4, 4, 3), 90, np.uint8))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make(root, files):
    """Writes files of these names: {name: bytes or text}."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        (root / name).write_bytes(data)


def open_folder(root, **options):
    return pictures.open_pictures("image_folder", str(root), **options)


CLASSES = {"cat/1.png": PNG, "dog/1.png": PNG}
COCO = json.dumps({"images": [{"file_name": "1.png"}], "annotations": []})
# What lies beside folders of classes, and what is said of it.
BETTER = {
    "coco": ({"annotations/captions.json": COCO}, "write its captions as metadata"),
    "kohya": ({"meta_cap.json": '{"cat/1": {"caption": "a"}}'}, "write its captions"),
    "second json": (
        {"cat/1.json": '{"n": 1}', "dog/1.json": '{"caption": "a"}'},
        "write its captions as",
    ),
    "tabs": ({"all.tsv": "file_name\tcaption\n1.png\ta\n"}, "as metadata.csv, with"),
    "flickr8k": ({"captions.txt": "image,caption\n1.png,a dog\n"}, "as metadata.csv"),
    "flickr30k": (
        {"results.csv.txt": "image_name| comment_number| comment\n1.png| 0| a\n"},
        "as metadata.csv",
    ),
    "another table": ({"all.CSV": "image,text\n1.png,a\n"}, "name it with captions="),
}


@pytest.mark.parametrize("kind", BETTER)
def test_folder_names_are_no_captions_where_better_ones_are_beside(kind, tmp_path):
    files, remedy = BETTER[kind]
    make(tmp_path, CLASSES | files)
    name = list(files)[-1]
    with pytest.raises(config.ConfigError) as refused:
        open_folder(tmp_path)
    assert f"{name} looks like a table of captions" in str(refused.value)
    assert remedy in str(refused.value)
    assert open_folder(tmp_path, captions="folders").label_names == ("cat", "dog")


def test_folder_names_are_no_labels_where_a_table_has_them(tmp_path):
    make(tmp_path, CLASSES | {"labels.csv": "file,class\n1.png,7\n"})
    said = "labels.csv looks like a table of labels; folder names would be labels inste"
    with pytest.raises(config.ConfigError, match=said):
        open_folder(tmp_path)
    assert open_folder(tmp_path, captions="folders").label_names == ("cat", "dog")


def test_other_files_do_not_disturb(tmp_path):
    make(tmp_path, CLASSES | {"00000_stats.json": '{"count": 2}', "cat/about.json": ""})
    make(tmp_path, {"classes.csv": "id,label\n0,cat\n", "readme.txt": "image, a path"})
    assert open_folder(tmp_path).label_names == ("cat", "dog")


def test_one_folder_with_everything_is_no_class(tmp_path):
    make(tmp_path, {"images/1.png": PNG, "images/2.png": PNG, "labels.csv": "id,l\n"})
    with pytest.raises(config.ConfigError, match="all pictures lie in one folder, im"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, captions="folders").label_names == ("images",)
    # Of a set to validate with, the classes are known.
    assert len(open_folder(tmp_path, classes=("dogs", "images"))) == 2


def test_folders_of_splits_may_have_a_year(tmp_path):
    names = [f"{split}2017/{k}/1.png" for split in ("train", "val") for k in "ab"]
    make(tmp_path, dict.fromkeys(names, PNG))
    found = open_folder(tmp_path)
    read = [found.read(i) for i in range(4)]
    assert [(p.caption, p.held_out) for p in read] == [
        ("a", False),
        ("b", False),
        ("a", True),
        ("b", True),
    ]


def test_classes_within_classes_are_said(tmp_path):
    make(tmp_path, {"pets/cat/1.png": PNG, "pets/dog/1.png": PNG, "cars/1.png": PNG})
    said = open_folder(tmp_path).captions_from
    assert said == "the names of 2 folders, not of those within them"


def test_endings_of_captions_may_be_in_upper_case(tmp_path):
    make(tmp_path / "texts", {"1.PNG": PNG, "1.TXT": "one", "2.png": PNG})
    make(tmp_path / "texts", {"2.txt": "two"})
    found = outcomes(open_folder(tmp_path / "texts"))
    assert found == {"1.PNG": "one", "2.png": "two"}
    for name, text in (
        ("Captions.CSV", "file_name,caption\n1.png,three\n"),
        ("METADATA.JSONL", '{"file_name": "1.png", "text": "three"}'),
    ):
        make(tmp_path / name, {"a/1.png": PNG, f"a/{name}": text})
        assert outcomes(open_folder(tmp_path / name)) == {"1.png": "three"}


def test_folders_of_network_drives_are_hidden(tmp_path):
    make(tmp_path, CLASSES | {"@eaDir/cat/1.png": PNG})
    assert open_folder(tmp_path).label_names == ("cat", "dog")


def test_archives_beside_pictures_are_named(tmp_path):
    make(tmp_path, CLASSES | {"bird.zip": b"PK", "fish.tar": b""})
    said = open_folder(tmp_path).captions_from
    assert said.endswith("(not read: the archive bird.zip and 1 more archives)")


def test_links(tmp_path):
    make(tmp_path, CLASSES)
    (tmp_path / "dog/loop").symlink_to(tmp_path)
    (tmp_path / "dog/lost.png").symlink_to("nowhere.png")
    (tmp_path / "dog/own.png").symlink_to("own.png")
    (tmp_path / "dog/cat.png").symlink_to("../cat/1.png")
    os.mkfifo(tmp_path / "dog/pipe.png")
    found = open_folder(tmp_path)
    nowhere = "it is a link that leads nowhere, or no file"
    assert {found.read(0).name: found.read(0).caption} == {"cat/1.png": "cat"}
    assert outcomes(found) == {
        "1.png": "dog",
        "cat.png": "dog",
        "lost.png": nowhere,
        "own.png": nowhere,
        "pipe.png": nowhere,
    }
    (tmp_path / "twin").symlink_to("cat")
    with pytest.raises(config.ConfigError, match="folders cat and twin are the same"):
        open_folder(tmp_path)


def test_shards_that_are_links_to_nowhere_are_refused(tmp_path):
    tar(tmp_path / "0.tar", [("1.png", PNG), ("1.txt", b"one")])
    (tmp_path / "1.tar").symlink_to("nowhere.tar")
    with pytest.raises(config.ConfigError, match="1 shards are links that lead nowh"):
        pictures.open_pictures("webdataset", str(tmp_path))


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path, monkeypatch):
    make(tmp_path, CLASSES)
    scandir = os.scandir

    def denied(folder):
        if str(folder).rstrip("/").endswith("dog"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(config.ConfigError, match="Permission denied: .*dog"):
        open_folder(tmp_path)


def test_names_that_are_not_utf_8_are_bad_records(tmp_path):
    make(tmp_path, CLASSES)
    with open(os.fsencode(tmp_path) + b"/dog/\xff.png", "wb") as file:
        file.write(PNG)
    found = open_folder(tmp_path)
    with pytest.raises(pictures.BadRecord) as bad:
        found.read(2)
    assert str(bad.value).encode()  # it can be written
    assert bad.value.reason == "its name is not UTF-8; rename it"
    lines = pictures.examples_of(found)
    assert lines == [
        "captions are from the names of 2 folders, for example",
        "  cat/1.png: 'cat'",
        "  dog/1.png: 'dog'",
        "labels: 0 cat, 1 dog",
    ]


def test_where_nothing_is_readable_no_example_is_promised(tmp_path):
    make(tmp_path, {"cat/1.png": b"", "dog/1.png": b""})
    lines = pictures.examples_of(open_folder(tmp_path))
    assert lines[0] == "captions are from the names of 2 folders"
    assert lines[1:] == ["labels: 0 cat, 1 dog"]


def test_of_many_classes_the_first_and_the_last_label_are_said(tmp_path):
    make(tmp_path, {f"c{k:02d}/1.png": PNG for k in range(12)})
    last = pictures.examples_of(open_folder(tmp_path))[-1]
    assert last.startswith("labels: 0 c00, 1 c01, ")
    assert last.endswith(", 9 c09, ... 11 c11")


# A file of another kind, and what is said where pictures were expected.
OTHER_KINDS = {
    "cifar/data_batch_1": (pickle.dumps({}, 2), "is a Python pickle, which is never"),
    "train.pkl": (b"", "is a Python pickle, which is never read"),
    "train-images-idx3-ubyte.gz": (b"\x1f\x8b", "holds arrays, which are not read"),
    "a.npz": (b"PK", "holds arrays, which are not read"),
    "0.tar": (b"", "are read with config.data.source=webdataset"),
    "0.parquet": (b"", "are read with config.data.source=huggingface"),
    "set.zip": (b"PK", "is an archive: unpack it"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_files_of_another_kind_are_refused_by_name(name, tmp_path):
    content, said = OTHER_KINDS[name]
    make(tmp_path, {name: content, "readme.html": ""})
    with pytest.raises(config.ConfigError) as refused:
        open_folder(tmp_path)
    assert f"2 files is a picture; {name}" in str(refused.value) or (
        f"2 files is a picture; files as {name}" in str(refused.value)
    )
    assert said in str(refused.value)


def test_tars_within_tars_and_pickles_are_named(tmp_path):
    members = [("n01.tar", b"x"), ("2.pyd", b"x"), ("3.png", PNG), ("3.cls", b"1")]
    tar(tmp_path / "0.tar", [*members, ("4.png", PNG), ("4.txt", b"four")])
    found = outcomes(pictures.open_pictures("webdataset", str(tmp_path)))
    packed = "it is an archive or a pickle, which is not read: unpack it"
    assert found["0.tar:n01"] == found["0.tar:2"] == packed
    assert found["0.tar:4"] == "four"
    assert "label and no caption; where labels are all there is" in found["0.tar:3"]


def test_tables_of_addresses_alone_are_refused(tmp_path):
    rows = pa.table({"URL": ["http://a"], "TEXT": ["a cat"]})
    pq.write_table(rows, tmp_path / "0.parquet")
    with pytest.raises(config.ConfigError, match="only their addresses, column 'URL'"):
        pictures.open_pictures("huggingface", str(tmp_path))
    both = rows.append_column("jpg", [[PNG]])
    pq.write_table(both, tmp_path / "0.parquet")
    found = pictures.open_pictures("huggingface", str(tmp_path))
    assert found.read(0).caption == "a cat"


def test_files_that_only_have_the_name_of_a_picture(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    make(tmp_path, {"1.png": pointer, "2.png": "<!DOCTYPE html><p>404", "3.png": PNG})
    make(tmp_path, {f"{i}.txt": "a" for i in (1, 2, 3)})
    found = outcomes(open_folder(tmp_path))
    assert found["1.png"].endswith("pointer of Git LFS; fetch the file, git lfs pull")
    assert found["2.png"] == "not a picture but a web page: its download failed"
    assert found["3.png"] == "a"
