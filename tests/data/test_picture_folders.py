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


def make(root, originals, names, texts=()):
    """Pictures of these names, and text files as pairs of a name and a text."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(originals[0].image))
    for name, text in texts:
        (root / name).write_text(text)


def captions_of(root, **options):
    """{name: caption} of a folder whose records are all good."""
    found = pictures.open_pictures("image_folder", str(root), **options)
    return {p.name: p.caption for p in map(found.read, range(len(found)))}


def rows(*names):
    """A table of objects."""
    lines = [json.dumps({"file_name": n, "text": f"a photo of {n}"}) for n in names]
    return "\n".join(lines)


def test_folder_tables_lie_anywhere_below(tmp_path, originals):
    tables = {"train/metadata.jsonl": rows("1.png"), "val/x/captions.csv": "file,text"}
    tables["val/x/captions.csv"] += "\n2.png,two\ny/3.png,three\n"
    make(
        tmp_path,
        originals,
        ["train/1.png", "val/x/2.png", "val/x/y/3.png"],
        tables.items(),
    )
    assert captions_of(tmp_path) == {
        "train/1.png": "a photo of 1.png",
        "val/x/2.png": "two",
        "val/x/y/3.png": "three",
    }
    (tmp_path / "val" / "metadata.jsonl").write_text(rows("x/2.png"))
    with pytest.raises(config.ConfigError, match="val/x/2.png is in two tables, val/x"):
        captions_of(tmp_path)


def test_folder_table_may_name_files_from_the_root(tmp_path, originals):
    table = [("meta/captions.csv", "file,text\na/1.png,one\n")]
    make(tmp_path, originals, ["a/1.png", "meta/0.png"], table)
    found = pictures.open_pictures("image_folder", str(tmp_path))
    assert found.read(0).caption == "one"
    assert outcomes(found)["0.png"] == "it has no caption: not in meta/captions.csv"


def test_folder_caption_files_come_before_folder_names(tmp_path, originals):
    texts = [("10_dog/1.caption", "a dog"), ("10_dog/2.caption", "two dogs")]
    make(tmp_path, originals, ["10_dog/1.png", "10_dog/2.png"], texts)
    assert sorted(captions_of(tmp_path).values()) == ["a dog", "two dogs"]
    (tmp_path / "10_dog" / "1.txt").write_text("dog, animal")
    with pytest.raises(config.ConfigError, match=r"\.txt and \.caption files lie besi"):
        captions_of(tmp_path)
    assert sorted(captions_of(tmp_path, captions="caption").values())[0] == "a dog"


def test_folder_captions_in_json_beside_the_pictures(tmp_path, originals):
    said = {"caption": "a dog", "width": 512, "label": 0}
    texts = [("d/1.json", json.dumps(said)), ("d/2.json", "[]"), ("d/3.json", "{}")]
    make(tmp_path, originals, [f"d/{i}.png" for i in range(1, 5)], texts)
    found = pictures.open_pictures("image_folder", str(tmp_path), label="label")
    assert ".json" in found.captions_from
    assert (found.read(0).caption, found.read(0).label) == ("a dog", 0)
    got = outcomes(found)
    assert got["2.png"] == "its .json is no object"
    assert got["3.png"].startswith(".json: no column with a usual name for the caption")
    assert got["4.png"] == "it has no caption: no d/4.json"
    # img2dataset writes both; a text file takes precedence, as in a .tar.
    for i in range(1, 5):
        (tmp_path / f"d/{i}.txt").write_text(f"text {i}")
    assert captions_of(tmp_path)["d/1.png"] == "text 1"
    other = pictures.open_pictures("image_folder", str(tmp_path), captions="json")
    assert other.read(0).caption == "a dog"


def test_folder_json_without_captions_leaves_folder_names(tmp_path, originals):
    names = ["red_fox/1.png", "wolf/1.png"]
    make(tmp_path, originals, names, [("red_fox/1.json", '{"boxes": []}')])
    assert captions_of(tmp_path) == dict(zip(names, ["red fox", "wolf"], strict=True))


def test_folder_metadata_in_parquet(tmp_path, originals):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"file_name": ["1.png", "b/2.png"], "text": ["one", None], "n": [0, 7]}
    make(tmp_path, originals, ["train/1.png", "train/b/2.png"])
    table = tmp_path / "train" / "metadata.parquet"
    parquet.write_table(pa.table(columns), table)
    found = pictures.open_pictures("image_folder", str(tmp_path), label="n")
    assert found.captions_from == "the table train/metadata.parquet"
    assert (found.read(0).caption, found.read(0).label) == ("one", 0)
    assert outcomes(found)["2.png"] == "it has no caption"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(config.ConfigError, match=r"metadata\.parquet cannot be read"):
        captions_of(tmp_path)


def test_folder_numbers_of_kohya_are_no_part_of_a_class(tmp_path, originals):
    names = ["10_sks dog/1.png", "5_a_cat/1.png", "2_sks dog/2.png"]
    make(tmp_path / "all", originals, names)
    found = pictures.open_pictures("image_folder", str(tmp_path / "all"))
    got = {p.name: (p.caption, p.label) for p in map(found.read, range(3))}
    said = [("sks dog", 1), ("a cat", 0), ("sks dog", 1)]
    assert got == dict(zip(names, said, strict=True))
    assert found.label_names == ("a_cat", "sks dog")
    assert "'10_sks dog' begin with a number" in found.captions_from
    assert "each counts once" in found.captions_from
    # With a folder that has none, a number belongs to the name.
    make(tmp_path / "one", originals, ["3_d/1.png", "flat/1.png"])
    assert captions_of(tmp_path / "one")["3_d/1.png"] == "3 d"


def test_folder_of_a_split_is_no_caption(tmp_path, originals):
    names = ["red_fox/1.png", "owl/2.png"]
    kept = [f"{split}/{name}" for split in ("Train", "val", "test") for name in names]
    make(tmp_path / "own", originals, [f"animals/{name}" for name in kept])
    found = pictures.open_pictures("image_folder", str(tmp_path / "own"))
    got = [(p.name, p) for p in map(found.read, range(6))]
    assert {p.caption for _, p in got} == {"red fox", "owl"}
    assert {p.label for n, p in got if "owl" in n} == {0}
    assert [n for n, p in got if not p.held_out] == [
        "animals/Train/owl/2.png",
        "animals/Train/red_fox/1.png",
    ]
    make(tmp_path / "one", originals, [f"train/{name}" for name in names])
    assert captions_of(tmp_path / "one")["train/owl/2.png"] == "owl"
    found = pictures.open_pictures("image_folder", str(tmp_path / "one"))
    assert {found.read(i).held_out for i in range(2)} == {None}
    make(tmp_path / "flat", originals, ["train/1.png", "test/2.png"])
    with pytest.raises(config.ConfigError, match="no captions for test/2.png"):
        captions_of(tmp_path / "flat")


def test_folder_names_that_are_not_clear_are_refused(tmp_path, originals):
    make(tmp_path, originals, ["train/1.png", "plane/2.png"])
    with pytest.raises(config.ConfigError, match="train may be a split or a class bes"):
        captions_of(tmp_path)
    assert set(captions_of(tmp_path, captions="folders").values()) == {"train", "plane"}
    (tmp_path / "train").rename(tmp_path / "car")
    (tmp_path / "plane" / "all.csv").write_text("id,n\n1,2\n")
    assert set(captions_of(tmp_path).values()) == {"car", "plane"}
    (tmp_path / "plane" / "about.csv").write_text("Filename,Caption\n2.png,a plane\n")
    with pytest.raises(config.ConfigError, match="about.csv looks like a table of cap"):
        captions_of(tmp_path)


def test_where_captions_come_from_is_said_with_examples(tmp_path, originals):
    texts = [(f"{i}.txt", f"number {i}") for i in range(40) if i != 20]
    make(tmp_path, originals, [f"{i:02}.png" for i in range(40)])
    make(tmp_path, originals, [], [(f"{int(n[:-4]):02}.txt", t) for n, t in texts])
    found = pictures.open_pictures("image_folder", str(tmp_path))
    assert pictures.examples_of(found) == [
        "captions are from text files beside the pictures, .txt, for example",
        "  00.png: 'number 0'",
        "  13.png: 'number 13'",
        "  26.png: 'number 26'",
    ]
    (tmp_path / "00.txt").write_text("")
    assert "  01.png: 'number 1'" in pictures.examples_of(
        pictures.open_pictures("image_folder", str(tmp_path))
    )


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


def test_folder_pictures_of_every_ending_count(tmp_path, originals):
    good = png(originals[0].image)
    for name in ("a.jfif", "b.JPE", "c.avif", "d.heic", "e.dng"):
        (tmp_path / name).write_bytes(good if name != "e.dng" else b"MM\0*raw")
        (tmp_path / name).with_suffix(".txt").write_text(name)
    got = outcomes(pictures.open_pictures("image_folder", str(tmp_path)))
    assert [got[name] for name in list(got)[:4]] == list(got)[:4]
    assert len(got) == 5 and "e.dng" not in got["e.dng"]


def test_names_are_alike_however_accents_are_encoded(tmp_path, originals):
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    good = png(originals[0].image)
    for folder in ("table", "text", f"classes/{nfc}", f"classes/{nfd}"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{nfd}.png").write_bytes(good)
    (tmp_path / "table/captions.csv").write_text(f"file_name,text\n{nfc}.png,a\n")
    (tmp_path / f"text/{nfc}.txt").write_text("b")
    for folder, caption in (("table", "a"), ("text", "b")):
        found = pictures.open_pictures("image_folder", str(tmp_path / folder))
        assert [p.caption for p in map(found.read, range(len(found)))] == [caption]
    found = pictures.open_pictures("image_folder", str(tmp_path / "classes"))
    got = {(p.caption, p.label) for p in map(found.read, range(2))}
    assert len(got) == len(found.label_names) == 1 and len(found) == 2


def test_folder_labels_of_a_table(tmp_path, originals):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(png(originals[0].image))
    rows = [
        {"file": f"{name}.png", "text": "x", "kind": kind}
        for name, kind in zip("abc", (2, 2.5, None), strict=True)
    ]
    lines = [json.dumps(row) for row in (*rows, {"file": "d.png", "text": "x"})]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    found = pictures.open_pictures("image_folder", str(tmp_path), label="kind")
    got = outcomes(found)
    assert got == {
        "a.png": "x",
        "b.png": "its label is 2.5, no whole number",
        "c.png": "it has no label",
        "d.png": "it has no label",
    }


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({}, {}, "no captions for a.png and others: neither captions.csv"),
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
        (
            {"captions.csv": "file,text,text\na.png,x,y\n"},
            {},
            "2 columns are called 'text', and only one can be the caption",
        ),
        (
            {"captions.csv": "file,text,n,n\na.png,x,1,2\n"},
            {"label": "n"},
            "2 columns are called 'n', and only one can be the label",
        ),
        ({"captions.jsonl": "[" * 100_000}, {}, "line 1: no JSON: maximum recursion"),
        ({"captions.jsonl": "9" * 5000}, {}, "line 1: no JSON: "),
        ({"captions.csv": "file,text\na.png,x, y\n"}, {}, "line 2: more fields"),
        ({"captions.csv": "file,text\n"}, {}, "no rows below its header line"),
        (
            {"captions.csv": "file,text\na.png,x\na.png,y\n"},
            {},
            "line 3: a.png occurs twice",
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
