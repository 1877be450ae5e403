"""Meshes and rows where hosts are no neighbours: TPU pods, slices, hosts of GPUs."""

import dataclasses
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from processes import ROOT

from scaling_ldm.training import mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh is made from."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def gpus(hosts, each):
    """Devices of a GPU cluster, in which each host is a slice."""
    return [Device(i, i // each, i // each) for i in range(hosts * each)]


@pytest.mark.parametrize(
    ("hosts", "each", "fsdp"), [(1, 8, 4), (8, 8, 1), (8, 8, 8), (4, 8, 2), (4, 8, 16)]
)
def test_gradients_go_between_hosts_and_weights_within(hosts, each, fsdp):
    devices = gpus(hosts, each)
    grid = mesh.device_grid((hosts * each // fsdp, fsdp), devices)
    assert sorted(d.id for d in grid.flat) == list(range(hosts * each))
    together = [{d.process_index for d in row} for row in grid]
    assert {len(row) for row in together} == {max(1, fsdp // each)}


# The TPU compiler describes pods on any machine. It is read in a process of its own,
# because it takes a lock.
DESCRIBED = """
import sys
import numpy as np
from jax.experimental import topologies
from scaling_ldm import config
from scaling_ldm.training import mesh
name, fsdp, slices = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
more = {"num_slices": slices} if slices > 1 else {}
if name.startswith("v4"):
    more["chip_config_name"] = "megacore"
devices = topologies.get_topology_desc(
    platform="tpu", topology_name=name, **more
).devices
found = mesh.build(config.MeshConfig(replica=-1, fsdp=fsdp), {}, use=devices)
hosts = sorted({device.process_index for device in devices})
rows = [mesh.rows_of_process(found, 4 * found.size, host) for host in hosts]
assert {len(part) for part in rows} == {4 * len(devices) // len(hosts)}
every = np.sort(np.concatenate(rows))
np.testing.assert_array_equal(every, np.arange(4 * len(devices)))
apart = sum(np.any(np.diff(part) != 1) for part in rows)
print(dict(found.shape), len(hosts), "hosts,", apart, "with rows apart")
"""
PODS = {
    ("v4:2x2x4", 1, 1): "{'replica': 16, 'fsdp': 1} 4 hosts, 4",
    ("v4:4x4x8", 8, 1): "{'replica': 16, 'fsdp': 8} 32 hosts, 32",
    ("v5e:16x16", 1, 1): "{'replica': 256, 'fsdp': 1} 64 hosts, 64",
    ("v5e:16x16", 16, 1): "{'replica': 16, 'fsdp': 16} 64 hosts, 64",
    ("v5e:8x8", 8, 4): "{'replica': 32, 'fsdp': 8} 64 hosts, 64",
    ("v5p:4x4x4", 1, 1): "{'replica': 64, 'fsdp': 1} 16 hosts, 16",
    ("v5p:4x8x8", 8, 1): "{'replica': 32, 'fsdp': 8} 64 hosts, 64",
    ("v5p:4x8x8", 16, 1): "{'replica': 16, 'fsdp': 16} 64 hosts, 64",
    ("v6e:16x16", 8, 1): "{'replica': 32, 'fsdp': 8} 64 hosts, 64",
    ("v6e:8x8", 8, 2): "{'replica': 16, 'fsdp': 8} 32 hosts, 32",
    ("tpu7x:2x2x4", 4, 1): "{'replica': 8, 'fsdp': 4} 4 hosts, 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("pod", PODS, ids=lambda pod: "-".join(map(str, pod)))
def test_every_host_of_a_pod_feeds_its_own_rows(pod):
    pytest.importorskip("libtpu")  # the extra `tpu`
    # What the compiler would ask the machine about itself.
    told = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBED, *map(str, pod)],
        cwd=ROOT,
        env=os.environ | told,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(PODS[pod]), done.stdout


# Places of the two hosts' devices alternate, as on a pod.
ALTERNATING = """
import sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from scaling_ldm.training import mesh
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
a, b = (
    [d for d in jax.devices() if d.process_index == host] for host in range(2)
)
grid = np.array([[a[0], b[0]], [b[1], a[1]]])
found = Mesh(grid, mesh.AXES, axis_types=(AxisType.Explicit,) * 2)
rows = mesh.rows_of_process(found, 8)
assert rows.tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]][jax.process_index()]
batch = np.arange(24.0).reshape(8, 3)
own = {"x": batch[rows], "many": np.stack([batch, -batch])[:, rows]}
x = mesh.put(found, own["x"])
many = mesh.put(found, own["many"], mesh.STACKED_BATCHES)
whole = jax.jit(lambda v: v, out_shardings=mesh.named_sharding(found, mesh.REPLICATED))
with jax.set_mesh(found):
    np.testing.assert_array_equal(np.asarray(whole(x)), batch)
    np.testing.assert_array_equal(np.asarray(whole(many)), np.stack([batch, -batch]))
    scale = mesh.put(found, np.float32(3), mesh.REPLICATED)
    assert float(scale) == 3
print("the same")
"""


def test_a_batch_is_whole_where_the_places_of_hosts_alternate():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    job = [
        subprocess.Popen(
            [sys.executable, "-c", ALTERNATING, port, str(host)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    for one in job:
        out, err = one.communicate(timeout=120)
        assert one.returncode == 0, err[-2000:]
        assert out.endswith("the same\n")


def test_rows_follow_the_places_of_a_hosts_devices(unchecked):
    class Placed:
        size, shape = 4, {"replica": 4, "fsdp": 1}
        devices = np.array(
            [[Device(i, host, 0)] for i, host in enumerate([1, 0, 0, 1])]
        )

    assert mesh.rows_of_process(Placed, 8, 0).tolist() == [2, 3, 4, 5]
    assert mesh.rows_of_process(Placed, 8, 1).tolist() == [0, 1, 6, 7]
