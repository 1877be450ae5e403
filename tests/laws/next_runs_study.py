"""How much better proposed runs narrow a prediction than a uniform grid does.

    python tests/laws/next_runs_study.py
    python tests/laws/next_runs_study.py --replicates 40 --only N_opt

Each replicate simulates a small study whose law is known. Then it spends the same FLOPs
twice: on the runs that `next_runs.propose` names, one after the other, and on a grid of
sizes at every budget, as fine as the FLOPs allow. The laws are fitted again by
`fit.isoflop` with all runs. What is compared is the error of its prediction at four
times the largest budget.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from unittest import mock

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "coverage"))
import studies  # noqa: E402

from scaling_ldm.laws import fit, next_runs  # noqa: E402
from scaling_ldm.records import Refusal  # noqa: E402

BUDGETS = studies.EQUAL.C0 * np.geomspace(0.1, 10**0.5, 4)
FIRST = np.geomspace(1 / 4, 4, 5)  # sizes of each budget, over the best one
GRID = np.geomspace(1 / 4, 4, 9)  # sizes that may be added
SPENT = 1.0  # FLOPs that are added, over those of the first runs
NOISE = 0.005


def loss_of(surface, budget, n, rng):
    value = float(surface.loss(budget, n))
    return value * (1 + NOISE * float(rng.standard_normal()))


def predictions(points, target, draws=50):
    """N and L at the target by the library's fit; None: a law is refused."""
    with mock.patch.object(fit, "_surface", lambda *_: fit.refuse("not fitted", "")):
        found = fit.isoflop(points, bootstrap=draws, hold_out_largest=False)
    laws = [found.laws[q] for q in ("N_opt", "L_opt")]
    if any(isinstance(law, Refusal) for law in laws):
        return None
    return [law(target) for law in laws]


def replicate(seed, quantity="N_opt", surface=studies.EQUAL):
    """ln(predicted / true) of both ways; None where one of the fits refuses."""
    rng = np.random.default_rng(seed)
    target = 4 * BUDGETS[-1]
    truth = float(surface.n_opt(target)), float(surface.least(target))
    first = [
        (c, k * float(surface.n_opt(c)), 0.0) for c in BUDGETS.tolist() for k in FIRST
    ]
    first = [(c, n, loss_of(surface, c, n, rng)) for c, n, _ in first]
    money = SPENT * sum(c for c, _, _ in first)
    grid = [(c, k * float(surface.n_opt(c))) for c in BUDGETS.tolist() for k in GRID]
    proposed = next_runs.propose(
        [(c, n, y) for c, n, y in first],
        [(c, n * (1 + 1e-6 * i)) for i in range(6) for c, n in grid],
        target=target,
        count=200,
        quantity=quantity,
        seed=seed,
    )
    if isinstance(proposed, Refusal):
        return None
    added, left = [], money
    for run in proposed.runs:
        if run.budget <= left:
            left -= run.budget
            added.append((run.budget, run.n))
    # The uniform grid has as many sizes at each budget, of any number of seeds.
    each = int(round(money / BUDGETS.sum()))
    uniform = [
        (c, k * float(surface.n_opt(c)))
        for c in BUDGETS.tolist()
        for k in np.geomspace(1 / 4, 4, each)
    ]
    errors = []
    for more in (added, uniform):
        every = first + [(c, n, loss_of(surface, c, n, rng)) for c, n in more]
        said = predictions([(c, n, c / (6 * n), y) for c, n, y in every], target)
        if said is None:
            return None
        errors.append([float(np.log(a / b)) for a, b in zip(said, truth, strict=True)])
    return errors


def study(replicates, quantity="N_opt"):
    """(root mean square error of the proposed runs, of the grid, how many replicates).

    Args:
      quantity: what is narrowed and compared.
    """
    found = [replicate(seed, quantity) for seed in range(replicates)]
    kept = np.array([errors for errors in found if errors is not None])
    column = ("N_opt", "L_opt").index(quantity)
    rms = np.sqrt(np.mean(kept[:, :, column] ** 2, 0))
    return float(rms[0]), float(rms[1]), len(kept)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--only", choices=("N_opt", "L_opt"), help="one quantity")
    given = parser.parse_args()
    for quantity in (given.only,) if given.only else ("N_opt", "L_opt"):
        proposed, uniform, count = study(given.replicates, quantity)
        print(
            f"{quantity}: rms error of ln {proposed:.4f} with proposed runs, "
            f"{uniform:.4f} with a uniform grid of the same FLOPs; variance "
            f"{(proposed / uniform) ** 2:.2f} times, {count} of {given.replicates} "
            "studies"
        )


if __name__ == "__main__":
    main()
