"""What the README shows runs as it stands."""

import pathlib
import re

import pytest

TEXT = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
NETWORKS = "Networks, and their published weights"
HEADINGS = ("Samplers", "Likelihoods", NETWORKS, NETWORKS, "FLOPs", "Fits")


@pytest.mark.parametrize("number", range(len(HEADINGS)), ids=HEADINGS)
def test_a_block_runs(number):
    before = TEXT.split(BLOCKS[number])[0]
    assert re.findall(r"^### (.*)$", before, re.MULTILINE)[-1] == HEADINGS[number]
    exec(compile(BLOCKS[number], f"README.md, {HEADINGS[number]}", "exec"), {})


def test_there_is_no_other_block():
    assert len(BLOCKS) == len(HEADINGS)
