"""The script for a GPU or TPU, with tiny networks on the CPU."""

import json
import os
import subprocess
import sys

import pytest
from processes import ROOT


@pytest.mark.slow
def test_every_part_is_measured_and_written(tmp_path):
    script = ROOT / "tests" / "benchmarks" / "accelerator.py"
    done = subprocess.run(
        [sys.executable, script, "--out", tmp_path, "--tiny", "--seconds=0.1"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "accelerator.jsonl").read_text().splitlines()
    first, *rows = [json.loads(line) for line in lines]
    assert first["part"] == "matrix products" and first["flops_per_second"] > 0
    assert [(row["part"], row["network"]) for row in rows] == [
        ("training", "DiT-XL/2"),
        ("sampling", "DiT-XL/2"),
        ("training", "U-Net 866M"),
        ("sampling", "U-Net 866M"),
    ]
    for row in rows:
        assert row["device"] and row["tiny"] is True and "failed" not in row
        if row["part"] == "training":
            assert 0 < row["share_of_products"] < 1
            assert row["planned_bytes"] > 0
        else:
            assert row["finite"]
            assert 0 < row["host_milliseconds_a_step"] <= row["milliseconds_a_step"]
