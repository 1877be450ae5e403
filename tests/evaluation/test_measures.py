"""The evaluate stage's numbers of features that are given."""

import dataclasses

import numpy as np
import pytest

from scaling_ldm import config
from scaling_ldm.evaluation import extractors, measures, reference
from scaling_ldm.metrics import Moments, frechet, manifold


def features(seed, count, scale=1.0):
    rows = np.random.default_rng(seed).normal(size=(count, 6)) * scale
    return rows.astype(np.float32)


OURS, THEIRS = features(0, 64, 0.8), features(1, 80)
GENERATED = measures.Generated(
    features=OURS, logits=10 * OURS, captions=features(2, 64) + OURS
)
EVALUATE = config.EvaluateConfig(network="clip", bootstrap=20, confidence=0.8, seed=3)


def test_tables_have_the_names_of_config():
    assert list(measures.METRICS) == list(config.METRICS)
    assert list(extractors._LOADERS) == [
        n for n in config.FEATURE_NETWORKS if n != "none"
    ]
    assert set(extractors._WANTED) == set(extractors._LOADERS)
    assert frechet.BACKENDS == config.FD_BACKENDS


@pytest.mark.parametrize(
    ("metric", "network", "wanted"),
    [
        ("fd", "inception_torch_fidelity", ("fid",)),
        ("fd_infinity", "inception_pytorch_fid", ("fid_infinity",)),
        ("fd_infinity", "dinov2", ("fd_dinov2_infinity",)),
        ("kid", "inception_pytorch_fid", ("kid_inception_pytorch_fid",)),
        ("precision_recall", "clip", ("precision_clip", "recall_clip")),
        ("clip_score", "clip", ("clip_score",)),
    ],
)
def test_numbers_are_named_by_metric_and_network(metric, network, wanted):
    assert measures.names(metric, network) == wanted


@pytest.fixture(scope="module")
def real():
    return reference.RealStatistics(
        moments=Moments.of([THEIRS]), load=lambda: THEIRS, digest="", images=80
    )


def test_precision_and_recall_have_the_intervals_of_generated_pictures(real):
    found = measures.measure(EVALUATE, "precision_recall", GENERATED, real)
    wanted = manifold.precision_recall(THEIRS, OURS, seed=3, replicates=20, level=0.8)
    assert tuple(found.values()) == wanted
    assert list(found) == ["precision_clip", "recall_clip"]
    assert all(e.low < e.value < e.high and e.level == 0.8 for e in found.values())
    none = dataclasses.replace(EVALUATE, bootstrap=0)
    none = measures.measure(none, "precision_recall", GENERATED, real)
    for name, estimate in none.items():
        assert estimate.low == estimate.value == estimate.high == found[name].value


def test_the_fewest_pictures_of_precision_and_recall_are_enough(real):
    least = measures.METRICS["precision_recall"].minimum_images
    few = dataclasses.replace(GENERATED, features=OURS[:least])
    assert len(measures.measure(EVALUATE, "precision_recall", few, real)) == 2
    with pytest.raises(ValueError, match="two thirds"):
        fewer = dataclasses.replace(GENERATED, features=OURS[: least - 1])
        measures.measure(EVALUATE, "precision_recall", fewer, real)


@pytest.mark.parametrize(
    ("metric", "bootstrap"),
    [*((name, 8) for name in measures.METRICS), ("fd", 0), ("precision_recall", 0)],
)
def test_numbers_are_python_floats(real, metric, bootstrap):
    cfg = dataclasses.replace(EVALUATE, bootstrap=bootstrap)
    for estimate in measures.measure(cfg, metric, GENERATED, real).values():
        for field in ("value", "low", "high", "level"):
            assert type(getattr(estimate, field)) is float, (metric, field)
        assert "np." not in repr(estimate)
    assert type(frechet.distance(Moments.of([OURS]), Moments.of([THEIRS]))) is float
