"""Fits the stored numbers of the quickstart again, without training.

    python tests/refit_quickstart.py

Reads experiments/results/quickstart_measurements.jsonl, the held-out loss of each run
at its end, and writes quickstart_laws.json beside it. A change of the fits needs this;
a change of training needs a new run (docs/contributing.md).
"""

from __future__ import annotations

import dataclasses
import pathlib

from scaling_ldm import records
from scaling_ldm.laws import fit

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "results"
MEASUREMENTS = FOLDER / "quickstart_measurements.jsonl"
LAWS = FOLDER / "quickstart_laws.json"


def refitted() -> records.FitResult:
    """The laws of the stored rows, with the settings of the experiment's fit."""
    rows = records.read_jsonl(MEASUREMENTS)
    (weights,) = {row.weights for row in rows}
    (protocol,) = {row.protocol_hash for row in rows}
    points = [
        {
            name: getattr(row, name)
            for name in ("budget_flops", SIZE, "tokens", "run_id")
        }
        | {"loss": row.value}
        for row in rows
    ]
    found = fit.isoflop(points, size=SIZE)
    return dataclasses.replace(found, weights=weights, protocol_hash=protocol)


SIZE = "params_without_embeddings"  # config.fit.size

if __name__ == "__main__":
    found = refitted()
    LAWS.write_text(records.dumps(found) + "\n", encoding="utf-8")
    print("\n".join(fit.summary(found)))
