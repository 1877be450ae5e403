"""How often the intervals of `fit.compare` hold the truth, in simulated pairs.

    python tests/coverage/measure_pairs.py
    python tests/coverage/measure_pairs.py --replicates 20 --only cross
    python tests/coverage/measure_pairs.py --replicates 200 --write

The last command writes the table of docs/compare.md, about 8 minutes on a CPU core.
The pairs are those of `pairs.py`. Laws with an offset are not fitted: their coverage is
that of `measure.py`, and their fits would take half of the time.
"""

from __future__ import annotations

import argparse
import collections
import math
import pathlib
import sys
from unittest import mock

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import pairs  # noqa: E402

from scaling_ldm.laws import comparison, fit  # noqa: E402
from scaling_ldm.records import (  # noqa: E402
    AtBudget,
    ComparedLaw,
    CrossingBudget,
    EqualLoss,
    Refusal,
)

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "compare.md"
BEGIN, END = "<!-- coverage: begin -->\n", "<!-- coverage: end -->"
COLUMNS = {
    "exponent": "exponents of N_opt",
    "slope": "exponents of L_opt",
    "n": "N_opt in the middle",
    "loss": "L_opt in the middle",
    "compute": "compute for equal loss",
    "crossing": "crossing",
}
_VERDICTS = ("first better", "second better", "they cross", "no difference shown")


def one_pair(pair: pairs.Pair, draws: int, seed: int) -> dict:
    """Of each column, the results (1.0: the truth is inside) of one pair."""
    first, second, truth = pairs.draw(pair, seed)
    given = {"paired": pair.paired, "bootstrap": draws, "seed": seed}
    nothing = fit.refuse("not fitted", "")
    with mock.patch.object(comparison._Fitted, "_offset_law", lambda *_: nothing):
        found = fit.compare(first, second, **given)
    said = collections.defaultdict(list)
    said["refused"].append(float(isinstance(found, Refusal)))
    if isinstance(found, Refusal):
        return said

    def check(name, interval, value):
        said[name].append(float(interval.low <= value <= interval.high))

    for name, of, ratio, slope in (
        ("N_opt", "exponent", "n", truth.exponent),
        ("L_opt", "slope", "loss", truth.slope),
    ):
        law = found.laws[name]
        if isinstance(law, ComparedLaw):
            i = law.difference_interval
            check(of, i, slope)
            said[f"width {of}"].append(i.high - i.low)
            check(ratio, law.ratio_interval, getattr(truth, f"{ratio}_ratio"))
    middle = found.at_budgets[1] if len(found.at_budgets) > 1 else None
    if isinstance(middle, AtBudget) and isinstance(middle.compute, EqualLoss):
        check("compute", middle.compute.interval, truth.compute)
    known = isinstance(found.crossing, CrossingBudget)
    said["crosses"].append(float(known))
    if known and not math.isnan(truth.crossing):
        check("crossing", found.crossing.interval, truth.crossing)
    said["verdict"].append(found.verdict)
    return said


def coverage(pair: pairs.Pair, replicates: int, draws: int = 1000) -> dict[str, list]:
    """The results of `one_pair` of many pairs, by column."""
    together = collections.defaultdict(list)
    for seed in range(replicates):
        for name, results in one_pair(pair, draws, seed).items():
            together[name] += results
    return together


def row(pair: pairs.Pair, said: dict[str, list]) -> str:
    """The row of the table; a share outside 85 to 95 is in bold."""

    def cell(name: str) -> str:
        results = said.get(name, [])
        if len(results) < 20:
            return "-"
        share = round(100 * np.mean(results))
        return f"{share}" if 85 <= share <= 95 else f"**{share}**"

    n = max(len(said["refused"]), 1)
    of = [round(100 * said["verdict"].count(v) / n) for v in _VERDICTS]
    crosses = round(100 * sum(said["crosses"]) / n)
    cells = [*map(cell, COLUMNS), " / ".join(map(str, of)), f"{crosses}"]
    return f"| {pair.name} | {' | '.join(cells)} |"


def table(rows: list[str], replicates: int) -> str:
    """The table as docs/compare.md has it."""
    head = ["pair", *COLUMNS.values(), f"verdicts: {', '.join(_VERDICTS)}"]
    head.append("crossings given")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
    said = f"Coverage in % at nominal 90%, {replicates} simulated pairs of each kind."
    return "\n".join([said, "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--only", default="", help="part of a pair's name")
    parser.add_argument("--write", action="store_true", help="into docs/compare.md")
    options = parser.parse_args()
    rows = []
    for pair in [p for p in pairs.PAIRS if options.only in p.name]:
        said = coverage(pair, options.replicates, options.draws)
        rows.append(row(pair, said))
        width = {n: np.median(said[f"width {n}"]) for n in ("exponent", "slope")}
        more = ", ".join(f"{name} {w:.2g}" for name, w in width.items())
        print(rows[-1], f"widths: {more}", flush=True)
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        middle = table(rows, options.replicates)
        PAGE.write_text(before + BEGIN + middle + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
