"""The variational bound against scipy, first principles and closed-form Gaussians."""

import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose
from scipy import integrate, special, stats

from scaling_ldm.diffusion import noise, prediction, samplers
from scaling_ldm.diffusion.losses import likelihood, ode_likelihood, vlb

KEY = jax.random.key(0)
LOG2 = math.log(2)
STD = 0.5  # of Gaussian data, per value
SHORT = noise.linear(7, 0.02, 0.5)


def optimal(schedule, kind):
    """What the perfect network says of x0 ~ N(0, STD^2); x is [B, D]."""

    def network(x, t, cond):
        del cond
        alpha, sigma = schedule.from_logsnr(schedule.logsnr(t))
        a, s = alpha[:, None], sigma[:, None]
        there = x / (a**2 * STD**2 + s**2)
        return prediction.target(kind, a * STD**2 * there, s * there, alpha, sigma)

    return network


def expected_rows(schedule, x0, variance):
    """Nats per value of every row when STD is known, given x0, noise averaged out.

    From the Gaussians themselves: q(x_{t-1} | x_t, x0) by Bayes' rule, the mean of p by
    putting E[x0 | x_t] in the place of x0.
    """
    bar = np.asarray(schedule.alphas_bar)
    rows = []
    for t in range(schedule.steps):
        gain = np.sqrt(bar[t]) * STD**2 / (bar[t] * STD**2 + 1 - bar[t])
        miss = (1 - gain * np.sqrt(bar[t])) ** 2 * x0**2 + gain**2 * (1 - bar[t])
        mean, q, p = bayes(bar, t, variance, None)
        if t == 0:
            rows.append(0.5 * np.log(2 * np.pi * p) + miss / (2 * p))
        else:
            rows.append(0.5 * (np.log(p / q) + q / p - 1 + mean**2 * miss / p))
    return np.stack(rows)


def bayes(bar, t, variance, levels, place=None):
    """(factor of x0 in the mean, variance of q, variance of p) at row t."""
    if t == 0:
        small, large, mean = bayes(bar, 1, "fixed_small", levels)[1], 1 - bar[0], 1.0
        if variance != "learned":
            small = large = small if levels else large
    else:
        step = bar[t] / bar[t - 1]  # x_t = sqrt(step) x_{t-1} + noise of 1 - step
        small = 1 / (step / (1 - step) + 1 / (1 - bar[t - 1]))
        large = 1 - step
        mean = small * np.sqrt(bar[t - 1]) / (1 - bar[t - 1])
    if variance == "learned":
        share = 0.5 * (place + 1)
        return mean, small, np.exp(share * np.log(large) + (1 - share) * np.log(small))
    return mean, small, small if variance == "fixed_small" else large


def prior(schedule, x0):
    bar = schedule.alphas_bar[-1]
    return 0.5 * (bar * x0**2 + (1 - bar) - 1 - np.log(1 - bar))


@pytest.mark.parametrize(
    ("variance", "levels"),
    [(v, n) for v in prediction.VARIANCES for n in (256, None)] + [("fixed_small", 5)],
)
def test_rows_are_those_of_scipy(variance, levels):
    """A network that ignores its noisy input leaves nothing to chance."""
    guess = np.array([0.1, -0.9, 0.45])
    half = 1 / (levels - 1) if levels else 0.0
    x0 = np.array([[-1, -0.5, 0.5], [0, 1, -1], [1, 0.5, -0.5]])
    if levels == 256:
        x0 = np.round((x0 + 1) * 127.5) / 127.5 - 1

    def network(x, t, cond):
        said = jnp.asarray(guess, x.dtype)[None] + 0 * x
        place = jnp.tanh(0.3 * t - 1)[:, None] + 0 * x
        if variance != "learned":
            return said
        return jnp.concatenate([said, place], axis=-1)

    run = functools.partial(
        vlb.bits_per_dim, network, SHORT, variance=variance, levels=levels
    )
    got = jax.jit(lambda x: run(x, KEY, prediction="x0"))(jnp.asarray(x0, jnp.float32))
    bar = np.asarray(SHORT.alphas_bar)
    want = []
    for t in range(SHORT.steps):
        mean, q, p = bayes(bar, t, variance, levels, np.tanh(0.3 * t - 1))
        square = (x0 - guess) ** 2
        if t:
            nats = 0.5 * (np.log(p / q) + q / p - 1 + mean**2 * square / p)
        elif levels is None:
            nats = -stats.norm(guess, np.sqrt(p)).logpdf(x0)
        else:
            low = np.where(x0 < -1 + half, -np.inf, x0 - half)
            high = np.where(x0 > 1 - half, np.inf, x0 + half)
            bins = (np.stack([low, high], -1) - guess[:, None]) / np.sqrt(p)
            flip = bins.sum(-1, keepdims=True) > 0
            bins = np.where(flip, -bins[..., ::-1], bins)
            nats = -np.log(np.diff(special.ndtr(bins))[..., 0])
        want.append(nats.mean(1) / LOG2)
    assert_allclose(got.terms, want, rtol=3e-5, atol=1e-6)
    assert_allclose(got.prior, prior(SHORT, x0).mean(1) / LOG2, rtol=1e-4)
    assert_allclose(got.total, got.prior + np.sum(want, 0), rtol=3e-5)
    square = np.mean((x0 - guess) ** 2, 1)
    assert_allclose(got.x0_mse, np.tile(square, (7, 1)), rtol=1e-5)
    assert_allclose(got.eps_mse, (bar / (1 - bar))[:, None] * square, rtol=1e-5)


