"""What every source of pictures keeps."""

import pathlib

import fsspec
import pytest
from fsspec.implementations import memory
from picture_layouts import (
    COUNT,
    LAYOUTS,
    assert_are,
    make_originals,
    upload,
)

from scaling_ldm import config
from scaling_ldm.data import pictures
from scaling_ldm.workdir import exit_status


@pytest.fixture(scope="module")
def originals():
    return make_originals()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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


class HttpError(Exception):
    """As that of gcsfs: no OSError."""

    code = 503


@pytest.mark.parametrize("opened", [False, True])
def test_a_store_that_fails_is_storage_and_no_defect(
    layout, opened, tmp_path, monkeypatch
):
    source, path, options, _ = layout
    if "cache" in pictures.options_of(source):
        options = options | {"cache": str(tmp_path / "copies")}
    url, backend = upload(path), fsspec.get_filesystem_class("memory")

    def fail(*_, **__):
        raise HttpError("later")

    found = pictures.open_pictures(source, url, **options) if opened else None
    if opened and any((tmp_path / "copies").rglob("*.arr*")):
        return  # nothing is read from the store any more
    monkeypatch.setattr(backend, "cat_file", fail)
    monkeypatch.setattr(backend, "get_file", fail)
    monkeypatch.setattr(memory.MemoryFile, "read", fail, raising=False)
    with pytest.raises(OSError, match="The store does not answer") as raised:
        found = found or pictures.open_pictures(source, url, **options)
        list(pictures.read_ahead(found, range(len(found)), 2))
    # fsspec's memory adds a slash.
    assert raised.value.filename.replace(":///", "://").startswith(url)
    assert exit_status.of(raised.value) == exit_status.EXIT["storage"]


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
    "tfds": "it has no features.json",
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
