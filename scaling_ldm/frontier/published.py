"""Paper A's models and grids as data: Mei et al. 2024, arXiv 2404.01367v2."""

from __future__ import annotations

import dataclasses

GUIDANCE_GRID = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # section 3.3.1, figures 7-9
STEP_GRID = (4, 6, 8, 10, 20, 50)  # figure 8
REFERENCE = "866M"  # whose evaluation costs 1


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """A row of table 1.

    FID and CLIP: COCO-2014 validation, 30k images, 50 steps of DDIM, guidance 7.5.
    FLOPs: one evaluation at a 64 x 64 x 4 latent, as printed.
    """

    name: str
    params: float  # as printed; denoisers.presets.UNETS has them exactly
    base_channels: int
    gflops: float
    relative_cost: float  # "norm. cost"
    fid: float
    clip: float
    note: str = ""
    source: str = "arXiv 2404.01367v2, table 1"


_MISPRINT = (
    "25.3 GFLOPs contradict the row's own cost (25.3 / 789.3 = 0.03) and repeat its "
    "FID; a quadratic in the channels through the other rows gives 56.7, which has the "
    "printed cost"
)

TABLE_1 = {
    row.name: row
    for row in (
        PublishedModel("39M", 39e6, 64, 25.3, 0.07, 25.30, 0.305, _MISPRINT),
        PublishedModel("83M", 83e6, 96, 102.7, 0.13, 24.30, 0.308),
        PublishedModel("145M", 145e6, 128, 161.5, 0.20, 24.18, 0.310),
        PublishedModel("223M", 223e6, 160, 233.5, 0.30, 23.76, 0.310),
        PublishedModel("318M", 318e6, 192, 318.5, 0.40, 22.83, 0.311),
        PublishedModel("430M", 430e6, 224, 416.6, 0.53, 22.35, 0.312),
        PublishedModel("558M", 558e6, 256, 527.8, 0.67, 22.15, 0.312),
        PublishedModel("704M", 704e6, 288, 652.0, 0.83, 21.82, 0.312),
        PublishedModel("866M", 866e6, 320, 789.3, 1.00, 21.55, 0.312),
        PublishedModel("2B", 2e9, 512, 1887.5, 2.39, 20.98, 0.312),
        PublishedModel("5B", 5e9, 768, 4082.6, 5.17, 20.14, 0.314),
    )
}


def relative_cost(name: str) -> float:
    """The printed cost of one evaluation of a network of table 1; the 866M's is 1.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> relative_cost("83M")
      0.13
    """
    if name not in TABLE_1:
        raise ValueError(f"unknown network {name!r}; table 1 has {', '.join(TABLE_1)}")
    return TABLE_1[name].relative_cost