def data(n, dims, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(STD * rng.normal(size=(n, dims)), jnp.float32)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_every_row_of_the_optimal_network_is_its_closed_form(variance):
    schedule = noise.cosine(12)
    x0 = data(400, 32)
    run = functools.partial(vlb.bits_per_dim, optimal(schedule, "v"), schedule)
    got = jax.jit(
        lambda x: run(x, KEY, prediction="v", variance=variance, levels=None)
    )(x0)
    want = expected_rows(schedule, np.asarray(x0, np.float64), variance).mean(2) / LOG2
    gap = np.asarray(got.terms) - want
    error = gap.std(1) / 400**0.5
    assert error.max() < 0.02
    assert (np.abs(gap.mean(1)) < 4 * error + 1e-6).all()
    assert_allclose(got.total, got.prior + got.terms.sum(0), rtol=1e-6)


def test_the_predictions_of_one_network_have_one_bound():
    schedule = noise.linear(10, 0.01, 0.3)
    x0 = data(3, 4)
    bounds = [
        jax.jit(
            functools.partial(
                vlb.bits_per_dim,
                optimal(schedule, kind),
                schedule,
                prediction=kind,
                levels=None,
            )
        )(x0, KEY)
        for kind in ("epsilon", "x0", "flow")
    ]
    for bound in bounds[1:]:
        assert_allclose(bound.terms, bounds[0].terms, rtol=1e-4, atol=1e-5)
        assert_allclose(bound.eps_mse, bounds[0].eps_mse, rtol=1e-4, atol=1e-6)


def test_the_bound_lies_above_the_density_and_closes_with_more_steps():
    """Its two ends as they are: alpha^2 from 0.999 down to 0.001."""
    x0 = data(500, 64)
    squares = np.mean(np.asarray(x0, np.float64) ** 2)
    exact = (0.5 * np.log(2 * np.pi * STD**2) + 0.5 * squares / STD**2) / LOG2
    gaps = []
    for steps in (10, 80):
        bar = special.expit(np.linspace(6.9, -6.9, steps))
        schedule = noise.Discrete(tuple(bar.tolist()))
        run = functools.partial(vlb.bits_per_dim, optimal(schedule, "x0"), schedule)
        run = jax.jit(
            lambda x, run=run: run(
                x, KEY, prediction="x0", levels=None, variance="fixed_large"
            ).total.mean()
        )
        gaps.append(run(x0) - exact)
    assert 0.01 < gaps[1] < 0.2 * gaps[0]


@pytest.mark.slow
def test_random_rows_estimate_the_whole():
    network = optimal(SHORT, "epsilon")
    x0 = jnp.broadcast_to(data(1, 8), (4000, 8))
    options = dict(prediction="epsilon", levels=None)
    run = functools.partial(vlb.bits_per_dim, network, SHORT, **options)
    whole = jax.jit(run)(x0, KEY).total
    spread = []
    for draws in (1, 7):
        run = functools.partial(vlb.estimate, network, SHORT, draws=draws, **options)
        got = jax.jit(run)(x0, jax.random.key(1))
        spread.append(np.std(got))
        error = np.hypot(spread[-1], np.std(whole)) / 4000**0.5
        assert abs(np.mean(got) - np.mean(whole)) < 4 * error
    # As many draws as rows take each row once.
    assert_allclose(spread[1], np.std(whole), rtol=0.1)
    assert spread[0] > 3 * spread[1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vp_cosine", marks=pytest.mark.slow),
        "rectified_flow",
        "scaled_linear",
    ],
)
def test_the_continuous_bound_is_its_closed_form(name):
    schedule = noise.SCHEDULES[name]()
    kind = "flow"
    x0 = data(500, 256)
    run = functools.partial(vlb.continuous, optimal(schedule, kind), schedule)
    got = jax.jit(lambda x: run(x, KEY, prediction=kind, levels=None, draws=64))(x0)
    high, low = (
        schedule.logsnr(end(schedule, None))
        for end in (likelihood.least_noise, likelihood.most_noise)
    )
    s2 = STD**2
    squares = np.asarray(x0, np.float64) ** 2

    def integral(scale):
        """Of E (eps - eps_hat)^2 over logsnr, x0^2 = scale."""
        return integrate.quad(
            lambda v: (
                (s2 * np.exp(v)) ** 2 / (1 + s2 * np.exp(v)) ** 2
                + np.exp(v) * scale / (1 + s2 * np.exp(v)) ** 2
            ),
            low,
            high,
        )[0]

    at_zero = integral(0.0)
    want = 0.5 * (at_zero + (integral(1.0) - at_zero) * squares).mean(1) / LOG2
    gap = got.diffusion - want
    error = np.std(gap) / 500**0.5
    assert abs(np.mean(gap)) < 4 * error < 0.06
    assert_allclose(
        got.decoder, 0.5 * np.log2(2 * np.pi * np.e * np.exp(-high)), rtol=1e-5
    )
    bar = special.expit(low)
    want = 0.5 * (bar * (squares - 1) - np.log1p(-bar)).mean(1) / LOG2
    assert_allclose(got.prior, want, rtol=1e-3, atol=1e-7)
    assert_allclose(got.total, got.prior + got.decoder + got.diffusion, rtol=1e-6)
    if name != "scaled_linear":  # little noise at one end, much at the other: tight
        exact = (0.5 * np.log(2 * np.pi * s2) + 0.5 * np.mean(squares) / s2) / LOG2
        assert abs(np.mean(got.total) - exact) < 4 * error


