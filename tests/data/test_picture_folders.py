"""Folders of pictures with captions beside them, in tables or in folder names."""

import json

import pytest
from picture_layouts import (
    make_originals,
    outcomes,
    png,
)

from scaling_ldm import config
from scaling_ldm.data import pictures


@pytest.fixture(scope="module")
def originals():
    return make_originals()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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
