"""Noise schedules against formulas written out again, in numpy and in jax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm.diffusion import noise

ZERO = noise.zero_terminal_snr(noise.scaled_linear())
ALL = {name: make() for name, make in noise.SCHEDULES.items()} | {"zero_snr": ZERO}
TABLES = [name for name in ALL if isinstance(ALL[name], noise.Discrete)]
CONTINUOUS = [name for name in ALL if name not in TABLES]
PRESERVING = [name for name in ALL if name not in ("rectified_flow", "edm")]
every = pytest.mark.parametrize(  # tables of betas by night, but one
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("scaled_linear", "cosine") else ()
        )
        for name in ALL
    ],
)


def inside(schedule, n=201):
    """Times over the whole range, a table's whole and broken steps among them."""
    return np.linspace(schedule.t_data, schedule.t_noise, n)


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_is_preserved(name):
    s = ALL[name]
    t = inside(s, 1000)
    assert_allclose(s.alpha(t) ** 2 + s.sigma(t) ** 2, 1.0, rtol=1e-14)
    total = jax.jit(lambda t: s.alpha(t) ** 2 + s.sigma(t) ** 2)
    assert_allclose(total(jnp.asarray(t)), 1.0, rtol=1e-6)


def test_flow_is_a_straight_line_and_edm_adds_noise_alone():
    flow, edm = ALL["rectified_flow"], ALL["edm"]
    t = inside(flow)
    assert_array_equal(flow.alpha(t), 1 - t)
    assert_array_equal(flow.sigma(t), t)
    a, s = flow.from_logsnr(flow.logsnr(t[1:-1]))
    assert_allclose(a + s, 1.0, rtol=1e-14)
    assert_allclose(s, t[1:-1], rtol=1e-13)
    t = inside(edm)
    assert_array_equal(edm.alpha(t), 1.0)
    assert_array_equal(edm.sigma(t), t)
    assert_allclose(edm.from_logsnr(edm.logsnr(t))[1], t, rtol=1e-13)
    assert edm.prior_std == 80.0 and flow.prior_std == 1.0


def test_tables_against_their_papers():
    linear = np.asarray(ALL["linear"].alphas_bar)
    assert len(linear) == 1000
    assert_allclose(ALL["linear"].betas[[0, -1]], [1e-4, 0.02], rtol=1e-9)
    assert_allclose(np.diff(ALL["linear"].betas), 0.0199 / 999, rtol=1e-6)
    assert_allclose(linear[-1], 4.0358e-5, rtol=1e-4)  # DDPM: nearly nothing is left

    sd = ALL["scaled_linear"]
    assert_allclose(sd.alphas_bar[0], 0.99915, rtol=1e-12)
    assert_allclose(sd.alphas_bar[-1], 0.00466, rtol=1e-3)
    assert_allclose(np.diff(np.sqrt(sd.betas)), 8.0467e-05, rtol=1e-3)
    product = 1.0
    for i in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999
        product *= 1 - root**2
        assert math.isclose(product, sd.alphas_bar[i], rel_tol=1e-11)

    def f(t):  # Nichol & Dhariwal 2021, eq. 17, T = 1000
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    cosine = ALL["cosine"]
    expected = [f(t) / f(0) for t in range(1, 1000)]
    assert_allclose(cosine.alphas_bar[:-1], expected, rtol=1e-9)
    assert_allclose(cosine.betas[-1], 0.999, rtol=1e-9)  # eq. 17 itself gives 1


def test_continuous_schedules_against_their_papers():
    t = np.linspace(0.01, 0.99, 37)
    # Song et al. 2021, eq. 33.
    expected = np.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1)
    assert_allclose(ALL["vp_sde"].alpha(t), expected, rtol=1e-12)
    # Salimans & Ho 2022: logsnr = -2 log tan(pi t / 2), its ends cut off.
    expected = -2 * np.log(np.tan(np.pi * t / 2))
    assert_allclose(ALL["vp_cosine"].logsnr(t), expected, atol=0.02)
    assert_allclose(noise.vp_cosine(60.0).alpha(t), np.cos(np.pi * t / 2), rtol=1e-9)
    assert_allclose(
        ALL["vp_cosine"].logsnr(np.asarray([0.0, 0.5, 1.0])), [20, 0, -20], atol=1e-7
    )


@every
def test_logsnr_falls_and_is_the_ratio(name):
    s = ALL[name]
    t = inside(s)
    logsnr = s.logsnr(t)
    assert np.all(np.diff(logsnr) < 0)
    with np.errstate(divide="ignore"):
        ratio = 2 * (np.log(s.alpha(t)) - np.log(s.sigma(t)))
    assert_allclose(ratio, logsnr, rtol=1e-10, atol=1e-9)
    assert np.all(np.diff(jax.jit(s.logsnr)(jnp.asarray(t))) < 0)


