"""Paths in an object store, on fsspec's store in memory."""

import dataclasses
import datetime
import email
import errno
import hashlib
import io
import json
import os
import pathlib
import sys
import uuid

import fsspec
import numpy as np
import pytest
from finished_study import make_workdir

from scaling_ldm import config, records, report
from scaling_ldm.records import backends, places, table
from scaling_ldm.records.errors import ConfigError, Held, LocalOnly
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.report import figures, plotting
from scaling_ldm.training import growing, progress, run_files
from scaling_ldm.workdir import lock, ownership, samples


@pytest.fixture
def far():
    """A folder of its own in the store."""
    return ObjectPath.of(f"memory://{uuid.uuid4().hex}/study")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parts_of_a_path_are_those_of_its_url():
    path = ObjectPath.of("memory://bucket//a/./b.json")
    assert str(path) == path.as_posix() == "memory://bucket/a/b.json"
    assert (path.name, path.suffix, path.parent.name) == ("b.json", ".json", "a")
    assert str(path.parent / "c" / "d") == "memory://bucket/a/c/d"
    assert str(path.with_name("e.f")) == "memory://bucket/a/e.f"
    assert path.relative_to(path.parents[1]).as_posix() == "a/b.json"
    assert path.expanduser() == path.resolve() == path.absolute() == path
    assert {path: 1}[ObjectPath.of("memory://bucket/a/b.json")] == 1
    assert isinstance(path, pathlib.Path) and isinstance(path.parent, ObjectPath)


@pytest.mark.parametrize("url", ["gs://", "memory:///", "memory://a/../b"])
def test_a_url_without_a_bucket_is_refused(url):
    with pytest.raises(ConfigError, match="give a bucket"):
        ObjectPath.of(url)


def test_files_are_written_found_and_removed(far):
    assert not far.exists() and list(far.iterdir()) == [] and far.below() == []
    for name in ("runs/b/record.json", "runs/a/record.json", "runs/a/x.npy", "plan"):
        (far / name).write_text(name)
    assert far.is_dir() and not far.is_file()
    assert (far / "plan").is_file() and not (far / "plan").is_dir()
    assert not (far / "pla").exists()
    assert [p.name for p in far.iterdir()] == ["plan", "runs"]
    found = [p.relative_to(far).as_posix() for p in far.glob("runs/*/record.json")]
    assert found == ["runs/a/record.json", "runs/b/record.json"]
    assert [p.name for p in (far / "runs").glob("*")] == ["a", "b"]
    assert [p.name for p in (far / "runs" / "a").glob("x.*")] == ["x.npy"]
    (far / "plan").unlink()
    (far / "plan").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError) as raised:
        (far / "plan").unlink()
    assert raised.value.filename == str(far / "plan")
    (far / "runs" / "a").rename(far / "runs" / "c")
    assert far.below() == ["runs/b/record.json", "runs/c/record.json", "runs/c/x.npy"]
    (far / "runs").rmtree()
    assert not far.exists()


def test_of_several_writers_one_creates(far):
    path = far / "lock.json"
    path.create(b"first")
    with pytest.raises(FileExistsError) as raised:
        path.create(b"second")
    assert raised.value.errno == errno.EEXIST and path.read_text() == "first"


def local_uses():
    """What takes a path for a local one."""
    return {
        "open": lambda p: open(p, "w"),
        "os.open": lambda p: os.open(p, os.O_CREAT | os.O_WRONLY),
        "mkdir": os.makedirs,
        "np.save": lambda p: np.save(p, np.zeros(1)),
        "np.load": np.load,
        "exists": os.path.exists,
        "replace": lambda p: p.replace("x"),
        "rename": lambda p: p.rename("x"),
        "touch": lambda p: p.touch(),
        "append": lambda p: p.open("ab"),
        "write": lambda p: p.open("w"),
        "stat": lambda p: p.stat(),
        "rglob": lambda p: list(p.rglob("*")),
    }


