"""What a network that judges pictures gives; jax only.

Each of them is a module with `init(key) -> params` and `apply(params, x_BHWC) ->
Features`, of pictures in RGB from 0 to 255 that already have the network's size; how
the network wants them normalised is its own affair.
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class Features(NamedTuple):
    """Of a batch of pictures, in float32.

    Attributes:
      features: [B, D], what distances are measured in.
      logits: [B, K] over classes; None where the network has none.
    """

    features: jax.Array
    logits: jax.Array | None
