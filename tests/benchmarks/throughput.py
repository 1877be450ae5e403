"""Training steps and input pictures a second on this machine, and against PyTorch.

    python tests/benchmarks/throughput.py --widths 64x2,128x3,256x4 --batch 32 --torch

The step is the one `scaling_ldm.train` runs, on the mesh it builds: on a CPU one
simulated device a core, layers unrolled. The contenders take turns in short blocks, so
that a change of the machine meets all of them; rounds that other processes disturb are
repeated; times and ratios are medians over the rounds. A ratio above 1 means that we
are faster. PyTorch (the "parity" extra) trains the same network, which is checked
first. On a GPU the same command adds torch.compile; there --dtype bfloat16 gives the
share of the measured bfloat16 matrix-product rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave torch some

import jax
import jax.numpy as jnp
import numpy as np
import timing

from scaling_ldm import config, data
from scaling_ldm.models import denoisers, from_config
from scaling_ldm.training import mesh, train_step

Row = dict[str, Any]


def experiment(
    sizes: Sequence[tuple[int, int]],
    batch: int,
    dtype: str,
    changes: argparse.Namespace,
) -> config.Experiment:
    """The recipe that is timed: 64 image, 15 text and one time token by default."""
    c = config.default()
    c.name = "throughput"
    c.data.shape = (16, 16, 3)
    c.data.text_tokens = 15
    c.data.vocab_size = 1024
    c.model.patch_size = 2
    c.model.head_dim = changes.head_dim
    c.model.text_width = c.model.time_width = 32
    c.model.activation = changes.activation
    c.model.compute_dtype = dtype
    c.optimizer.averages = ("ema",)  # PyTorch's step keeps this one
    c.mesh.cpu_devices = changes.cpu_devices
    c.plan.sizes = tuple(sizes)
    c.train.batch_size = batch
    c.train.steps_per_dispatch = 8
    return config.resolve(c)


class Ours:
    """Our training step, dispatched as `train` does: eight steps in one call."""

    def __init__(
        self,
        recipe: config.Experiment,
        size: tuple[int, int],
        device_mesh: jax.sharding.Mesh,
        batch: Mapping[str, np.ndarray],
        uncond: Mapping[str, np.ndarray],
    ) -> None:
        self.mesh, self.most = device_mesh, recipe.train.steps_per_dispatch
        self.batches = {k: np.stack([v] * self.most) for k, v in batch.items()}
        self.compiled = train_step.compile_functions(recipe, *size, device_mesh)
        whole = mesh.named_sharding(device_mesh, mesh.REPLICATED)
        key = jax.device_put(jax.random.key(0), whole)
        self.state = self.compiled.init(key)
        self.uncond = mesh.put(device_mesh, dict(uncond), mesh.REPLICATED)
        rates = {"peak": np.float32(1e-4), "warmup": np.float32(100)}
        self.hyper = mesh.put(device_mesh, rates, mesh.REPLICATED) | {"key": key}
        self.flag = mesh.request_flags(device_mesh, 0)

    def advance(self, steps: int) -> None:
        """`steps` steps; metrics are read after the next dispatch has started."""
        unseen = None
        while steps:
            count = min(steps, self.most)
            steps -= count
            batches = mesh.put(self.mesh, self.batches, mesh.STACKED_BATCHES)
            number = mesh.put(self.mesh, np.int32(count), mesh.REPLICATED)
            self.state, metrics = self.compiled.steps(
                self.state, batches, number, self.uncond, self.hyper, self.flag
            )
            if unseen is not None:
                jax.device_get(unseen)
            unseen = metrics
        jax.block_until_ready((self.state, unseen))


def check_equal(
    recipe: config.Experiment,
    size: tuple[int, int],
    network: Any,
    batch: Mapping[str, np.ndarray],
) -> float:
    """Copies weights into PyTorch's network and compares what both predict in float32.

    Returns:
      The relative error: the largest difference over the largest prediction.

    Raises:
      SystemExit: the networks differ by more than 1e-4.
    """
    import torch_dit

    exact = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, compute_dtype="float32")
    )
    denoiser = from_config.denoiser(exact, *size, unroll=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(  # away from zero, so that every parameter acts
        lambda a: np.asarray(a) + 0.05 * rng.normal(size=a.shape).astype(np.float32),
        jax.jit(denoiser.init)(jax.random.key(0)),
    )
    network.load(params)
    few = {name: value[:8] for name, value in batch.items()}
    t = np.linspace(0.05, 0.95, len(few["x"])).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(denoiser.apply)(params, few["x"], t, few))
    theirs = torch_dit.predict(network, few["x"], t, few)
    error = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not error <= 1e-4:
        sys.exit(f"{size}: the networks differ by {error:.1e}; nothing is timed")
    return error


def time_size(
    recipe: config.Experiment,
    size: tuple[int, int],
    device_mesh: jax.sharding.Mesh,
    batch: Mapping[str, np.ndarray],
    flags: argparse.Namespace,
) -> Row:
    """One row of the table."""
    uncond = data.sources(recipe, pathlib.Path())[0].uncond
    names = denoisers.CONDITIONING[recipe.model.architecture]
    uncond = {name: uncond[name] for name in names}
    batch = {name: batch[name] for name in ("x", *names)}
    ours = Ours(recipe, size, device_mesh, batch, uncond)
    contenders: dict[str, Callable[[int], None]] = {"ours": ours.advance}
    row: Row = {"width": size[0], "depth": size[1], "batch": recipe.train.batch_size}
    if flags.torch:
        import torch
        import torch_dit

        network = torch_dit.Transformer(recipe, *size)
        row["relative_error"] = check_equal(recipe, size, network, batch)
        eager = torch_dit.Trainer(recipe, network, batch, uncond, compiled=False)
        contenders["torch"] = eager.advance
        if flags.compile or torch.cuda.is_available():
            network = torch_dit.Transformer(recipe, *size)
            other = torch_dit.Trainer(recipe, network, batch, uncond, compiled=True)
            try:
                other.advance(1)
                contenders["torch.compile"] = other.advance
            except Exception as e:  # whatever its compiler toolchain raises
                row["compile_failed"] = f"{type(e).__name__}: {e}".splitlines()[0]
    measured = timing.alternate(contenders, flags.seconds)
    times = measured.seconds
    functions = train_step.train_functions(recipe, *size, unroll=False)
    flops = train_step.cost(recipe, functions, len(batch["x"])).flops.total
    seconds = statistics.median(times["ours"])
    row |= {
        "flops_per_step": flops,
        "milliseconds": 1e3 * seconds,
        "gflops_per_second": flops / seconds / 1e9,
        "images_per_second": len(batch["x"]) / seconds,
        "disturbed_rounds": measured.disturbed,
    }
    for name in contenders:
        if name != "ours":
            ratios = [b / a for a, b in zip(times["ours"], times[name], strict=True)]
            row[name] = {
                "milliseconds": 1e3 * statistics.median(times[name]),
                "gflops_per_second": flops / statistics.median(times[name]) / 1e9,
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
    return row


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large matrix product on one device (best of several)."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((side, side), denoisers.DTYPES[dtype])
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def pipeline_rate(recipe: config.Experiment, seconds: float) -> float:
    """Pictures a second of the training stream when nothing else runs."""
    source, _ = data.sources(recipe, pathlib.Path())
    rows = recipe.train.batch_size
    batches = data.batches(
        source,
        batch_size=rows,
        rows=np.arange(rows),
        prefetch=recipe.data.prefetch_batches,
    )
    for _ in range(5):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return rows * count / (time.perf_counter() - start)


def machine(flags: argparse.Namespace) -> Row:
    """What the numbers were measured on."""
    facts: Row = {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    if flags.torch:
        import torch

        torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as JAX does
        facts["torch"] = torch.__version__
        facts["torch_threads"] = torch.get_num_threads()
        facts["torch_device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return facts


HEADER = (
    "| width x depth | batch | GFLOPs/step | ms/step | GFLOP/s | images/s "
    "| share of matmul |"
)


def line(row: Row, matmul: float, others: Sequence[str]) -> str:
    """A row in Markdown."""
    cells = [
        f"{row['width']} x {row['depth']}",
        f"{row['batch']}",
        f"{row['flops_per_step'] / 1e9:.3f}",
        f"{row['milliseconds']:.2f}",
        f"{row['gflops_per_second']:.0f}",
        f"{row['images_per_second']:.0f}",
        f"{1e9 * row['gflops_per_second'] / matmul:.0%}",
    ]
    for name in others:
        other = row.get(name)
        cells.append(f"{other['gflops_per_second']:.0f}" if other else "-")
        cells.append(
            "{:.2f} ({:.2f}-{:.2f})".format(other["ratio"], *other["ratio_range"])
            if other
            else "-"
        )
    noise = row["disturbed_rounds"]
    return f"| {' | '.join(cells)} |" + (f" {noise} rounds disturbed" if noise else "")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="64x2,128x3,256x4", help="WIDTHxDEPTH,...")
    parser.add_argument(
        "--batch", default="32", help="pictures a step, or several: N,M"
    )
    parser.add_argument("--dtype", default="float32", choices=list(denoisers.DTYPES))
    parser.add_argument("--activation", default="gelu", choices=config.ACTIVATIONS)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--cpu_devices", type=int, default=0, help="0: one per core")
    parser.add_argument("--torch", action="store_true", help="time PyTorch beside it")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument(
        "--smallest", default="16x1", help="the fastest model that eats"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="for each size and contender"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    flags = parser.parse_args(arguments)
    try:
        flags.sizes = [tuple(map(int, s.split("x"))) for s in flags.widths.split(",")]
        flags.small = tuple(map(int, flags.smallest.split("x")))
        flags.batches = [int(n) for n in flags.batch.split(",")]
    except ValueError:
        parser.error("sizes look like 64x2,128x3 and batches like 32,64")
    return flags


def main() -> None:
    """Times every size at every batch size, then the input pipeline."""
    flags = parse()
    mesh.start_devices(config.MeshConfig(cpu_devices=flags.cpu_devices))
    facts = machine(flags)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    matmul = matmul_rate(flags.dtype)
    if jax.default_backend() != "cpu":
        matmul *= jax.device_count()  # simulated devices share the cores
    print(f"{flags.dtype} matrix product: {matmul / 1e9:.0f} GFLOP/s")
    others = ["torch"] if flags.torch else []
    if flags.torch and (flags.compile or facts["torch_device"] == "cuda"):
        others.append("torch.compile")
    columns = "".join(f" {name} GFLOP/s | ours/{name} |" for name in others)
    print(HEADER + columns)
    print("|---" * (HEADER.count("|") + columns.count("|") - 1) + "|")
    rows = []
    for batch_size in flags.batches:
        recipe = experiment(flags.sizes, batch_size, flags.dtype, flags)
        device_mesh = mesh.build(recipe.mesh, {"--batch": batch_size})
        batch = data.sources(recipe, pathlib.Path())[0].rows(np.arange(batch_size))
        with jax.set_mesh(device_mesh):
            for size in flags.sizes:
                row = time_size(recipe, size, device_mesh, batch, flags)
                rows.append(row)
                print(line(row, matmul, others), flush=True)
    small = argparse.Namespace(**vars(flags))
    small.torch, small.head_dim = False, min(flags.head_dim, flags.small[0])
    small.seconds = min(flags.seconds, 5.0)
    recipe = experiment([flags.small], flags.batches[0], flags.dtype, small)
    batch = data.sources(recipe, pathlib.Path())[0].rows(np.arange(flags.batches[0]))
    with jax.set_mesh(device_mesh):
        fastest = time_size(recipe, flags.small, device_mesh, batch, small)
    made = pipeline_rate(recipe, small.seconds)
    eaten = fastest["images_per_second"]
    print(
        f"input pipeline: {made:.0f} images/s, {made / eaten:.1f} x what a "
        f"{flags.smallest} model eats ({eaten:.0f}); wanted: at least 2"
    )
    if flags.json:
        result = {
            "command": sys.argv[1:],
            "machine": facts,
            "matmul_flops_per_second": matmul,
            "rows": rows,
            "pipeline": {
                "images_per_second": made,
                "fastest": fastest,
                "ratio": made / eaten,
            },
        }
        flags.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
