"""Checkpoints: what is saved is restored, and each belongs to one run."""

import dataclasses
import errno
import itertools
import os
import pathlib
import shutil
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm import config, records
from scaling_ldm.records import upgrade
from scaling_ldm.stages import plan
from scaling_ldm.training import checkpoint, checksum, signals, storage_faults


@pytest.fixture(scope="module")
def spec(tiny):
    return plan.plan(config.resolve(tiny))[0]


STATE = {"w": jnp.arange(24.0).reshape(4, 6), "n": jnp.int32(3)}
ABSTRACT = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), STATE
)


def progress(step):
    return checkpoint.ResumeState(data={"next_index": step}, seconds=1.5, restarts=2)


def test_what_is_saved_is_restored_with_its_position(spec, tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    assert saved.restore(ABSTRACT) is None
    for step in (1, 2, 3):
        state = jax.tree.map(lambda a, s=step: a + jnp.asarray(s, a.dtype), STATE)
        saved.save(step, state, progress(step))
    saved.wait()
    restored = saved.restore(ABSTRACT)
    saved.close()
    assert (restored.step, restored.progress) == (3, progress(3))
    np.testing.assert_array_equal(restored.state["w"], STATE["w"] + 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


@pytest.mark.parametrize("content", ["[]", "17"])
def test_a_file_of_orbax_that_is_no_object_is_named(spec, tmp_path, content):
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    saved.save(1, STATE, progress(1))
    saved.close()
    path = tmp_path / "1" / "_CHECKPOINT_METADATA"
    path.write_text(content)
    with pytest.raises(checkpoint.CheckpointError) as refused:
        checkpoint.Checkpoints(tmp_path, spec, keep=2).restore(ABSTRACT)
    assert f"{path} is damaged" in str(refused.value)
    path.unlink()  # as it says
    assert checkpoint.Checkpoints(tmp_path, spec, keep=2).restore(ABSTRACT).step == 1


def test_a_part_is_read_alone_and_checked(spec, tmp_path, monkeypatch):
    """Also where its leaves are not the first ones; the others are not looked at."""
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    saved.save(1, STATE, progress(1))
    saved.wait()
    read = []
    part = checkpoint.Checkpoints._part
    monkeypatch.setattr(
        checkpoint.Checkpoints,
        "_part",
        lambda self, step, **args: read.append(args) or part(self, step, **args),
    )
    for name in STATE:
        restored = saved.restore(ABSTRACT, 1, name)
        np.testing.assert_array_equal(restored.state, STATE[name])
        assert list(read[-1]["state"].item) == [name]
        assert restored.progress == progress(1)
    monkeypatch.setattr(checksum, "of", lambda *_: 0)
    with pytest.raises(checkpoint.CheckpointError, match="checksum 0, saved as"):
        saved.restore(ABSTRACT, 1, "w")
    saved.close()


def test_a_part_of_an_older_checkpoint_is_checked_with_the_whole(
    spec, tmp_path, monkeypatch
):
    with monkeypatch.context() as older:
        older.setattr(
            records, "stamped", lambda meta: {k: meta[k] for k in meta if k != "parts"}
        )
        saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
        saved.save(1, STATE, progress(1))
        saved.wait()
    np.testing.assert_array_equal(saved.restore(ABSTRACT, 1, "w").state, STATE["w"])
    sums = []
    monkeypatch.setattr(checksum, "of", lambda tree, *_: sums.append(tree) or 0)
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        saved.restore(ABSTRACT, 1, "w")
    assert set(sums[0]) == set(STATE)
    saved.close()


@pytest.mark.parametrize(
    ("on_disk", "stay"),
    [
        ([3, 5, 7], [5, 7]),  # no mark yet
        ([3, 5, 10], [5, 10]),
        ([5, 10, 13], [10, 13]),
        ([10, 13, 15, 17], [10, 15, 17]),
        ([10, 15, 17, 20], [10, 20]),  # as many marks as are kept
        ([10, 20, 21], [10, 20, 21]),
        ([10, 20, 21, 22, 23], [10, 20, 22, 23]),
        ([4, 10, 20, 22, 23, 30], [4, 20, 30]),
    ],
)
def test_a_step_between_marks_pushes_out_no_mark(on_disk, stay):
    kept = checkpoint.Kept(2, frozenset({4}), frozenset({10, 20, 30}))
    found = [types.SimpleNamespace(step=step) for step in on_disk]
    answer = kept.should_preserve(found, context=None)
    assert [step for step, yes in zip(on_disk, answer, strict=True) if yes] == stay


def test_a_finished_run_with_fewer_marks_than_are_kept_has_them_alone():
    kept = checkpoint.Kept(9, frozenset(), frozenset({10, 20}))
    found = [types.SimpleNamespace(step=step) for step in (3, 10, 13, 20)]
    assert kept.should_preserve(found, context=None) == [False, True, False, True]


def test_another_runs_checkpoint_is_refused_and_kept(spec, tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    saved.save(1, STATE, progress(1))
    saved.close()
    other = dataclasses.replace(spec, seed=spec.seed + 1)
    saved = checkpoint.Checkpoints(tmp_path, other, keep=2)
    said = f"{tmp_path / '1'} belongs to another run, of other seed: put"
    with pytest.raises(checkpoint.CheckpointError, match=said):
        saved.restore({"another": ABSTRACT["w"]})  # before its state is looked at
    saved.close()
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_newer_versions_checkpoint_is_refused_and_kept(spec, tmp_path, monkeypatch):
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    with monkeypatch.context() as newer:
        newer.setattr(upgrade, "SCHEMA", "9.0.0")
        saved.save(1, STATE, progress(1))
        saved.wait()
    with pytest.raises(records.NewerVersion) as e:
        saved.restore({"another": ABSTRACT["w"]})  # before its state is looked at
    saved.close()
    assert str(e.value).startswith(f"{tmp_path / '1'} was written by scaling_ldm 9.0.0")
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_save_that_orbax_skips_is_an_error(spec, tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    saved.save(5, STATE, progress(5))
    saved.wait()
    with pytest.raises(checkpoint.CheckpointError, match="could not write") as e:
        saved.save(5, STATE, progress(5))
    assert "Repair that, then run" in str(e.value)  # the disk is not full
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "Make room, then run" in str(saved._failed(5, full))
    saved.close()


@pytest.fixture
def one(spec, tmp_path):
    """A folder with one checkpoint, and what opens it."""
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    saved.save(1, STATE, progress(1))
    saved.wait()
    yield saved
    saved.close()


NO_DAMAGE = [
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"),
    ValueError("Error opening zarr3: [OS error 13: EACCES Permission denied]"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_DAMAGE, ids=lambda e: str(e) or type(e).__name__)
def test_what_does_not_lie_in_a_file_is_no_damage(error):
    damage = ValueError("a chunk is not what its checksum says")
    assert not storage_faults.of_environment(None)
    assert not storage_faults.of_environment(damage)
    assert not storage_faults.of_environment(FileNotFoundError(errno.ENOENT, "no"))
    assert storage_faults.of_environment(error)
    damage.__cause__ = error
    assert storage_faults.of_environment(damage)


def test_what_cannot_be_read_is_left_as_it_is(one, tmp_path, monkeypatch):
    def unreadable(*_, **__):
        raise NO_DAMAGE[0]

    monkeypatch.setattr(one, "_part", unreadable)
    with pytest.raises(checkpoint.CheckpointError) as e:
        one.restore(ABSTRACT)
    assert "Permission denied). Nothing was changed there: make it read" in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    monkeypatch.undo()
    assert one.restore(ABSTRACT).step == 1


@pytest.mark.parametrize("name", ["state", "meta", "1"])
def test_a_folder_without_permissions_is_no_damage(one, tmp_path, monkeypatch, name):
    """orbax says that what lies in it is not there; root could read it all the same."""
    folder = next(p for p in (tmp_path, *tmp_path.rglob("*")) if p.name == name)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    scandir = os.scandir

    def denied(path):
        if pathlib.Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as without:
        without.setattr(os, "scandir", denied)
        with pytest.raises(checkpoint.CheckpointError) as e:
            one.restore(ABSTRACT)
    assert "Permission denied" in str(e.value) and str(folder) in str(e.value)
    assert "Nothing was changed there" in str(e.value)
    assert one.set_aside() == []
    assert one.restore(ABSTRACT) is None  # with the permission, it is damage
    assert one.set_aside() == [tmp_path / "damaged-1"]


def test_a_file_without_permission_is_behind_another_error(tmp_path, monkeypatch):
    damage, path = ValueError("its parts do not fit"), tmp_path / "d" / "chunk"
    path.parent.mkdir()
    path.write_bytes(b"0")
    assert storage_faults.behind(None, tmp_path) is None
    assert storage_faults.behind(damage, tmp_path) is damage
    assert storage_faults.behind(damage, tmp_path / "missing") is damage
    monkeypatch.setattr(os, "access", lambda p, mode: p != str(path))
    assert storage_faults.behind(damage, tmp_path).filename == str(path)


def test_a_stop_while_a_checkpoint_is_read_is_no_damage(one, tmp_path, monkeypatch):
    """It ends the process at once; whatever goes on until then sets nothing aside."""
    ends, part = [], one._part
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    listener = signals.Listener(ends.append)
    listener.configure(config.TrainConfig(), None)

    def stopped(*args, **more):
        listener.take([signal.SIGTERM])
        return part(*args, **more)

    monkeypatch.setattr(one, "_part", stopped)
    assert one.restore(ABSTRACT, only=1).step == 1
    assert set(ends) == {"SIGTERM"}
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_damage_of_a_finished_run_is_told_and_changes_nothing(one, spec, tmp_path):
    (chunk, *_) = sorted((tmp_path / "1" / "state" / "d").iterdir())
    chunk.write_bytes(chunk.read_bytes()[:-9] + bytes(9))
    with pytest.raises(checkpoint.CheckpointError) as e:
        one.restore(ABSTRACT, only=1)
    assert f"checkpoint 1 in {tmp_path} is damaged (" in str(e.value)
    assert f"or remove {tmp_path.parent}, and the same" in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["1"] and one.set_aside() == []
    assert one.restore(ABSTRACT) is None  # to continue from, it is passed over
    assert one.set_aside() == [tmp_path / "damaged-1"]


def test_the_folder_of_a_step_under_the_name_of_another_is_damage(one, spec, tmp_path):
    """As somebody may put a copy back; each file in it is whole."""
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    again = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    with pytest.raises(checkpoint.CheckpointError, match=r"\(it is that of step 1\)"):
        again.restore(ABSTRACT, only=2)
    assert again.restore(ABSTRACT).step == 1
    assert again.set_aside() == [tmp_path / "damaged-2"]
    again.close()


def test_nothing_waits_for_the_time_of_day(spec, tmp_path, monkeypatch):
    """It goes forward by an hour at each look; orbax would say "timed out"."""
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    saved.save(1, STATE, progress(1))
    saved.close()
    assert next(hours) > 1, "nothing has looked"


def test_checksum_sees_any_bit_and_any_swap():
    a, b = jnp.arange(4.0), jnp.arange(4.0) + 1
    same = checksum.of({"a": a, "b": b})
    assert same == sum(checksum.of_parts({"a": a, "b": b}).values()) % 2**32
    assert same == checksum.of({"a": a + 0, "b": b + 0})
    assert same != checksum.of({"a": b, "b": a})
    assert same != checksum.of({"a": -a, "b": b})
    assert same != checksum.of({"a": a.at[2].add(2e-7), "b": b})
    assert same != checksum.of({"a": a[::-1], "b": b})
    mesh = jax.make_mesh((2, 2), ("replica", "fsdp"))
    with jax.set_mesh(mesh):
        split = jax.device_put(a, jax.P("fsdp")), jax.device_put(b, jax.P())
        assert same == checksum.of(dict(zip("ab", split, strict=True)))
