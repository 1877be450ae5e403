"""The names of the runs of a study and of their groups; see `axes`."""

from __future__ import annotations

import decimal
import re
from collections.abc import Collection, Sequence
from typing import Any

from scaling_ldm import records
from scaling_ldm.config import axes
from scaling_ldm.config.axes import Overrides
from scaling_ldm.config.fields import Experiment, PlanConfig

# The short names of fields in the id of a run; other fields have their own name.
_SHORT = {
    "optimizer.learning_rate": "lr",
    "train.batch_size": "batch",
    "model.architecture": "",
}
LONGEST_ID = 120  # characters; a file system allows 255


def group_of(
    plan: PlanConfig, overrides: Overrides, within: Collection[str] = (axes.SEED,)
) -> str:
    """The part of a study whose runs differ in size, budget and seed alone.

    "learning_rate 2e-3, cross_attention"; "" where there is one group.

    Args:
      within: the fields in which runs of one group may differ.
    """
    several = _several(plan)
    said = []
    for path, value in overrides.items():
        if path not in within and path in several:
            name = f"{short_name(path)} " if _SHORT.get(path) != "" else ""
            said.append(f"{name}{value_text(value)}")
    return ", ".join(said)


def varies_rate(plan: PlanConfig) -> bool:
    """Whether runs of a study differ in their learning rate by an axis of rates."""
    return axes.RATE in _several(plan)


def _several(plan: PlanConfig) -> set[str]:
    """The fields that have more than one value in the plan."""
    seen: dict[str, set[Any]] = {}
    for overrides in axes.combinations(plan):
        for path, value in overrides.items():
            seen.setdefault(path, set()).add(value)
    return {path for path, values in seen.items() if len(values) > 1}


def short_name(path: str) -> str:
    """The last part of a field's path; the whole path if two fields share that part."""
    last = path.rpartition(".")[2]
    known = vars(Experiment())
    alike = [s for s in (*axes.SECTIONS, "train") if last in vars(known[s])]
    return last if len(alike) == 1 else path


def value_text(value: Any) -> str:
    """The shortest text that reads back as the value: 2e-3, 0.15, cross_attention."""
    if isinstance(value, (tuple, list)):
        return "+".join(map(value_text, value))
    if not isinstance(value, float):
        return str(value)
    exact = decimal.Decimal(repr(value)).normalize()
    if value == 0 or 0.01 <= abs(value) < 1e4:
        return f"{exact:f}"
    sign, digits, exponent = exact.as_tuple()
    first, rest = str(digits[0]), "".join(map(str, digits[1:]))
    power = int(exponent) + len(rest)
    return f"{'-' * sign}{first}{'.' * bool(rest)}{rest}e{power}"


def budget_texts(budgets: Sequence[float]) -> dict[float, str]:
    """Each budget as it is written in ids, with more than 4 digits only where needed.

    If two budgets have the same 4 digits, the one that they give exactly keeps them.
    """
    found: dict[str, float] = {}
    for budget in sorted(set(budgets), key=lambda b: (float(f"{b:.3e}") != b, b)):
        texts = (f"{budget:.{n}e}".replace("+", "") for n in range(3, 18))
        taken = {float(text) for text in found}
        found[next(text for text in texts if float(text) not in taken)] = budget
    return {budget: text for text, budget in found.items()}


def run_id(experiment: Experiment, budget: str, size: str, overrides: Overrides) -> str:
    """The id of a run: "1.000e09-16x2", and what differs from the experiment.

    So a run keeps its id, and its folder, when the study gets more axes or values. The
    differences are in the order of the names of their fields.

    Args:
      budget: of `budget_texts`.
      size: "16x2".
    """
    parts = [budget, size]
    for path, value in sorted(overrides.items()):
        if value == axes.value_of(experiment, path):
            continue
        name = _SHORT.get(path, short_name(path))
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        joint = "" if number or not name else "_"
        parts.append(f"{name}{joint}{value_text(value)}")
    exact = "-".join(parts)
    safe = re.sub(r"[^\w.+-]", "_", exact, flags=re.ASCII)
    if safe == exact and len(safe) <= LONGEST_ID:
        return safe
    return f"{safe[: LONGEST_ID - 17]}-{records.digest(exact)}"