@pytest.mark.parametrize("name", local_uses())
def test_no_use_as_a_local_path_makes_a_local_file(here, far, name):
    with pytest.raises(LocalOnly, match=f"^{far}"):
        local_uses()[name](far)
    assert os.listdir(here) == []


def test_a_local_copy_of_a_path_cannot_be_written(here, far):
    copy = pathlib.Path(*far.parts)
    with pytest.raises(OSError):
        copy.mkdir(parents=True)
    with pytest.raises(OSError):
        copy.write_text("x")
    assert os.listdir(here) == []


# --- Failures of a store.


class Failing(fsspec.AbstractFileSystem):
    """A file system whose every request fails; what fsspec makes of that is its own."""

    cachable = False

    def __init__(self, error):
        super().__init__()
        self.error = error

    def _fail(self, *_, **__):
        raise self.error

    info = ls = find = cat_file = pipe_file = put_file = rm_file = modified = _fail


REQUESTS = {
    "is_file": lambda p: p.is_file(),
    "is_dir": lambda p: p.is_dir(),
    "exists": lambda p: p.exists(),
    "iterdir": lambda p: list(p.iterdir()),
    "glob": lambda p: list(p.glob("*")),
    "read_bytes": lambda p: p.read_bytes(),
    "write_text": lambda p: p.write_text("x"),
    "create": lambda p: p.create(b""),
    "unlink": lambda p: p.unlink(missing_ok=True),
    "written_at": lambda p: p.written_at(),
    "write_file": lambda p: records.write_text(p, "x"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_store_that_fails_is_never_taken_for_one_without_the_file(
    far, name, monkeypatch
):
    monkeypatch.setattr(
        backends,
        "_file_system",
        lambda _: Failing(RuntimeError("Connection\n refused")),
    )
    with pytest.raises(OSError) as raised:
        REQUESTS[name](far)
    assert raised.value.errno == errno.EHOSTUNREACH
    line = records.in_one_line(raised.value)
    assert line == (
        "The store does not answer (RuntimeError: Connection refused): "
        f"{far}; mend that, then run the same command to continue"
    )


def answered(status, text="no"):
    """An exception of a backend, which holds the status of HTTP."""
    error = RuntimeError(text)
    error.code = status
    return error


def answered_by_s3(code, status):
    """An exception of botocore, as s3fs hands it on."""
    error = OSError(errno.EBUSY, "a text")
    error.__cause__ = RuntimeError("An error occurred")
    error.__cause__.response = {
        "Error": {"Code": code},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return error


def because_of(cause):
    error = ValueError("it failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("no"),
        OSError("Forbidden: b\nno"),
        ValueError("PERMISSION_DENIED: no"),
        answered(401),
        answered("403"),
        because_of(answered(403)),
        answered_by_s3("SignatureDoesNotMatch", 403),
        type("RefreshError", (Exception,), {})("revoked"),
    ],
    ids=str,
)
def test_a_refusal_of_a_store_is_a_missing_permission(far, error, monkeypatch):
    monkeypatch.setattr(backends, "_file_system", lambda _: Failing(error))
    for name, doing in (("write_text", "write"), ("read_bytes", "read")):
        with pytest.raises(PermissionError, match=f"No permission to {doing} there"):
            REQUESTS[name](far)


def test_writing_to_a_bucket_that_is_missing_says_so(far, monkeypatch):
    monkeypatch.setattr(
        backends, "_file_system", lambda _: Failing(FileNotFoundError("b"))
    )
    with pytest.raises(FileNotFoundError, match="No such bucket"):
        far.write_text("x")
    assert not far.exists()


@pytest.mark.parametrize(
    "error",
    [
        answered(503, "checkpoints/403"),
        answered(429, "Forbidden"),
        OSError("b/checkpoints/403/401: reset"),
        answered_by_s3("SlowDown", 503),
    ],
    ids=str,
)
def test_a_store_that_fails_on_a_path_with_a_number_is_no_refusal(
    far, error, monkeypatch
):
    monkeypatch.setattr(backends, "_file_system", lambda _: Failing(error))
    with pytest.raises(OSError, match="The store does not answer") as raised:
        far.read_bytes()
    assert raised.value.errno == errno.EHOSTUNREACH


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Bad Request: b/x\ninvalid name"),
        answered(400),
        answered_by_s3("InvalidRequest", 400),
        type("ParamValidationError", (Exception,), {})("an impossible name"),
    ],
    ids=str,
)
def test_a_store_that_refuses_a_request_has_answered(far, error, monkeypatch):
    monkeypatch.setattr(backends, "_file_system", lambda _: Failing(error))
    with pytest.raises(OSError, match="The store refuses the request") as raised:
        far.read_bytes()
    assert raised.value.errno == errno.EINVAL and raised.value.filename == str(far)


