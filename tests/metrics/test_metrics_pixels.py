"""Resizing to the bit as Pillow does it; PSNR and SSIM against direct formulas."""

import numpy as np
import PIL
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from scaling_ldm.metrics import pairs, resize

PIL_METHODS = {name: Image.Resampling[name.upper()] for name in resize.FILTERS}
ORDER = "pillow13" if int(PIL.__version__.split(".")[0]) >= 13 else "horizontal"


def pictures(seed, *shape):
    """Noise of all values and, in the last picture, hard edges that ring."""
    x = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    x[-1] = np.where(x[-1] > 127, 255, 0)
    return x


def by_pillow(x_BHWC, size, method):
    """RGB as a whole; one channel and floats plane by plane."""

    def one(image):
        resized = Image.fromarray(image).resize(size[::-1], PIL_METHODS[method])
        return np.asarray(resized)

    if x_BHWC.dtype == np.uint8 and x_BHWC.shape[3] == 3:
        return np.stack([one(picture) for picture in x_BHWC])
    return np.stack(
        [np.stack([one(p) for p in np.moveaxis(x, -1, 0)], -1) for x in x_BHWC]
    )


@pytest.mark.parametrize("method", resize.FILTERS)
def test_resize_is_pillows_to_the_bit(method):
    """Up, down, both at once and to one pixel; 8 bits and float32."""
    rng = np.random.default_rng(len(method))
    sizes = [rng.integers(1, 70, 4) for _ in range(40)]
    sizes += [(256, 256, 224, 224), (32, 32, 299, 299), (64, 48, 64, 24), (40, 9, 7, 9)]
    for h, w, height, width in sizes:
        size = int(height), int(width)
        x = pictures(int(h * w), 2, int(h), int(w), 3)
        found = resize.resize(x, size, method, order=ORDER)
        assert found.dtype == np.uint8
        assert_array_equal(found, by_pillow(x, size, method), str((h, w, size)))
        x = x.astype(np.float32) / 7
        found = resize.resize(x, size, method, order=ORDER)
        assert found.dtype == np.float32
        assert_array_equal(found, by_pillow(x, size, method), str((h, w, size)))


def test_one_channel_and_every_picture_of_a_batch(monkeypatch):
    x = pictures(0, 5, 21, 34, 1)
    wanted = by_pillow(x, (13, 13), "bicubic")
    assert_array_equal(resize.resize(x, (13, 13), "bicubic", order=ORDER), wanted)
    monkeypatch.setattr(resize, "BLOCK", 2000)  # two pictures of the first pass at once
    assert_array_equal(resize.resize(x, (13, 13), "bicubic", order=ORDER), wanted)
    none = resize.resize(x[:0], (13, 13), "bicubic")
    assert none.shape == (0, 13, 13, 1)


def test_the_order_of_passes():
    """Horizontal first is two resizes of Pillow; the other differs where it says so."""
    x = pictures(1, 2, 60, 30, 3)
    for size in ((20, 25), (20, 40), (70, 20)):
        two = by_pillow(x, (60, size[1]), "lanczos")
        two = by_pillow(two, size, "lanczos")
        assert_array_equal(resize.resize(x, size, "lanczos"), two)
    assert (
        resize.resize(x, (20, 25), "lanczos", order="pillow13")
        != resize.resize(x, (20, 25), "lanczos")
    ).any()
    square = pictures(2, 2, 50, 50, 3)
    assert_array_equal(
        resize.resize(square, (20, 20), "bicubic"),
        by_pillow(square, (20, 20), "bicubic"),
    )


def test_the_same_size_is_a_copy():
    x = pictures(3, 1, 8, 8, 3)
    found = resize.resize(x, (8, 8), "lanczos")
    assert_array_equal(found, x)
    found[:] = 0
    assert x.any()


