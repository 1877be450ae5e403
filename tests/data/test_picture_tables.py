"""Hugging Face data sets: Parquet and Arrow files."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_layouts import (
    COUNT,
    make_originals,
    outcomes,
    png,
    table,
    write_parquet,
    write_saved,
)

from scaling_ldm import config
from scaling_ldm.data import pictures


@pytest.fixture(scope="module")
def originals():
    return make_originals()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_tables_splits(tmp_path, originals):
    write_saved(tmp_path / "train", originals)
    write_saved(tmp_path / "test", originals[:9])
    with pytest.raises(config.ConfigError, match=r"several splits \(test, train\)"):
        pictures.open_pictures("huggingface", str(tmp_path))
    with pytest.raises(config.ConfigError, match="no split 'dev'; it has: test, train"):
        pictures.open_pictures("huggingface", str(tmp_path), split="dev")
    assert len(pictures.open_pictures("huggingface", str(tmp_path), split="test")) == 9


@pytest.mark.parametrize(
    ("names", "split", "count"),
    [
        (["pets.parquet"], "train", 9),  # as the Hub has it
        (["pets.parquet"], "", 9),
        (["pets_train_0.parquet", "pets_test_0.parquet"], "train", 9),
        (["training/0.parquet", "testing/0.parquet"], "testing", 9),
        (["train/a.parquet", "train/b.parquet"], "train", 18),
    ],
)
def test_tables_names_of_splits(tmp_path, originals, names, split, count):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table(originals[:9]), tmp_path / name)
    found = pictures.open_pictures("huggingface", str(tmp_path), split=split)
    assert len(found) == count


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        (
            ["pets.parquet"],
            "test",
            "no split 'test'; its files name none; .*data.split",
        ),
        (["a_train.parquet", "a_test.parquet"], "", r"several splits \(.*data.split"),
        (["training.parquet"], "train", "no split 'train'; it has: training; choose"),
    ],
)
def test_tables_splits_that_are_not_there(tmp_path, originals, names, split, said):
    for name in names:
        pq.write_table(table(originals[:1]), tmp_path / name)
    with pytest.raises(config.ConfigError, match=said):
        pictures.open_pictures("huggingface", str(tmp_path), split=split)


CAPTIONS = {
    "dictionary": lambda: pa.array(["x", "y"]).dictionary_encode(),
    "string view": lambda: pa.array(["x", "y"], pa.string_view()),
    "fixed list": lambda: pa.array([["x", "z"], ["y", "z"]], pa.list_(pa.string(), 2)),
    "list of dictionary": lambda: pa.array(
        [["x"], ["y"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))
    ),
    "large": lambda: pa.array([["x"], ["y"]], pa.large_list(pa.large_string())),
}


@pytest.mark.parametrize("kind", CAPTIONS)
@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_tables_kinds_of_text_and_bytes(tmp_path, originals, kind, image):
    good = png(originals[0].image)
    rows = pa.table({"image": pa.array([good] * 2, image), "text": CAPTIONS[kind]()})
    pq.write_table(rows, tmp_path / "x.parquet")
    found = pictures.open_pictures("huggingface", str(tmp_path))
    assert [found.read(i).caption for i in range(2)] == ["x", "y"]


def test_tables_with_a_column_twice(tmp_path, originals):
    good = pa.array([png(originals[0].image)])
    columns = {"image": good, "text": pa.array(["a"]), "n": pa.array([1])}
    for twice in columns:
        names = [*columns, twice]
        rows = pa.Table.from_arrays([columns[name] for name in names], names=names)
        with pa.ipc.new_stream(str(tmp_path / "x.arrow"), rows.schema) as out:
            out.write_table(rows)
        with pytest.raises(
            config.ConfigError, match=f"2 columns are called '{twice}', and"
        ):
            pictures.open_pictures("huggingface", str(tmp_path), label="n")


def test_tables_text_that_is_not_utf_8(tmp_path, originals):
    text = pa.Array.from_buffers(
        pa.string(),
        1,
        [None, pa.py_buffer(np.array([0, 2], "i4")), pa.py_buffer(b"\xff\xe9")],
    )
    rows = pa.table({"image": [png(originals[0].image)], "text": text})
    pq.write_table(rows, tmp_path / "x.parquet")
    found = pictures.open_pictures("huggingface", str(tmp_path))
    with pytest.raises(pictures.BadRecord, match="its text is not UTF-8"):
        found.read(0)


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
        ({"caption": "n"}, "column 'n' holds int64; captions are text"),
        ({"label": "x"}, "no column 'x'"),
    ):
        with pytest.raises(config.ConfigError, match=words):
            pictures.open_pictures("huggingface", str(tmp_path), **options)


def test_tables_names_of_classes(tmp_path, originals):
    """As `datasets` writes a ClassLabel; other metadata is no error."""
    known = {"_type": "ClassLabel", "names": ["cat", "red fox"]}
    features = {"features": {"n": known, "text": {"_type": "Value"}}}
    rows = {"image": [png(originals[0].image)], "text": ["x"], "n": [1]}
    path = tmp_path / "x.parquet"

    def names_of(about, label):
        plain = pa.table(rows)
        plain = plain.replace_schema_metadata({"huggingface": about})
        pq.write_table(plain, path)
        found = pictures.open_pictures("huggingface", str(tmp_path), label=label)
        return found.label_names

    about = json.dumps({"info": features})
    assert names_of(about, "n") == ("cat", "red fox")
    assert names_of(about, "") == ()
    for odd in ("{", "[]", "{}", about.replace('"cat"', "1")):
        assert names_of(odd, "n") == ()
    pq.write_table(pa.table(rows), path)
    found = pictures.open_pictures("huggingface", str(tmp_path), label="n")
    assert (found.label_names, found.read(0).label) == ((), 1)


def write_classes(path, image, rows, **names):
    """Rows whose columns `names` are ClassLabels."""
    kinds = {n: {"_type": "ClassLabel", "names": found} for n, found in names.items()}
    about = json.dumps({"info": {"features": kinds}})
    count = len(next(iter(rows.values())))
    plain = pa.table({"image": [png(image)] * count} | rows)
    pq.write_table(plain.replace_schema_metadata({"huggingface": about}), path)


def test_names_of_classes_are_captions_where_there_is_no_text(tmp_path, originals):
    image, names = originals[0].image, ["cat", "red_fox"]
    write_classes(tmp_path / "x.parquet", image, {"n": [1, 0, -1, 2, None]}, n=names)
    found = pictures.open_pictures("huggingface", str(tmp_path), label="n")
    assert found.captions_from == "the names of the classes in column 'n'"
    assert (found.read(1).caption, found.read(1).label) == ("cat", 0)
    assert found.label_names == ("cat", "red_fox")
    # An experiment that reads no labels has the captions, too.
    found = pictures.open_pictures("huggingface", str(tmp_path))
    got = [*outcomes(found).values()]
    bad = ["it has no caption", "its class is 2; its classes are 0 to 1"]
    assert got == ["red fox", "cat", *bad, "it has no caption"]
    assert pictures.examples_of(found)[:2] == [
        "captions are from the names of the classes in column 'n', for example",
        "  x.parquet:0: 'red fox'",
    ]
    # With text, they are captions only if they are named.
    rows = {"n": [1, 0], "text": ["first", "second"], "m": [0, 1]}
    write_classes(tmp_path / "x.parquet", image, rows, n=names, m=["dog", "owl"])
    assert pictures.open_pictures("huggingface", str(tmp_path)).read(0).caption == (
        "first"
    )
    options = {"caption": "n", "label": "m"}
    found = pictures.open_pictures("huggingface", str(tmp_path), **options)
    assert (found.read(0).caption, found.label_names) == ("red fox", ("dog", "owl"))


def test_names_of_classes_that_are_not_clear(tmp_path, originals):
    image, rows = originals[0].image, {"n": [1, 0], "m": [0, 1]}
    several = {"n": ["cat", "fox"], "m": ["dog", "owl"]}
    write_classes(tmp_path / "x.parquet", image, rows, **several)
    with pytest.raises(config.ConfigError, match="several columns .* 'n', 'm'; name"):
        pictures.open_pictures("huggingface", str(tmp_path))
    found = pictures.open_pictures("huggingface", str(tmp_path), label="m")
    assert found.read(0).caption == "dog"
    write_classes(tmp_path / "x.parquet", image, {"n": [1]}, n=["cat", "fox"])
    write_classes(tmp_path / "y.parquet", image, {"n": [1]}, n=["fox", "cat"])
    with pytest.raises(config.ConfigError, match="y.parquet has other classes in"):
        pictures.open_pictures("huggingface", str(tmp_path))


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
