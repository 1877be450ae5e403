"""PSNR and SSIM as scikit-image has them; runs where that is installed."""

import importlib.util

import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling_ldm.metrics import pairs

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("skimage") is None,
        reason="scikit-image is not installed",
    ),
]


@pytest.mark.parametrize("size", [(11, 11), (40, 57)])
@pytest.mark.parametrize("noise", [1, 30])
def test_pairs_of_pictures(size, noise):
    from skimage import metrics

    rng = np.random.default_rng(noise)
    a = rng.integers(0, 256, (3, *size, 3), dtype=np.uint8)
    a[0] = np.linspace(0, 255, size[1])[None, :, None]
    b = np.clip(a + rng.normal(0, noise, a.shape), 0, 255).astype(np.uint8)
    found = pairs.ssim(a, b, span=255), pairs.psnr(a, b, span=255)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        wanted = metrics.structural_similarity(
            x,
            y,
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert_allclose(found[0][i], wanted, rtol=1e-9)
        wanted = metrics.peak_signal_noise_ratio(x, y, data_range=255)
        assert_allclose(found[1][i], wanted, rtol=1e-12)
