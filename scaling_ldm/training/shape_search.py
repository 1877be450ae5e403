"""The shape of an experiment's family whose parameters are nearest to a given number.

Parameters are counted on abstract values: nothing is compiled and no device touched.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence

from scaling_ldm import config
from scaling_ldm.config import shapes
from scaling_ldm.models import denoisers, layers
from scaling_ldm.training import objective
from scaling_ldm.training.train_step import compiled_part


def nearest(
    experiment: config.Experiment, params: float, size: str
) -> tuple[shapes.Shape, int]:
    """The shape nearest in ln N that can be built, and its N.

    Args:
      params: what is wanted.
      size: what N counts, "params" or "params_without_embeddings".

    Raises:
      ConfigError: no shape of the family can be built, or all are much smaller.
    """
    family = [*shapes.family(experiment)]
    index = 0 if size == "params" else 1

    @functools.cache
    def count(place: int) -> int:
        return counted(experiment, family[place])[index]

    # Counting takes a second, so it is done at a few places of an interpolation of
    # ln N. N grows with the width and the depth, so their product w^2 d is the start.
    bulk = [width * width * depth for width, depth in family]
    place, scale, tried = _at(bulk, params / 12), 1.0, set[int]()
    while place not in tried:
        tried.add(place)
        scale = count(place) / bulk[place]
        place = _at(bulk, params / scale)
    # A depth that is rounded makes N uneven from one width to the next.
    around = [i for i in (place - 1, place, place + 1) if 0 <= i < len(family)]
    for best in sorted(around, key=lambda i: abs(math.log(count(i) / params))):
        if count(best) < params / 4:
            break
        if shapes.can_be_built(experiment, family[best]):
            return family[best], count(best)
    width, depth = family[place]
    raise config.ConfigError(
        f"no network of the family of config.plan.sizes = {experiment.plan.sizes} with "
        f"about {params:.4g} parameters can be built; its nearest one, "
        f"{width} x {depth}, has {count(place):.4g}"
    )


def _at(values: Sequence[int], wanted: float) -> int:
    """The place of the first value that is not smaller, or else the last place."""
    return min(bisect.bisect_left(values, wanted), len(values) - 1)


def counted(experiment: config.Experiment, shape: shapes.Shape) -> tuple[int, int]:
    """(all parameters, those without embeddings) of the network of a shape."""
    learnt = objective.build(compiled_part(experiment), *shape, unroll=False)
    return denoisers.count_shapes(layers.initial_shapes(learnt.init), learnt.embeddings)
