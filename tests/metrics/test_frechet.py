"""Frechet distances of known Gaussians, their bias, and their intervals."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm.metrics import Moments, Reference, frechet


def features(seed, count, dim, shift=0.0):
    """Correlated rows whose dimensions differ in scale and offset, float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) * np.geomspace(0.05, 4, dim)
    rows = rng.normal(size=(count, dim)) @ mix + rng.normal(size=dim) * 5 + shift
    return rows.astype(np.float32)


def spd(seed, dim):
    a = np.random.default_rng(seed).normal(size=(dim, dim + 3))
    return a @ a.T / dim


def moments_of(rows):
    return Moments.of([rows])


def by_sqrtm(mean_a, cov_a, mean_b, cov_b):
    """The formula as Heusel et al. write it, with scipy's complex root."""
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    assert np.abs(root.imag).max() < 1e-6 * np.abs(root.real).max()
    mean = np.sum((mean_a - mean_b) ** 2)
    return mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real


def test_gaussians_in_one_dimension():
    a, b = (np.array([1.0]), np.array([[4.0]])), (np.array([-2.0]), np.array([[0.25]]))
    assert_allclose(frechet.distance(a, b), 3**2 + (2 - 0.5) ** 2, rtol=1e-14)


def test_gaussians_with_shared_axes():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    s, t = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    mean_a, mean_b = rng.normal(size=(2, 6))
    a, b = (mean_a, axes * s**2 @ axes.T), (mean_b, axes * t**2 @ axes.T)
    wanted = np.sum((mean_a - mean_b) ** 2) + np.sum((s - t) ** 2)
    assert_allclose(frechet.distance(a, b), wanted, rtol=1e-12)


def test_gaussians_in_general_against_sqrtm():
    rng = np.random.default_rng(1)
    for seed, dim in enumerate((2, 9, 40)):
        a = rng.normal(size=dim), spd(seed, dim)
        b = rng.normal(size=dim), spd(seed + 10, dim)
        assert_allclose(frechet.distance(a, b), by_sqrtm(*a, *b), rtol=1e-9)


def test_singular_covariances_need_no_epsilon():
    """Orthogonal planes share nothing; a complex root fails on such matrices."""
    a, b = np.zeros((6, 6)), np.zeros((6, 6))
    a[:3, :3], b[3:, 3:] = spd(0, 3), spd(1, 3)
    zero = np.zeros(6)
    wanted = np.trace(a) + np.trace(b)
    assert_allclose(frechet.distance((zero, a), (zero, b)), wanted, rtol=1e-14)
    assert_allclose(frechet.distance((zero, a), (zero, a)), 0, atol=1e-13)
    rotate = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
    a, b = rotate @ a @ rotate.T, rotate @ b @ rotate.T
    assert_allclose(frechet.distance((zero, a), (zero, b)), wanted, rtol=1e-12)
    assert frechet.distance((zero, 0 * a), (zero, 0 * b)) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(-5, 5))