def test_the_continuous_decoder_of_levels_is_a_softmax_over_them():
    """Against the posterior of 5 levels given x0 plus noise, by quadrature."""
    schedule = noise.vp_cosine()
    t = float(schedule.time(4.0))
    std = np.exp(-2.0)
    grid = np.linspace(-1, 1, 5)
    x0 = jnp.broadcast_to(jnp.asarray(grid, jnp.float32), (4000, 5))
    got = jax.jit(
        lambda x: (
            vlb.continuous(
                lambda x, t, c: x, schedule, x, KEY, prediction="v", levels=5, t_min=t
            ).decoder
        )
    )(x0)

    def nats(level, eps):
        logits = -0.5 * ((level + std * eps - grid) / std) ** 2
        return special.logsumexp(logits) + 0.5 * eps**2

    node, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = weight / weight.sum()
    want = [
        sum(w * nats(g, e) for w, e in zip(weight, node, strict=True)) for g in grid
    ]
    error = np.std(got) / 4000**0.5
    assert error < 0.01
    assert abs(np.mean(got) - np.mean(want) / LOG2) < 4 * error


def test_far_tails_are_finite_and_exact():
    """Where mass underflows in any precision the bound is still the right one."""
    x0 = jnp.array([[-0.2, 0.2]], jnp.float32)

    def network(x, t, cond):
        return jnp.sign(x) * 0 + jnp.asarray([[0.8, -0.8]], x.dtype)

    schedule = noise.linear(4, 1e-5, 1e-4)
    got = vlb.bits_per_dim(network, schedule, x0, KEY, prediction="x0", levels=11)
    std = np.sqrt(bayes(schedule.alphas_bar, 1, "fixed_small", 11)[1])
    want = -stats.norm.logcdf((-0.1 - 0.8) / std) / LOG2  # the next bins weigh nothing
    assert want > 1e4
    assert_allclose(got.terms[0], want, rtol=1e-5)


def test_clipping_bounds_the_estimate_of_the_picture():
    x0 = jnp.full((2, 3), 0.5)
    options = dict(prediction="x0", levels=None)
    network = lambda x, t, c: 3 + 0 * x  # noqa: E731
    cut = vlb.bits_per_dim(network, SHORT, x0, KEY, clip=1.0, **options)
    assert_allclose(cut.x0_mse, 0.25, rtol=1e-6)


def test_a_last_step_without_signal_has_a_bound():
    schedule = noise.zero_terminal_snr(SHORT)
    x0 = data(400, 16)
    run = functools.partial(vlb.bits_per_dim, optimal(schedule, "v"), schedule)
    got = jax.jit(lambda x: run(x, KEY, prediction="v", levels=None))(x0)
    assert_allclose(got.prior, 0, atol=1e-7)
    want = expected_rows(schedule, np.asarray(x0, np.float64), "fixed_small")
    assert_allclose(got.terms.mean(1), want.mean((1, 2)) / LOG2, rtol=0.05, atol=1e-4)
    with pytest.raises(ValueError, match="no signal: use x0, v or flow"):
        run(x0, KEY, prediction="epsilon")


def network_of_pictures(x, t, cond):
    return jnp.tanh(x) * cond[:, None, None, None] - 0.1 * t[:, None, None, None]


