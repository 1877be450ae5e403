"""Sets of very many records: their table, and their order in windows of shards."""

import collections
import itertools
import json
import resource
import subprocess
import sys
import weakref

import large_records
import numpy as np
import pytest
from damages import said_about
from encoded_records import (
    CAPTIONS,
    COUNT,
    PER_SHARD,
    experiment,
    shards_of,
    write,
)
from numpy.testing import assert_array_equal

from scaling_ldm import config, data, records
from scaling_ldm.data import (
    encoded,
    hashing,
    row_noise,
    row_order,
    seals,
    shard_files,
    shard_table,
    shards,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("large") / "r", experiment())


def opened(folder, split="train", **changes):
    return encoded.Encoded(folder, experiment(data=changes), split)


# The order of rows, and their noise


def test_the_order_of_older_studies_is_what_it_was(folder):
    """Captions that 0.2.0 gave before there were tables of shards."""
    positions = np.array([0, 1, 2, 29])
    for split, numbers in (("train", [26, 29, 7, 11]), ("validation", [12, 24, 4, 36])):
        found = opened(folder, split, seed=5).captions(positions)
        assert found == [CAPTIONS[i] for i in numbers]
    # By the definition: one permutation of all records of the split.
    kept = np.array([i for i in range(COUNT) if i % 4])
    positions = np.arange(500, dtype=np.int64)
    epoch, slot = np.divmod(positions, len(kept))
    keys = hashing.draw(5, 101, epoch.astype(np.uint64))
    want = kept[hashing.permute(slot, keys, len(kept))]
    assert opened(folder, seed=5).captions(positions) == [CAPTIONS[i] for i in want]


def test_noise_is_that_of_a_generator_for_each_row():
    key = 0xFEDCBA9876543210
    positions = np.array([0, 1, 7, 2**31, 2**40 + 3, 2**62, 7])
    for shape in ((1,), (3, 5), (32, 32, 4)):
        found = row_noise.normals(key, positions, shape)
        for row, position in zip(found, positions, strict=True):
            bits = np.random.Philox(key=[np.uint64(key), np.uint64(position)])
            want = np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
            assert_array_equal(row, want)


def test_threads_change_no_row(folder):
    positions = np.arange(1000, dtype=np.int64)
    want, got = (
        opened(folder, reader_threads=threads).rows(positions) for threads in (1, 7)
    )
    for name, value in want.items():
        assert_array_equal(got[name], value)


# Windows


def starts(counts):
    return np.concatenate([[0], np.cumsum(counts)])


ORDERS = {
    "one shard": ([5], 1),
    "fewer records than a turn": ([7, 0, 9, 4], 2),
    "one lane block": ([300] * 5, 2),
    "many": (np.random.default_rng(0).integers(0, 90, 60), 3),
    "a window of all": ([50] * 40, 1000),
}


@pytest.mark.parametrize(("counts", "window"), ORDERS.values(), ids=ORDERS)
def test_every_record_comes_once_an_epoch(counts, window):
    order = row_order.WindowOrder(3, starts(counts), window)
    total = int(np.sum(counts))
    first, second = (order.places(np.arange(total) + e * total) for e in (0, 1))
    for epoch in (first, second):
        assert_array_equal(np.sort(epoch), np.arange(total))
    assert (first != second).any()
    # Any position by itself.
    some = np.random.default_rng(1).integers(0, total, 50)
    assert_array_equal(order.places(some), first[some])
    other = row_order.WindowOrder(4, starts(counts), window)
    assert (other.places(np.arange(total)) != first).any()


@pytest.mark.parametrize(("counts", "window"), ORDERS.values(), ids=ORDERS)
def test_windows_say_which_shards_are_read_now_and_next(counts, window):
    order = row_order.WindowOrder(3, starts(counts), window)
    total = int(np.sum(counts))
    positions = total + np.arange(total)
    shard = np.searchsorted(starts(counts), order.places(positions), side="right") - 1
    found = collections.defaultdict(set)  # in the order in which they are reached
    for i in range(total):
        (one,) = order.windows(positions[i : i + 1])
        found[one].add(int(shard[i]))
    assert sorted(found) == order.windows(positions)
    of_lane = collections.defaultdict(list)
    for one, there in found.items():
        assert {*order.shards_of(one)} == there
        # Shards differ in size, and empty ones do not count.
        smallest = min(count for count in counts if count)
        assert len(there) <= order.size // smallest + 2
        of_lane[one[1]].append(one)
    for lane, windows in of_lane.items():
        for one, then in itertools.pairwise(windows):
            assert order.following(one) == then
        assert order.following(windows[-1]) == (2, lane, 0)


