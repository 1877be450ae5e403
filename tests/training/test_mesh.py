"""Shardings, and messages about devices that do not fit."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from scaling_ldm import config
from scaling_ldm.training import mesh, train_step


@pytest.fixture(scope="module")
def wide(tiny):
    """The abstract state of a network with leaves above mesh.MIN_SHARDED_SIZE."""
    return train_step.abstract_state(
        train_step.train_functions(config.resolve(tiny), 64, 2, unroll=False)
    )


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves
    }


def test_a_weight_its_average_and_its_moments_lie_together(wide):
    specs = flat(mesh.partition_specs(wide, fsdp=2))
    shapes = flat(wide)
    names = [n.removeprefix("params/") for n in specs if n.startswith("params/")]
    sharded = 0
    for name in names:
        same = [s for n, s in specs.items() if n.endswith("/" + name)]
        assert len(same) == 4, name  # params, ema, mu, nu
        assert len(set(same)) == 1, name
        size = np.prod(shapes[f"params/{name}"].shape)
        if size < 4096:
            assert same[0] == PartitionSpec(), name
        if "blocks/" in name and len(same[0]):
            assert same[0][0] is None, f"{name}: layers are not split"
        sharded += "fsdp" in same[0]
    assert sharded >= 5
    assert specs["step"] == specs["smoothed_loss"] == PartitionSpec()
    assert set(flat(mesh.partition_specs(wide, fsdp=1)).values()) == {PartitionSpec()}


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_fsdp_divides_the_bytes_of_a_device(wide, fsdp):
    device_mesh = mesh.build(config.MeshConfig(fsdp=fsdp), {})
    assert device_mesh.shape == {"replica": 4 // fsdp, "fsdp": fsdp}
    placed = mesh.shardings(device_mesh, wide)
    here = whole = 0
    for leaf, sharding in zip(
        jax.tree.leaves(wide), jax.tree.leaves(placed), strict=True
    ):
        value = jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding)
        here += value.addressable_shards[3].data.nbytes
        whole += value.nbytes
    assert here <= whole * (1 / fsdp + 0.1)
    assert here >= whole / fsdp


@pytest.mark.parametrize(
    ("cfg", "sizes", "words"),
    [
        (config.MeshConfig(fsdp=3), {}, ("fsdp = 3", "4 devices", "[1, 2, 4]")),
        (config.MeshConfig(replica=1, fsdp=2), {}, ("1 x 2", "4", "mesh.replica = -1")),
        (config.MeshConfig(), {"config.train.batch_size": 18}, ("= 18", "16 or 20")),
        (config.MeshConfig(), {"config.train.batch_size": 2}, ("= 2", "nearest: 4")),
    ],
)
def test_devices_that_do_not_fit_are_named_with_a_way_out(cfg, sizes, words):
    with pytest.raises(config.ConfigError) as refused:
        mesh.build(cfg, sizes)
    for word in words:
        assert word in str(refused.value)


def test_batches_are_checked_before_anything_compiles(tiny, tmp_path, monkeypatch):
    from scaling_ldm.stages import plan, train

    experiment = config.resolve(tiny)
    rows = plan.plan(experiment)
    uneven = dataclasses.replace(
        experiment, validation=config.ValidationConfig(samples=20, batch_size=10)
    )

    def compiled(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax, "jit", compiled)
    with pytest.raises(config.ConfigError, match="validation.batch_size = 10"):
        train.run(uneven, tmp_path, list(enumerate(rows)), 1)
    assert not list(tmp_path.iterdir())


def test_rows_of_a_process_and_votes():
    device_mesh = mesh.build(config.MeshConfig(fsdp=2), {})
    assert mesh.rows_of_process(device_mesh, 16).tolist() == list(range(16))
    votes = mesh.request_flags(device_mesh, 3)
    assert votes.shape == (4,)
    assert votes.sharding.spec == mesh.BATCH
    assert mesh.any_process(True) and not mesh.any_process(False)


@pytest.mark.parametrize(("devices", "threads"), [(2, None), (8, "32"), (0, None)])
def test_more_devices_than_cores_get_more_threads(monkeypatch, devices, threads):
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("PJRT_NPROC", "removed after the test, whatever is set in it")
    monkeypatch.delenv("PJRT_NPROC")
    mesh.start_devices(config.MeshConfig(cpu_devices=devices))
    assert told == {"jax_num_cpu_devices": devices or 2}
    assert os.environ.get("PJRT_NPROC") == threads
