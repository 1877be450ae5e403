"""Fits public runs from a file of yours, and compares with what was published.

    python tests/laws/public_runs.py --chinchilla svg_extracted_data.csv
    python tests/laws/public_runs.py --runs runs.csv --exponent 0.497

The first file is that of Besiroglu et al. 2024 (arXiv 2404.10102), which their
repository links: 245 runs read off a figure of Hoffmann et al. 2022. It has no licence,
so it is not part of this library. Five of its runs, those of the fewest tokens, lie far
off and are left out, as they do.

The second file is any table with the columns budget_flops, params, tokens and loss, one
run a row, such as an export of the runs of Porian et al. 2024 (arXiv 2406.19146). Its
exponent of N_opt is compared with the given one.
"""

from __future__ import annotations

import argparse
import csv
import os
import pathlib

from scaling_ldm.laws import fit
from scaling_ldm.records import Refusal

# As published, with the standard errors of the bootstrap of Besiroglu et al.
REFIT = {
    "E": (1.8172, 0.03),
    "A": (482.01, 124.58),
    "B": (2085.43, 1293.23),
    "alpha": (0.3478, 0.02),
    "beta": (0.3658, 0.02),
    "n_opt_exponent": (0.5126, 0.018),
}
OUTLIERS = 5
FILE = "SCALING_LDM_CHINCHILLA"  # the variable with the path, for the test


def chinchilla(path: str | os.PathLike) -> list[tuple[float, float, float, float]]:
    """(C, N, D = C / 6 N, loss) of the 240 runs."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [
            (float(r["Training FLOP"]), float(r["Model Size"]), float(r["loss"]))
            for r in csv.DictReader(file)
            if r["Training FLOP"] and r["Model Size"] and r["loss"]
        ]
    points = [(c, n, c / (6 * n), y) for c, n, y in rows]
    return sorted(points, key=lambda point: point[2])[OUTLIERS:]


def refit(points, bootstrap=200):
    """The surface by the Huber loss of ln L, as the paper fits it."""
    return fit.parametric(points, huber=1e-3, bootstrap=bootstrap)


def differences(found) -> dict[str, float]:
    """(fitted - published) / standard error of each constant."""
    return {
        name: (getattr(found, name) - value) / error
        for name, (value, error) in REFIT.items()
    }


def runs(path: str | os.PathLike) -> list[dict[str, float]]:
    """The rows of a table with the columns budget_flops, params, tokens and loss."""
    with open(path, newline="", encoding="utf-8") as file:
        columns = ("budget_flops", "params", "tokens", "loss")
        rows = csv.DictReader(file)
        return [{name: float(row[name]) for name in columns} for row in rows]


def _say_refit(path: pathlib.Path) -> None:
    points = chinchilla(path)
    found = refit(points)
    if isinstance(found, Refusal):
        print(f"{len(points)} runs: {found.what}: {found.why}")
        return
    print(f"{len(points)} runs, constants of L = E + A / N^alpha + B / D^beta")
    off = differences(found)
    for name, (value, error) in REFIT.items():
        print(
            f"  {name:<15}{getattr(found, name):10.4f}, published {value:g} +- "
            f"{error:g}, {off[name]:+.2f} standard errors apart"
        )


def _say_exponent(path: pathlib.Path, exponent: float) -> None:
    found = fit.isoflop(runs(path))
    for line in fit.summary(found):
        print(line)
    law = found.laws["N_opt"]
    if not isinstance(law, Refusal):
        i = law.exponent_interval
        print(
            f"exponent of N_opt {law.exponent:.3f} [{i.low:.3f}, {i.high:.3f}], "
            f"published {exponent:g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chinchilla", type=pathlib.Path)
    parser.add_argument("--runs", type=pathlib.Path)
    parser.add_argument("--exponent", type=float)
    given = parser.parse_args()
    if given.chinchilla:
        _say_refit(given.chinchilla)
    if given.runs:
        _say_exponent(given.runs, given.exponent)


if __name__ == "__main__":
    main()
