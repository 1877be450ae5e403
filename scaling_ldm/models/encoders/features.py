"""What a feature network returns.

A feature network is a module with `init(key) -> params` and `apply(params, x_BHWC) ->
Features`. Its pictures are RGB from 0 to 255 and already have the network's size. The
network itself normalises them.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float

from scaling_ldm.models.shapes import Array


class Features(NamedTuple):
    """Float32 features of a batch of pictures, between which distances are measured.

    Attributes:
      logits: over classes; None where the network has none.
    """

    features: Float[Array, "B D"]
    logits: Float[Array, "B classes"] | None
