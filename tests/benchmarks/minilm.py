"""Captions to MiniLM features on this machine, against transformers in PyTorch.

    python tests/benchmarks/minilm.py

Both have the same random weights in float32 and give the same features, which is
checked first; a run takes ids and a mask from the host and waits for the features. The
contenders take turns, rounds that other processes disturb are repeated, and times and
ratios are medians over the rounds. A ratio above 1 means that we are faster. Ours runs
with its layers stacked and scanned, stacked and unrolled, or taken apart once before
(`blocks.unstacked`); with --devices also with the batch split over simulated devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave torch some

import jax
import numpy as np
import timing
import torch
import transformers

from scaling_ldm.encoders import bert, blocks, presets
from scaling_ldm.weights import bert as bert_weights

SHAPE = presets.PRESETS["minilm_l6"].shape
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Run = Callable[[], Any]


def theirs() -> torch.nn.Module:
    """MiniLM with random weights, as transformers runs it by default."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.width,
        num_hidden_layers=SHAPE.depth,
        num_attention_heads=SHAPE.heads,
        intermediate_size=SHAPE.hidden,
    )
    return transformers.BertModel(config).to(DEVICE).eval()


def loaded(net: torch.nn.Module) -> dict[str, Any]:
    """Its weights in our tree."""
    with tempfile.TemporaryDirectory() as scratch:
        net.save_pretrained(scratch)
        return jax.device_put(bert_weights.load(scratch, SHAPE))


def captions(batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of captions of different lengths."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, SHAPE.vocab_size, (batch, tokens)).astype(np.int32)
    lengths = rng.integers(tokens // 2, tokens + 1, batch)
    return ids, np.arange(tokens)[None] < lengths[:, None]


def our_runs(
    params: dict[str, Any], ids: np.ndarray, mask: np.ndarray, devices: int
) -> dict[str, Run]:
    """Name -> a function that encodes once and waits."""
    apply = jax.jit(functools.partial(bert.apply, SHAPE))
    apart = {**params, "blocks": jax.jit(blocks.unstacked)(params["blocks"])}
    unrolled = dataclasses.replace(SHAPE, unroll=True)
    loop = jax.jit(functools.partial(bert.apply, unrolled))
    runs: dict[str, Run] = {
        "apart": lambda: apply(apart, ids, mask).block_until_ready(),
        "scanned": lambda: apply(params, ids, mask).block_until_ready(),
        "unrolled": lambda: loop(params, ids, mask).block_until_ready(),
    }
    if devices > 1 and ids.shape[0] % devices == 0:
        mesh = jax.make_mesh((devices,), ("batch",))
        rows = jax.NamedSharding(mesh, jax.P("batch"))
        copies = jax.device_put(apart, jax.NamedSharding(mesh, jax.P()))

        def split() -> jax.Array:
            with jax.set_mesh(mesh):
                given = jax.device_put((ids, mask), rows)
                return apply(copies, *given).block_until_ready()

        runs["split"] = split
    return runs


def their_run(net: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> Run:
    @torch.inference_mode()
    def run() -> torch.Tensor:
        out = net(
            input_ids=torch.from_numpy(ids).to(DEVICE, torch.long),
            attention_mask=torch.from_numpy(mask).to(DEVICE, torch.long),
        ).last_hidden_state
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return out

    return run


def check_equal(runs: dict[str, Run], wanted: torch.Tensor) -> float:
    """The largest relative error.

    Raises:
      SystemExit: it is over 1e-4.
    """
    right = wanted.cpu().numpy()
    worst = 0.0
    for name, run in runs.items():
        with jax.default_matmul_precision("highest"):
            error = float(np.abs(np.asarray(run()) - right).max() / np.abs(right).max())
        if not error <= 1e-4:
            sys.exit(f"{name}: features differ by {error:.1e}; nothing is timed")
        worst = max(worst, error)
    return worst


def repeated(run: Run) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            run()

    return advance


def measure(
    net: torch.nn.Module, params: dict[str, Any], batch: int, flags: argparse.Namespace
) -> dict[str, Any]:
    """One row: milliseconds a call of each contender, and ratios."""
    ids, mask = captions(batch, flags.tokens)
    ours = our_runs(params, ids, mask, flags.devices)
    torch_run = their_run(net, ids, mask)
    error = check_equal(ours, torch_run())
    measured = timing.alternate(
        {name: repeated(run) for name, run in {"torch": torch_run, **ours}.items()},
        flags.seconds,
        flags.rounds,
    )
    seconds = {name: np.asarray(times) for name, times in measured.seconds.items()}
    ratios = {name: seconds["torch"] / seconds[name] for name in ours}
    return {
        "batch": batch,
        "tokens": flags.tokens,
        "error": error,
        "milliseconds": {k: 1e3 * float(np.median(v)) for k, v in seconds.items()},
        "ratio": {k: float(np.median(v)) for k, v in ratios.items()},
        "ratio_range": {k: [float(v.min()), float(v.max())] for k, v in ratios.items()},
        "disturbed_rounds": measured.disturbed,
    }


def lines(row: dict[str, Any]) -> str:
    """A row in Markdown, one line a contender."""
    found = []
    for name, ratio in row["ratio"].items():
        least, most = row["ratio_range"][name]
        found.append(
            f"| {row['batch']} x {row['tokens']} | {name} "
            f"| {row['milliseconds'][name]:.2f} | {row['milliseconds']['torch']:.2f} "
            f"| {ratio:.2f} ({least:.2f}-{most:.2f}) |"
        )
    if row["disturbed_rounds"]:
        found.append(f"{row['disturbed_rounds']} rounds disturbed")
    return "\n".join(found)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="32,1", help="captions in a call")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each contender of each row"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--devices", type=int, default=1, help="simulated, on a CPU")
    parser.add_argument("--torch_threads", type=int, help="torch's choice by default")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    return parser.parse_args(arguments)


def main() -> None:
    """Times one batch size after the other."""
    flags = parse()
    if flags.torch_threads:
        torch.set_num_threads(flags.torch_threads)
    if flags.devices > 1:
        jax.config.update("jax_num_cpu_devices", flags.devices)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("| captions x tokens | layers | ours, ms | torch, ms | torch/ours |")
    print("|---|---|---|---|---|")
    net = theirs()
    params, rows = loaded(net), []
    for batch in map(int, flags.batches.split(",")):
        rows.append(measure(net, params, batch, flags))
        print(lines(rows[-1]), flush=True)
    if flags.json:
        result = {"command": sys.argv[1:], "machine": facts, "rows": rows}
        flags.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
