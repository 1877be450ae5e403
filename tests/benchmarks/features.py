"""Pictures per second of the networks that judge them, against PyTorch.

    python tests/benchmarks/features.py

EfficientNet-Lite0 at 96 and 224 px and the 2015 Inception, against the same network in
plain PyTorch in eager mode (torch_features.py; the "parity" extra), float32, with the
same random weights, PyTorch's pictures channels first or channels last. That both give
the same features is checked first. They take turns, as timing.py says; times and ratios
are medians over the rounds, with the range of the ratio. A ratio above 1 means that
ours is faster. Ours runs as the library does, on a mesh of one simulated device per
core, each with its part of the batch; PyTorch takes the threads that it takes.
"""

from __future__ import annotations

import functools
import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import contest
import jax
import numpy as np
import torch
import torch_features

from scaling_ldm import config, flops
from scaling_ldm.models.encoders import efficientnet_lite, inception
from scaling_ldm.models.weights import efficientnet_lite as lite_weights
from scaling_ldm.models.weights import inception as inception_weights
from scaling_ldm.training import mesh


def against(
    net: torch.nn.Module,
    ours: Any,
    weights: Any,
    middle: float,
    size: int,
    channels_last: bool,
    batch: int,
) -> contest.Contest:
    """The features of `batch` pictures; `middle` is what both subtract first."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    net = torch_features.randomise(net).to(memory_format=form)
    devices = mesh.build(config.MeshConfig(), {"--batch": batch})
    params = jax.device_put(
        weights.read(contest.tensors_of(net)),
        jax.sharding.NamedSharding(devices, mesh.REPLICATED),
    )
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (batch, size, size, 3)).astype("f")
    torch_x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    torch_x = torch_x.contiguous(memory_format=form)
    apply = jax.jit(ours)

    def run_ours() -> np.ndarray:
        with jax.set_mesh(devices):
            return np.asarray(apply(params, mesh.put(devices, x)).features)

    @torch.inference_mode()
    def run_theirs() -> np.ndarray:
        return net((torch_x - middle) / 128)[0].numpy()

    return contest.Contest(
        ours=run_ours, theirs=run_theirs, flops=flops.count(ours, params, x).total
    )


def lite0(size: int, batch: int, *, channels_last: bool) -> contest.Contest:
    """EfficientNet-Lite0."""
    net, ours = torch_features.EfficientNetLite0(), efficientnet_lite.apply
    return against(net, ours, lite_weights, 127, size, channels_last, batch)


def inception_v3(batch: int, *, channels_last: bool) -> contest.Contest:
    """FID's Inception, as torch-fidelity normalises pictures."""
    net, ours = torch_features.Inception(), inception.apply
    size = inception.SIZE
    return against(net, ours, inception_weights, 128, size, channels_last, batch)


# With the batch of one device: few pictures, whose activations stay in the caches.
CONTESTS = {
    f"{name}{'_channels_last' if last else ''}": (
        functools.partial(make, channels_last=last),
        batch,
    )
    for name, make, batch in (
        ("lite0_96", functools.partial(lite0, 96), 8),
        ("lite0_224", functools.partial(lite0, 224), 2),
        ("inception_299", inception_v3, 2),
    )
    for last in (False, True)
}
COLUMNS = (
    "| network | batch | ours, pictures/s | PyTorch, pictures/s | ours, GFLOP/s "
    "| PyTorch, GFLOP/s | ours / PyTorch | disturbed | load | first call, s |"
)


def line(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    least, most = row["ratio_range"]
    rates = {who: row["batch"] / row[who] for who in ("ours", "theirs")}
    return (
        f"| {row['name']} | {row['batch']} | {rates['ours']:.1f} "
        f"| {rates['theirs']:.1f} | {row['gflops']['ours']:.0f} "
        f"| {row['gflops']['theirs']:.0f} | {row['ratio']:.2f} ({least:.2f}-{most:.2f})"
        f" | {row['disturbed_rounds']} | {row['load']:.1f} | {row['first_call']:.1f} |"
    )


def main() -> None:
    """Times one network after the other."""
    parser = contest.parser(__doc__, CONTESTS)
    parser.add_argument("--devices", type=int, default=0, help="0: one per core")
    flags = parser.parse_args()
    if flags.one_core:
        contest.one_core(torch)
    mesh.start_devices(config.MeshConfig(cpu_devices=flags.devices))
    facts = contest.machine(jax, torch)
    facts |= {"torch_threads": torch.get_num_threads(), "devices": jax.device_count()}
    contests = {
        name: (make, batch * jax.device_count())
        for name, (make, batch) in CONTESTS.items()
    }
    contest.run(flags, contests, facts, COLUMNS, line)


if __name__ == "__main__":
    main()
