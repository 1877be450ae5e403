"""README.md is short, says what has been run, and shows a check that failed."""

import pathlib
import re

from scaling_ldm import records

ROOT = pathlib.Path(__file__).parent.parent


def _read(name):
    return (ROOT / name).read_text(encoding="utf-8")


TEXT = _read("README.md")
FOUND = records.loads(_read("experiments/results/quickstart_laws.json"))
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
    rows = _rows(TEXT, 5)
    for name, law in FOUND.laws.items():
        assert _says(rows[name][0].partition("=")[2], *_constants(law))
        assert _says(rows[name][1], *_ends(law.exponent_interval))
    for check in FOUND.held_out:
        _, _, predicted, measured, verdict = rows[check.quantity]
        interval = check.predicted_interval
        assert _says(predicted, check.predicted, *_ends(interval))
        assert _says(measured, check.measured)
        assert verdict == ("inside" if check.inside else "**failed**")
    (said,) = re.findall(r"its interval is (.*)\.$", TEXT, re.MULTILINE)
    assert _says(said, *_ends(FOUND.laws["L_opt"].offset_interval))


def test_numbers_elsewhere_are_those_of_the_stored_result():
    """The tutorial, the page of laws and the experiment say them, too."""
    tutorial = _read("docs/tutorial.md")
    laws, checks = _rows(tutorial, 3), _rows(tutorial, 5)
    for name, law in FOUND.laws.items():
        formula, exponent, interval = laws[name]
        assert _says(formula.partition("=")[2], *_constants(law))
        assert _says(exponent, law.exponent)
        assert _says(interval, *_ends(law.exponent_interval))
    for check in FOUND.held_out:
        _, predicted, interval, measured, verdict = checks[check.quantity]
        assert _says(predicted, check.predicted)
        assert _says(interval, *_ends(check.predicted_interval))
        assert _says(measured, check.measured)
        assert verdict == ("yes" if check.inside else "**no**")
    loss = {check.quantity: check for check in FOUND.held_out}["L_opt"]
    page = _read("docs/laws.md")
    (said,) = re.findall(r"The quickstart shows it: (.*?)\. Version", page)
    assert _says(said, loss.predicted, *_ends(loss.predicted_interval), loss.measured)
    assert not [note for note in FOUND.notes if "_opt: " in note]
    (said,) = re.findall(r"Its interval is (.*): these four budgets", tutorial)
    assert _says(said, *_ends(FOUND.laws["L_opt"].offset_interval))
    shown = r"with an error of (.*)%, the law with an offset with (.*)%"
    wanted = [f"{100 * form.left_out_error:.1f}" for form in FOUND.loss_forms]
    assert re.findall(shown, tutorial) == [tuple(wanted)]
    experiment = _read("experiments/quickstart.py")
    (said,) = re.findall(r"N_opt ~ C\^(.* )\(90%\s+interval (.*?)\)", experiment)
    law = FOUND.laws["N_opt"]
    assert _says("".join(said), law.exponent, *_ends(law.exponent_interval))


def _rows(text, width):
    """Cells of the tables' rows of so many cells, by the first word."""
    rows = [x.strip("| ").split(" | ") for x in text.splitlines() if x[:2] == "| "]
    return {row[0].split()[0]: row for row in rows if len(row) == width}


def _ends(interval):
    return interval.low, interval.high


def _constants(law):
    offset = (law.offset,) if isinstance(law, records.OffsetLaw) else ()
    return *offset, law.coef, law.exponent


def _says(text, *values):
    """Whether a text has these numbers and no other, rounded to the digits it gives."""
    number = r"(?<![\w.])(-?[\d.]*\d)(e-?\d+)?([kM]?)"
    shown = re.findall(number, text.replace("C^", ""))
    assert len(shown) == len(values), text
    for (digits, power, unit), value in zip(shown, values, strict=True):
        significant = digits.strip("-").replace(".", "").lstrip("0")
        if "." not in digits:
            significant = significant.rstrip("0")
        scale = {"": 1.0, "k": 1e3, "M": 1e6}[unit] * float("1" + (power or "e0"))
        rounded = float(f"{value / scale:.{len(significant)}g}")
        if rounded != float(digits):
            return False
    return True
