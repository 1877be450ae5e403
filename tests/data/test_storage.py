"""Files by path, pattern and URL: the same names and bytes wherever they lie."""

import os
import sys
import uuid

import fsspec
import pytest

from scaling_ldm import config
from scaling_ldm.data import shards, storage
from scaling_ldm.records import backends
from scaling_ldm.workdir import exit_status

FILES = {
    "a/one-08.tar": b"08",
    "a/one-09.tar": b"0909",
    "a/one-10.tar": b"101010",
    "a/deep/two.tar": b"0123456789",
    "a/note.TXT": b"",
    "a/.hidden/x.tar": b"x",
    "a/._one-08.tar": b"x",
}


@pytest.fixture(params=["local", "file", "memory"])
def root(request, tmp_path):
    if request.param != "memory":
        for name, data in FILES.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        yield ("file://" if request.param == "file" else "") + str(tmp_path)
        return
    fs, base = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for name, data in FILES.items():
        fs.pipe_file(f"{base}/{name}", data)
    yield f"memory:/{base}"
    fs.rm(base, recursive=True)


def test_a_folder_is_all_that_is_not_hidden(root):
    found = storage.find(root)
    assert list(found.files) == [
        "a/deep/two.tar",
        "a/note.TXT",
        "a/one-08.tar",
        "a/one-09.tar",
        "a/one-10.tar",
    ]
    assert [file.size for file in found.files.values()] == [10, 0, 2, 4, 6]
    assert list(storage.find(root, (".txt",)).files) == ["a/note.TXT"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/one-{08..10}.tar", ["one-08.tar", "one-09.tar", "one-10.tar"]),
        ("a/one-{08,10}.tar", ["one-08.tar", "one-10.tar"]),
        ("a/one-*.tar", ["one-08.tar", "one-09.tar", "one-10.tar"]),
        ("a/one-0?.tar", ["one-08.tar", "one-09.tar"]),
        ("a/one-[01][!8].tar", ["one-09.tar", "one-10.tar"]),
        ("a/*.tar", ["one-08.tar", "one-09.tar", "one-10.tar"]),
        ("a/**/two.tar", ["deep/two.tar"]),
        ("{a/one-08,a/deep/two}.tar", ["a/deep/two.tar", "a/one-08.tar"]),
        ("a/deep/two.tar", ["two.tar"]),
    ],
)
def test_patterns(root, pattern, names):
    assert list(storage.find(f"{root}/{pattern}").files) == names


def test_any_part_of_a_file(root):
    found = storage.find(root)
    name = "a/deep/two.tar"
    assert found.read(name) == b"0123456789"
    assert found.read(name, 3, 4) == b"3456"
    assert found.read(name, 8, 99) == b"89"
    assert found.read(name, 4) == b"456789"
    assert found.read(name, 4, 0) == b""
    assert found.read("a/note.TXT") == b""
    with found.open(name) as file:
        file.seek(7)
        assert file.read() == b"789"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("b", "no such file or folder"),
        ("a/one-{08..12}.tar", r"2 of its 5 parts match no file: .*one-11.tar"),
        ("a/x*.tar", "1 of its 1 parts match no file"),
        ("a/one-{10..08}.tar", "counts down"),
    ],
)
def test_what_is_not_there_is_named(root, pattern, said):
    with pytest.raises(config.ConfigError, match=said):
        storage.find(f"{root}/{pattern}")


def test_a_folder_without_such_files(root):
    with pytest.raises(config.ConfigError, match="no files that end in .jpg, .png"):
        storage.find(root, (".jpg", ".png"))


def test_numbers_keep_their_width(tmp_path):
    for name in ("s-8", "s-9", "s-10"):
        (tmp_path / name).write_bytes(b"x")
    assert len(storage.find(f"{tmp_path}/s-{{8..10}}").files) == 3
    with pytest.raises(config.ConfigError, match="3 of its 3 parts"):
        storage.find(f"{tmp_path}/s-{{08..10}}x")


