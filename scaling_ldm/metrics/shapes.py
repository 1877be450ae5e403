"""The letters of every array axis of the metrics, and the named array types.

N, M images (rows of features), D dimensions of a feature, R rank, K classes, S splits
or replicates, B pairs of pictures. A name such as `features_ND` carries its axes.
Features may come in any floating type; computed arrays are float64.
"""

import numpy as np
from jaxtyping import Float64

FeaturesND = Float64[np.ndarray, "N D"]
MeanD = Float64[np.ndarray, "D"]
CovDD = Float64[np.ndarray, "D D"]
FactorDR = Float64[np.ndarray, "D R"]
ValuesB = Float64[np.ndarray, "B"]
ValuesS = Float64[np.ndarray, "S"]
