"""Time per sampling step beside the network's own, and against diffusers.

    python tests/benchmarks/sampling.py --steps 50 --batch 4

The same small network with the same weights, ours in one compiled loop and theirs in
PyTorch's Python loop, as their pipelines write it (the "parity" extra). Both give the
same picture, which is checked first. A run is one picture batch, planning and
`set_timesteps` included. The network alone is timed in the same way: evaluated as
often on as many samples, in a compiled loop or in a Python loop. Overhead is the
difference, so it holds all that is not the network: the solver, guidance, dispatch.
The contenders take turns, and times and ratios are medians over the rounds. A ratio
above 1 means that our overhead is smaller. On a GPU the same command also prints the
host's time per step: until the call returns, with the device still at work.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave torch some

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch

from scaling_ldm.diffusion import noise, samplers

COND = 16  # features of a condition
TIMES = 32  # features of a time
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Name: their scheduler, its options, our sampler and spacing.
SAMPLERS: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "DDIM": (
        diffusers.DDIMScheduler,
        {"timestep_spacing": "leading", "clip_sample": False},
        "ddim",
        "leading",
    ),
    "DPM-Solver++ 2M": (
        diffusers.DPMSolverMultistepScheduler,
        {"timestep_spacing": "trailing"},
        "dpm++2m",
        "trailing",
    ),
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

Weights = dict[str, Any]


def weights(pixels: int, width: int) -> Weights:
    """Weights of a residual network of three layers, scaled to outputs of order one."""
    rng = np.random.default_rng(0)
    shapes = {
        "enter": (pixels, width),
        "time": (TIMES, width),
        "cond": (COND, width),
        "middle": (width, width),
        "leave": (width, pixels),
    }
    return {
        name: (rng.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def ours(w: Weights, x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
    """The network, in jax."""
    rates = 1e-3 * 2.0 ** jnp.linspace(0, 8, TIMES, dtype=x.dtype)[None]
    h = x.reshape(x.shape[0], -1) @ w["enter"] + cond @ w["cond"]
    h = jax.nn.silu(h + jnp.sin(t[:, None] * rates) @ w["time"])
    h = h + jax.nn.silu(h @ w["middle"])
    return jnp.tanh(h @ w["leave"]).reshape(x.shape)


class Theirs(torch.nn.Module):
    """The same network, in torch."""

    def __init__(self, w: Weights) -> None:
        super().__init__()
        for name, value in w.items():
            self.register_buffer(name, torch.from_numpy(value))
        rates = 1e-3 * 2.0 ** torch.linspace(0, 8, TIMES)[None]
        self.register_buffer("rates", rates)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor
    ) -> torch.Tensor:
        h = x.flatten(1) @ self.enter + cond @ self.cond
        h = torch.nn.functional.silu(
            h + torch.sin(t.float()[:, None] * self.rates) @ self.time
        )
        h = h + torch.nn.functional.silu(h @ self.middle)
        return torch.tanh(h @ self.leave).reshape(x.shape)


@functools.partial(jax.jit, static_argnums=0)
def ours_alone(
    steps: int, w: Weights, x: jax.Array, t: jax.Array, cond: jax.Array
) -> jax.Array:
    """The network `steps` times, each time on its last output."""

    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        return ours(w, x, jnp.full(x.shape[:1], t[i]), cond)

    return jax.lax.fori_loop(0, steps, body, x)


class Case:
    """One sampler, guided or not: four contenders, each a function that waits or not.

    Every one takes `wait`; without, it returns as soon as the host is free.
    """

    def __init__(self, name: str, guided: bool, flags: argparse.Namespace) -> None:
        scheduler, options, self.sampler, self.spacing = SAMPLERS[name]
        self.scheduler = scheduler(**BETAS, **options)
        self.steps, self.scale = flags.steps, 3.0 if guided else None
        shape = (flags.batch, flags.side, flags.side, 4)
        given = weights(int(np.prod(shape[1:])), flags.width)
        rng = np.random.default_rng(1)
        start = rng.normal(size=shape).astype(np.float32)
        cond = rng.normal(size=(2, flags.batch, COND)).astype(np.float32)
        cond[1] = 0  # without a condition

        self.start, self.cond, self.uncond = map(jnp.asarray, (start, *cond))
        self.denoise = samplers.denoiser(
            ours,
            noise.scaled_linear(),
            prediction="epsilon",
            time="schedule",
            params=jax.tree.map(jnp.asarray, given),
        )
        self.network = Theirs(given).to(DEVICE)
        self.torch_start = torch.from_numpy(start).to(DEVICE)
        both = cond[::-1] if guided else cond[:1]  # unconditional first, as pipelines
        self.torch_cond = torch.from_numpy(np.concatenate(both)).to(DEVICE)

        copies = 2 if guided else 1
        self.alone_jax = (
            self.denoise.params,
            jnp.concatenate([self.start] * copies),
            jnp.linspace(999, 0, self.steps),
            jnp.concatenate([self.cond, self.uncond][:copies]),
        )
        self.scheduler.set_timesteps(self.steps, device=DEVICE)
        self.alone_torch = torch.cat([self.torch_start] * copies)
        self.torch_times = list(self.scheduler.timesteps)
        jax.block_until_ready((self.alone_jax, self.start, self.cond, self.uncond))

    def sample(self, wait: bool = True) -> jax.Array:
        """Our sampler."""
        x = samplers.sample(
            self.denoise,
            noise=self.start,
            cond=self.cond,
            uncond=self.uncond,
            sampler=self.sampler,
            steps=self.steps,
            grid=self.spacing,
            guidance=self.scale,
        )
        return x.block_until_ready() if wait else x

    def alone(self, wait: bool = True) -> jax.Array:
        """Our network alone, as often and on as many samples."""
        x = ours_alone(self.steps, *self.alone_jax)
        return x.block_until_ready() if wait else x

    @torch.inference_mode()
    def torch_sample(self, wait: bool = True) -> torch.Tensor:
        """Their sampler, as in the loops of their pipelines."""
        self.scheduler.set_timesteps(self.steps, device=DEVICE)
        x = self.torch_start * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            each = x if self.scale is None else torch.cat([x] * 2)
            each = self.scheduler.scale_model_input(each, t)
            out = self.network(each, t.expand(each.shape[0]), self.torch_cond)
            if self.scale is not None:
                without, with_cond = out.chunk(2)
                out = without + self.scale * (with_cond - without)
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return self._waited(x, wait)

    @torch.inference_mode()
    def torch_alone(self, wait: bool = True) -> torch.Tensor:
        """Their network alone, as often and on as many samples."""
        x = self.alone_torch
        for t in self.torch_times:
            x = self.network(x, t.expand(x.shape[0]), self.torch_cond)
        return self._waited(x, wait)

    def _waited(self, x: torch.Tensor, wait: bool) -> torch.Tensor:
        if wait and DEVICE == "cuda":
            torch.cuda.synchronize()
        return x


def first(case: Case) -> tuple[float, float]:
    """Seconds to the first picture, compilation included, of ours and of theirs.

    Raises:
      SystemExit: the pictures differ by more than 1e-4 of the largest value.
    """
    seconds, pictures = [], []
    for run in (case.sample, case.torch_sample):
        start = time.perf_counter()
        picture = run()
        seconds.append(time.perf_counter() - start)
        pictures.append(picture if run == case.sample else picture.cpu())
    our, their = map(np.asarray, pictures)
    with jax.default_matmul_precision("highest"):  # what is compared, is not timed
        exact = np.asarray(case.sample())
    error = float(np.abs(exact - their).max() / np.abs(their).max())
    if not (error <= 1e-4 and np.all(np.isfinite(our))):
        sys.exit(
            f"{case.sampler}: the pictures differ by {error:.1e}; nothing is timed"
        )
    return seconds[0], seconds[1]


def repeated(run: Callable[[], Any]) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            run()

    return advance


def host_seconds(run: Callable[[bool], Any], count: int = 10) -> float:
    """Seconds until the call returns; the device is idle before it."""
    times = []
    for _ in range(count):
        run(True)
        start = time.perf_counter()
        run(False)
        times.append(time.perf_counter() - start)
    run(True)
    return statistics.median(times)


def measure(name: str, guided: bool, flags: argparse.Namespace) -> dict[str, Any]:
    """One row of the table; times in microseconds a step."""
    case = Case(name, guided, flags)
    first_ours, first_theirs = first(case)
    runs = {
        "ours": case.sample,
        "ours_network": case.alone,
        "theirs": case.torch_sample,
        "theirs_network": case.torch_alone,
    }
    measured = timing.alternate(
        {name: repeated(run) for name, run in runs.items()}, flags.seconds
    )
    each = {k: 1e6 * np.asarray(v) / flags.steps for k, v in measured.seconds.items()}
    over = {k: each[k] - each[f"{k}_network"] for k in ("ours", "theirs")}
    row = {k: float(np.median(v)) for k, v in each.items()}
    row |= {f"{k}_overhead": float(np.median(v)) for k, v in over.items()}
    # Rounds in which ours came out at nothing count as one nanosecond a step.
    ratios = over["theirs"] / np.maximum(over["ours"], 1e-3)
    row |= {
        "sampler": name,
        "guided": guided,
        "ratio": row["theirs_overhead"] / max(row["ours_overhead"], 1e-3),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
        "first_ours": first_ours,
        "first_theirs": first_theirs,
        "disturbed_rounds": measured.disturbed,
    }
    if jax.default_backend() != "cpu":
        for key in ("ours", "theirs"):
            row[f"{key}_host"] = 1e6 * host_seconds(runs[key]) / flags.steps
    return row


HEADER = (
    "| sampler | guidance | ours | its network | overhead | theirs | its network "
    "| overhead | overheads theirs/ours | first picture, ours | theirs |"
)


def line(row: dict[str, Any]) -> str:
    """A row in Markdown: microseconds a step, and seconds."""
    cells = [
        row["sampler"],
        "on" if row["guided"] else "off",
        *(
            f"{row[side + part]:.1f}"
            for side in ("ours", "theirs")
            for part in ("", "_network", "_overhead")
        ),
        "{:.1f} ({:.1f}-{:.1f})".format(row["ratio"], *row["ratio_range"]),
        f"{row['first_ours']:.2f} s",
        f"{row['first_theirs']:.2f} s",
    ]
    if "ours_host" in row:
        cells += [f"{row['ours_host']:.1f}", f"{row['theirs_host']:.1f}"]
    disturbed = row["disturbed_rounds"]
    text = f"| {' | '.join(cells)} |"
    return text + (f" {disturbed} rounds disturbed" if disturbed else "")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_device": DEVICE,
        "diffusers": diffusers.__version__,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=8, help="of the square pictures")
    parser.add_argument("--width", type=int, default=128, help="of the network")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each contender of each row"
    )
    parser.add_argument(
        "--torch_threads",
        type=int,
        default=1,
        help="the arrays are too small to be shared: more threads wait for each other",
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    return parser.parse_args(arguments)


def main() -> None:
    """Times both samplers, without and with guidance."""
    flags = parse()
    torch.set_num_threads(flags.torch_threads)
    facts = machine()  # and so the device is ready before anything is timed
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("microseconds a step, medians over rounds")
    header = HEADER
    if facts["backend"] != "cpu":
        header += " host, ours | host, theirs |"
    print(header)
    print("|---" * (header.count("|") - 1) + "|")
    rows = []
    for name in SAMPLERS:
        for guided in (False, True):
            rows.append(measure(name, guided, flags))
            print(line(rows[-1]), flush=True)
    if flags.json:
        result = {"command": sys.argv[1:], "machine": facts, "rows": rows}
        flags.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
