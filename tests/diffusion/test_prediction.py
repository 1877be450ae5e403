"""Every prediction as every other, and what happens where one says nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm.diffusion import noise, prediction

KINDS = list(prediction.PREDICTIONS)
PAIRS = list(itertools.product(KINDS, KINDS))
FORMULAS = {
    "epsilon": lambda x0, eps, a, s: eps,
    "x0": lambda x0, eps, a, s: x0,
    "v": lambda x0, eps, a, s: a * eps - s * x0,
    "flow": lambda x0, eps, a, s: eps - x0,
    "score": lambda x0, eps, a, s: -eps / s,
}


def levels():
    """(alpha, sigma) [B] float64: unrelated, and those of each kind of schedule."""
    rng = np.random.default_rng(0)
    angle, t, sigma = (rng.uniform(0.05, high, 8) for high in (1.5, 0.95, 80.0))
    alphas = [rng.uniform(0.05, 2, 8), np.cos(angle), 1 - t, np.ones(8)]
    sigmas = [rng.uniform(0.05, 2, 8), np.sin(angle), t, sigma]
    return np.concatenate(alphas), np.concatenate(sigmas)


def pictures(batch):
    rng = np.random.default_rng(1)
    return rng.normal(size=(2, batch, 3, 2))


def spread(value):
    return value[:, None, None]


def test_the_formulas_are_all_there():
    assert set(FORMULAS) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_targets_and_corruption_follow_their_formulas(name):
    a, s = levels()
    x0, eps = pictures(len(a))
    expected = FORMULAS[name](x0, eps, spread(a), spread(s))
    with jax.enable_x64(True):
        given = [jnp.asarray(v) for v in (x0, eps, a, s)]
        assert_allclose(prediction.target(name, *given), expected, rtol=1e-12)
        x = prediction.corrupt(*given)
        assert_allclose(x, spread(a) * x0 + spread(s) * eps, rtol=1e-12)
        one = prediction.target(name, given[0], given[1], 0.8, 0.6)
    assert_allclose(one, FORMULAS[name](x0, eps, 0.8, 0.6), rtol=1e-12)


def test_every_conversion_meets_its_formula_and_returns():
    a, s = levels()
    x0, eps = pictures(len(a))
    x = spread(a) * x0 + spread(s) * eps
    for source, to in PAIRS:
        given = FORMULAS[source](x0, eps, spread(a), spread(s))
        expected = FORMULAS[to](x0, eps, spread(a), spread(s))
        c, d = prediction.factors(source, to, spread(a), spread(s))
        scale = np.abs(expected).max()
        assert_allclose(c * x + d * given, expected, rtol=1e-9, atol=1e-9 * scale)
        if source == to:
            assert (c, d) == (0.0, 1.0)
        e, f = prediction.factors(to, source, spread(a), spread(s))
        back = e * x + f * (c * x + d * given)
        assert_allclose(back, given, rtol=1e-9, atol=1e-9 * np.abs(given).max())


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_conversions_of_jax_arrays(source, to):
    a, s = levels()
    x0, eps = pictures(len(a))
    x = spread(a) * x0 + spread(s) * eps
    given = FORMULAS[source](x0, eps, spread(a), spread(s))
    convert = jax.jit(prediction.convert, static_argnames=("source", "to"))
    narrow = [jnp.asarray(v, jnp.float32) for v in (given, x, a, s)]
    out = convert(*narrow, source=source, to=to)
    assert out.dtype == jnp.float32
    expected = FORMULAS[to](x0, eps, spread(a), spread(s))
    # Dividing by what is small makes small what was rounded.
    error = np.abs(out - expected) / (1 + np.abs(expected))
    assert error.max() < 1e-3 and np.median(error) < 1e-6


EDGES = [(1.0, 0.0), (0.0, 1.0), (1.0, 80.0), (1.0, 1e-30), (1e-30, 1.0), (1.0, 1e-12)]


def test_results_and_gradients_are_finite_at_the_edges():
    x0, eps = pictures(len(EDGES))
    a, s = (jnp.asarray(v, jnp.float32) for v in zip(*EDGES, strict=True))
    given, x = (jnp.asarray(v, jnp.float32) for v in (x0, eps))

    @jax.jit
    def everything(given, x, a, s):
        def total(given, x, a, s, source, to):
            out = prediction.convert(given, x, a, s, source=source, to=to)
            return out.sum(), out

        slopes = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)
        return {pair: slopes(given, x, a, s, *pair) for pair in PAIRS}

    for pair, (slopes, out) in everything(given, x, a, s).items():
        assert np.all(np.isfinite(out)), pair
        for slope in slopes:
            assert np.all(np.isfinite(slope)), pair


@pytest.mark.parametrize(("a", "s"), [(1.0, 0.0), (0.0, 1.0), (0.6, 0.8)])
def test_what_is_defined_is_right(a, s):
    x0, eps = pictures(4)
    x = a * x0 + s * eps
    with np.errstate(divide="ignore", invalid="ignore"):
        sources = {n: FORMULAS[n](x0, eps, a, np.float64(s)) for n in KINDS}
    for source, to in itertools.product(KINDS, ("x0", "epsilon")):
        if source == "score" and s == 0:
            continue  # infinite itself
        c, d = prediction.factors(source, to, a, s)
        expected = FORMULAS[to](x0, eps, a, s)
        right = np.allclose(c * x + d * sources[source], expected)
        assert right == prediction.is_defined(source, to, a, s), (source, to)


def test_zero_snr_is_told_from_little():
    defined = prediction.is_defined
    assert not defined("epsilon", "x0", 0.0, 1.0) and not defined("score", "x0", 0, 1)
    assert defined("epsilon", "x0", 1e-9, 1.0) and defined("v", "x0", 0.0, 1.0)
    assert not defined("x0", "epsilon", 1.0, 0.0) and defined("flow", "epsilon", 1, 0)
    zero = noise.zero_terminal_snr(noise.linear())
    assert not defined("epsilon", "x0", zero.alpha(999), zero.sigma(999))


@pytest.mark.parametrize(
    "call",
    [
        lambda: prediction.kind("eps"),
        lambda: prediction.factors("eps", "x0", 0.6, 0.8),
        lambda: prediction.factors("v", "eps", 0.6, 0.8),
        lambda: prediction.factors("eps", "eps", 0.6, 0.8),
        lambda: prediction.target("eps", jnp.ones(2), jnp.ones(2), 0.6, 0.8),
    ],
)
def test_an_unknown_kind_lists_the_known(call):
    with pytest.raises(ValueError, match="'eps' is none of epsilon, x0, v, flow, scor"):
        call()


def test_a_value_per_sample_meets_pictures():
    like = jnp.zeros((4, 2, 3))
    assert prediction.batched(jnp.arange(4.0), like).shape == (4, 1, 1)
    assert prediction.batched(0.5, like).shape == ()
    assert_array_equal(prediction.batched(jnp.arange(4.0), like)[:, 0, 0], range(4))
