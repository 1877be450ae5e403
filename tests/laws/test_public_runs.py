"""The refit of public runs: the reader always, the numbers where the file is."""

import importlib.util
import os
import pathlib
import sys

import numpy as np
import pytest
from law_studies import CHINCHILLA
from numpy.testing import assert_allclose


def _load():
    path = pathlib.Path(__file__).parent / "public_runs.py"
    spec = importlib.util.spec_from_file_location("public_runs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


public = _load()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A table as the paper's, of its own surface, with five outliers and a gap."""
    rng = np.random.default_rng(0)
    k, rows = CHINCHILLA, []
    for c in np.geomspace(3e18, 3e21, 8):
        for n in np.geomspace(8e7, 1e10, 12):
            d = c / (6 * n)
            if not 1e9 < d < 3e11:
                continue
            y = k["E"] + k["A"] / n ** k["alpha"] + k["B"] / d ** k["beta"]
            rows.append((n, c, y * (1 + 0.002 * rng.standard_normal())))
    for i in range(5):
        rows.append((3e9, 6 * 3e9 * 1e8 * (i + 1), 5.0))
    path = tmp_path_factory.mktemp("public") / "runs.csv"
    lines = [f"0,0,#aa,{n},{c},#aa,{y}" for n, c, y in rows] + ["0,0,#aa,,1e19,#aa,3"]
    path.write_text("x,y,color,Model Size,Training FLOP,hex_color,loss\n")
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    return path, len(rows) - 5


def test_a_table_as_the_papers_gives_its_surface_back(file, capsys):
    path, count = file
    points = public.chinchilla(path)
    assert len(points) == count and max(p[3] for p in points) < 4
    for c, n, d, _ in points:
        assert_allclose(6 * n * d, c)
    found = public.refit(points, bootstrap=50)
    assert all(abs(off) < 1 for off in public.differences(found).values())
    assert public.differences(found)["E"] == pytest.approx((found.E - 1.8172) / 0.03)


def test_a_table_of_runs_is_read_by_its_names(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("loss,params,tokens,budget_flops,other\n2.5,1e6,2e7,1.2e14,a\n")
    (row,) = public.runs(path)
    assert row == {"budget_flops": 1.2e14, "params": 1e6, "tokens": 2e7, "loss": 2.5}


@pytest.mark.skipif(public.FILE not in os.environ, reason=f"{public.FILE} is not set")
def test_the_refit_of_chinchillas_runs_is_the_published_one():
    points = public.chinchilla(os.environ[public.FILE])
    assert len(points) == 240
    found = public.refit(points)
    assert all(abs(off) < 1 for off in public.differences(found).values())
