"""Time to encode pictures with Stable Diffusion's autoencoder, against diffusers.

    python tests/benchmarks/autoencoder.py --side 256 --batch 1

Both networks have the same random weights and run in float32 on the CPU, ours
compiled, theirs in PyTorch eager mode (the "parity" extra), each with the threads that
it takes by itself. That both give the same moments is checked first. They take turns,
as timing.py says; time and ratio are medians over the rounds, with the range of the
ratio. A ratio above 1 means that ours is faster. `--decode` times the other direction.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import diffusers
import jax
import numpy as np
import timing
import torch

from scaling_ldm import encoders, flops
from scaling_ldm.encoders import presets
from scaling_ldm.weights import autoencoder_kl as weights


def theirs(preset: presets.Preset) -> diffusers.AutoencoderKL:
    """With weights of its own initialisation."""
    torch.manual_seed(0)
    config = weights.to_config(preset.shape)
    return diffusers.AutoencoderKL.from_config(config).eval()


def contenders(
    flags: argparse.Namespace,
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray], int]:
    """Ours and theirs, each a function that waits, and FLOPs of a call."""
    preset = presets.AUTOENCODERS[flags.network]
    net, ours = theirs(preset), encoders.autoencoder(preset.shape)
    tensors = {k: v.numpy() for k, v in net.state_dict().items()}
    params = jax.device_put(weights.read(tensors, preset.shape))
    side, channels = flags.side, preset.shape.image_channels
    fn = ours.encode
    if flags.decode:
        side, channels = flags.side // ours.factor, ours.latent_channels
        fn = ours.decode
    rng = np.random.default_rng(1)
    given = rng.uniform(-1, 1, size=(flags.batch, side, side, channels))
    x = jax.device_put(given.astype(np.float32))
    torch_x = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()
    compiled = jax.jit(fn)

    def run_ours() -> np.ndarray:
        return np.asarray(compiled(params, x))

    @torch.inference_mode()
    def run_theirs() -> np.ndarray:
        if flags.decode:
            out = net.decode(torch_x).sample
        else:
            latent = net.encode(torch_x).latent_dist
            out = torch.cat([latent.mean, latent.logvar], dim=1)
        return out.permute(0, 2, 3, 1).numpy()

    return run_ours, run_theirs, flops.count(fn, params, x).total


def repeated(run: Callable[[], Any]) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            run()

    return advance


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """All numbers; times are seconds a call.

    Raises:
      SystemExit: the outputs differ by more than 1e-4 of the largest value.
    """
    run_ours, run_theirs, each = contenders(flags)
    start = time.perf_counter()
    got = run_ours()
    first = time.perf_counter() - start
    wanted = run_theirs()
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    if not error <= 1e-4:
        sys.exit(f"the outputs differ by {error:.1e}; nothing is timed")
    measured = timing.alternate(
        {"ours": repeated(run_ours), "theirs": repeated(run_theirs)},
        flags.seconds,
        rounds=flags.rounds,
    )
    times = {name: np.asarray(s) for name, s in measured.seconds.items()}
    ratios = times["theirs"] / times["ours"]
    row: dict[str, Any] = {name: float(np.median(s)) for name, s in times.items()}
    return row | {
        "ours_gflops": each / row["ours"] / 1e9,
        "theirs_gflops": each / row["theirs"] / 1e9,
        "ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
        "difference": error,
        "first_ours": first,
        "disturbed_rounds": measured.disturbed,
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "diffusers": diffusers.__version__,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=presets.AUTOENCODERS, default="sd")
    parser.add_argument("--side", type=int, default=256, help="of square pictures")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=9.0, help="for each contender, in all rounds"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    return parser.parse_args()


def main() -> None:
    """Times both and prints one line."""
    flags, facts = parse(), machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    row = measure(flags)
    print(
        "{} {}, {} px, batch {}: ours {:.3f} s ({:.0f} GFLOP/s), theirs {:.3f} s "
        "({:.0f} GFLOP/s), theirs/ours {:.2f} ({:.2f}-{:.2f}), {} of {} rounds "
        "disturbed; first call {:.1f} s; outputs differ by {:.1e}".format(
            flags.network,
            "decode" if flags.decode else "encode",
            flags.side,
            flags.batch,
            row["ours"],
            row["ours_gflops"],
            row["theirs"],
            row["theirs_gflops"],
            row["ratio"],
            *row["ratio_range"],
            row["disturbed_rounds"],
            flags.rounds,
            row["first_ours"],
            row["difference"],
        )
    )
    if flags.json:
        result = {"command": sys.argv[1:], "machine": facts, **row}
        flags.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
