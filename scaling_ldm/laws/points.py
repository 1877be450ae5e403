"""Points of an isoFLOP study, read from tuples, mappings or objects."""

from __future__ import annotations

import dataclasses
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


def run_name(budget: float, n: float) -> str:
    return f"run of {n:.6g} parameters at {budget:.6g} FLOPs"


def read(
    points: Iterable[Any], metric: str, size: str
) -> tuple[list[IsoflopPoint], list[str]]:
    """Usable points in a fixed order, and a line for each that is not usable.

    Raises:
      ValueError: a point that is no four numbers and lacks one of the fields.
    """
    kept, excluded = [], []
    names = ("budget_flops", size, "tokens", metric)
    for number, point in enumerate(points):
        values = _values(point, names, number)
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
            kept.append(IsoflopPoint(*values))
    return sorted(kept), sorted(excluded)


def _values(point: Any, names: Sequence[str], number: int) -> tuple[float, ...]:
    if isinstance(point, (Mapping, str)) or not isinstance(
        point, (Sequence, np.ndarray)
    ):
        values = [_field(point, name, number) for name in names]
    elif len(point) == 4:
        values = point
    else:
        raise ValueError(
            f"point {number} has {len(point)} values; 4 are needed: "
            "(budget_flops, params, tokens, loss)"
        )
    return tuple(math.nan if v is None else float(v) for v in values)


def _field(point: Any, name: str, number: int) -> Any:
    if isinstance(point, Mapping):
        if name in point:
            return point[name]
    elif hasattr(point, name):
        return getattr(point, name)
    have = point if isinstance(point, Mapping) else getattr(point, "__dict__", ())
    raise ValueError(
        f"point {number} ({type(point).__name__}) has no {name!r}; "
        f"it has: {', '.join(map(str, have)) or 'no fields'}. Give (budget_flops, "
        "params, tokens, loss) or name the fields with metric= and size="
    )