@pytest.mark.parametrize(
    "code, status", [("PreconditionFailed", 412), ("ConditionalRequestConflict", 409)]
)
def test_a_condition_that_does_not_hold_is_another_version(
    far, code, status, monkeypatch
):
    failing = Failing(answered_by_s3(code, status))
    monkeypatch.setattr(backends, "_file_system", lambda _: failing)
    with pytest.raises(FileExistsError) as raised:
        far.create(b"")
    assert raised.value.filename == str(far)


@pytest.mark.parametrize(
    "error",
    [TypeError("a defect"), AttributeError("x"), OSError(errno.ENOSPC, "full", "/t")],
    ids=str,
)
def test_what_no_store_has_said_stays_what_it_is(far, error, monkeypatch):
    monkeypatch.setattr(backends, "_file_system", lambda _: Failing(error))
    with pytest.raises(type(error)) as raised:
        far.read_bytes()
    assert raised.value is error


def test_no_bucket_is_missing_where_an_object_or_a_local_file_is(
    far, tmp_path, monkeypatch
):
    with pytest.raises(FileNotFoundError) as raised:
        far.upload(tmp_path / "x")
    assert raised.value.filename == str(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="No such file"):
        far.unlink()
    monkeypatch.setattr(ObjectPath, "below", lambda _: ["gone"])
    with pytest.raises(FileNotFoundError, match="No such file") as raised:
        far.rename(far / "to")
    assert raised.value.filename == str(far / "gone")


