"""Frechet distances between Gaussians fitted to features.

Dowson & Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), Eq. 6:

    d^2 = |m_A - m_B|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2.

With A = F F^T and B = G G^T the last trace is the sum of the singular values of F^T G.
So there is no square root of a non-symmetric matrix, no complex number, and nothing is
added to the diagonal of a singular covariance. A direction counts as having no variance
if its variance is below float64's rounding of the largest one.

The distance of n images is biased upwards, about linearly in 1/n, by an amount that
depends on the model: compare equal n, or use `infinity` (Chong & Forsyth 2020, arXiv
1911.07023).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.stats

from scaling_ldm.metrics.checks import check_finite, check_level, check_replicates
from scaling_ldm.metrics.estimate import Estimate
from scaling_ldm.metrics.moments import Moments
from scaling_ldm.metrics.shapes import FactorDR, MeanD, ValuesS

Gaussian = Moments | tuple[np.ndarray, np.ndarray]  # (mean [D], covariance [D, D])
BACKENDS = ("numpy", "tfgan")
_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The Gaussian of a reference, prepared once for many distances.

    Attributes:
      mean: [D].
      factor: [D, R]; factor @ factor.T is the covariance, of rank R.
      trace: of the covariance.
    """

    mean: MeanD
    factor: FactorDR
    trace: float

    @classmethod
    def of(cls, gaussian: Gaussian) -> Reference:
        """Prepares a Gaussian.

        Raises:
          ValueError: values that are not finite, or a matrix that is no covariance.
        """
        mean, cov = _gaussian(gaussian)
        return cls(mean=mean, factor=_factor(cov), trace=float(np.trace(cov)))

    def dimensions(self, share: float) -> int:
        """The smallest number of principal directions with this share of the variance.

        Args:
          share: from 0 to 1.
        """
        variances = np.sort(np.einsum("dr,dr->r", self.factor, self.factor))[::-1]
        held = np.cumsum(variances)
        return int(np.sum(held < share * variances.sum())) + 1 if len(held) else 0


