"""Types of arrays with one row per sample; jaxtyping only.

B is the batch. The other axes are anything: height, width and channels of a latent, or
the values of a point.
"""

from jaxtyping import Array, Float

SamplesB = Float[Array, "B *rest"]
ValueB = Float[Array, "B"]  # one number per sample
