"""Types of arrays with one row per sample; jaxtyping only.

B batch, H height, W width, C channels; "rest" is any other axes, such as those of a
latent or the values of a point.
"""

from jaxtyping import Array, Float

SamplesB = Float[Array, "B *rest"]
LatentBHWC = Float[Array, "B H W C"]
ValueB = Float[Array, "B"]  # one number per sample
