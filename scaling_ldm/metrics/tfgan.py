"""The Frechet distance by TensorFlow-GAN's functions; needs the extra "tfgan".

tensorflow_gan 2.1.0, its last release, cannot be imported as a whole beside TensorFlow
from 2.16 on, which has no tf.estimator any more. Its metrics need none of that, so they
are imported alone, behind packages without contents.

Its square root of a matrix takes no root of singular values below 1e-10, where products
of variances lie if features scatter little: its distances are then too large, by 3e-4
of 16 rows with 64 features of deviation 0.01, and exact from a deviation of 0.03 on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator

import numpy as np

_METRICS = "tensorflow_gan.python.eval.classifier_metrics"


def distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """The squared Frechet distance as TensorFlow-GAN computes it, in float64.

    Raises:
      ImportError: its packages are not installed.
    """
    metrics = load()
    import tensorflow as tf

    a, b = tf.constant(cov_a, tf.float64), tf.constant(cov_b, tf.float64)
    shared = metrics.trace_sqrt_product(a, b)
    mean = tf.reduce_sum(tf.math.squared_difference(mean_a, mean_b))
    return float(mean + tf.linalg.trace(a) + tf.linalg.trace(b) - 2.0 * shared)


def from_activations(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """The same from activations, whose statistics it forms itself in float64.

    Raises:
      ImportError: its packages are not installed.
    """
    metrics = load()
    import tensorflow as tf

    a, b = tf.constant(a_ND, tf.float64), tf.constant(b_MD, tf.float64)
    return float(metrics.frechet_classifier_distance_from_activations(a, b))


def load() -> types.ModuleType:
    """tensorflow_gan's module of metrics.

    Raises:
      ImportError: its packages are not installed.
    """
    if _METRICS in sys.modules:
        return sys.modules[_METRICS]
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # tensorflow_probability asks
    with _without_contents(find()):
        return importlib.import_module(_METRICS)


def find() -> importlib.machinery.ModuleSpec:
    """Where tensorflow_gan is; nothing is imported.

    Raises:
      ImportError: its packages are not installed.
    """
    spec = importlib.util.find_spec("tensorflow_gan")
    missing = [
        name
        for name in ("tensorflow", "tensorflow_probability", "tf_keras")
        if importlib.util.find_spec(name) is None
    ]
    if spec is None or missing:
        raise ImportError(
            'the backend "tfgan" needs tensorflow_gan, tensorflow, '
            "tensorflow_probability and tf_keras: pip install scaling_ldm[tfgan]"
        )
    return spec


@contextlib.contextmanager
def _without_contents(spec: importlib.machinery.ModuleSpec) -> Iterator[None]:
    """The packages above the metrics, for as long as these are imported."""
    parts = _METRICS.split(".")[:-1]
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    folders = list(spec.submodule_search_locations or ())
    added = []
    for depth, name in enumerate(names):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [os.path.join(f, *parts[1 : depth + 1]) for f in folders]
            sys.modules[name] = package
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
