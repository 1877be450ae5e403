"""How often the intervals of `fit.isoflop` hold the truth, in simulated studies.

    python tests/coverage/measure.py
    python tests/coverage/measure.py --replicates 20 --only base
    python tests/coverage/measure.py --replicates 200 --draws 400 --write

The last command writes the table of docs/laws.md, about half an hour on a CPU core. The
scenarios are those of `studies.py`.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import math
import pathlib
import sys
from unittest import mock

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import studies  # noqa: E402

from scaling_ldm.laws import fit  # noqa: E402
from scaling_ldm.records import HeldOut, Interval, Parabola, Refusal  # noqa: E402

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "laws.md"
BEGIN, END = "<!-- coverage: begin -->\n", "<!-- coverage: end -->"
COLUMNS = {
    "vertex": "N_opt at a budget",
    "n": "exponent of N_opt",
    "held n": "held-out N_opt",
    "held l": "held-out L_opt",
    "beyond": "L at 4 x the largest budget",
    "offset": "E",
    "decay": "exponent of L_opt",
    "surface": "exponent of N_opt by the surface",
    "surface E": "E of the surface",
}
_REFUSED = {
    "no vertex": "minima",
    "no n": "law of N",
    "no l": "law of L",
    "no surface": "surface",
}


def one_study(scenario: studies.Scenario, draws: int, seed: int) -> dict:
    """Of each column, the results (1.0: the truth is inside) of one study."""
    points, truth = studies.draw(scenario, seed)
    with mock.patch.object(fit, "estimates", lambda *_, **__: ((), None, [])):
        found = fit.isoflop(points, bootstrap=draws, seed=seed)
    said = collections.defaultdict(list)

    def check(name: str, interval: Interval, value: float) -> None:
        said[name].append(float(interval.low <= value <= interval.high))

    of_all = found.parametric
    said["no surface"].append(float(isinstance(of_all, Refusal)))
    if not isinstance(of_all, Refusal):
        check("surface", of_all.intervals["n_opt_exponent"], truth.exponent)
        check("surface E", of_all.intervals["E"], truth.E)
    for parabola, n_opt in zip(found.parabolas, truth.n_opt, strict=True):
        said["no vertex"].append(float(isinstance(parabola, Refusal)))
        if isinstance(parabola, Parabola):
            check("vertex", parabola.n_opt_interval, n_opt)
            said["shift"].append(math.log(parabola.n_opt / n_opt))
    n, loss = found.laws["N_opt"], found.laws["L_opt"]
    said["no n"].append(float(isinstance(n, Refusal)))
    said["no l"].append(float(isinstance(loss, Refusal)))
    if not isinstance(n, Refusal):
        check("n", n.exponent_interval, truth.exponent)
        said["width"].append(n.exponent_interval.high - n.exponent_interval.low)
        said["bias"].append(n.exponent - truth.exponent)
    if not isinstance(loss, Refusal):
        check("offset", loss.offset_interval, truth.E)
        check("decay", loss.exponent_interval, -truth.decay)
        at, low, high = loss.band[-1]
        if math.isclose(at, truth.beyond[0]):  # else the largest budget has no minimum
            said["beyond"].append(float(low <= truth.beyond[1] <= high))
    for held in found.held_out:
        if isinstance(held, HeldOut) and held.quantity != "D_opt":
            said[f"held {held.quantity[0].lower()}"].append(float(held.inside))
            if held.quantity == "L_opt":
                said["error"].append(abs(held.relative_error))
    return said


def coverage(
    scenario: studies.Scenario, replicates: int, draws: int = 1000
) -> dict[str, list[float]]:
    """The results of `one_study` of many studies of one scenario, by column."""
    together = collections.defaultdict(list)
    for seed in range(replicates):
        for name, results in one_study(scenario, draws, seed).items():
            together[name] += results
    return together


def row(scenario: studies.Scenario, said: dict[str, list[float]]) -> str:
    """The row of the table; a share outside 85 to 95 is in bold."""

    def cell(name: str) -> str:
        results = said.get(name, [])
        if len(results) < 20:
            return "-"
        share = round(100 * np.mean(results))
        return f"{share}" if 85 <= share <= 95 else f"**{share}**"

    shares = [round(100 * float(np.mean(said[name]))) for name in _REFUSED]
    cells = [*map(cell, COLUMNS), " / ".join(map(str, shares))]
    return f"| {scenario.name} | {' | '.join(cells)} |"


def table(rows: list[str], replicates: int) -> str:
    """The table as docs/laws.md has it."""
    head = ["scenario", *COLUMNS.values(), f"refused: {', '.join(_REFUSED.values())}"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
    said = f"Coverage in % at nominal 90%, {replicates} studies of each scenario."
    return "\n".join([said, "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--only", default="", help="part of a scenario's name")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="into docs/laws.md")
    options = parser.parse_args()
    chosen = [s for s in studies.SCENARIOS if options.only in s.name]
    measure = functools.partial(
        coverage, replicates=options.replicates, draws=options.draws
    )
    rows = []
    with contextlib.ExitStack() as stack:
        each = map(measure, chosen)
        if options.processes > 1:
            pool = concurrent.futures.ProcessPoolExecutor(options.processes)
            each = stack.enter_context(pool).map(measure, chosen)
        for scenario, said in zip(chosen, each, strict=True):
            rows.append(row(scenario, said))
            width, bias = np.median(said["width"]), np.mean(said["bias"])
            more = f"ln N_opt: bias {np.mean(said['shift']):+.4f}"
            more += f"; exponent of N: width {width:.3f}, bias {bias:+.3f}"
            if said["error"]:
                more += f"; held-out L: median error {np.median(said['error']):.2%}"
            print(rows[-1], more, flush=True)
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        middle = table(rows, options.replicates)
        PAGE.write_text(before + BEGIN + middle + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
