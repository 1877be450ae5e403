"""One letter for every array axis, and names for the common array types.

B batch, H height, W width, C channels of a picture or latent; N image tokens,
S text tokens, T all tokens of the trunk, E text features, D width of the trunk,
K heads, L layers. The suffix of a name such as `x_BHWC` lists its axes.

Within one signature a letter stands for one size. Where a function changes a size, its
signature gives the new size another letter.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Num

Array = jax.Array | np.ndarray
Params = dict[str, Any]  # nested dicts of arrays

LatentBHWC = Float[Array, "B H W C"]
PictureBHWC = Num[Array, "B H W C"]  # RGB, of integers or of floats
TimeB = Float[Array, "B"]
TokensBTD = Float[Array, "B T D"]
TextBS = Int[Array, "B S"]
TextBSE = Float[Array, "B S E"]
MaskBS = Bool[Array, "B S"]
IndexB = Int[Array, "B"]
Scalar = Float[Array, ""]
Count = Int[Array, ""]