@pytest.mark.parametrize("bound", [vlb.bits_per_dim, vlb.estimate, vlb.continuous])
def test_a_picture_does_not_depend_on_its_batch_and_nothing_recompiles(bound):
    @jax.jit
    def run(x, index, cond):
        keys = jax.vmap(functools.partial(jax.random.fold_in, KEY))(index)
        got = bound(network_of_pictures, SHORT, x, keys, prediction="x0", cond=cond)
        return got if bound is vlb.estimate else got.total

    x = jax.random.uniform(KEY, (6, 4, 4, 2), minval=-1)
    index, cond = jnp.arange(6), jnp.linspace(0.1, 0.9, 6)
    whole = run(x, index, cond)
    rows = np.array([5, 1, 2, 0, 4, 3])
    assert_allclose(run(x[rows], index[rows], cond[rows]), whole[rows], rtol=1e-5)
    assert run._cache_size() == 1
    others = run(x.at[2:].set(0.3), index.at[2:].set(9), cond.at[2:].set(2))
    assert_allclose(others[:2], whole[:2], rtol=1e-5)
    assert np.std(whole) > 1e-3


@pytest.mark.slow
def test_pictures_spread_over_devices_have_the_same_bound():
    def every(x, key):
        network = lambda x, t, cond: x - 0.1 * t[:, None]  # noqa: E731
        options = dict(prediction="v", levels=None)
        whole = vlb.bits_per_dim(network, SHORT, x, key, **options)
        smooth = vlb.continuous(network, noise.vp_sde(), x, key, **options)
        cheap = vlb.estimate(network, SHORT, x, key, **options)
        return cheap, *whole[:2], *smooth

    x0 = data(8, 4)
    alone = jax.jit(every)(x0, KEY)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    placed = NamedSharding(mesh, PartitionSpec("data", None))
    with jax.set_mesh(mesh):
        got = jax.jit(every)(jax.device_put(x0, placed), KEY)
    for one, other in zip(got, alone, strict=True):
        assert one.sharding.spec == PartitionSpec("data")
        assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(prediction="noise"), "none of epsilon"),
        (dict(prediction="v", variance="fixed"), "none of fixed_small"),
        (dict(prediction="v", variance="learned"), r"gives \(2, 6\)"),
        (dict(prediction="v", schedule=noise.vp_sde()), "noise.Discrete"),
    ],
)
def test_what_cannot_be_is_refused(options, says, unchecked):
    options = dict(schedule=SHORT) | options
    schedule = options.pop("schedule")
    with pytest.raises(ValueError, match=says):
        vlb.bits_per_dim(lambda x, t, c: x, schedule, jnp.zeros((2, 3)), KEY, **options)


def test_draws_and_ends_are_checked():
    x0 = jnp.zeros((2, 3))
    say = lambda x, t, c: x  # noqa: E731
    with pytest.raises(ValueError, match="draws"):
        vlb.estimate(say, SHORT, x0, KEY, prediction="v", draws=0)
    flow = noise.rectified_flow()
    with pytest.raises(ValueError, match="t_min = 0 has no noise"):
        vlb.continuous(say, flow, x0, KEY, prediction="flow", t_min=0.0)
    with pytest.raises(ValueError, match="t_max = 1 has no signal"):
        vlb.continuous(say, flow, x0, KEY, prediction="flow", t_max=1.0)


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(vlb)
    assert result.attempted > 5 and result.failed == 0


def test_a_denoiser_of_samplers_is_read_as_the_x0_that_it_gives():
    """Its network takes another t and predicts something else."""
    unit = lambda x, t, cond: x * (1 - t)[:, None]  # noqa: E731  # epsilon
    denoise = samplers.denoiser(unit, SHORT, prediction="epsilon", time="unit")
    x0 = jnp.linspace(-1, 1, 6).reshape(2, 3)
    got = vlb.continuous(denoise, SHORT, x0, KEY, prediction="x0", draws=4)

    def own(x, t, cond):
        return unit(x, SHORT.unit_time(t), cond)

    want = vlb.continuous(own, SHORT, x0, KEY, prediction="epsilon", draws=4)
    assert_allclose(got.total, want.total, rtol=1e-5)
    other = noise.linear(steps=7)
    for measure in (
        vlb.bits_per_dim,
        vlb.continuous,
        ode_likelihood.bits_per_dim,
        functools.partial(vlb.estimate, draws=2),
    ):
        with pytest.raises(ValueError, match="estimates x0: give prediction='x0', not"):
            measure(denoise, SHORT, x0, KEY, prediction="epsilon")
        with pytest.raises(ValueError, match="schedule is .*, not"):
            measure(denoise, other, x0, KEY, prediction="x0")
