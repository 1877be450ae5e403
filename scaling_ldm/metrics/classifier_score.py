"""Inception Score: how certain and how varied the answers of a classifier are.

Salimans et al. 2016 (arXiv 1606.03498): exp of the mean of KL(p(y|x) || p(y)), where
p(y) is the mean of p(y|x) over the images of one split. It lies between 1 and the
number of classes.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.special
import scipy.stats

from scaling_ldm.metrics.checks import check_finite, check_level
from scaling_ldm.metrics.estimate import Estimate
from scaling_ldm.metrics.shapes import ValuesS


def scores(logits_NK: np.ndarray, *, splits: int, seed: int) -> ValuesS:
    """The score of each split; the images are split in random order.

    The score grows with the number of images of a split: compare equal N and equal
    splits. Papers often write the standard deviation of these scores behind the mean.

    Args:
      logits_NK: logits of K classes for each of N images.
      splits: parts of about equal size.
      seed: of the random order.

    Raises:
      ValueError: fewer images than splits, or logits that are not finite.
    """
    logits = np.asarray(logits_NK)
    if logits.ndim != 2:
        raise ValueError(f"logits of {logits.shape}, wanted [N, K]")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{splits} splits of {len(logits)} images")
    check_finite(logits, "logits")
    order = np.random.default_rng(seed).permutation(len(logits))
    return np.array([_score(logits[part]) for part in np.array_split(order, splits)])


def inception_score(
    logits_NK: np.ndarray, *, splits: int = 10, seed: int = 0, level: float = 0.9
) -> Estimate:
    """The mean over splits, with Student's interval of that mean.

    Args: as of `scores`; `level` is that of the interval.

    Raises:
      ValueError: as `scores`, and for fewer than two splits.
    """
    if splits < 2:
        raise ValueError(f"{splits} splits; an interval needs 2, or use `scores`")
    check_level(level)
    found = scores(logits_NK, splits=splits, seed=seed)
    value, error = float(found.mean()), float(found.std(ddof=1)) / math.sqrt(splits)
    half_width = float(scipy.stats.t.ppf((1 + level) / 2, splits - 1)) * error
    return Estimate.symmetric(value, half_width, level)


def _score(logits_NK: np.ndarray) -> float:
    log_p = scipy.special.log_softmax(logits_NK.astype(np.float64), axis=1)
    log_marginal = scipy.special.logsumexp(log_p, axis=0) - math.log(len(log_p))
    kl = np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1)
    return float(np.exp(kl.mean()))
