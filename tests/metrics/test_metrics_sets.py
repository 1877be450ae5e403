"""Kernel distance, Inception Score, precision and recall, on sets that are known."""

import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import cdist

from scaling_ldm.metrics import classifier_score, kernel, manifold


def normal(seed, count, dim, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (count, dim)).astype(np.float32)


# Kernel distance


def test_kernel_distance_is_the_sum_over_pairs():
    a, b = normal(0, 7, 5).astype(float), normal(1, 9, 5, 0.5).astype(float)

    def mean(x, y, same):
        values = [
            (np.dot(p, q) / 5 + 1) ** 3
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not (same and i == j)
        ]
        return np.mean(values)

    wanted = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert_allclose(kernel.distance(a, b), wanted, rtol=1e-12)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    values = [
        kernel.distance(normal(2 * s, 30, 4), normal(2 * s + 1, 30, 4))
        for s in range(400)
    ]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0 < max(values)
    # The biased estimate would be off by many errors: with i = j in its sums.
    assert 30 * error < 2 * np.mean(
        [(np.dot(x, x) / 4 + 1) ** 3 for x in normal(0, 99, 4)]
    )


def test_kid_is_the_mean_over_subsets_with_an_interval():
    a, b = normal(0, 400, 6), normal(1, 500, 6, 0.3)
    found = kernel.kid(a, b, seed=5, subsets=40, subset_size=100)
    assert found == kernel.kid(a, b, seed=5, subsets=40, subset_size=100)
    assert found != kernel.kid(a, b, seed=6, subsets=40, subset_size=100)
    assert_allclose(found.value, kernel.distance(a, b), rtol=0.1)
    # x.y with means s is D s^2 on average, so the truth follows from moments.
    far = [
        kernel.kid(
            normal(2 * s, 400, 6), normal(2 * s + 1, 400, 6, 0.3), seed=s,
            subsets=40, subset_size=100,
        )
        for s in range(40)
    ]  # fmt: skip
    values = np.array([e.value for e in far])
    width = np.mean([(e.high - e.low) / 2 for e in far])
    assert 0.8 < width / (1.645 * values.std(ddof=1)) < 1.6
    assert sum(e.low <= values.mean() <= e.high for e in far) >= 33  # of 40, level 0.9


def test_the_interval_of_kid_is_for_as_many_images_as_the_smaller_set():
    a, b = normal(0, 60, 4), normal(1, 200, 4, 0.3)
    found = kernel.kid(a, b, seed=2, subsets=5, subset_size=20)
    rng, values = np.random.default_rng(2), []
    for _ in range(5):
        part = a[rng.permutation(60)[:20]]
        values.append(kernel.distance(part, b[rng.permutation(200)[:20]]))
    share = 20 / 60
    variance = np.var(values, ddof=1) * (share / (1 - share) + 1 / 5)
    width = 1.6448536269514722 * np.sqrt(variance)
    assert_allclose(found.value, np.mean(values), rtol=1e-10)
    assert_allclose(found.high - found.value, width, rtol=1e-9)
    assert_allclose(found.value - found.low, width, rtol=1e-9)


def test_kid_refuses():
    a = normal(0, 10, 3)
    with pytest.raises(ValueError, match="wanted from 2 to 5"):
        kernel.kid(a, a, seed=0, subset_size=6)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        kernel.distance(a, normal(0, 10, 4))
    with pytest.raises(ValueError, match="not finite"):
        kernel.distance(a, a * np.nan)
    with pytest.raises(ValueError, match="2 are needed"):
        kernel.distance(a, a[:1])
    with pytest.raises(ValueError, match="at least 2"):
        kernel.kid(a, a, seed=0, subset_size=4, subsets=1)


# Inception Score


def test_inception_score_of_known_answers():
    sure = np.repeat(np.eye(4) * 200, 25, axis=0)  # every class, no doubt
    assert_allclose(classifier_score.scores(sure, splits=1, seed=0), 4, rtol=1e-12)
    assert_allclose(
        classifier_score.scores(sure * 0 + 3, splits=5, seed=0), 1, rtol=1e-12
    )
    one = np.tile([300.0, 0, 0], (50, 1))  # sure but always the same
    assert_allclose(classifier_score.scores(one, splits=2, seed=0), 1, rtol=1e-12)


