"""Remote shards: what is fetched, what is kept, and what is removed."""

import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import http.server
import os
import threading
import time

import fsspec
import numpy as np
import pytest
from encoded_records import experiment, shards_of, write
from numpy.testing import assert_array_equal

from scaling_ldm import config, records
from scaling_ldm.data import encoded, seals, shard_cache, shard_table, shards
from scaling_ldm.records.errors import CacheFull

FAR = "memory://test_shard_cache/records"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scaling_ldm" / shard_cache.FOLDER


@pytest.fixture(scope="module")
def far():
    """A remote folder of 40 records in 20 shards."""
    return write(FAR, experiment(), per_shard=2)


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    return write(tmp_path_factory.mktemp("near") / "r", experiment(), per_shard=2)


@pytest.fixture
def fetched(monkeypatch):
    """The names of the shards that were fetched, in order."""
    names, copy = [], shards.Store.copy

    def counted(self, name, target):
        names.append(name)
        copy(self, name, target)

    monkeypatch.setattr(shards.Store, "copy", counted)
    monkeypatch.setattr(encoded, "KEPT_BYTES", 0)  # rows are read each time
    return names


def table_of(folder):
    store = shards.Store(folder)
    return store, shard_table.read(store, seals.stored_manifest(store))


def size_of_shard(folder):
    return int(table_of(folder)[1].nbytes.max())


def opened(folder, split="train", **changes):
    return encoded.Encoded(folder, experiment(data=changes), split)


def copies(cache):
    return sorted(cache.glob(f"*{shards.SUFFIX}"))


