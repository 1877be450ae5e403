"""PSNR and SSIM of pairs of pictures, in float64."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from scaling_ldm.metrics.checks import check_finite
from scaling_ldm.metrics.shapes import ValuesB

WINDOW = 11  # pixels of a side
SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03


def psnr(a_BHWC: np.ndarray, b_BHWC: np.ndarray, *, span: float | int) -> ValuesB:
    """Peak signal-to-noise ratio of each pair, in dB; infinite for equal pictures.

    Args:
      a_BHWC, b_BHWC: pictures of any real dtype.
      span: the range of the values: 255 for 8-bit pictures, 1 for those in [0, 1].

    Raises:
      ValueError: shapes that differ, or values that are not finite.
    """
    a, b = _pictures(a_BHWC, b_BHWC, span)
    error = np.mean((a - b) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(span**2 / error)


def ssim(a_BHWC: np.ndarray, b_BHWC: np.ndarray, *, span: float | int) -> ValuesB:
    """Structural similarity of each pair: Wang et al. 2004 (IEEE TIP 13, 4), Eq. 13.

    The windows are Gaussians of 11 x 11 pixels with sigma 1.5 that lie inside the
    picture. Variances are weighted means, without the correction for a sample. The
    result is the mean over windows and channels.

    Args: as of `psnr`.

    Raises:
      ValueError: as `psnr`, and for pictures smaller than a window.
    """
    a, b = _pictures(a_BHWC, b_BHWC, span)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"pictures of {a.shape[1:3]}; SSIM's window has {WINDOW}")
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    both = _blur(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    likeness /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return likeness.mean(axis=(1, 2, 3))


def _blur(x_BHWC: np.ndarray) -> np.ndarray:
    """Weighted means of all windows that lie inside the pictures."""
    half = WINDOW // 2
    weights = np.exp(-((np.arange(WINDOW) - half) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (1, 2):
        x_BHWC = ndimage.correlate1d(x_BHWC, weights, axis=axis)
    return x_BHWC[:, half:-half, half:-half]


def _pictures(
    a: np.ndarray, b: np.ndarray, span: float | int
) -> tuple[np.ndarray, ...]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"pictures of {a.shape} and {b.shape}, wanted [B, H, W, C]")
    if not span > 0:
        raise ValueError(f"span must be positive, got {span}")
    for x in (a, b):
        if x.dtype.kind == "f":
            check_finite(x, "pixel values")
    return a.astype(np.float64), b.astype(np.float64)