@every
def test_time_is_the_inverse_of_logsnr(name):
    s = ALL[name]
    t = inside(s)[1:-1]
    assert s.time(s.logsnr(t)).dtype == np.float64
    assert_allclose(s.time(s.logsnr(t)), t, rtol=1e-9)

    def there_and_back(t):
        return s.time(s.logsnr(t))

    narrow = jnp.asarray(t, jnp.float32)
    for function in (there_and_back, jax.jit(there_and_back)):
        back = function(narrow)
        assert back.dtype == jnp.float32
        assert_allclose(back, t, rtol=2e-5, atol=2e-5 * s.t_noise)


@every
def test_times_stay_in_range_whatever_the_logsnr(name):
    s = ALL[name]
    asked = np.asarray([np.inf, 60.0, -60.0, -np.inf])
    for t in (s.time(asked), jax.jit(s.time)(jnp.asarray(asked, jnp.float32))):
        assert_allclose(t[:2], s.t_data, atol=1e-6)
        assert_allclose(t[2:], s.t_noise, rtol=1e-6)
    ends = s.logsnr(np.asarray([s.t_data, s.t_noise]))
    t = s.time(np.nextafter(ends, [np.inf, -np.inf]))
    assert s.t_data <= t[0] and t[1] <= s.t_noise


@every
def test_nothing_is_computed_in_less_than_float32(name):
    s = ALL[name]
    functions = [s.logsnr, s.alpha, s.sigma, s.time, s.at_fraction, s.unit_time]
    functions += [lambda t: noise.shift_time(t, 3.0)]
    for f in functions:
        for dtype in (jnp.bfloat16, jnp.float16, jnp.int32, jnp.float32):
            for shape in ((), (3,)):
                out = jax.eval_shape(f, jax.ShapeDtypeStruct(shape, dtype))
                assert out.dtype == jnp.float32 and out.shape == shape
        for given in (1, 0.5, np.float32(0.5), np.ones(3, np.int32)):
            assert f(given).dtype == np.float64
            assert np.shape(f(given)) == np.shape(given)
    with jax.enable_x64(True):
        assert s.alpha(jnp.ones(3, jnp.float64)).dtype == jnp.float64


@every
def test_numpy_and_jax_agree(name):
    s = ALL[name]
    t = inside(s)
    for f in (s.alpha, s.sigma):
        assert_allclose(jax.jit(f)(jnp.asarray(t)), f(t), rtol=1e-4, atol=1e-6)
    with jax.enable_x64(True):
        for f in (s.alpha, s.sigma, s.logsnr):
            assert_allclose(jax.jit(f)(jnp.asarray(t)), f(t), rtol=1e-10)


@pytest.mark.parametrize("name", TABLES)
def test_between_whole_steps_logsnr_is_linear(name):
    s = ALL[name]
    whole = np.arange(s.steps)
    bar = np.asarray(s.alphas_bar)
    assert_allclose(s.alpha(whole) ** 2, bar, rtol=1e-12)
    assert_allclose(jax.jit(s.alpha)(jnp.asarray(whole)) ** 2, bar, rtol=2e-5)
    low = np.asarray([0, 17, 500, s.steps - 3])
    a, b = s.logsnr(low), s.logsnr(low + 1)
    for part in (0.25, 0.5, 0.9):
        assert_allclose(s.logsnr(low + part), a + part * (b - a), rtol=1e-9)
        assert_allclose(s.time(a + part * (b - a)), low + part, rtol=1e-9)
    outside = s.logsnr(np.asarray([-3.0, s.steps + 3.0]))
    assert_array_equal(outside, s.logsnr(np.asarray([0.0, s.steps - 1.0])))


def test_zero_terminal_snr():
    base = noise.scaled_linear()
    root = np.sqrt(base.alphas_bar)  # Lin et al. 2023, algorithm 1
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    assert_allclose(np.sqrt(ZERO.alphas_bar), expected, rtol=1e-12)
    assert ZERO.alphas_bar[-1] == 0.0 and ZERO.alpha(999) == 0.0
    assert ZERO.sigma(999) == 1.0 and ZERO.logsnr(999.0) == -np.inf
    alpha_of = jax.jit(ZERO.alpha)
    assert float(alpha_of(jnp.float32(999))) == 0.0
    assert_allclose(ZERO.alphas_bar[0], base.alphas_bar[0], rtol=1e-14)
    # Over the last interval alpha falls to zero linearly, and time inverts it.
    t = 998 + np.asarray([0.0, 0.25, 0.5, 0.999, 1.0])
    alpha = expected[-2] * (999 - t)
    assert_allclose(ZERO.alpha(t), alpha, rtol=1e-9)
    rounded = np.asarray(t, np.float32)
    assert_allclose(
        alpha_of(jnp.asarray(rounded)), expected[-2] * (999 - rounded), rtol=1e-4
    )
    assert_allclose(ZERO.time(ZERO.logsnr(t)), t, rtol=1e-12)
    assert_allclose(ZERO.time(-np.inf), 999.0)
    assert_allclose(noise.zero_terminal_snr(ZERO).alphas_bar, ZERO.alphas_bar)


