"""Files that are written whole: full disks, and what killed processes leave."""

import copy
import errno

import numpy as np
import pytest

from scaling_ldm import records
from scaling_ldm.data import shards
from scaling_ldm.records import errors, table
from scaling_ldm.training import progress
from scaling_ldm.training.run_files import RunFiles
from scaling_ldm.workdir import ending, exit_status

# Every write to it fails as on a full disk. What may rename gets a link to it alone.
FULL = "/dev/full"


def row(step):
    return records.Measurement(
        study="s",
        run_id="r",
        group="",
        seed=0,
        budget_flops=1.0,
        params=1,
        params_without_embeddings=1,
        step=step,
        flops=1.0,
        images=1,
        tokens=1,
        metric="loss",
        value=1.0,
        low=1.0,
        high=1.0,
        level=1.0,
        weights="raw",
        protocol_hash="",
    )


def encode(folder):
    """Writes a shard as the encode stage does; the records go to a full disk."""
    picture = shards.Record(
        x=np.zeros((2, 2, 3), np.uint8),
        features=None,
        caption="",
        name="",
        label=None,
        held_out=False,
    )
    with shards.Store(str(folder)).replace("file") as partial:
        partial.unlink()
        partial.symlink_to(FULL)
        writer = shards.Writer(partial, count_words=False)
        writer.add(picture, np.zeros((2, 2, 3)), np.zeros((2, 2, 3)))
        writer.close()


def log(folder):
    """Writes a line of a run's metrics."""
    metrics = progress.MetricLog(RunFiles(folder), 0, tensorboard=False)
    metrics._file.close()
    (folder / "file").symlink_to(FULL)
    metrics._file = open(folder / "file", "a", buffering=1)
    try:
        metrics.write(1, {"loss": 1.0})
    finally:  # what is left to write fails again
        metrics.close()


def whole(folder):
    def fill(file):
        with open(FULL, "wb", buffering=0) as full:
            full.write(b"1")

    records.write_file(folder / "file", lambda f: _without_name(lambda: fill(f)))


def _without_name(act):
    """Errors of `write` have no name of a file."""
    try:
        act()
    except OSError as e:
        raise OSError(e.errno, e.strerror) from None


def append(folder):
    (folder / "file").symlink_to(FULL)
    table.append_rows(folder / "file", [row(1)])


@pytest.mark.parametrize("write", [encode, whole, append, log])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, write):
    with pytest.raises(OSError) as e:
        write(tmp_path)
    assert e.value.errno == errno.ENOSPC and records.is_full(e.value)
    said = ending.message(e.value)
    assert said == (
        f"No space left on device: {tmp_path / 'file'}; make room, then run the same "
        "command to continue"
    )
    assert exit_status.of(e.value) == exit_status.EXIT["storage"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_errors_name_the_file_and_ask_for_no_room(tmp_path):
    (tmp_path / "a").write_text("no folder")
    with pytest.raises(OSError) as e:
        records.write_text(tmp_path / "a" / "b", "")
    assert str(tmp_path / "a") in ending.message(e.value)
    assert "make room" not in ending.message(e.value)
    with pytest.raises(ZeroDivisionError), records.writing(tmp_path):
        raise ZeroDivisionError
    assert not records.is_full(ValueError("nothing of that kind"))
    try:
        raise ValueError("not saved") from RuntimeError("No space left on device; 3")
    except ValueError as error:
        assert records.is_full(error)


def test_what_killed_processes_left_is_removed(tmp_path):
    left = [
        tmp_path / name
        for name in (
            ".laws.json.7.0123abcd",
            "samples/.images.tar.4711.89abcdef",
            "samples/.images.tar.4711",  # of 0.1.0
            "runs/a/.metrics.jsonl.12.00000000",
        )
    ]
    others = [
        tmp_path / name
        for name in (
            ".hidden",
            ".notes.7",
            "laws.json",
            "runs/a/checkpoints/3/.x.json.7.0123abcd",
            "samples/images.tar.4711",
        )
    ]
    for path in (*left, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    found = []

    def fill(file):  # what is being written stays
        file.write(b"new")
        found.extend(records.remove_leftovers(tmp_path))

    records.write_file(tmp_path / "laws.json", fill)
    assert sorted(found) == sorted(left)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)
    assert (tmp_path / "laws.json").read_bytes() == b"new"
    assert records.remove_leftovers(tmp_path) == []


def test_a_damaged_file_is_told_with_one_remedy():
    """That of the error itself, or else the one that always helps."""
    plain, own = errors.Damaged("a is cut off"), errors.Damaged("a lacks b", "do c")
    assert ending.message(plain) == "a is cut off; remove it or put a copy back"
    assert ending.message(own) == "a lacks b: do c"
    again = copy.copy(own)  # made anew from its arguments
    assert (str(again), again.remedy) == (str(own), "do c")