def test_what_pillow_would_do_otherwise_is_refused():
    x = pictures(4, 2, 8, 8, 3)
    with pytest.raises(ValueError, match="known: box, bilinear, bicubic, lanczos"):
        resize.resize(x, (4, 4), "nearest")
    with pytest.raises(ValueError, match="known: horizontal, pillow13"):
        resize.resize(x, (4, 4), "box", order="vertical")
    with pytest.raises(ValueError, match="uint8 or float32"):
        resize.resize(x.astype(np.float64), (4, 4), "box")
    with pytest.raises(ValueError, match="1 or 3"):
        resize.resize(pictures(4, 2, 8, 8, 4), (4, 4), "box")
    with pytest.raises(ValueError, match="1 or 3"):
        resize.resize(x[0], (4, 4), "box")
    with pytest.raises(ValueError, match="at least 1"):
        resize.resize(x, (4, 0), "box")
    with pytest.raises(ValueError, match="not finite"):
        resize.resize(np.full((1, 4, 4, 3), np.inf, np.float32), (2, 2), "box")


def test_psnr_of_known_errors():
    a = np.full((3, 4, 5, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 5
    b[2, 0, 0, 0] = 0
    found = pairs.psnr(a, b, span=255)
    assert found[0] == np.inf
    assert_allclose(found[1], 20 * np.log10(255 / 5), rtol=1e-14)
    assert_allclose(found[2], 10 * np.log10(255**2 / (100**2 / 60)), rtol=1e-14)
    assert_allclose(pairs.psnr(b, a, span=255), found, rtol=1e-14)  # no uint8 wraps
    scaled = pairs.psnr(a / 255, b / 255, span=1)
    assert_allclose(scaled[1:], found[1:], rtol=1e-12)


def direct_ssim(a_HWC, b_HWC, span):
    """Eq. 13 of Wang et al., window by window."""
    at = np.arange(11) - 5
    w = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    w /= w.sum()
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    found = []
    for c in range(a_HWC.shape[2]):
        for i in range(a_HWC.shape[0] - 10):
            for j in range(a_HWC.shape[1] - 10):
                x = a_HWC[i : i + 11, j : j + 11, c].astype(float)
                y = b_HWC[i : i + 11, j : j + 11, c].astype(float)
                mx, my = np.sum(w * x), np.sum(w * y)
                vx, vy = np.sum(w * (x - mx) ** 2), np.sum(w * (y - my) ** 2)
                both = np.sum(w * (x - mx) * (y - my))
                found.append(
                    (2 * mx * my + c1)
                    * (2 * both + c2)
                    / ((mx**2 + my**2 + c1) * (vx + vy + c2))
                )
    return np.mean(found)


def test_ssim_is_the_formula():
    a = pictures(5, 3, 16, 20, 3)
    a[0] = np.arange(20, dtype=np.uint8)[:, None] * 9
    noise = np.random.default_rng(6).normal(0, 20, a.shape)
    b = np.clip(a + noise, 0, 255).astype(np.uint8)
    found = pairs.ssim(a, b, span=255)
    assert found.shape == (3,)
    for value, x, y in zip(found, a, b, strict=True):
        assert_allclose(value, direct_ssim(x, y, 255), rtol=1e-10)
    assert_allclose(pairs.ssim(a / 255, b / 255, span=1), found, rtol=1e-10)
    assert_allclose(pairs.ssim(a, a, span=255), 1, rtol=1e-12)
    assert_allclose(pairs.ssim(a, 255 - a, span=255)[1:], direct_pair(a), rtol=1e-10)


def direct_pair(a):
    return [direct_ssim(x, 255 - x, 255) for x in a[1:]]


def test_pairs_that_cannot_be_compared_are_refused():
    a = np.zeros((2, 12, 12, 3))
    with pytest.raises(ValueError, match=r"wanted \[B, H, W, C\]"):
        pairs.psnr(a, a[:1], span=1)
    with pytest.raises(ValueError, match="window has 11"):
        pairs.ssim(a[:, :10], a[:, :10], span=1)
    with pytest.raises(ValueError, match="not finite"):
        pairs.ssim(a, a * np.nan, span=1)
    with pytest.raises(ValueError, match="positive"):
        pairs.psnr(a, a, span=0)
