"""What one accelerator does with two published networks: speed, memory, sampling.

    python tests/benchmarks/accelerator.py --out results
    python tests/benchmarks/accelerator.py --out results --tiny

It trains DiT-XL/2 on 32 x 32 latents and paper A's U-Net of 866M parameters on 64 x 64
latents, in bfloat16, with the step that `scaling_ldm.train` runs, on every device that
jax finds. For each it prints model FLOP/s, their share of the matrix-product rate that
was measured just before, and the peak memory against the plan's estimate; then the time
until a sampler's call returns and the time until its pictures are there. Each part is
written as a line of OUT/accelerator.jsonl as soon as it is done, with the device's
name, and a part that fails (too little memory) is written as such. PyTorch beside it,
compiled: tests/benchmarks/throughput.py --torch. Meant for less than ten minutes.

--tiny takes small networks of the same kind: it shows that the script runs, and its
rates say nothing.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import base, unet_family
from scaling_ldm import config, records
from scaling_ldm.diffusion import samplers
from scaling_ldm.models import from_config
from scaling_ldm.stages import plan
from scaling_ldm.training import capacity, inference, mesh, objective_checks, train_step

Row = dict[str, Any]


def transformer(tiny: bool, batch: int) -> config.Experiment:
    """DiT-XL/2 (Peebles and Xie 2022, arXiv 2212.09748), 675M parameters."""
    c = base.paper_b("dit_xl_2", 1e18)
    c.model.architecture, c.model.classes = "adaln_zero", 1000
    c.data.shape = (8, 8, 4) if tiny else (32, 32, 4)
    c.model.head_dim = 8 if tiny else 72
    c.plan.sizes = ((16, 2),) if tiny else ((1152, 28),)
    return _resolved(c, batch, tiny)


def unet(tiny: bool, batch: int) -> config.Experiment:
    """Paper A's U-Net of 866M parameters, on latents of pictures of 512 px."""
    c = unet_family.paper_a("unet_866m", 32 if tiny else 320)
    c.model.heads = 4 if tiny else 8
    if tiny:
        c.data.shape, c.plan.sizes = (8, 8, 4), ((32, 2),)
        c.model.text_width = 16
    return _resolved(c, batch, tiny)


def _resolved(c: Any, batch: int, tiny: bool) -> config.Experiment:
    c.train.optimize_code = not tiny  # compiles faster on a CPU
    c.plan.steps, c.plan.budgets_flops = 1000, ()
    c.train.batch_size = c.validation.batch_size = c.generate.batch_size = batch
    c.mesh.fsdp, c.mesh.cpu_devices = 1, 1
    c.plan.devices = jax.device_count()
    return config.resolve(c)


NETWORKS = {"DiT-XL/2": (transformer, 64), "U-Net 866M": (unet, 16)}


def product_rate(tiny: bool) -> float:
    """FLOP/s of one device in a large bfloat16 matrix product, the best of five."""
    n = 256 if tiny else 8192
    a = jnp.ones((n, n), jnp.bfloat16)
    times = 1 if tiny else 20

    @jax.jit
    def products(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: (x @ a) * (1.0 / n), a)

    products(a).block_until_ready()
    best = min(_seconds(lambda: products(a).block_until_ready()) for _ in range(5))
    return 2 * n**3 * times / best


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def training(
    experiment: config.Experiment, spec: records.RunSpec, rate: float, seconds: float
) -> Row:
    """Steps of the real training step, on random latents."""
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        part = train_step.compiled_part(experiment)
        functions = train_step.compile_functions(
            part, spec.width, spec.depth, device_mesh
        )
        shapes = objective_checks.abstract_inputs(
            experiment, functions.objective, spec.batch_size
        )
        batch, uncond = (jax.tree.map(_drawn, tree) for tree in shapes)
        key = jax.random.key(0)
        state = functions.init(key)
        inputs = (
            mesh.put(device_mesh, batch),
            mesh.put(device_mesh, uncond, mesh.REPLICATED),
        )
        hyper = {"key": key, "peak": jnp.float32(1e-4), "warmup": jnp.float32(100)}
        flag = mesh.request_flags(device_mesh, 0)

        def steps(count: int) -> None:
            nonlocal state
            for _ in range(count):
                state, metrics = functions.step(state, *inputs, hyper, flag)
            jax.block_until_ready((state, metrics))

        compiling = _seconds(lambda: steps(1))
        one = _seconds(lambda: steps(3)) / 3
        count = max(3, int(seconds / one))
        taken = _seconds(lambda: steps(count)) / count
    achieved = spec.flops_per_step / taken / device_mesh.size
    statistics = jax.local_devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    planned = capacity.step_bytes(
        spec.state_bytes, spec.activation_bytes, device_mesh.size, 1
    )
    return {
        "parameters": spec.params,
        "batch": spec.batch_size,
        "seconds_to_compile": compiling,
        "seconds_a_step": taken,
        "steps": count,
        "model_flops_per_second": achieved,
        "share_of_products": achieved / rate,
        "peak_bytes": peak,
        "planned_bytes": planned,
    }


