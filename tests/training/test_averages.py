"""Averages by power functions: profiles, updates, and what stored ones give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import integrate

from scaling_ldm.records.errors import AverageError
from scaling_ldm.training import averages
from scaling_ldm.training.averages import Profile

WIDTHS = (0.02, 0.05, 0.1, 0.2, 0.28)
STEPS = 512


def profile(sigma_rel=0.1, step=STEPS):
    return Profile(sigma_rel=sigma_rel, step=step)


def density(p, time):
    """The continuous profile, written out again."""
    gamma = averages.gamma_of(p.sigma_rel)
    inside = (time >= 0) & (time <= p.step)
    return inside * (gamma + 1) * np.abs(time) ** gamma / p.step ** (gamma + 1)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel):
    p = profile(sigma_rel, 1)

    def moment(k):
        return integrate.quad(lambda u: u**k * density(p, u), 0, 1, epsabs=1e-12)[0]

    assert moment(0) == pytest.approx(1, rel=1e-9)
    assert (moment(2) - moment(1) ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)
    gamma = averages.gamma_of(sigma_rel)
    assert averages.sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)


def test_the_exponents_are_those_of_the_paper():
    """Karras et al. 2024, section 3.1: gamma = 16.97 and 6.94 for 5% and 10%."""
    assert averages.gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert averages.gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


def test_all_steps_alike_is_the_widest():
    assert averages.gamma_of(12**-0.5) == pytest.approx(0, abs=1e-6)
    assert_allclose(profile(12**-0.5, 4).weights(), 0.25, rtol=1e-6)
    for sigma_rel in (0.0, -0.1, 0.29):
        with pytest.raises(AverageError, match="at most 0.2887"):
            averages.gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_weights_sum_to_one_and_have_the_width(sigma_rel):
    weights = profile(sigma_rel, 20_000).weights()
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    at = (np.arange(20_000) + 0.5) / 20_000
    mean = weights @ at
    assert (weights @ (at - mean) ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-4)


@pytest.fixture(scope="module")
def path():
    """Weights of a run of STEPS steps, {"w": [STEPS, 16]}: drift and noise."""
    rng = np.random.default_rng(0)
    drift = np.linspace(0, 1, STEPS)[:, None] ** 0.5 * rng.normal(size=16)
    return {"w": (drift + 0.3 * rng.normal(size=(STEPS, 16))).astype(np.float32)}


@pytest.fixture(scope="module")
def tracked(path):
    """Profile -> the average that updates gave, for two widths at every step."""

    def step(before, k):
        params = jax.tree.map(lambda w: w[k - 1], path)
        new = {s: averages.update(before[s], params, k, s) for s in (0.05, 0.1)}
        return new, new

    path = jax.tree.map(jnp.asarray, path)
    first = {s: {"w": jnp.full(16, 7.0)} for s in (0.05, 0.1)}  # counts for nothing
    _, found = jax.lax.scan(step, first, jnp.arange(1, STEPS + 1))
    return {
        profile(s, k): jax.tree.map(lambda w, k=k: np.asarray(w[k - 1]), found[s])
        for k in range(1, STEPS + 1)
        for s in (0.05, 0.1)
    }


def explicit(path, p):
    return p.weights() @ path["w"][: p.step].astype(np.float64)


def test_updates_keep_the_weighted_sum(path, tracked):
    for k in (1, 2, 3, 10, 100, STEPS):
        for sigma_rel in (0.05, 0.1):
            p = profile(sigma_rel, k)
            assert_allclose(tracked[p]["w"], explicit(path, p), rtol=1e-4, atol=2e-6)


def test_the_share_of_a_new_step_keeps_its_digits_in_a_long_run():
    for step in (1, 2, 1000, 10**6, 10**7):
        exponent = averages.gamma_of(0.05) + 1
        want = -np.expm1(exponent * np.log1p(-1 / step)) if step > 1 else 1.0
        share = jax.jit(averages.new_share, static_argnums=1)(jnp.int32(step), 0.05)
        assert_allclose(share, want, rtol=1e-6)


@pytest.mark.parametrize("a", [profile(0.05, 30), profile(0.1, 100), profile(0.28, 7)])
@pytest.mark.parametrize("b", [profile(0.05, 100), profile(0.2, 90)])
def test_inner_products_are_integrals(a, b):
    last = min(a.step, b.step)
    want, _ = integrate.quad(lambda t: density(a, t) * density(b, t), 0, last)
    assert averages.inner_product(a, b) == pytest.approx(want, rel=1e-7)
    assert averages.inner_product(b, a) == pytest.approx(want, rel=1e-7)


def snapshots(tracked, count):
    """The two averages at `count` evenly spaced steps."""
    steps = [STEPS * (i + 1) // count for i in range(count)]
    return {p: tracked[p] for k in steps for p in (profile(0.05, k), profile(0.1, k))}


@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_stored_average_is_made_from_itself(tracked, count):
    stored = snapshots(tracked, count)
    for wanted in list(stored)[-3:]:
        found = averages.combination(list(stored), wanted)
        assert found.error < 1e-5
        got = averages.reconstruct(stored, wanted)
        assert_allclose(got["w"], stored[wanted]["w"], rtol=2e-5, atol=2e-6)


# (stored steps, width, relative error of the profile): docs/experiments.md has them.
ERRORS = [
    *((8, 0.02, 0.245), (8, 0.04, 0.031), (8, 0.07, 0.013), (8, 0.15, 0.033)),
    *((8, 0.25, 0.18), (16, 0.02, 0.12), (16, 0.04, 0.010), (16, 0.07, 0.0038)),
    *((16, 0.15, 0.0090), (16, 0.25, 0.079), (32, 0.02, 0.039), (32, 0.04, 0.0028)),
    *((32, 0.07, 0.00097), (32, 0.15, 0.0023), (32, 0.25, 0.034)),
]


@pytest.mark.parametrize(
    ("count", "sigma_rel", "error"),
    [  # of the many stored ones, which take a second each, one width by day
        pytest.param(
            *case, marks=pytest.mark.slow if case[0] == 32 and case[1] != 0.07 else ()
        )
        for case in ERRORS
    ],
)
def test_another_width_is_made_from_two(path, tracked, count, sigma_rel, error):
    stored, wanted = snapshots(tracked, count), profile(sigma_rel)
    found = averages.combination(list(stored), wanted)
    total = sum(
        c * np.pad(p.weights(), (0, STEPS - p.step))
        for c, p in zip(found.coefficients, stored, strict=True)
    )
    want = wanted.weights()
    off = np.linalg.norm(total - want) / np.linalg.norm(want)
    assert found.error == pytest.approx(error, rel=0.05)
    assert off == pytest.approx(error, rel=0.05)  # also of weights of whole steps
    assert sum(found.coefficients) == pytest.approx(1, abs=1e-9)
    got = averages.reconstruct(stored, wanted, largest_error=0.3)["w"]
    # The bound of Cauchy and Schwarz; the mean has no part, as the errors sum to 0.
    spread = np.linalg.norm(path["w"] - path["w"].mean(0))
    bound = 1.05 * error * np.linalg.norm(want) * spread
    assert np.linalg.norm(got - explicit(path, wanted)) < bound + 1e-5


def test_another_last_step_can_be_wanted(path, tracked):
    stored = snapshots(tracked, 32)
    for step in (320, 448):
        wanted = profile(0.12, step)
        assert averages.combination(list(stored), wanted).error < 0.005
        got = averages.reconstruct(stored, wanted)["w"]
        assert_allclose(got, explicit(path, wanted), atol=0.003)
    # Between two stored steps there is an edge that no stored profile has.
    assert averages.combination(list(stored), profile(0.12, 300)).error > 0.15
    got = averages.reconstruct(stored, profile(0.12, 300), largest_error=0.3)["w"]
    assert_allclose(got, explicit(path, profile(0.12, 300)), atol=0.1)


def test_what_stored_averages_do_not_give_is_refused(tracked):
    stored = snapshots(tracked, 2)
    with pytest.raises(AverageError, match="steps 256, 512: the profile would be off"):
        averages.reconstruct(stored, profile(0.02))
    got = averages.reconstruct(stored, profile(0.02), largest_error=1.0)
    assert got["w"].shape == (16,)
    for wrong in ([], [profile(), profile()]):
        with pytest.raises(AverageError, match="each once"):
            averages.combination(wrong, profile())


def test_a_sum_takes_one_tree_at_a_time():
    alive = []

    def terms():
        for c in (1.0, -2.0, 0.5):
            alive.append(c)
            yield c, {"a": np.float32([c, 1])}

    assert_array_equal(averages.weighted_sum(terms())["a"], [1 + 4 + 0.25, -0.5])
    assert alive == [1.0, -2.0, 0.5]
