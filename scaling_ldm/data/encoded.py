"""Records of the encode stage: their format, and the source that reads them."""

from __future__ import annotations

import numpy as np

from scaling_ldm import config
from scaling_ldm.data.pipeline import Rows


class Encoded:
    """Latents and text that the encode stage wrote."""

    def __init__(self, folder: str, experiment: config.Experiment, split: str) -> None:
        raise config.ConfigError(f"no records in {folder}: add encode to --stages")

    def rows(self, positions: np.ndarray) -> Rows:
        raise NotImplementedError

    def captions(self, positions: np.ndarray) -> list[str]:
        raise NotImplementedError