def test_a_batch_opens_few_shards_on_each_of_many_hosts():
    counts = np.full(20_000, 4096)
    order = row_order.WindowOrder(0, starts(counts), 4)
    batch = 1_000_000 * 1024 + np.arange(1024)
    shard = order.places(batch) // 4096
    # 64 hosts with 16 rows each have shards of their own.
    of_host = [set(rows.tolist()) for rows in shard.reshape(64, 16)]
    assert max(map(len, of_host)) <= 5
    assert sum(map(len, of_host)) == len(set.union(*of_host))
    # A host goes on with the same shards for the length of a window.
    later = order.places(batch[:16] + 400 * 1024) // 4096
    assert len({*later.tolist()} | of_host[0]) <= 10
    whole = row_order.WholeOrder(0, int(counts.sum()))
    assert len({*(whole.places(batch) // 4096).tolist()}) > 900


def test_records_of_a_window_are_mixed_evenly():
    """In each tenth of a lane, about a tenth of each record's neighbours."""
    counts = np.full(64 * 4, 256)
    order = row_order.WindowOrder(0, starts(counts), 4)
    slots = np.arange(64 * 4 * 256)
    lane0 = order.places(slots[slots // 16 % 64 == 0])  # one window of 1024 records
    assert len(lane0) == 1024
    of_shard = collections.Counter((lane0[:256] // 256).tolist())
    assert len(of_shard) == 4
    assert all(40 <= count <= 90 for count in of_shard.values())  # 64 expected, sd 6


def test_rows_in_windows_do_not_depend_on_hosts_or_restarts(folder):
    def stream(rows, window=1):
        source = opened(folder, shuffle_window=window)
        return data.batches(source, batch_size=8, rows=np.array(rows), prefetch=1)

    whole = stream(range(8))
    batches = [next(whole) for _ in range(9)]
    parts = [stream(rows) for rows in ([0, 1, 6], [2, 3, 4, 5, 7])]
    for batch in batches:
        mine, others = (next(part) for part in parts)
        for name, value in batch.items():
            assert_array_equal(mine[name], value[[0, 1, 6]])
            assert_array_equal(others[name], value[[2, 3, 4, 5, 7]])
    state = stream(range(8))
    for _ in range(4):
        next(state)
    again = stream(range(8))
    again.set_state(state.get_state())
    for batch in batches[4:]:
        for name, value in next(again).items():
            assert_array_equal(value, batch[name])
    # The same pictures, in another order.
    a, b = (
        opened(folder, shuffle_window=w).captions(np.arange(30, dtype=np.int64))
        for w in (0, 1)
    )
    assert sorted(a) == sorted(b) and a != b


def test_the_window_is_part_of_a_recipe_and_not_of_the_records(folder):
    e = {w: experiment(data={"shuffle_window": w}) for w in (0, 1, 2)}
    assert len({one.recipe_hash for one in e.values()}) == 3
    assert e[0].recipe_hash == experiment().recipe_hash
    assert encoded.identity(e[0]) == encoded.identity(e[2])
    assert e[1].recipe_hash == (
        experiment(
            data={"shuffle_window": 1, "reader_threads": 9, "cache_gigabytes": 3.0}
        ).recipe_hash
    )
    with pytest.raises(config.ConfigError, match="shuffle_window = 3 is not read"):
        c = config.default()  # icons that are painted: there are no shards
        c.data.shuffle_window = 3
        config.resolve(c)


# The table

CHANGES = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-9],
    "a bit": lambda content: (
        content[:-300] + bytes([content[-300] ^ 1]) + content[-299:]
    ),
    "longer": lambda content: content + b"0",
    "no arrays": lambda content: b"it works on my machine",
}


def as_of_before(folder, target):
    """A copy of the manifest with a list of shards, as it was before the table."""
    store = shards.Store(str(folder))
    manifest = seals.stored_manifest(store)
    found = [
        seals.stored_summary(store, n, "ours")
        for n in range(manifest["shards"]["count"])
    ]
    keys = ("records", "bytes", "checksum", "held_out")
    manifest["shards"] = [{k: one[k] for k in keys} for one in found]
    shards.Store(str(target)).write_json(shards.MANIFEST, seals.sealed(manifest))
    for n in range(len(found)):
        name = shards.shard_name(n)
        shards.Store(str(target)).write(name, store.read(name))


def test_manifests_with_a_list_of_shards_are_read(folder, tmp_path):
    as_of_before(folder, tmp_path)
    positions = np.arange(90, dtype=np.int64)
    for split in ("train", "validation"):
        want, got = (opened(f, split).rows(positions) for f in (folder, str(tmp_path)))
        for name, value in want.items():
            assert_array_equal(got[name], value)


def test_tables_and_bytes_and_back(tmp_path):
    rng = np.random.default_rng(0)
    counts = [9, 0, 16, 1, 0]
    flags = [rng.random(count) < 0.5 for count in counts]
    table = shard_table.ShardTable(
        np.array(counts),
        np.array([1, 2, 2**40, 4, 5]),
        rng.integers(0, 256, (5, 16)).astype(np.uint8),
        np.concatenate([np.packbits(f) for f in flags]),
    )
    store = shards.Store(str(tmp_path))
    store.write(shard_table.FILE, table.to_bytes())
    manifest = {"shards": shard_table.described(table.to_bytes(), 5)}
    found = shard_table.read(store, manifest)
    assert_array_equal(found.held_out_counts(), [f.sum() for f in flags])
    for n, want in enumerate(flags):
        assert_array_equal(found.held_out(n), want)
        assert found.summary(n) == table.summary(n)
    assert found.summary(2)["bytes"] == 2**40
    for validation in (False, True):
        side = shard_table.Side(found, validation)
        want = [
            (n, i) for n, f in enumerate(flags) for i in np.flatnonzero(f == validation)
        ]
        places = np.arange(len(side))
        numbers = side.shards(places)
        assert numbers.tolist() == [n for n, _ in want]
        for n in set(numbers.tolist()):
            inside = side.within(n, places[numbers == n])
            assert inside.tolist() == [i for k, i in want if k == n]
    store.remove(shard_table.FILE)
    with pytest.raises(records.Damaged, match="shards.npz is missing: put a copy back"):
        shard_table.read(store, manifest)


@pytest.mark.parametrize("damage", CHANGES.values(), ids=CHANGES)
def test_a_table_that_was_changed_is_refused(folder, tmp_path, damage):
    path = tmp_path / shard_table.FILE
    for name in (shards.MANIFEST, shard_table.FILE):
        (tmp_path / name).write_bytes(shards.Store(folder).read(name))
    opened(str(tmp_path))
    path.write_bytes(damage(path.read_bytes()))
    assert said_about(path, lambda: opened(str(tmp_path)))


def in_fresh_process(folder, count, per_shard):
    command = [sys.executable, large_records.__file__]
    command += [str(folder), str(count), str(per_shard)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("count", "per_shard", "cost"),
    [
        (1500, 400, lambda folder, *_: large_records.opened(str(folder))),
        pytest.param(150_000, 4000, in_fresh_process, marks=pytest.mark.slow),
    ],
)
def test_a_manifest_of_many_records_opens_fast_and_small(
    tmp_path, count, per_shard, cost
):
    """Without its shards, of which none is touched."""
    large_records.write(str(tmp_path), count, per_shard)
    found = cost(tmp_path, count, per_shard)
    assert found["train"] + found["validation"] == count * per_shard
    if cost is in_fresh_process:
        assert found["seconds"] <= 10
        assert found["peak_bytes"] <= 1e9
    assert found["most_files_of_a_host"] <= 2 * (large_records.WINDOW + 1)
    # Beside the bits, a shard has 32 bytes in the file.
    size = (tmp_path / shard_table.FILE).stat().st_size
    assert size <= count * (per_shard // 8 + 32) + 2000


def test_the_records_of_a_shard_are_where_they_were(folder):
    source = opened(folder)
    positions = np.arange(30, dtype=np.int64)
    numbers = [CAPTIONS.index(c) for c in source.captions(positions)]
    want = sorted({n // PER_SHARD for n in numbers})
    assert shards_of(source, positions) == want


@pytest.fixture
def small(tmp_path):
    """40 records in 20 shards."""
    return write(tmp_path / "r", experiment(), per_shard=2)


@pytest.fixture
def opens(monkeypatch):
    """The shards that were opened, in order."""
    names, reader = [], shard_files.ShardReader

    def counted(path, *others):
        names.append(path.name)
        return reader(path, *others)

    monkeypatch.setattr(shard_files, "ShardReader", counted)
    monkeypatch.setattr(encoded, "KEPT_BYTES", 0)  # rows are read each time
    return names


@pytest.mark.parametrize("window", [0, 4])
def test_shards_of_a_window_stay_open(small, opens, monkeypatch, window):
    """More shards than the usual number: each batch opened all of them again."""
    monkeypatch.setattr(shard_files, "OPEN_SHARDS", 3)
    assert row_order.shards_of_batch(4) >= 320  # 64 lanes of 4 shards, and their ends
    source = opened(small, shuffle_window=window, reader_threads=1)
    for _ in range(2):
        source.captions(np.arange(30))
    train = {*shards_of(source, np.arange(30))}
    assert len(opens) == len(train) * (1 if window else 2) and len(train) > 3


def test_sources_leave_half_of_the_files_to_others(small, opens, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (72, 72))
    monkeypatch.setattr(shard_files, "_SOURCES", weakref.WeakSet())
    sources = [opened(small, reader_threads=1) for _ in range(3)]
    for source in [*sources, *sources]:
        source.captions(np.arange(30))
    held = [len(source._files._open) for source in sources]
    # Each keeps sixteen, whatever the others hold.
    assert held == [20, 16, 16]
