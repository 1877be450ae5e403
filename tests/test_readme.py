"""README.md is short, says what has been run, and shows a check that failed."""

import pathlib
import re

from scaling_ldm import records

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = "\n".join(TEXT.splitlines()[:40])


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150


def test_its_first_screen_says_what_has_been_run():
    assert "2 CPU cores" in FIRST_SCREEN
    assert re.search(r"No run\s+on a TPU or GPU", FIRST_SCREEN)
    assert "simulated CPU devices only" in FIRST_SCREEN


def test_there_is_one_test_command():
    """.ci/run takes the test command from this line."""
    lines = re.findall(r"^python3 -m venv .*pytest.*$", TEXT, re.MULTILINE)
    assert len(lines) == 1
    assert lines[0].endswith("pytest -n 2")


def test_its_numbers_are_those_of_the_stored_result():
    path = ROOT / "experiments" / "results" / "quickstart_laws.json"
    found = records.loads(path.read_text())
    rows = {
        cells[0].split()[0]: cells
        for line in TEXT.splitlines()
        if line.startswith("| ") and len(cells := line.strip("| ").split(" | ")) == 5
    }
    for check in found.held_out:
        _, exponent, predicted, measured, verdict = rows[check.quantity]
        law = found.laws[check.quantity].exponent_interval
        low, high = (float(x) for x in exponent.split(" to "))
        assert abs(low - law.low) < 0.006 and abs(high - law.high) < 0.006
        i = check.predicted_interval
        stated = [_number(x) for x in re.findall(r"[\d.]+[kM]?", predicted)]
        for value, true in zip(
            (*stated, _number(measured)),
            (check.predicted, i.low, i.high, check.measured),
            strict=True,
        ):
            assert abs(value / true - 1) < 0.006
        inside = i.low <= check.measured <= i.high
        assert verdict == ("inside" if inside else "**failed**")


def _number(text):
    return float(text.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(text[-1], 1)
