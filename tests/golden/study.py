"""The numbers of experiments/tiny.py from end to end, held against stored ones.

    python tests/golden/study.py WORKDIR            compares a finished study
    python tests/golden/study.py WORKDIR --update   stores its numbers instead

WORKDIR is what this command made:

    python -m scaling_ldm.main --config experiments/tiny.py --workdir WORKDIR FLAGS

with the FLAGS below. On the processor that the stored numbers come from, every number
is the same to the bit, but for the ends of intervals of image metrics: they come from
sums and singular values whose last bits depend on the order of summation and on the
threads of BLAS, and agree to 1e-12. Another processor rounds differently: there, counts
are the same, losses agree to 1e-3 and the other numbers are not compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pathlib
import platform
import sys
from typing import Any

import numpy as np

from scaling_ldm import records

HERE = pathlib.Path(__file__).parent
STORED = HERE / "tiny.json"
FLAGS = (
    "--config.generate.images=32",
    "--config.evaluate.network=lite0",
    "--config.evaluate.input_size=64",
    "--config.evaluate.reference_images=64",
    '--config.evaluate.metrics=("fd", "kid", "precision_recall")',
    "--config.evaluate.bootstrap=4",
)
# Wall time, what follows from it, and sentences.
TIMED = {"seconds", "flops_per_second", "mfu", "restarts", "mfu_reason"}
LOSS_TOLERANCE = 1e-3  # relative, on another processor
ENDS = {"low", "high"}  # of the interval of an image metric
ENDS_TOLERANCE = 1e-12  # relative


def processor() -> str:
    """What decides how a compiled program rounds: the instructions and the cores."""
    flags = ""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        flags = next((line for line in lines if line.startswith("flags")), "")
    cores = len(os.sched_getaffinity(0))
    digest = hashlib.sha256(flags.encode()).hexdigest()[:16]
    return f"{platform.machine()} {digest} {cores} cores"


def numbers(workdir: pathlib.Path) -> dict[str, Any]:
    """Every number of a study that does not depend on the time of day."""
    plan = records.to_json(records.read_jsonl(workdir / "runs.jsonl"))
    shards = sorted((workdir / "samples" / "shards").glob("*.npy"))
    images = np.concatenate([np.load(path) for path in shards])
    return {
        "plan": plan,
        "training": [
            records.to_json(
                records.read(workdir / "runs" / row["run_id"] / "record.json")
            )
            for row in plan
        ],
        "losses": losses(workdir),
        "laws": records.to_json(records.read(workdir / "laws.json")),
        "samples": hashlib.sha256(images.tobytes()).hexdigest(),
        "evaluations": [
            # The stored numbers have the name of 0.1.0, whose record held them.
            records.to_json(record) | {"record": "EvalRecord"}
            for record in records.read_evaluations(workdir)
        ],
    }


# Metric and weights of the losses that are compared.
ENDS_OF_RUNS = (
    ("loss", "raw"),
    ("loss", "ema"),
    ("train_loss_smoothed", "raw"),
)


def losses(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """The losses at the end of each run: run_id -> metric and weights -> value."""
    found: dict[str, dict[str, float]] = {}
    specs = {s.run_id: s for s in records.read_jsonl(workdir / "runs.jsonl")}
    for row in records.read_table(workdir):
        end = row.step == specs[row.run_id].steps if row.run_id in specs else False
        if end and (row.metric, row.weights) in ENDS_OF_RUNS:
            found.setdefault(row.run_id, {})[f"{row.metric} {row.weights}"] = row.value
    return found


def differences(stored: Any, found: Any, *, to_the_bit: bool) -> list[str]:
    """Where two studies differ, a line each."""
    lines: list[str] = []

    def same(a: Any, b: Any, where: str, name: str) -> bool:
        if not to_the_bit and where.startswith("losses"):
            there = None not in (a, b)
            return there and math.isclose(a, b, rel_tol=LOSS_TOLERANCE)
        if where.startswith("evaluations") and name in ENDS:
            return math.isclose(a, b, rel_tol=ENDS_TOLERANCE)
        return a == b

    def walk(a: Any, b: Any, where: str) -> None:
        name = where.rsplit(".", 1)[-1]
        if name in TIMED or (where == "laws.protocol_hash" and a == ""):
            return  # 0.1.0 did not say the protocol of a loss
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                walk(a.get(key), b.get(key), f"{where}.{key}")
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for i, pair in enumerate(zip(a, b, strict=True)):
                walk(*pair, f"{where}[{i}]")
        elif not same(a, b, where, name):
            lines.append(f"{where}: {a!r} stored, {b!r} found")

    parts = stored.keys() if to_the_bit else ("plan", "training", "losses")
    for part in parts:
        walk(stored[part], found[part], part)
    return lines


def compare(workdir: pathlib.Path) -> list[str]:
    """The lines of `differences` between the stored study and the one in a workdir."""
    stored = json.loads(STORED.read_text())
    version = records.version_of(stored, STORED)
    stored = records.unstamped(stored, STORED)
    same = stored.pop("processor") == processor()
    stored = records.to_json(records.from_json(stored, version))
    print("compared", "to the bit" if same else "to rounding: another processor")
    return differences(stored, numbers(workdir), to_the_bit=same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path, nargs="?")
    parser.add_argument("--flags", action="store_true", help="print FLAGS, a line each")
    parser.add_argument("--update", action="store_true")
    flags = parser.parse_args()
    if flags.flags:
        print("\n".join(FLAGS))
        return 0
    if flags.update:
        held = records.stamped({"processor": processor(), **numbers(flags.workdir)})
        STORED.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
        return 0
    lines = compare(flags.workdir)
    print("\n".join(lines) or "the same")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