@pytest.mark.parametrize(
    "scheme, package, extra", [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")]
)
def test_a_missing_package_is_named_with_its_extra(
    here, monkeypatch, scheme, package, extra
):
    backends._file_system.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    try:
        said = rf"{scheme}://b/x: {scheme}:// needs .*\[{extra}\]"
        with pytest.raises(ConfigError, match=said):
            places.place(f"{scheme}://b/x")
    finally:
        backends._file_system.cache_clear()
    assert os.listdir(here) == []


# --- The files of a study.


def test_rows_are_added_replaced_and_dropped(far, tmp_path):
    record = dict.fromkeys(("study", "run_id", "group", "metric", "weights"), "a")
    record |= dict.fromkeys(("seed", "params", "images", "tokens"), 1)
    record |= dict.fromkeys(("budget_flops", "flops", "value", "low", "high"), 1.0)
    record |= {"params_without_embeddings": 1, "level": 0.9, "protocol_hash": "p"}
    rows = [records.Measurement(**record, step=step) for step in (5, 6, 7)]
    path, twin = far / table.FILE, tmp_path / "twin.jsonl"
    for step in (
        lambda p: table.append_rows(p, rows[:2]),
        lambda p: table.append_rows(p, rows[2:]),
        lambda p: table.put_rows(p, [dataclasses.replace(rows[1], value=2.0)]),
        lambda p: table.drop_rows(p, 6),
    ):
        step(path)
        step(twin)
        assert path.read_bytes() == twin.read_bytes()
    assert [(r.step, r.value) for r in table.read_rows(path)[0]] == [(5, 1.0), (6, 2.0)]


@pytest.mark.slow  # the figures; by day, the table and the rows are read and written
def test_a_report_from_a_store_is_that_from_a_folder(far, tmp_path, monkeypatch):
    picture = plotting.Plot(
        name="a", caption="A", svg="<svg></svg>", png=b"1", pdf=b"2"
    )
    monkeypatch.setattr(figures, "draw", lambda *_: [picture])
    local = make_workdir(tmp_path, "few", lean=True)
    for file in local.rglob("*"):
        if file.is_file():
            (far / file.relative_to(local).as_posix()).write_bytes(file.read_bytes())
    (far / "report" / "figures" / "old.png").write_bytes(b"")
    assert records.read_table(far) == records.read_table(local)
    assert report.write(far) == far / "report" / "index.html"
    report.write(local)
    for file in (local / "report").rglob("*"):
        if file.suffix in (".html", ".csv", ".png"):
            assert (far / file.relative_to(local).as_posix()).read_bytes() == (
                file.read_bytes()
            )
    assert not (far / "report" / "figures" / "old.png").exists()


def test_a_directory_is_registered_and_refused_as_on_a_disk(far):
    experiment = config.resolve(config.default())
    ownership.register(experiment, far)
    ownership.check(experiment, far)
    other = config.default()
    other.optimizer.learning_rate = 0.5
    with pytest.raises(ConfigError, match="holds another experiment"):
        ownership.check(config.resolve(other), far)
    (far / "experiment.json").unlink()
    with pytest.raises(ConfigError, match="holds no experiment.json"):
        ownership.check(experiment, far)


@pytest.mark.parametrize("field, value", [("tensorboard", True), ("profile_steps", 3)])
def test_what_others_write_to_folders_is_refused(far, tmp_path, field, value):
    c = config.default()
    c.train[field] = value
    train = config.resolve(c).train
    with pytest.raises(ConfigError, match=f"config.train.{field} = {value}: .*{far}"):
        places.check_fields(far, train)
    places.check_fields(tmp_path, train)


def test_pictures_are_read_and_compared_with_their_checksums(far):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    path = samples.shard_folder(far) / "00000.npy"
    samples.write_images(path, images, "of")
    (read,) = samples.read_images(far)
    np.testing.assert_array_equal(read, images)
    buffer = io.BytesIO()
    np.save(buffer, images + 1)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(records.Damaged, match="other pictures"):
        list(samples.read_images(far))


def test_checkpoints_count_once_they_are_committed(far, tmp_path):
    for name in ("8/commit_success.txt", "8/state/d", "16/state/d", "damaged-4/x"):
        (far / name).write_text("")
    assert run_files.steps(far) == [8]
    assert [p.name for p in run_files.unfinished(far, "-tmp-")] == ["16"]
    for name in ("8", "16.orbax-tmp-3", "damaged-4"):
        (tmp_path / name).mkdir()
    assert run_files.steps(tmp_path) == [8]
    assert [p.name for p in run_files.unfinished(tmp_path, "-tmp-")] == [
        "16.orbax-tmp-3"
    ]


def test_a_log_is_whole_at_each_flush_and_continues(far, monkeypatch):
    files = run_files.RunFiles(far)
    log = progress.MetricLog(files, 0, False)
    log.write(1, {"loss": 1.0})
    assert files.metrics.read_bytes() == b""  # not a write for every step
    log.flush()
    log.write(2, {"loss": 0.5})
    log.close()
    steps = [json.loads(x)["step"] for x in files.metrics.read_text().splitlines()]
    assert steps == [1, 2]
    log = progress.MetricLog(files, 1, False)  # step 2 is done again
    monkeypatch.setattr(growing, "EVERY", -1.0)
    log.write(2, {"loss": 0.25})
    lines = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 0.25]


# --- Locks.


def elsewhere(path, age):
    """A lock of a process on another machine, renewed some seconds ago."""
    held = vars(lock._this_process()) | {"host": "other", "place": "other", "pid": 7}
    path.write_text(json.dumps(held))
    entry = fsspec.filesystem("memory").store[f"/{path._key}"]
    entry.modified -= datetime.timedelta(seconds=age)


