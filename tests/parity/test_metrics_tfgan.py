"""The same distance as TensorFlow-GAN; needs the extra "tfgan"."""

import importlib.util
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling_ldm.metrics import Moments, classifier_score, frechet, kernel, tfgan

NEEDED = ("tensorflow_gan", "tensorflow", "tensorflow_probability", "tf_keras")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="the extra tfgan is not installed",
    ),
]


def activations(seed, count, dim):
    """Rectified and correlated, as a pooled layer's are; float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    rows = rng.normal(size=(count, dim)) @ mix + 0.1 * rng.normal(size=dim)
    return np.maximum(rows, 0).astype(np.float32)


def from_activations(a, b):
    """TensorFlow-GAN's distance, with the statistics that it forms itself."""
    metrics = tfgan.load()
    import tensorflow as tf

    a, b = tf.constant(a, tf.float64), tf.constant(b, tf.float64)
    return float(metrics.frechet_classifier_distance_from_activations(a, b))


@pytest.mark.parametrize(("count", "dim"), [(500, 16), (1000, 128), (100, 128)])
def test_equal_to_tfgan(count, dim):
    """Also with fewer activations than dimensions."""
    a, b = activations(0, count, dim), activations(1, count, dim)
    ours, theirs = Moments.of([a]), Moments.of([b])
    found = frechet.distance(ours, theirs)
    reference = frechet.Reference.of(theirs)
    assert_allclose(frechet.distance_from_features(a, reference), found, rtol=1e-7)
    wanted = from_activations(a, b)
    print(f"relative difference {abs(found / wanted - 1):.2e} at {count} x {dim}")
    assert_allclose(found, wanted, rtol=1e-6)
    assert_allclose(frechet.distance(ours, theirs, backend="tfgan"), found, rtol=1e-6)


def test_nothing_is_left_that_would_stand_for_tensorflow_gan():
    from_activations(activations(0, 20, 4), activations(1, 20, 4))
    assert "tensorflow_gan" not in sys.modules


def test_kernel_distance_and_inception_score():
    import tensorflow as tf

    metrics = tfgan.load()
    a, b = activations(2, 300, 64), activations(3, 300, 64)
    wanted = metrics.kernel_classifier_distance_from_activations(
        tf.constant(a, tf.float64), tf.constant(b, tf.float64), max_block_size=300
    )
    assert_allclose(kernel.distance(a, b), float(wanted), rtol=1e-9)
    logits = 3 * np.random.default_rng(4).normal(size=(200, 50))
    wanted = metrics.classifier_score_from_logits(tf.constant(logits))
    assert_allclose(
        classifier_score.scores(logits, splits=1, seed=0), float(wanted), rtol=1e-9
    )
