"""The family of networks that a ladder of sizes belongs to, also beyond the ladder.

A ladder grows in width at one depth, or with a depth that is a power of the width, as
it is at a fixed ratio of both. The shapes between and beyond its sizes follow the same
rule, in steps of width that every size of the ladder has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from scaling_ldm.config import fields, names
from scaling_ldm.config.axes import problems_of_run

Shape = tuple[int, int]
LARGEST_WIDTH = 65_536


def step_of_width(e: fields.Experiment) -> int:
    """What every width of the family is a multiple of."""
    model, widths = e.model, [width for width, _ in e.plan.sizes]
    parts = [model.head_dim or model.heads or 1]
    if model.architecture in names.CONVOLUTIONAL:
        parts.append(model.groups)
    must = math.lcm(*(max(part, 1) for part in parts))
    # A whole divisor of all widths, but no finer than a quarter of the smallest.
    shared = math.gcd(*widths)
    finest = max(must, min(widths) // 4)
    fits = [n for n in range(must, shared + 1, must) if shared % n == 0]
    return next((n for n in fits if n >= finest), fits[-1] if fits else must)


def depth_at(e: fields.Experiment, width: int) -> int:
    """The depth that a network of this width has in the family."""
    sizes = sorted(e.plan.sizes)
    widths = sorted({width for width, _ in sizes})
    depths = {depth for _, depth in sizes}
    exact = [depth for w, depth in sizes if w == width]
    if exact:
        return exact[0]
    if len(depths) == 1 or len(widths) == 1 or _convolutional(e):
        return max(depths, key=[depth for _, depth in sizes].count)
    x = [math.log(w) for w, _ in sizes]
    y = [math.log(depth) for _, depth in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope /= sum((a - mean_x) ** 2 for a in x)
    return max(round(math.exp(mean_y + slope * (math.log(width) - mean_x))), 1)


def _convolutional(e: fields.Experiment) -> bool:
    return e.model.architecture in names.CONVOLUTIONAL


def family(e: fields.Experiment) -> Iterator[Shape]:
    """Every shape of the family with a width up to LARGEST_WIDTH, ascending."""
    step = step_of_width(e)
    for width in range(step, LARGEST_WIDTH + 1, step):
        yield width, depth_at(e, width)


def can_be_built(e: fields.Experiment, shape: Shape) -> bool:
    """Whether the experiment can have a run of this shape."""
    return not problems_of_run(e, shape)
