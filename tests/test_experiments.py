"""Every experiment file resolves, says what it costs, and plans."""

import ast
import math
import pathlib
import re

import pytest

from scaling_ldm import config
from scaling_ldm.stages import plan

FOLDER = pathlib.Path(__file__).parent.parent / "experiments"
FILES = sorted(p for p in FOLDER.glob("*.py") if p.name != "base.py")
SMALL = {"tiny", "quickstart"}


def test_the_documented_experiments_are_there():
    names = {p.stem for p in FILES}
    grid = {f"dit_{b}" for b in ("1e17", "3e17", "6e17", "1e18", "3e18", "6e18")}
    assert grid | {"dit_isoflop", "dit_1e21", "dit_cross_attention"} <= names
    assert {"unet_family", "unet_866m"} <= names
    assert SMALL | BY_DAY <= names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_resolves_and_says_question_cost_and_command(path):
    experiment = config.resolve(config.load(path))
    assert experiment.name == path.stem
    assert experiment.question.endswith("?")
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert "?" in doc.splitlines()[0]
    assert "Cost: " in doc
    assert "Expect" in doc
    assert f"--config experiments/{path.name}" in doc


# By day: the main one, and those that need little. At night: every experiment.
BY_DAY = {"dit_1e18", "quick_frontier", "tiny_axes"}  # test_docs plans quickstart


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem in BY_DAY else [pytest.mark.slow])
        for path in FILES
    ],
    ids=lambda p: p.stem,
)
def test_it_plans(path):
    """On two sizes of its ladder: a whole plan traces every size."""
    c = config.load(path)
    everything = config.resolve(c).plan
    sizes = sorted(everything.sizes)
    middle = len(sizes) // 2
    c.plan.sizes = tuple(sizes[middle : middle + 2])
    c.plan.sizes_per_budget = min(everything.sizes_per_budget, 2)
    c.plan.budgets_flops = everything.budgets_flops[-1:]
    rows = plan.plan(config.resolve(c))
    everything = c.plan.steps or not c.plan.sizes_per_budget
    sizes = len(c.plan.sizes) if everything else c.plan.sizes_per_budget
    assert len(rows) == sizes * math.prod(len(values) for _, values in c.plan.axes)
    for row in rows:
        assert row.hours > 0


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_its_mesh_and_batches_fit_its_default_devices(path):
    e = config.resolve(config.load(path))
    assert e.plan.devices % e.mesh.fsdp == 0
    assert e.mesh.replica in (-1, e.plan.devices // e.mesh.fsdp)
    # Those of training and validation are refused where they do not fit.
    for size in (e.train.batch_size, e.validation.batch_size):
        assert size % e.plan.devices == 0


def test_paper_b_grid():
    """Width 64 x depth, depth 2 to 15, batch 1024, 1e-4, 256 image tokens."""
    e = config.resolve(config.load(FOLDER / "dit_isoflop.py"))
    assert e.plan.sizes == tuple((64 * n, n) for n in range(2, 16))
    assert e.plan.budgets_flops == (1e17, 3e17, 6e17, 1e18, 3e18, 6e18)
    assert (e.train.batch_size, e.optimizer.learning_rate) == (1024, 1e-4)
    assert e.data.shape[0] * e.data.shape[1] // e.model.patch_size**2 == 256
    assert e.model.architecture == "in_context"


def test_the_expected_loss_in_a_docstring_is_paper_bs_law():
    from scaling_ldm.laws import fit

    law = fit.published()["liang2024_in_context_loss"]
    for path in FILES:
        budget = re.fullmatch(r"dit_(\de\d\d)", path.stem)
        if budget:
            stated = re.search(r"training\s+loss of (0\.\d+)", path.read_text())
            assert float(stated[1]) == pytest.approx(law(float(budget[1])), abs=6e-4), (
                path.stem
            )