def size_of(path):
    """Bytes of a copy; 0 if a thread that fetches has removed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def no_others(cache):
    """Whether there are only copies: no lock and no unfinished file."""
    return {*cache.iterdir()} == {*copies(cache)}


def test_opening_fetches_nothing_and_rows_fetch_what_they_need(far, cache, fetched):
    source = opened(far)
    assert not fetched and not copies(cache)
    positions = np.arange(3, dtype=np.int64)
    needed = shards_of(source, positions)
    source.rows(positions)
    assert sorted(fetched) == [shards.shard_name(n) for n in needed]
    source.rows(positions)
    opened(far).rows(positions)  # as another process would
    assert len(fetched) == len(needed) == len(copies(cache))
    assert no_others(cache)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_cache_stays_within_its_bytes(far, near, cache, fetched, threads):
    """Six shards of twenty; rows are those of a local folder, in any case."""
    most = 6 * size_of_shard(far)
    gigabytes = (most + 1) / 1e9
    source = opened(
        far, shuffle_window=1, cache_gigabytes=gigabytes, reader_threads=threads
    )
    here = opened(near, shuffle_window=1)
    largest = 0
    for first in range(0, 120, 4):
        positions = np.arange(first, first + 4)
        assert_array_equal(source.rows(positions)["x"], here.rows(positions)["x"])
        largest = max(largest, sum(map(size_of, copies(cache))))
    assert 0 < largest <= most
    # Three epochs; most shards are fetched once in each.
    assert 40 <= len(fetched) <= 90


def test_the_shard_used_longest_ago_goes(far, cache):
    store, table = table_of(far)
    held = shard_cache.ShardCache(store.copy, 3 * size_of_shard(far) + 1, FAR)
    for number in (0, 1, 2, 0, 3):
        held.prepare(number, table.summary(number))
        time.sleep(0.02)  # more than a tick of the file system's clock
    there = {path.name for path in copies(cache)}
    want = {f"{table.summary(n)['checksum']}{shards.SUFFIX}" for n in (2, 0, 3)}
    assert there == want and no_others(cache)


def wait_until(true):
    limit = time.monotonic() + 20
    while not true() and time.monotonic() < limit:
        time.sleep(0.01)
    assert true()


def test_what_was_read_goes_before_what_was_fetched_ahead(far, fetched):
    """Also where the shard that was fetched ahead came first, long before."""
    gigabytes = (3 * size_of_shard(far) + 1) / 1e9
    files = opened(far, shuffle_window=1, cache_gigabytes=gigabytes)._files
    first = np.zeros(1, np.int64)
    files.ahead({0}, {0, 1})
    wait_until(lambda: len(fetched) == 2)
    time.sleep(0.02)  # more than a tick of the file system's clock
    files.read(first, first)
    files.ahead({1}, {1, 2, 3})  # room for two of these and one more
    wait_until(lambda: len(fetched) == 4)
    files.read(first + 1, first)
    assert sorted(fetched) == [shards.shard_name(n) for n in range(4)]


def test_a_shard_that_is_read_stays_and_a_full_cache_says_so(far, cache):
    store, table = table_of(far)
    held = shard_cache.ShardCache(store.copy, 2 * size_of_shard(far) + 1, FAR)
    files = [held.hold(n, table.summary(n))[1] for n in (0, 1)]
    with pytest.raises(CacheFull, match="config.data.cache_gigabytes allows"):
        held.prepare(2, table.summary(2))
    files[0].close()
    held.prepare(2, table.summary(2))
    first = f"{table.summary(0)['checksum']}{shards.SUFFIX}"
    assert first not in {path.name for path in copies(cache)}
    files[1].close()
    with pytest.raises(config.ConfigError, match="one shard has"):
        shard_cache.ShardCache(store.copy, 10, FAR).prepare(0, table.summary(0))


def test_processes_fetch_a_shard_once(far, cache, fetched):
    """Caches of several processes know one another by their files alone."""
    store, table = table_of(far)

    def slowly(name, target):
        time.sleep(0.05)
        store.copy(name, target)

    many = [shard_cache.ShardCache(slowly, 10**9, FAR) for _ in range(6)]
    start = threading.Barrier(len(many))

    def work(one):
        start.wait()
        for number in range(4):
            one.prepare(number, table.summary(number))

    with concurrent.futures.ThreadPoolExecutor(len(many)) as pool:
        list(pool.map(work, many))
    assert sorted(fetched) == [shards.shard_name(n) for n in range(4)]
    assert len(copies(cache)) == 4 and no_others(cache)


def test_room_that_others_have_taken_counts(far, cache):
    store, table = table_of(far)
    size = size_of_shard(far)
    held = shard_cache.ShardCache(store.copy, 2 * size, FAR)
    mark = cache / f".room-{size + 1}-00ff"
    (cache / f"{mark.name}.data").write_text("half")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with mark.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process is fetching
            done = pool.submit(held.prepare, 0, table.summary(0))
            # What is fetched can be removed later, so this is not the end.
            assert not concurrent.futures.wait([done], timeout=0.3).done
            assert mark.exists() and not copies(cache)
        done.result(20)  # it was killed: its lock is gone
    assert len(copies(cache)) == 1 and no_others(cache)


def test_many_fetches_into_a_small_cache_take_turns(far, cache):
    """Twelve threads, and room for two shards."""
    store, table = table_of(far)

    def slowly(name, target):
        time.sleep(0.01)
        store.copy(name, target)

    held = shard_cache.ShardCache(slowly, 2 * size_of_shard(far), FAR)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for done in [pool.submit(held.prepare, n, table.summary(n)) for n in range(12)]:
            done.result(20)
    assert 1 <= len(copies(cache)) <= 2 and no_others(cache)


def nfs_lock(file, how):
    """Locks as NFS does: by how the file is open."""
    mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    kind = how & ~fcntl.LOCK_NB
    if mode == {fcntl.LOCK_EX: os.O_RDONLY, fcntl.LOCK_SH: os.O_WRONLY}[kind]:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    flock(file, how)


flock = fcntl.flock


def test_the_cache_can_be_on_nfs(far, cache, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", nfs_lock)
    store, table = table_of(far)
    size = size_of_shard(far)
    held = shard_cache.ShardCache(store.copy, 2 * size, FAR)
    for number in range(4):  # the last ones need the room of the first ones
        mark = cache / f".room-{size}-{number:04x}"
        mark.write_text("")  # of a process that was killed
        held.prepare(number, table.summary(number))
    assert len(copies(cache)) == 2 and no_others(cache)


def test_a_file_system_without_locks_is_refused(far, cache, monkeypatch):
    def none(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(config.ConfigError, match="locked there .*XDG_CACHE_HOME") as e:
        opened(far).rows(np.arange(3))
    assert str(cache) in str(e.value)


def test_a_transfer_that_ended_early_is_made_again(far, cache):
    store, table = table_of(far)
    short = [True]

    def cut(name, target):
        store.copy(name, target)
        if short.pop(0):
            os.truncate(target, 5)

    held = shard_cache.ShardCache(cut, 10**9, FAR)
    short += [False]
    held.prepare(0, table.summary(0))
    short += [True, True]
    want = f"{FAR}/{shards.shard_name(1)}: 5 bytes; wanted"
    with pytest.raises(records.Damaged, match=f"^{want}"):
        held.prepare(1, table.summary(1))
    assert not short and len(copies(cache)) == 1 and no_others(cache)


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_what_others_do_to_a_copy_meanwhile(far, cache, fetched, monkeypatch, change):
    """While its bytes are compared: a good copy stays, and no empty one appears."""
    store, table = table_of(far)
    shard_cache.ShardCache(store.copy, 10**9, FAR).prepare(0, table.summary(0))
    (path,) = copies(cache)
    good, check = path.read_bytes(), seals.check_shard
    if change == "replaced":
        path.write_bytes(b"bad")

    def meanwhile(where, *others):
        monkeypatch.setattr(seals, "check_shard", check)
        try:
            check(where, *others)
        finally:
            path.unlink()
            if change == "replaced":
                path.write_bytes(good)

    monkeypatch.setattr(seals, "check_shard", meanwhile)
    found, file = shard_cache.ShardCache(store.copy, 10**9, FAR).hold(
        0, table.summary(0)
    )
    with file:
        assert found == path and path.read_bytes() == file.read() == good
    assert len(fetched) == {"replaced": 1, "removed": 2}[change]
    assert no_others(cache)


def test_a_damaged_copy_is_fetched_again_and_a_damaged_shard_is_refused(
    far, cache, fetched
):
    positions = np.arange(30, dtype=np.int64)
    want = opened(far).rows(positions)
    count = len(fetched)
    path = copies(cache)[0]
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    got = opened(far).rows(positions)
    assert_array_equal(got["x"], want["x"])
    assert len(fetched) == count + 1 and path.read_bytes() == good
    # Of the store itself: nothing bad is kept.
    other = write(f"{FAR}_damaged", experiment(data={"seed": 1}), per_shard=3)
    fs = fsspec.filesystem("memory")
    name = f"{other}/{shards.shard_name(1)}"
    held = fs.cat_file(name)
    for bad in (held[:-1] + bytes([held[-1] ^ 1]), held[:-9]):
        fs.pipe_file(name, bad)
        with pytest.raises(records.Damaged, match="checksum|bytes; wanted"):
            opened(other).rows(positions)
    fs.rm_file(name)
    with pytest.raises(records.Damaged, match="shard-00001.array_record is missing"):
        opened(other).rows(positions)
    assert no_others(cache)


def test_the_next_window_is_fetched_while_this_one_is_read(far, fetched):
    source = opened(far, shuffle_window=2)
    order = source._order
    positions = np.arange(1, dtype=np.int64)
    (now,) = order.windows(positions)
    source.rows(positions)
    soon = {*order.shards_of(now), *order.shards_of(order.following(now))}
    assert {*shards_of(source, positions)} < soon
    want = {shards.shard_name(n) for n in soon}
    limit = time.monotonic() + 20
    while not want <= {*fetched} and time.monotonic() < limit:
        time.sleep(0.01)
    assert want <= {*fetched}
    # And no more than that: not the whole set.
    assert {*fetched} == want and len(want) < 8
    before = len(fetched)
    later = np.array([order.size], np.int64)  # its shards are there
    assert {*shards_of(source, later)} <= soon
    source._files.ahead = lambda *_: None
    source.rows(later)
    assert len(fetched) == before


def test_a_large_remote_set_needs_windows(far):
    small = {"cache_gigabytes": 1.5 * size_of_shard(far) / 1e9}
    with pytest.raises(config.ConfigError, match=r"set config\.data\.shuffle_window"):
        opened(far, **small)
    source = opened(far, shuffle_window=1, **small)
    with pytest.raises(config.ConfigError, match=r"now and next have [34] shards of"):
        source.rows(np.arange(1))
    # Nothing follows the windows of the validation split.
    enough = {"cache_gigabytes": 4 * size_of_shard(far) / 1e9}
    opened(far, shuffle_window=1, **enough).rows(np.arange(1))


def can_leave(cache):
    """How many copies nobody reads."""
    count = 0
    for path in copies(cache):
        with path.open("r+b") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            count += 1
    return count


@pytest.mark.parametrize("window", [0, 2])
def test_validation_fetches_what_it_reads_and_lets_it_go(far, cache, fetched, window):
    source = opened(far, "validation", shuffle_window=window)
    positions = np.arange(2, dtype=np.int64)
    now = {*shards_of(source, positions)}
    if window:
        now = {
            n
            for one in source._order.windows(positions)
            for n in (source._order.shards_of(one))
        }
    source.rows(positions)
    limit = time.monotonic() + 20
    while len(copies(cache)) < len(now) and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.2)  # of what is fetched in the background
    assert {*fetched} == {shards.shard_name(n) for n in now}
    assert 0 < can_leave(cache) == len(copies(cache)) < 10
    train = opened(far)
    train.rows(positions)
    assert can_leave(cache) < len(copies(cache))


def test_rows_that_are_in_memory_fetch_nothing(far, cache):
    source = opened(far, shuffle_window=2)
    positions = np.arange(30, dtype=np.int64)
    want = source.rows(positions)
    asked = []
    source._files.ahead = lambda *windows: asked.append(windows)
    got = source.rows(positions[::-1] + 60)  # of another epoch
    assert not asked and len(got["x"]) == len(want["x"])
    assert_array_equal(source.rows(positions)["x"], want["x"])


@pytest.fixture
def served(near):
    """The address of a local server of the files."""
    pytest.importorskip("aiohttp")
    answer = functools.partial(http.server.SimpleHTTPRequestHandler, directory=near)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_records_are_read_over_http(near, cache, fetched, served):
    source = opened(served)
    positions = np.arange(5, dtype=np.int64)
    assert_array_equal(source.rows(positions)["x"], opened(near).rows(positions)["x"])
    assert len(fetched) == len(shards_of(source, positions)) == len(copies(cache))
