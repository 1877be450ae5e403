"""The letters of every array axis, and the named array types; jaxtyping only.

B batch, H height, W width, C channels of a picture or latent; N image tokens,
S text tokens, T all positions of the trunk, E text features, D trunk width,
K heads, L layers. A name such as `x_BHWC` carries its axes.
"""

from jaxtyping import Array, Bool, Float, Int

LatentBHWC = Float[Array, "B H W C"]
TimeB = Float[Array, "B"]
TokensBTD = Float[Array, "B T D"]
TextBS = Int[Array, "B S"]
TextBSE = Float[Array, "B S E"]
MaskBS = Bool[Array, "B S"]
LabelB = Int[Array, "B"]
IndexB = Int[Array, "B"]
Scalar = Float[Array, ""]
Count = Int[Array, ""]