def test_a_pattern_does_not_walk_deeper_than_it_goes(tmp_path, monkeypatch):
    for name in ("a/s.tar", "a/deep/s.tar", "a/deep/er/s.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    walked = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda p: walked.append(p) or scandir(p))
    assert list(storage.find(f"{tmp_path}/a/*.tar").files) == ["s.tar"]
    assert list(storage.find(f"{tmp_path}/*/*/s.tar").files) == ["a/deep/s.tar"]
    folders = {os.path.relpath(path, tmp_path) for path in walked}
    assert folders == {"a", ".", "a/deep"}


@pytest.mark.parametrize("opened", [storage.find, shards.Store])
@pytest.mark.parametrize("missing", ["gcsfs", "aiohttp"])
def test_a_missing_backend_says_what_to_install(missing, opened, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(config.ConfigError, match=r"pip install 'scaling_ldm\[gcs\]'"):
        opened("gs://bucket/shards")


def test_an_unknown_protocol_and_no_path():
    with pytest.raises(config.ConfigError, match="zz:// cannot be opened"):
        storage.find("zz://bucket/shards")
    with pytest.raises(config.ConfigError, match="no path is given"):
        storage.find("")


def test_a_store_that_fails_is_told_as_it_says(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("credentials expired")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", refuse)
    with pytest.raises(config.ConfigError, match="RuntimeError: credentials expired"):
        storage.find("memory://somewhere")


def replaced(store):
    with store.replace("x") as partial:
        partial.write_bytes(b"x")


STORE_REQUESTS = {
    "read": lambda s, _: s.read("x"),
    "read_json": lambda s, _: s.read_json("x"),
    "write_json": lambda s, _: s.write_json("x", {}),
    "names": lambda s, _: s.names(),
    "remove": lambda s, _: s.remove("x"),
    "replace": lambda s, _: replaced(s),
    "copy": lambda s, folder: s.copy("x", folder / "x"),
}


@pytest.mark.parametrize("name", STORE_REQUESTS)
def test_a_store_of_records_that_fails_is_storage_and_no_defect(
    name, tmp_path, monkeypatch
):
    class HttpError(Exception):
        code = 503

    def fail(*_, **__):
        raise HttpError("later")

    backend = fsspec.get_filesystem_class("memory")
    for request in ("cat_file", "pipe_file", "ls", "rm_file", "put_file", "get_file"):
        monkeypatch.setattr(backend, request, fail)
    store = shards.Store("memory://bucket/records")
    with pytest.raises(OSError, match="The store does not answer") as raised:
        STORE_REQUESTS[name](store, tmp_path)
    assert raised.value.filename.startswith("memory://bucket/records")
    assert exit_status.of(raised.value) == exit_status.EXIT["storage"]


def test_a_store_of_records_reads_what_it_wrote(tmp_path):
    store = shards.Store(f"memory://{uuid.uuid4().hex}/records")
    assert store.names() == set() and store.read("x") is None
    replaced(store)
    store.write_json("y.json", {"a": 1})
    assert store.names() == {"x", "y.json"}
    assert store.read("x") == b"x" and store.read_json("y.json")["a"] == 1
    store.copy("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"x"
    store.remove("x")
    store.remove("x")
    assert store.names() == {"y.json"}


def test_limits_of_time_do_not_depend_on_the_working_directory(monkeypatch):
    given, limits = [], {"session_kwargs": {"timeout": 60}, "use_listings_cache": False}
    monkeypatch.setattr(backends, "_prepare_google", lambda: dict(limits))
    others = {"config_kwargs": {"read_timeout": 60}, "use_listings_cache": False}
    monkeypatch.setattr(backends, "_prepare_amazon", lambda: dict(others))

    def opened(url, **options):
        given.append(options)
        return None, "b"

    monkeypatch.setattr(fsspec.core, "url_to_fs", opened)
    shards.Store("gs://b/records")
    shards.Store("gcs://b/records")
    shards.Store("s3://b/records")
    shards.Store("memory://b/records")
    storage._filesystem("gs://b/pictures")
    timed = {"session_kwargs": {"timeout": 60}}
    assert given == [limits, limits, others, {}, timed]


def test_copies_are_made_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    fs, base = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    fs.pipe_file(f"{base}/x.bin", b"first")
    found = storage.find(f"memory:/{base}")
    with pytest.raises(config.ConfigError, match="cache=FOLDER"):
        found.fetch(["x.bin"], "", "files are read")
    (copy,) = found.fetch(["x.bin"], str(tmp_path), "files are read")
    assert copy.read_bytes() == b"first"
    copy.write_bytes(b"kept?")
    assert found.fetch(["x.bin"], str(tmp_path), "")[0].read_bytes() == b"kept?"
    fs.pipe_file(f"{base}/x.bin", b"other")
    found = storage.find(f"memory:/{base}")
    assert found.fetch(["x.bin"], str(tmp_path), "")[0].read_bytes() == b"other"
    assert not list(tmp_path.rglob(".partial-*"))


def test_links_in_a_circle_end(tmp_path, monkeypatch):
    seen = []
    realpath = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda p: seen.append(p) or realpath(p))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "f.txt").write_bytes(b"1")
    (tmp_path / "x" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert list(storage.find(str(tmp_path)).files) == ["x/f.txt"]
    assert len(seen) == 3


def test_a_partial_file_never_takes_the_place(tmp_path):
    target = tmp_path / "sub" / "t"
    with pytest.raises(KeyError), storage.atomic(target) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    assert not list((tmp_path / "sub").iterdir())