def distance(a: Gaussian, b: Gaussian, *, backend: str = "numpy") -> float:
    """The squared Frechet distance of two Gaussians: the number that is called FID.

    Args:
      a, b: `Moments`, or (mean [D], covariance [D, D]).
      backend: one of BACKENDS; with "tfgan" the traces come from TensorFlow-GAN.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, or a matrix that
        is no covariance.
      ImportError: the packages of the backend are not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}; known: {', '.join(BACKENDS)}")
    (mean_a, cov_a), (mean_b, cov_b) = _gaussian(a), _gaussian(b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"means of {mean_a.shape} and {mean_b.shape}")
    if backend == "tfgan":
        from scaling_ldm.metrics import tfgan

        return tfgan.distance(mean_a, cov_a, mean_b, cov_b)
    shared = np.sum(scipy.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)))
    traces = float(np.trace(cov_a) + np.trace(cov_b))
    return _total(_squared(mean_a - mean_b), traces, float(shared))


def distance_from_features(features_ND: np.ndarray, reference: Reference) -> float:
    """`distance` of features to a reference, without forming their covariance.

    Args:
      features_ND: N rows of D features.
      reference: the prepared Gaussian that they are compared with.

    Raises:
      ValueError: fewer than two rows, another D, or values that are not finite.
    """
    sample = _Sample(features_ND, reference)
    return sample.distance(np.arange(sample.count))


def bootstrap(
    features_ND: np.ndarray, reference: Reference, *, replicates: int, seed: int
) -> ValuesS:
    """Distances of N rows drawn with replacement, float64 [replicates].

    A replicate has about 0.63 N distinct rows, so it has the bias of fewer images:
    replicates lie above the distance of the features. Their spread is that of the
    distance. For an interval around the distance use `interval`.

    Args:
      features_ND: N rows of D features.
      reference: the prepared Gaussian that they are compared with.
      replicates: number of draws.
      seed: of the draws.

    Raises:
      ValueError: as `distance_from_features`.
    """
    sample, rng = _Sample(features_ND, reference), np.random.default_rng(seed)
    n = sample.count
    draws = (rng.integers(n, size=n) for _ in range(replicates))
    return np.array([sample.resampled(rows) for rows in draws])


def interval(
    features_ND: np.ndarray,
    reference: Reference,
    *,
    seed: int,
    replicates: int = 100,
    level: float = 0.9,
    show: Callable[[int], Any] = lambda done: None,
) -> Estimate:
    """The distance of these N rows, and how far the distance of other N rows scatters.

    The scatter comes from halves of the rows, drawn without replacement: the distances
    of halves have the variance of the distance of all rows (the delete-half jackknife,
    Shao & Wu 1989, Annals of Statistics 17, 1176), and no row counts twice. The bias of
    finite N is in the value and not in the interval; the error of the reference is in
    neither.

    Args:
      features_ND: N rows of D features.
      reference: the prepared Gaussian that they are compared with.
      seed: of the random halves.
      replicates: number of halves.
      level: of the interval.
      show: called after every replicate with the number that are done.
    """
    sample, rng = _Sample(features_ND, reference), np.random.default_rng(seed)
    rows = np.arange(sample.count)
    spread = []
    for done in range(replicates):
        spread.append(sample.resampled(rng.permutation(rows)[: sample.count // 2]))
        show(done + 1)
    return _estimate(sample.distance(rows), spread, level)


def infinity(
    features_ND: np.ndarray,
    reference: Reference,
    *,
    seed: int,
    points: int = 15,
    smallest: float = 0.3,
    replicates: int = 50,
    level: float = 0.9,
    show: Callable[[int], Any] = lambda done: None,
) -> Estimate:
    """The distance extrapolated to infinitely many images (Chong & Forsyth 2020).

    Random subsets have `points` sizes, evenly spaced from `smallest` N to N. A line in
    1/n is fitted to their distances; its value at 0 is the estimate. The interval comes
    from halves as in `interval`, each extrapolated in the same way. The bias of the
    reference's own finite size stays in the value.

    The bias is a series in dimensions / n; the line is its beginning. Let d be the
    number of principal directions that hold 99% of the variance. Tried were Gaussians
    whose variances are equal, or fall by a power or exponentially. If the smallest
    subset has at least 2 d rows, the value is off by less than about a tenth of the
    removed bias. With fewer rows it is too low by up to half of it; with far fewer rows
    it is too high. The estimate then says so in `doubt`.

    Args:
      points: number of sizes.
      smallest: the smallest size, as a share of N.
      seed, replicates, level, show: those of `interval`.

    Raises:
      ValueError: fewer than three distinct sizes of at least two rows.
    """
    sample, rng = _Sample(features_ND, reference), np.random.default_rng(seed)
    rows = np.arange(sample.count)
    value = _extrapolate(sample.distance, rows, points, smallest, rng)
    spread = []
    for done in range(replicates):
        half = rng.permutation(rows)[: sample.count // 2]
        spread.append(_extrapolate(sample.resampled, half, points, smallest, rng))
        show(done + 1)
    found, first = _estimate(value, spread, level), _sizes(rows, points, smallest)[0]
    dimensions = reference.dimensions(0.99)
    if first >= 2 * dimensions:
        return found
    doubt = (
        f"extrapolated from subsets of {first} rows and more, the smallest below twice "
        f"the {dimensions} dimensions that hold 99% of the reference's variance: the "
        "bias is not linear in 1/n there, and the estimate may be off by a tenth of it "
        "or more"
    )
    return dataclasses.replace(found, doubt=doubt)


class _Sample:
    """Features against a reference, ready for the distance of any subset of them."""

    def __init__(self, features_ND: np.ndarray, reference: Reference) -> None:
        features = np.asarray(features_ND)
        if features.ndim != 2 or features.shape[1] != len(reference.mean):
            raise ValueError(
                f"features of {features.shape}, wanted [N, {len(reference.mean)}]"
            )
        if len(features) < 2:
            raise ValueError(f"{len(features)} feature vectors; 2 are needed")
        check_finite(features, "features")
        self.count = len(features)
        self._reference = reference
        self._x = features.astype(np.float64) - reference.mean
        self._squares = np.einsum("nd,nd->n", self._x, self._x)
        self._y = self._x @ reference.factor

    def distance(self, rows: np.ndarray) -> float:
        """The distance of some rows, given by number; a row may be repeated."""
        counts = np.bincount(rows, minlength=self.count)
        # Singular values of y; the eigenvalues of y y^T would lose those below 1e-8 of
        # the largest.
        y = self._centred(counts)
        values = scipy.linalg.svdvals(y, overwrite_a=True, check_finite=False)
        return self._distance(counts, float(np.sum(values)))

    def resampled(self, rows: np.ndarray) -> float:
        """`distance` to about 1e-7 of its value, several times faster, for a spread."""
        counts = np.bincount(rows, minlength=self.count)
        if self._products is None:
            y = self._centred(counts)
            gram = y.T @ y
        else:
            (at,), n = np.nonzero(counts), counts.sum()
            w, gram = counts[at], self._products[np.ix_(at, at)]
            means = w @ gram / n
            gram -= means
            gram -= (means - w @ means / n)[:, None]
            gram *= np.sqrt(np.outer(w, w)) / (n - 1)
        values = np.asarray(
            scipy.linalg.eigvalsh(gram, overwrite_a=True, check_finite=False)
        )
        kept = values[values > len(values) * _EPS * values[-1]]
        return self._distance(counts, float(np.sqrt(kept).sum()))

    @functools.cached_property
    def _products(self) -> np.ndarray | None:
        """y y^T [N, N]; None if y^T y of a part of the rows is smaller."""
        if self.count > 2 * self._y.shape[1]:
            return None
        return self._y @ self._y.T

    def _centred(self, counts: np.ndarray) -> np.ndarray:
        """Y of the counted rows, with mean zero; Y^T Y is the covariance of y."""
        (at,), n = np.nonzero(counts), counts.sum()
        y, w = self._y[at], counts[at]
        return (y - w @ y / n) * np.sqrt(w / (n - 1))[:, None]

    def _distance(self, counts: np.ndarray, shared: float) -> float:
        n = counts.sum()
        mean = _squared(counts @ self._x / n)
        trace = (counts @ self._squares - n * mean) / (n - 1)
        return _total(mean, self._reference.trace + trace, shared)


def _gaussian(gaussian: Gaussian) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(gaussian, Moments):
        gaussian = gaussian.mean, gaussian.cov
    mean, cov = (np.asarray(part, np.float64) for part in gaussian)
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"a mean of {mean.shape} and a covariance of {cov.shape}")
    check_finite(mean, "means")
    check_finite(cov, "covariances")
    return mean, cov


def _factor(cov: np.ndarray) -> np.ndarray:
    """F [D, R] with F F^T = cov.

    Statistics stored in float32 have negative eigenvalues of the size of its rounding.
    They count as zero; larger negative ones are refused.
    """
    if not np.allclose(cov, cov.T, rtol=1e-6, atol=1e-6 * abs(np.trace(cov))):
        raise ValueError("the covariance is not symmetric")
    values, vectors = map(np.asarray, scipy.linalg.eigh((cov + cov.T) / 2))
    if values[0] < -1e-5 * max(values[-1], 0.0):
        raise ValueError(
            f"not a covariance: eigenvalues from {values[0]:.3g} to {values[-1]:.3g}"
        )
    kept = values > len(cov) * _EPS * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _squared(x: np.ndarray) -> float:
    return float(x @ x)


def _total(mean: float, traces: float, shared: float) -> float:
    """The distance from its three parts; what rounding makes negative is zero."""
    value = float(mean + traces - 2 * shared)
    if not math.isfinite(value):
        raise ValueError(f"a Frechet distance of {value}: its features are too large")
    return max(value, 0.0)


def _extrapolate(
    distance: Callable[[np.ndarray], float],
    rows: np.ndarray,
    points: int,
    smallest: float,
    rng: np.random.Generator,
) -> float:
    sizes, values = _sizes(rows, points, smallest), []
    for size in sizes:
        values.append(distance(rng.permutation(rows)[:size]))
    return float(np.polynomial.polynomial.polyfit(1 / sizes, values, 1)[0])


def _sizes(rows: np.ndarray, points: int, smallest: float) -> np.ndarray:
    first = max(2.0, smallest * len(rows))
    sizes = np.unique(np.rint(np.linspace(first, len(rows), points)).astype(int))
    if len(sizes) < 3:
        raise ValueError(f"{len(rows)} rows give {len(sizes)} sizes; 3 are needed")
    return sizes


def _estimate(value: float, spread: list[float], level: float) -> Estimate:
    check_level(level)
    check_replicates(len(spread))
    half_width = float(scipy.stats.norm.ppf((1 + level) / 2) * np.std(spread, ddof=1))
    return Estimate.symmetric(value, half_width, level)