def _drawn(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    if jnp.issubdtype(shape.dtype, jnp.floating):
        draw = np.random.default_rng(0).standard_normal(shape.shape, np.float32)
        return draw.astype(shape.dtype)
    return np.ones(shape.shape, shape.dtype)


def sampling(experiment: config.Experiment, spec: records.RunSpec) -> Row:
    """Ten steps of DDIM or Euler with guidance, of one batch."""
    network = from_config.denoiser(experiment, spec.width, spec.depth, unroll=False)
    steps, rows = 10, experiment.generate.batch_size
    params = jax.jit(network.init)(jax.random.key(0))
    every = objective_checks.abstract_batch(experiment, rows)
    cond = {name: jnp.asarray(_drawn(every[name])) for name in network.conditioning}
    settings = inference.options(experiment.generate) | {"steps": steps}

    def draw() -> jax.Array:
        return samplers.sample(
            inference.denoise(experiment, network, params),
            jax.random.key(1),
            shape=(rows, *experiment.data.shape),
            cond=cond,
            uncond=jax.tree.map(jnp.zeros_like, cond),
            **settings,
        )

    draw().block_until_ready()
    start = time.perf_counter()
    found = draw()
    returned = time.perf_counter() - start
    found.block_until_ready()
    whole = time.perf_counter() - start
    return {
        "sampler": experiment.generate.sampler,
        "batch": rows,
        "host_milliseconds_a_step": 1e3 * returned / steps,
        "milliseconds_a_step": 1e3 * whole / steps,
        "finite": bool(jnp.isfinite(found).all()),
    }


def main() -> int:
    """Runs every part; returns 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each training")
    parser.add_argument("--batch", type=int, default=0, help="0: of each network")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device, failed = jax.devices()[0], False
    about = {"device": device.device_kind, "devices": jax.device_count()}
    rate = product_rate(arguments.tiny)
    rows: list[Row] = [{"part": "matrix products", "flops_per_second": rate}]
    print(json.dumps(about | rows[0]), flush=True)
    for name, (build, usual) in NETWORKS.items():
        batch = arguments.batch or (4 if arguments.tiny else usual)
        experiment = build(arguments.tiny, batch * jax.device_count())
        (spec,) = plan.plan(experiment)
        parts: dict[str, Callable[[], Row]] = {
            "training": lambda e=experiment, s=spec: training(
                e, s, rate, arguments.seconds
            ),
            "sampling": lambda e=experiment, s=spec: sampling(e, s),
        }
        for part, measure in parts.items():
            row: Row = {"part": part, "network": name, "tiny": arguments.tiny}
            try:
                row |= measure()
            except jax.errors.JaxRuntimeError as e:
                row["failed"], failed = " ".join(str(e).split())[:300], True
            rows.append(row)
            print(json.dumps(about | row), flush=True)
            text = "".join(json.dumps(about | one) + "\n" for one in rows)
            (arguments.out / "accelerator.jsonl").write_text(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