@every
def test_gradients_are_finite(name):
    s = ALL[name]
    edge = 1e-3 * (s.t_noise - s.t_data)
    t = jnp.linspace(s.t_data + edge, s.t_noise, 50)
    for f in (s.alpha, s.sigma):
        slope = jax.jit(jax.vmap(jax.grad(f)))
        assert np.all(np.isfinite(slope(t))), f
        middle = inside(s)[50:150:7] + 0.3 * edge
        h = 1e-5 * s.t_noise
        expected = (f(middle + h) - f(middle - h)) / (2 * h)
        with jax.enable_x64(True):
            got = slope(jnp.asarray(middle))
        assert_allclose(got, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 10, 4000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_tables_of_any_length(name, steps):
    s = noise.SCHEDULES[name](steps=steps)
    zero = noise.zero_terminal_snr(s)
    for table in (s, zero):
        assert table.steps == steps == len(table.betas)
        assert (table.t_data, table.t_noise) == (0.0, steps - 1.0)
        t = np.linspace(0, steps - 1, 41)
        assert_allclose(table.time(table.logsnr(t)), t, rtol=1e-7, atol=1e-9)
        assert_allclose(
            jax.jit(table.alpha)(jnp.asarray(t)), table.alpha(t), rtol=1e-2, atol=1e-6
        )
        assert_allclose(table.unit_time(steps - 1), 1 - 1 / steps)
    assert_allclose(np.cumprod(1 - s.betas), s.alphas_bar, rtol=1e-9)
    assert zero.alpha(steps - 1) == 0.0


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_shifting_time_lowers_logsnr_evenly(factor):
    flow = noise.rectified_flow()
    t = np.linspace(0.01, 0.99, 21)
    shifted = noise.shift_time(t, factor)
    assert_allclose(shifted, 1 / (1 + (1 / t - 1) / factor), rtol=1e-12)
    assert_allclose(flow.logsnr(shifted), flow.logsnr(t) - 2 * math.log(factor))
    assert_array_equal(noise.shift_time(np.asarray([0.0, 1.0]), factor), [0.0, 1.0])


@every
def test_fractions_cover_the_range_evenly(name):
    s = ALL[name]
    u = np.linspace(0, 1, 100_001)[:-1]
    t = s.at_fraction(u)
    assert t.min() == s.t_data and np.all(t <= s.t_noise)
    if name in TABLES:
        times, counts = np.unique(t, return_counts=True)
        assert_array_equal(times, np.arange(1000))
        assert np.all(np.abs(counts - 100) <= 1)
        assert s.at_fraction(np.nextafter(1.0, 0.0)) == 999
        # The largest float32 below 1 is rounded to no step that does not exist.
        last = s.at_fraction(jnp.float32(np.nextafter(np.float32(1), np.float32(0))))
        assert float(last) == 999
    else:
        assert_allclose(np.diff(t), (s.t_noise - s.t_data) * 1e-5, rtol=1e-6)
        assert_allclose(t[-1], s.t_noise, rtol=1e-4)


def test_networks_are_given_times_of_order_one():
    assert ALL["linear"].unit_time(500) == 0.5
    assert ALL["vp_cosine"].unit_time(0.25) == 0.25
    # Karras et al. 2022, table 1: c_noise.
    assert_allclose(ALL["edm"].unit_time(80.0), math.log(80) / 4)


def test_schedules_are_equal_and_hashed_by_value():
    for name, make in noise.SCHEDULES.items():
        assert make() == ALL[name] and hash(make()) == hash(ALL[name])
        assert len({make(), ALL[name], ZERO}) == 2
    assert noise.linear(10) != noise.linear(11) and noise.edm() != noise.edm(0.01)
    alpha = jax.jit(lambda s, t: s.alpha(t), static_argnums=0)
    assert_allclose(alpha(noise.rectified_flow(), 0.25), 0.75)
    with pytest.raises(AttributeError):
        ALL["edm"].sigma_max = 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: noise.linear(1), "at least 2 steps, got 1"),
        (lambda: noise.from_betas([0.1, 0.0]), r"in \(0, 1\], got 0.0 to 0.1"),
        (lambda: noise.from_betas([0.1, 1.5]), "got 0.1 to 1.5"),
        (lambda: noise.Discrete((1.0, 0.5)), "strictly from below 1 .* got 1.0 ... 0"),
        (lambda: noise.Discrete((0.5, 0.5)), "must fall strictly"),
        (lambda: noise.Discrete((0.5, -0.1)), "no less than 0, got 0.5 ... -0.1"),
    ],
)
def test_tables_that_are_none_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
