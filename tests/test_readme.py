"""What the README shows runs as it stands."""

import ast
import pathlib
import re
import shlex

import pytest

from scaling_ldm import config

TEXT = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = re.findall(r"^python -m scaling_ldm\.main (.*)$", TEXT, re.MULTILINE)
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
NETWORKS = "Networks, and their published weights"
COST = "Quality against the cost of sampling"
HEADINGS = (COST, "Samplers", "Likelihoods", NETWORKS, NETWORKS, "FLOPs", "Fits")


@pytest.mark.parametrize("number", range(len(HEADINGS)), ids=HEADINGS)
def test_a_block_runs(number):
    before = TEXT.split(BLOCKS[number])[0]
    assert re.findall(r"^### (.*)$", before, re.MULTILINE)[-1] == HEADINGS[number]
    exec(compile(BLOCKS[number], f"README.md, {HEADINGS[number]}", "exec"), {})


def test_there_is_no_other_block():
    assert len(BLOCKS) == len(HEADINGS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_fields_resolve(command):
    root = pathlib.Path(__file__).parent.parent
    words = shlex.split(command.replace("FOLDER_OR_HUB_ID", "owner/name"))
    c = config.load(root / words[words.index("--config") + 1])
    for word in words:
        if field := re.fullmatch(r"--config\.(\w+)\.(\w+)=(.*)", word):
            section, name, value = field.groups()
            text = isinstance(c[section][name], str)
            c[section][name] = value if text else ast.literal_eval(value)
    config.resolve(c)