def test_a_lock_is_held_renewed_and_released(far):
    path = far / lock.NAME
    with lock.holding([path]):
        before = path.written_at()
        with pytest.raises(Held, match=f"{far} is in use by process {os.getpid()}"):
            with lock.holding([path]):
                pass
        lock._held[path].beat()
        assert path.written_at() > before
        assert f".{lock.NAME}" not in " ".join(far.below())
    assert not path.exists()


def test_a_lock_of_a_holder_elsewhere_is_taken_over_when_it_is_stale(far, capsys):
    path = far / lock.NAME
    elsewhere(path, age=lock.STALE + 20)
    with lock.holding([path]):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "process 7 on other" in capsys.readouterr().err
    assert far.below() == []


def test_a_lock_of_a_living_holder_elsewhere_is_refused(far, monkeypatch):
    path = far / lock.NAME
    elsewhere(path, age=5)
    monkeypatch.setattr(lock, "_pause", lambda _: elsewhere(path, age=1))
    with pytest.raises(Held, match="It is on another machine"):
        with lock.holding([path]):
            pass
    assert json.loads(path.read_text())["pid"] == 7


def test_a_holder_that_was_taken_over_ends(far, monkeypatch):
    path, said = far / lock.NAME, []
    monkeypatch.setattr(lock, "_when_lost", said.append)
    with lock.holding([path]):
        elsewhere(path, age=0)
        lock._held[path].beat()
    assert said and "was taken over by process 7 on other" in said[0]
    assert json.loads(path.read_text())["pid"] == 7


class Versioned(type(fsspec.filesystem("memory"))):
    """The store in memory, with versions and the requests of gs:// that ask for one.

    Attributes:
      under_way: called while a write or a removal is between here and the store.
      limits: of time, of each request.
    """

    cachable = False
    base = "https://store/storage/v1/"

    def __init__(self):
        super().__init__()
        self.under_way, self.limits = lambda: None, []

    def info(self, path, **given):
        self.limits.append(given.get("timeout"))
        found = super().info(path)
        written = self.store[self._strip_protocol(path)].modified
        return found | {"generation": written.isoformat()}

    def cat_file(self, path, start=None, end=None, **given):
        self.limits.append(given.get("timeout"))
        return super().cat_file(path)

    def pipe_file(self, path, value, mode="overwrite", **given):
        self._travel()
        return super().pipe_file(path, value, mode)

    def rm_file(self, path):
        self._travel()
        return super().rm_file(path)

    def _travel(self):
        under_way, self.under_way = self.under_way, lambda: None
        under_way()

    def call(self, method, path, *args, ifGenerationMatch, timeout, **given):
        self._travel()
        self.limits.append(timeout)
        if method == "POST":
            assert given["uploadType"] == "multipart"
            assert (
                path.format(*args) == f"https://store/upload/storage/v1/b/{args[0]}/o"
            )
            head = f"Content-Type: {given['headers']['Content-Type']}\r\n\r\n"
            whole = email.message_from_bytes(head.encode() + given["data"])
            meta, content = (x.get_payload(decode=True) for x in whole.get_payload())
            key = f"{args[0]}/{json.loads(meta)['name']}"
        else:
            assert (method, path) == ("DELETE", "b/{}/o/{}")
            key = "/".join(args)
        if super().info(key) and self.info(key)["generation"] != ifGenerationMatch:
            raise FileExistsError(key)
        if method == "POST":
            super().pipe_file(key, content)
        else:
            super().rm_file(key)


@pytest.fixture
def versioned(monkeypatch):
    store = Versioned()
    monkeypatch.setattr(backends, "_file_system", lambda _: store)
    return store


def test_a_heartbeat_that_arrives_late_does_not_write_over_the_next_holder(
    far, versioned, monkeypatch
):
    path, said = far / lock.NAME, []
    monkeypatch.setattr(lock, "_when_lost", said.append)
    with lock.holding([path]):
        held = lock._held[path]
        before = path.written_at()
        held.beat()
        assert path.written_at() > before and path.read_text() == held._text
        versioned.under_way = lambda: elsewhere(path, age=0)
        held.beat()
        assert json.loads(path.read_text())["pid"] == 7 and said == []
        held.beat()
        assert "was taken over by process 7 on other" in said[0]
    assert json.loads(path.read_text())["pid"] == 7


