"""The fields of a comparison, and what is wrong with their values."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Whose laws are held against each other; config.fit says of which metrics."""

    # Working directories, as folders or URLs; the others are held against the first.
    # (): the groups of this study are.
    studies: tuple[str, ...] = ()
    # Groups of runs in these studies; the others are held against the first. (): all.
    groups: tuple[str, ...] = ()
    # FLOPs at which losses and equal compute are stated; (): the least, the middle and
    # the largest of those compared.
    budgets: tuple[float, ...] = ()


def problems_of(cfg: CompareConfig) -> list[str]:
    """Studies and groups that are named twice, and budgets out of order."""
    problems = []
    for field in ("studies", "groups"):
        values = getattr(cfg, field)
        if "" in values or len(set(values)) < len(values):
            problems.append(
                f"config.compare.{field} = {values}: may hold names, each at most once"
            )
    budgets = cfg.budgets
    if any(b <= 0 for b in budgets) or list(budgets) != sorted(set(budgets)):
        problems.append(
            f"config.compare.budgets = {budgets}: must be positive and increase"
        )
    return problems
