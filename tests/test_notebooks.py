"""Every notebook runs from top to bottom, and shows what it promises.

Running them needs the extra `notebooks`; `.ci/run` does it.
"""

import json
import os
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {"fit_your_own_runs": 1, "read_a_study": 2, "samplers": 4}


# A process for each, and the samplers' compiles every one at seven numbers of steps. By
# day, tests/diffusion, tests/laws and the cells of the pages call the same functions.
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    # One real device, optimised code: faster for many runs.
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.fspath(FOLDER.parent.parent))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    ).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == PICTURES[path.stem]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_its_stored_outputs_are_complete(path):
    """The site shows them; a cell that was changed must be run again."""
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["source"]]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == PICTURES[path.stem]