def test_inception_score_is_the_formula():
    logits = normal(3, 90, 7) * 3
    p = np.exp(logits.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    order = np.random.default_rng(8).permutation(90)
    wanted = [
        np.exp(np.mean(np.sum(q * np.log(q / q.mean(axis=0)), axis=1)))
        for q in np.split(p[order], 3)
    ]
    assert_allclose(
        classifier_score.scores(logits, splits=3, seed=8), wanted, rtol=1e-10
    )
    shifted = logits + 1000 * np.arange(90)[:, None]  # softmax ignores it
    assert_allclose(
        classifier_score.scores(shifted, splits=3, seed=8), wanted, rtol=1e-3
    )
    found = classifier_score.inception_score(logits, splits=3, seed=8)
    assert_allclose(found.value, np.mean(wanted), rtol=1e-10)
    half = 2.92 * np.std(wanted, ddof=1) / np.sqrt(3)  # Student, 2 degrees, 90%
    assert_allclose(found.high - found.value, half, rtol=1e-3)
    assert_allclose(found.value - found.low, half, rtol=1e-3)


def test_inception_score_refuses():
    with pytest.raises(ValueError, match="11 splits of 10"):
        classifier_score.scores(normal(0, 10, 3), splits=11, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        classifier_score.scores(normal(0, 10, 3) * np.inf, splits=2, seed=0)
    with pytest.raises(ValueError, match="needs 2"):
        classifier_score.inception_score(normal(0, 10, 3), splits=1)


# Precision and recall


def direct(real, generated, k):
    """From all distances at once, as the papers define them."""
    cross = cdist(generated, real)
    real_r = np.sort(cdist(real, real), axis=1)[:, k]  # column 0 is the row itself
    generated_r = np.sort(cdist(generated, generated), axis=1)[:, k]
    inside = cross <= real_r
    return (
        inside.any(axis=1).mean(),
        (cross <= generated_r[:, None]).any(axis=0).mean(),
        inside.sum() / (k * len(generated)),
        inside.any(axis=0).mean(),
    )


@pytest.mark.parametrize("block", [1, 1000, 2**23])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifolds_are_the_definition_in_blocks_of_any_size(monkeypatch, block, k):
    monkeypatch.setattr(manifold, "BLOCK", block)
    real, generated = normal(0, 60, 5, 30.0), normal(1, 45, 5, 30.6)
    found = manifold.compare(real, generated, k=k)
    wanted = direct(real.astype(float), generated.astype(float), k)
    assert_allclose(
        (found.precision, found.recall, found.density, found.coverage), wanted
    )


def test_manifolds_tell_loss_of_fidelity_from_loss_of_variety():
    real = normal(0, 400, 3)
    same = manifold.compare(real, normal(1, 400, 3))
    assert same.precision > 0.8 and same.recall > 0.8
    narrow = manifold.compare(real, normal(2, 400, 3) * 0.1)
    assert narrow.precision > 0.95 and narrow.recall < 0.2 and narrow.coverage < 0.3
    wide = manifold.compare(real, normal(3, 400, 3) * 8)
    assert wide.precision < 0.3 and wide.recall > 0.9
    apart = manifold.compare(real, real + 1000)
    assert (apart.precision, apart.recall, apart.coverage) == (0, 0, 0)


def test_a_set_lies_in_its_own_manifold_also_with_duplicates():
    real = np.repeat(normal(4, 20, 8, 1000.0), 5, axis=0)  # radii of zero
    found = manifold.compare(real, real[::-1])
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    wide = normal(5, 50, 301, 3.0).astype(np.float64)
    for _, squares in manifold._distances(wide, wide[::-1]):
        assert_array_equal(np.diag(squares[:, ::-1]), 0)


@pytest.mark.parametrize("block", [1, 2**23])
@pytest.mark.parametrize(("k", "count"), [(1, 40), (3, 45), (3, 6), (5, 70)])
def test_an_interval_of_recall_is_that_of_parts_with_balls_of_their_own(
    monkeypatch, block, k, count
):
    """All distances at once; the parts are those that the seed draws."""
    monkeypatch.setattr(manifold, "BLOCK", block)
    real, generated = normal(0, 60, 5, 30.0), normal(1, count, 5, 30.6)
    precision, recall = manifold.precision_recall(
        real, generated, seed=7, k=k, replicates=6, level=0.8
    )
    whole = direct(real.astype(float), generated.astype(float), k)
    assert_allclose((precision.value, recall.value), whole[:2], rtol=1e-12)
    rng, kept = np.random.default_rng(7), 2 * count // 3
    parts = [
        direct(real.astype(float), generated[rng.permutation(count)[:kept]], k)[1]
        for _ in range(6)
    ]
    variance = np.var(parts, ddof=1) * kept / (count - kept)
    trials = np.mean(parts) * (1 - np.mean(parts)) / variance
    for found, n in ((precision, count), (recall, trials)):
        for q in (found.low, found.high):  # Wilson's: |p - q| = z sqrt(q (1 - q) / n)
            width = 1.2815515655446004 * np.sqrt(q * (1 - q) / n)
            assert_allclose(abs(found.value - q), width, rtol=1e-9, atol=1e-12)
        assert found.low < found.high and found.low <= found.value <= found.high
        assert found.level == 0.8
    assert manifold.precision_recall(real, generated, seed=8, k=k)[1] != recall


@pytest.mark.parametrize(
    ("dim", "shift", "scale"), [(8, 0.0, 0.8), (32, 0.3, 1.0)], ids=["narrow", "moved"]
)
def test_precision_and_recall_of_other_images_scatter_as_their_intervals_say(
    dim, shift, scale
):
    real = normal(0, 100, dim)
    found = [
        manifold.precision_recall(
            real, shift + scale * normal(1 + s, 100, dim), seed=s, replicates=30
        )
        for s in range(200)
    ]
    for estimates in zip(*found, strict=True):
        values = np.array([e.value for e in estimates])
        width = np.mean([(e.high - e.low) / 2 for e in estimates])
        assert 0.85 < width / (1.645 * values.std(ddof=1)) < 1.25
        covered = sum(e.low <= values.mean() <= e.high for e in estimates)
        assert 170 <= covered <= 192  # of 200 at level 0.9


def test_a_radius_beyond_the_known_neighbours_is_that_of_the_farthest():
    part = np.array([True, False, True, True, True])
    which = np.array([[1, 2, 3], [0, 2, 3], [1, 0, 4], [1, 0, 2], [1, 3, 0]])
    squares = np.array([[1.0, 2.0, 3.0]] * 5)
    found = manifold._radii_among(part, squares, which, 2)
    assert_array_equal(found, [3, -1, 3, 3, 3])
    assert_array_equal(manifold._radii_among(part, squares, which, 1)[[0, 2]], [2, 2])
    part[3] = False  # the first row has one of its three neighbours left
    assert manifold._radii_among(part, squares, which, 2)[0] == 3


def test_shares_of_none_and_of_all_have_an_interval():
    real = normal(0, 60, 3)
    apart = manifold.precision_recall(real, real + 1000, seed=0)
    for share in apart:
        assert share.value == share.low == 0
        assert_allclose(
            share.high, 2.7055 / (60 + 2.7055), rtol=1e-4
        )  # z^2 / (n + z^2)
    for share in manifold.precision_recall(real, real, seed=0):
        assert share.value == share.high == 1 and 0.8 < share.low < 1
    # All are met, but not by every part: as many trials as its scatter says.
    precision, recall = manifold.precision_recall(real, real * 0.9, seed=0, level=0.9)
    assert precision.value == recall.value == 1
    assert 0.5 < recall.low < precision.low < recall.high == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        "compare(x, x)",
        pytest.param("precision_recall(x, x, seed=0)", marks=pytest.mark.slow),
    ],
)
def test_manifolds_need_bounded_memory(call):
    code = f"""
import tracemalloc
import numpy as np
from scaling_ldm.metrics import manifold
manifold.BLOCK = 2**18
x = np.random.default_rng(0).random((4000, 8), np.float32)
tracemalloc.start()
manifold.{call}
print(tracemalloc.get_traced_memory()[1])
"""
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, timeout=120
    )
    assert int(out.stdout) < 16e6  # all distances would be 128 MB


def test_manifolds_refuse():
    a = normal(0, 10, 3)
    with pytest.raises(ValueError, match="neighbour 10 of 10"):
        manifold.compare(a, a, k=10)
    with pytest.raises(ValueError, match=r"\[M, D\]"):
        manifold.compare(a, normal(0, 10, 4))
    with pytest.raises(ValueError, match="not finite"):
        manifold.compare(a, a * np.nan)
    with pytest.raises(ValueError, match="neighbour 6 of two thirds of 10"):
        manifold.precision_recall(a, a, seed=0, k=6)
    with pytest.raises(ValueError, match="1 replicates; at least 2"):
        manifold.precision_recall(a, a, seed=0, replicates=1)
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 90"):
        manifold.precision_recall(a, a, seed=0, level=90.0)
    assert_array_equal(a, normal(0, 10, 3))
