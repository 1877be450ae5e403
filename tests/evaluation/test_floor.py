"""What stands beside a Frechet distance: real pictures below it, noise above it."""

import dataclasses

import numpy as np
import pytest

from scaling_ldm import config
from scaling_ldm.evaluation import floor
from scaling_ldm.evaluation.reference import RealStatistics
from scaling_ldm.metrics import Moments, frechet
from scaling_ldm.models.encoders.features import Features


class Extract:
    """A stand-in for a network: the mean and spread of each colour of a picture."""

    identity = {"network": "lite0", "weights": "w", "resize": "r"}

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        x = images.reshape(len(images), -1, 3) / 255
        return Features(np.concatenate([x.mean(1), x.std(1)], 1, dtype="f"), None)


def study(tiny, images=32, **evaluate):
    e = config.resolve(tiny)
    return dataclasses.replace(
        e,
        generate=dataclasses.replace(e.generate, images=images),
        evaluate=dataclasses.replace(e.evaluate, network="lite0", **evaluate),
    )


def statistics(features, load=True):
    return RealStatistics(
        moments=Moments.of([features]),
        load=(lambda: features) if load else None,
        digest="d",
        images=len(features),
    )


@pytest.fixture
def real():
    return np.random.default_rng(0).normal(size=(96, 6)).astype(np.float32)


def test_real_pictures_against_the_others_and_noise_against_all(tiny, tmp_path, real):
    extract = Extract()
    found = floor.measure(study(tiny), tmp_path, extract, statistics(real))
    assert set(found) == {"fd_lite0_real", "fd_lite0_noise"}
    value, n = found["fd_lite0_real"]
    order = np.random.default_rng(0).permutation(96)
    ours, theirs = real[order[:32]], real[order[32:]]
    wanted = frechet.distance(Moments.of([ours]), Moments.of([theirs]))
    assert value.value == pytest.approx(wanted) and n == 32 and value.doubt == ""
    noise, n = found["fd_lite0_noise"]
    assert n == 32 == extract.seen
    assert noise.value > 5 * value.value > 0
    assert (value.level, noise.level) == (1.0, 1.0)


def test_a_floor_of_fewer_pictures_says_so_and_falls_with_their_number(
    tiny, tmp_path, real
):
    extract = Extract()
    many, n = floor.measure(study(tiny, 64), tmp_path, extract, statistics(real))[
        "fd_lite0_real"
    ]
    assert n == 48 and "48 of 96 real pictures" in many.doubt
    few, _ = floor.measure(study(tiny, 8), tmp_path, extract, statistics(real))[
        "fd_lite0_real"
    ]
    assert few.value > many.value and few.doubt == ""


def test_noise_is_put_through_the_network_once(tiny, tmp_path, real):
    extract, given = Extract(), statistics(real)
    first = floor.measure(study(tiny, 300), tmp_path, extract, given)
    assert extract.seen == 300
    assert floor.measure(study(tiny, 300), tmp_path, extract, given) == first
    assert extract.seen == 300


def test_what_has_no_real_pictures_or_no_distance_has_no_floor(tiny, real):
    e = study(tiny)
    both = ("fd_lite0_real", "fd_lite0_noise")
    assert floor.names(e.evaluate, statistics(real)) == both
    assert floor.names(e.evaluate, statistics(real[:7])) == both[1:]  # halves of 3
    assert floor.names(e.evaluate, statistics(real, load=False)) == both[1:]
    assert floor.names(study(tiny, metrics=("kid",)).evaluate, statistics(real)) == ()
