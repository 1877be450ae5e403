"""The Frechet distance by TensorFlow-GAN's functions; needs the extra "tfgan".

tensorflow_gan 2.1.0, its last release, cannot be imported as a whole with TensorFlow
2.16 or later, which has no tf.estimator. Its metrics need no estimator. So they are
imported alone, while empty packages replace the packages above them.

Its square root of a matrix leaves singular values below 1e-10 as they are. Products of
small variances are that small, and the distances are then too large: by 3e-4 for 16
rows with 64 features of standard deviation 0.01. From a deviation of 0.03 on they
agree.
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

    Args:
      mean_a, mean_b: [D].
      cov_a, cov_b: [D, D].

    Raises:
      ImportError: its packages are not installed.
    """
    metrics = load()
    import tensorflow as tf  # pyrefly: ignore[missing-import]  # optional

    a, b = tf.constant(cov_a, tf.float64), tf.constant(cov_b, tf.float64)
    shared = metrics.trace_sqrt_product(a, b)
    mean = tf.reduce_sum(tf.math.squared_difference(mean_a, mean_b))
    return float(mean + tf.linalg.trace(a) + tf.linalg.trace(b) - 2.0 * shared)


def load() -> types.ModuleType:
    """The module of metrics of tensorflow_gan.

    Raises:
      ImportError: its packages are not installed.
    """
    if _METRICS in sys.modules:
        return sys.modules[_METRICS]
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # tensorflow_probability needs it
    with _empty_packages(find()):
        return importlib.import_module(_METRICS)


def find() -> importlib.machinery.ModuleSpec:
    """Where tensorflow_gan is installed; nothing is imported.

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
def _empty_packages(spec: importlib.machinery.ModuleSpec) -> Iterator[None]:
    """Empty packages stand for those above the metrics while these are imported."""
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