def test_a_distance_is_zero_symmetric_and_moved_by_a_translation(seed, dim, step):
    rng = np.random.default_rng(seed)
    a, b = (
        (rng.normal(size=dim), spd(seed, dim)),
        (rng.normal(size=dim), spd(-1 % 7, dim)),
    )
    scale = np.trace(a[1]) + np.trace(b[1])
    assert 0 <= frechet.distance(a, a) <= 1e-12 * scale
    there, back = frechet.distance(a, b), frechet.distance(b, a)
    assert abs(there - back) <= 1e-12 * (scale + there)
    moved = frechet.distance(a, (a[0] + step, a[1]))
    assert_allclose(moved, dim * step**2, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("count", [40, 200])  # fewer and more rows than dimensions
def test_the_fast_path_is_the_distance(count):
    reference = moments_of(features(0, 500, 60))
    rows = features(1, count, 60)
    found = frechet.distance_from_features(rows, Reference.of(reference))
    assert_allclose(found, frechet.distance(moments_of(rows), reference), rtol=1e-11)


def test_small_variances_count_on_both_paths():
    """Standard deviations over three decades, so products over twelve in variance."""
    rows = np.random.default_rng(0).normal(size=(2, 300, 48)) * np.geomspace(
        1, 1e-3, 48
    )
    a, b = moments_of(rows[0]), moments_of(rows[1] * 1.01)
    found = frechet.distance_from_features(rows[0], Reference.of(b))
    assert_allclose(found, frechet.distance(a, b), rtol=1e-10)
    assert_allclose(found, by_sqrtm(a.mean, a.cov, b.mean, b.cov), rtol=1e-6)


@pytest.mark.parametrize("count", [30, 150])
def test_a_bootstrap_is_of_resampled_rows(count):
    reference = moments_of(features(0, 300, 40))
    rows, ready = features(1, count, 40), Reference.of(reference)
    found = frechet.bootstrap(rows, ready, replicates=5, seed=3)
    rng = np.random.default_rng(3)
    for value in found:
        again = rows[rng.integers(count, size=count)]
        assert_allclose(
            value, frechet.distance(moments_of(again), reference), rtol=1e-9
        )
    more = frechet.bootstrap(rows, ready, replicates=7, seed=3)
    assert_array_equal(more[:5], found)


@pytest.mark.parametrize("count", [30, 150])
def test_resamples_are_distances_of_their_rows(count):
    """By products of all rows, fewer than twice the dimensions, or of dimensions."""
    reference = moments_of(features(0, 300, 40))
    rows = features(1, count, 40, 100.0) * 3  # far from the reference
    sample = frechet._Sample(rows, Reference.of(reference))
    assert (sample._products is None) == (count > 80)
    for seed in range(3):
        part = np.random.default_rng(seed).permutation(count)[: count // 2]
        wanted = frechet.distance_from_features(rows[part], Reference.of(reference))
        assert_allclose(sample.distance(part), wanted, rtol=1e-12)
        assert_allclose(sample.resampled(part), wanted, rtol=1e-9)


def truth(dim):
    """A model and a reference whose distance is known: (draw, Reference, distance)."""
    scales = np.linspace(0.5, 2, dim)
    mean, cov = np.full(dim, 0.1), np.diag(scales**2)
    ready = Reference.of((np.zeros(dim), np.eye(dim)))

    def draw(seed, count):
        return mean + np.random.default_rng(seed).normal(size=(count, dim)) * scales

    return draw, ready, frechet.distance((mean, cov), (np.zeros(dim), np.eye(dim)))


def test_extrapolation_removes_the_bias_and_the_interval_covers():
    draw, ready, wanted = truth(16)
    estimates = [
        frechet.infinity(draw(seed, 400), ready, seed=seed, replicates=20)
        for seed in range(24)
    ]
    raw = [frechet.distance_from_features(draw(seed, 400), ready) for seed in range(24)]
    bias, error = np.mean([e.value for e in estimates]) - wanted, np.mean(raw) - wanted
    assert error > 0.2  # so many images read too high
    assert abs(bias) < 0.2 * error
    covered = sum(e.low <= wanted <= e.high for e in estimates)
    assert 18 <= covered  # of 24 at level 0.9, less what the line misses
    assert all(e.level == 0.9 and e.low < e.value < e.high for e in estimates)


def test_extrapolation_from_too_few_rows_is_in_doubt():
    """Where it leaves a third of the bias, or takes away a third too much."""
    for dim, count, low, high in (
        (40, 30, 0.3, 0.6),
        (40, 90, -0.6, -0.3),
        (16, 400, -0.1, 0.1),
    ):
        draw, ready, wanted = truth(dim)
        rows = [draw(seed, count) for seed in range(40)]
        found = [frechet.infinity(x, ready, seed=0, replicates=2) for x in rows]
        bias = np.mean([frechet.distance_from_features(x, ready) for x in rows])
        miss = np.mean([e.value for e in found]) - wanted
        assert low < miss / (bias - wanted) < high
        said = f"subsets of {round(0.3 * count)} rows and more, the smallest below "
        said += f"twice the {dim} dimensions that hold 99%"
        for estimate in found:
            assert said in estimate.doubt if dim == 40 else estimate.doubt == ""
    assert frechet.interval(draw(0, 20), ready, seed=0, replicates=2).doubt == ""
    few, enough = (
        frechet.infinity(draw(0, count), ready, seed=0, replicates=2)
        for count in (104, 107)  # whose smallest subsets are of 31 and of 32 rows
    )
    assert few.doubt and not enough.doubt


def test_dimensions_are_principal_directions_of_a_share_of_the_variance():
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    cov = axes * [60.0, 30.0, 8.0, 2.0, 0.0] @ axes.T
    ready = Reference.of((np.zeros(5), cov))
    shares = (0.5, 0.61, 0.89, 0.91, 0.97, 0.99, 1.0 - 1e-9)
    assert [ready.dimensions(share) for share in shares] == [1, 2, 2, 3, 3, 4, 4]
    assert Reference.of((np.zeros(5), 0 * cov)).dimensions(0.99) == 0


def test_an_interval_has_the_spread_of_other_images():
    draw, ready, _ = truth(12)
    values = [frechet.distance_from_features(draw(s, 300), ready) for s in range(60)]
    widths = []
    for seed in range(8):
        found = frechet.interval(draw(seed, 300), ready, seed=seed)
        assert found.value == frechet.distance_from_features(draw(seed, 300), ready)
        widths.append((found.high - found.low) / 2 / 1.6449)
    assert 0.7 < np.mean(widths) / np.std(values) < 1.4


def test_intervals_are_of_halves_without_replacement():
    """The spread of the halves that the seed draws, each extrapolated or as it is."""
    draw, ready, _ = truth(6)
    x, z = draw(0, 41), 1.2815515655446004  # of a level of 0.8

    def distance(rows):
        return frechet.distance_from_features(x[rows], ready)

    rng = np.random.default_rng(5)
    values = [distance(rng.permutation(41)[:20]) for _ in range(6)]
    found = frechet.interval(x, ready, seed=5, replicates=6, level=0.8)
    assert_allclose(found.high - found.value, z * np.std(values, ddof=1), rtol=1e-9)
    assert_allclose(found.value - found.low, z * np.std(values, ddof=1), rtol=1e-9)

    def extrapolated(rows, *sizes):
        values = [distance(rng.permutation(rows)[:size]) for size in sizes]
        return np.polyfit(1 / np.array(sizes), values, 1)[1]

    rng = np.random.default_rng(5)
    value = extrapolated(np.arange(41), 20, 31, 41)  # 30.75 between half and all
    values = [extrapolated(rng.permutation(41)[:20], 10, 15, 20) for _ in range(6)]
    found = frechet.infinity(
        x, ready, seed=5, points=3, smallest=0.5, replicates=6, level=0.8
    )
    assert_allclose(found.value, value, rtol=1e-9)
    assert_allclose(found.high - found.value, z * np.std(values, ddof=1), rtol=1e-9)


def test_what_has_no_distance_is_refused():
    good = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="known: numpy, tfgan"):
        frechet.distance(good, good, backend="torch")
    with pytest.raises(ValueError, match="covariances are not finite"):
        frechet.distance(good, (good[0], good[1] * np.nan))
    with pytest.raises(ValueError, match="means are not finite"):
        frechet.distance(good, (good[0] + np.inf, good[1]))
    with pytest.raises(ValueError, match="not a covariance"):
        frechet.distance(good, (good[0], np.diag([1.0, -0.1, 1])))
    with pytest.raises(ValueError, match="not symmetric"):
        frechet.distance(good, (good[0], np.triu(np.ones((3, 3)))))
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        frechet.distance(good, (np.zeros(2), np.eye(2)))
    ready = Reference.of(good)
    with pytest.raises(ValueError, match="2 are needed"):
        frechet.distance_from_features(np.zeros((1, 3)), ready)
    with pytest.raises(ValueError, match="not finite"):
        frechet.distance_from_features(np.full((4, 3), np.nan), ready)
    with pytest.raises(ValueError, match=r"wanted \[N, 3\]"):
        frechet.distance_from_features(np.zeros((4, 2)), ready)
    with pytest.raises(ValueError, match="3 are needed"):
        frechet.infinity(np.zeros((2, 3)), ready, seed=0)
    with pytest.raises(ValueError, match="level"):
        frechet.interval(np.zeros((4, 3)), ready, seed=0, level=90.0)


def test_a_backend_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    good = np.zeros(3), np.eye(3)
    with pytest.raises(ImportError, match=r"pip install scaling_ldm\[tfgan\]"):
        frechet.distance(good, good, backend="tfgan")