def test_a_release_that_arrives_late_leaves_the_lock_of_the_next_holder(far, versioned):
    path = far / lock.NAME
    with lock.holding([path]):
        pass
    assert not path.exists()
    with lock.holding([path]):
        versioned.under_way = lambda: elsewhere(path, age=0)
    assert json.loads(path.read_text())["pid"] == 7


def test_a_takeover_that_arrives_late_leaves_the_lock_of_the_next_holder(
    far, versioned, monkeypatch
):
    path = far / lock.NAME
    elsewhere(path, age=lock.STALE + 20)
    mine = lock.Lock(path)
    found = mine._read()
    create = lock.lock_file.create

    def created(*given):
        create(*given)
        versioned.under_way = lambda: elsewhere(path, age=0)

    monkeypatch.setattr(lock.lock_file, "create", created)
    assert not mine._replace(found)
    assert json.loads(path.read_text())["host"] == "other"
    assert far.below() == [lock.NAME]


def test_a_heartbeat_gives_up_long_before_its_lock_is_stale(far, versioned):
    path = far / lock.NAME
    with lock.holding([path]):
        versioned.limits.clear()
        lock._held[path].beat()
        limits = versioned.limits[:]
        versioned.limits.clear()
    for asked in (limits, versioned.limits):
        assert len(asked) >= 3 and None not in asked[:3]
        assert lock.BEAT + sum(x or 0 for x in asked) < lock.STALE / 2


class ByContent(type(fsspec.filesystem("memory"))):
    """The store in memory, with the versions of s3:// and its requests on condition."""

    cachable = False

    def info(self, path, **_):
        digest = hashlib.md5(super().cat_file(path)).hexdigest()
        return super().info(path) | {"ETag": digest}

    def cat_file(self, path, start=None, end=None, **_):
        return super().cat_file(path)

    def call_s3(self, method, Bucket, Key, IfMatch, timeout, Body=None):
        path = f"{Bucket}/{Key}"
        if self.info(path)["ETag"] != IfMatch:
            raise answered_by_s3("PreconditionFailed", 412)
        if method == "put_object":
            super().pipe_file(path, Body)
        else:
            assert (method, Body) == ("delete_object", None)
            super().rm_file(path)


@pytest.fixture
def by_content(monkeypatch):
    """A folder of its own on s3://."""
    store = ByContent()
    monkeypatch.setattr(backends, "_file_system", lambda _: store)
    return ObjectPath.of(f"s3://{uuid.uuid4().hex}/study")


def test_a_lock_on_s3_is_written_anew_and_released(by_content):
    path = by_content / lock.NAME
    with lock.holding([path]):
        held, before = lock._held[path], path.version()
        held.beat()
        assert path.version() != before
        assert lock.lock_file.text(path) == held._text == lock.lock_file.read(path)[0]
        assert json.loads(held._text)["pid"] == os.getpid()
        with pytest.raises(FileExistsError):
            path.write_over(before, b"late", 1.0)
        with pytest.raises(FileExistsError):
            path.unlink_version(before, 1.0)
        with pytest.raises(Held, match=f"in use by process {os.getpid()}"):
            with lock.holding([path]):
                pass
    assert not path.exists()


def test_a_holder_on_s3_that_beats_during_a_takeover_keeps_its_lock(
    by_content, monkeypatch
):
    path, said = by_content / lock.NAME, []
    monkeypatch.setattr(lock, "_when_lost", said.append)
    with lock.holding([path]):
        held, other = lock._held[path], lock.Lock(path)
        other._text = other._text.replace(f'"pid": {os.getpid()}', '"pid": 7')
        found = other._read()
        read = other._read

        def read_then_beaten():
            held.beat()
            return dataclasses.replace(read(), beat=found.beat)

        monkeypatch.setattr(other, "_read", read_then_beaten)
        assert not other._replace(found)
        held.beat()
        assert lock.lock_file.text(path) == held._text and said == []
