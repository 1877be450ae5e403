"""Points of an isoFLOP study, read from tuples, mappings or objects.

A point whose values have names is read by name, whatever their order: a mapping, an
object, a named tuple, a row of a structured array or of a database. Budgets that differ
by 2% or less are one budget. A point that is given twice counts once. A run whose loss
lies far above those of its budget is left out by name: it diverged, though its loss is
a number.

Points may name their run. Points of one run are measured along one trajectory: they
share its seed, so what is noise at one budget is partly the same noise at the next.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, order=True)
class IsoflopPoint:
    budget: float  # FLOPs
    n: float  # parameters
    d: float  # tokens
    loss: float
    run: str = ""  # points of one run share its seed; "": not known


RUN = "run_id"  # the field of a named point that is `IsoflopPoint.run`; a text
SAME_BUDGET = 0.02  # relative difference up to which two budgets are one
NEAR_BUDGET = 0.05  # relative difference up to which a note asks whether they are one
_ROUNDING = 1e-6  # relative difference of budgets that needs no note
_UNITS = (0.1, 10.0)  # of 6 N D / C; beyond it one of the three has another unit
# A loss counts as far above the parabola through the others if its distance is larger
# than the range of the others, and than this many times the largest deviation of a
# usual budget.
_DEVIATIONS = 8
_RANGES_ALONE = 3  # without another budget: its distance in ranges of the others
_LEAST_OTHERS = 4  # fewest other sizes that a run is compared with


def run_name(budget: float, n: float) -> str:
    return f"run of {n:.6g} parameters at {budget:.6g} FLOPs"


def read(
    points: Iterable[Any], metric: str, size: str
) -> tuple[list[IsoflopPoint], list[str], list[str]]:
    """Usable points in a fixed order, a line for each that is left out, and notes.

    Raises:
      ValueError: a point is not four numbers and lacks one of the fields.
    """
    kept, excluded = [], []
    names = ("budget_flops", size, "tokens", metric)
    for number, point in enumerate(points):
        values = values_of(point, names, number)
        bad = [
            f"{name} is {value:.6g}"
            for name, value in zip(names[:3], values[:3], strict=True)
            if not (math.isfinite(value) and value > 0)
        ]
        if not math.isfinite(values[3]):
            bad.append(f"{metric} is {values[3]:.6g}")
        if bad:
            excluded.append(f"{run_name(*values[:2])}: {', '.join(bad)}")
        else:
            kept.append(IsoflopPoint(*values, run=_run(point)))
    counts = collections.Counter(kept)
    excluded += [
        f"{run_name(point.budget, point.n)}: given {count} times with the same tokens "
        f"and {metric}, counted once"
        for point, count in counts.items()
        if count > 1
    ]
    kept, notes = _with_equal_budgets(sorted(counts))
    return kept, sorted(excluded), notes + _odd_units(kept)


def shared_seeds(points: Iterable[IsoflopPoint]) -> list[str]:
    """A line if several points are of one run."""
    runs = collections.Counter(point.run for point in points if point.run)
    several = [count for count in runs.values() if count > 1]
    if not several:
        return []
    lie = (
        "lie on 1 trajectory"
        if len(several) == 1
        else f"lie on {len(several)} trajectories"
    )
    return [
        f"{sum(several)} points {lie}: those of one trajectory share their seed, and "
        "the intervals of minima and laws allow for noise that they have in common; "
        "those of the surface do not"
    ]


def _with_equal_budgets(
    points: list[IsoflopPoint],
) -> tuple[list[IsoflopPoint], list[str]]:
    """Sorted points, and notes; nearly equal budgets become the middle one of them."""
    groups: list[list[IsoflopPoint]] = []
    for point in points:
        first = groups[-1][0].budget if groups else 0.0
        if point.budget - first > SAME_BUDGET * point.budget:
            groups.append([])
        groups[-1].append(point)
    notes, middle = [], [group[len(group) // 2].budget for group in groups]
    united = [
        f"{group[0].budget:.6g} to {group[-1].budget:.6g}"
        for group in groups
        if group[-1].budget - group[0].budget > _ROUNDING * group[-1].budget
    ]
    if united:
        notes.append(
            f"budgets within {SAME_BUDGET:.0%} of each other are one budget "
            f"({', '.join(united)} FLOPs)"
        )
    notes += [
        f"budgets {low:.6g} and {high:.6g} FLOPs differ by {high / low - 1:.1%} and "
        "count as two: runs of one budget should have the budget they were planned for"
        for low, high in itertools.pairwise(middle)
        if high - low <= NEAR_BUDGET * high
    ]
    found = [
        dataclasses.replace(point, budget=budget)
        for group, budget in zip(groups, middle, strict=True)
        for point in group
    ]
    return sorted(found), notes


def _odd_units(points: list[IsoflopPoint]) -> list[str]:
    """A line if 6 N D is not nearly C: a unit may be another one."""
    ratios = [6 * p.n * p.d / p.budget for p in points]
    odd = [r for r in ratios if not _UNITS[0] <= r <= _UNITS[1]]
    if not odd:
        return []
    return [
        f"6 N D / C lies between {min(ratios):.3g} and {max(ratios):.3g}, outside "
        f"{_UNITS[0]:g} to {_UNITS[1]:g} at {len(odd)} of {len(ratios)} points: are "
        "parameters, tokens and FLOPs given as whole numbers, not in millions?"
    ]


def without_diverged(
    points: list[IsoflopPoint], metric: str
) -> tuple[list[IsoflopPoint], list[str]]:
    """The points without runs that diverged to a finite loss, and a line for each.

    The run with the largest such deviation is removed first. Then the rest is tested
    again, because a diverged run also spoils the parabolas of the others.
    """
    lines = []
    while True:
        budgets = sorted({p.budget for p in points})
        groups = [[p for p in points if p.budget == budget] for budget in budgets]
        deviations = [_deviations(group) for group in groups]
        largest = [max(np.abs(d[:, 0])) for d in deviations]
        found: list[tuple[float, float, IsoflopPoint]] = []
        for i, (group, of_group) in enumerate(zip(groups, deviations, strict=True)):
            others = [x for j, x in enumerate(largest) if j != i and x > 0]
            usual = _DEVIATIONS * float(np.median(others)) if others else 0.0
            for point, (above, spread) in zip(group, of_group, strict=True):
                limit = max(usual, spread if others else _RANGES_ALONE * spread)
                if above > limit > 0:
                    found.append((above / limit, above, point))
        if not found:
            return points, lines
        _, above, worst = max(found)
        lines.append(
            f"{run_name(worst.budget, worst.n)}: {metric} is {worst.loss:.6g}, where a "
            f"parabola through the other sizes gives {worst.loss - above:.6g}; the run "
            "seems to have diverged"
        )
        points = [p for p in points if p is not worst]


def _deviations(group: Sequence[IsoflopPoint]) -> np.ndarray:
    """Float [points, 2] of one budget: each loss minus a parabola through the others.

    The second column is the range of the losses of the others. Both are 0 where the
    others have fewer than _LEAST_OTHERS sizes.
    """
    x, y = np.log([p.n for p in group]), np.array([p.loss for p in group])
    found = np.zeros((len(group), 2))
    for i in range(len(group)):
        rest = np.arange(len(group)) != i
        if len(np.unique(x[rest])) >= _LEAST_OTHERS:
            design = np.vander(x - x[rest].mean(), 3)
            coefs = np.linalg.pinv(design[rest]) @ y[rest]
            found[i] = y[i] - design[i] @ coefs, np.ptp(y[rest])
    return found


def values_of(point: Any, names: Sequence[str], number: int) -> tuple[float, ...]:
    """The values of one point, as numbers; None becomes NaN.

    Raises:
      ValueError: it is neither that many numbers nor has fields of these names.
    """
    named = _by_name(point)
    if named is not None or not isinstance(point, (Sequence, np.ndarray)):
        found = point if named is None else named
        values = [_field(found, name, number, type(point)) for name in names]
    elif isinstance(point, (str, bytes)):
        raise ValueError(
            f"point {number} is the text {point!r}; {len(names)} numbers or named "
            "fields are needed. Of a data frame give its rows: frame.itertuples()"
        )
    elif len(point) == len(names):
        values = point
    else:
        raise ValueError(
            f"point {number} has {len(point)} values; {len(names)} are needed: "
            f"({', '.join(names)})"
        )
    return tuple(math.nan if v is None else float(v) for v in values)


def _run(point: Any) -> str:
    """The run of a point that has names, if it is a text; else ""."""
    named = _by_name(point)
    found = getattr(point, RUN, "") if named is None else named.get(RUN, "")
    return found if isinstance(found, str) else ""


def _by_name(point: Any) -> Mapping[str, Any] | None:
    """The values of a point that has names for them; None for any other."""
    if isinstance(point, Mapping):
        return point
    if fields := getattr(point, "_fields", None):  # a named tuple
        return dict(zip(fields, point, strict=True))
    if fields := getattr(getattr(point, "dtype", None), "names", None):  # structured
        return {name: point[name] for name in fields}
    if isinstance(point, Sequence) and callable(keys := getattr(point, "keys", None)):
        return dict(zip(keys(), point, strict=True))  # sqlite3.Row
    return None


def _field(point: Any, name: str, number: int, kind: type) -> Any:
    if isinstance(point, Mapping):
        if name in point:
            return point[name]
    elif hasattr(point, name):
        return getattr(point, name)
    have = point if isinstance(point, Mapping) else getattr(point, "__dict__", ())
    raise ValueError(
        f"point {number} ({kind.__name__}) has no {name!r}; "
        f"it has: {', '.join(map(str, have)) or 'no fields'}. Give (budget_flops, "
        "params, tokens, loss) or name the fields with metric= and size="
    )
