"""Solvers: their order of convergence, their noise, and the grids that they run on."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.integrate import solve_ivp
from scipy.special import softmax
from small_sampler import (
    COND,
    DENOISE,
    FLOW,
    INVERTED,
    KEY,
    SHAPE,
    TABLE,
    W,
    network,
    same,
    sample,
)

from scaling_ldm.diffusion import noise, samplers

# Order of convergence.

CENTRES = np.asarray([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]])
WEIGHTS = np.asarray([0.3, 0.5, 0.2])
WIDTH = 0.3
SDE = noise.vp_sde()
ENDS = (0.9, 0.15)  # times between which the ODE is solved


def mixture(xp, softmax, x, a, s):
    """E[x0 | x] of a mixture of Gaussians; x [B, 2], a and s scalars."""
    variance = (a * WIDTH) ** 2 + s**2
    away = x[:, None] - (a * CENTRES)[None]
    share = softmax(xp.log(WEIGHTS)[None] - 0.5 * (away**2).sum(-1) / variance, -1)
    each = CENTRES[None] + a * WIDTH**2 / variance * away
    return (share[..., None] * each).sum(1)


def mixture_network(x, t, cond):
    a, s = jnp.sqrt(jax.nn.sigmoid(t[0])), jnp.sqrt(jax.nn.sigmoid(-t[0]))
    return mixture(jnp, jax.nn.softmax, x, a, s)


@functools.cache
def ode_solution():
    """(x at ENDS[0], x at ENDS[1]) [64, 2], with scipy's own solver.

    With u = log(sigma / alpha) and y = x / alpha: dy/du = y - x0.
    """
    start, end = (-0.5 * float(SDE.logsnr(t)) for t in ENDS)

    def slope(u, y):
        a = 1 / math.sqrt(1 + math.exp(2 * u))
        y = y.reshape(-1, 2)
        return (y - mixture(np, softmax, a * y, a, a * math.exp(u))).ravel()

    x = np.random.default_rng(0).normal(size=(64, 2))
    first, last = (float(SDE.alpha(t)) for t in ENDS)
    y = solve_ivp(
        slope, (start, end), (x / first).ravel(), "DOP853", rtol=1e-10, atol=1e-12
    ).y[:, -1]
    return x, last * y.reshape(-1, 2)


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        ("ddim", {}, 1),
        ("euler", {}, 1),
        ("heun", {}, 2),
        ("dpm++1", {}, 1),
        ("dpm++2m", {}, 2),
        ("dpm++2m", {"solver": "heun"}, 2),
        ("dpm++3m", {}, 3),
        ("dpm++3m", {"curvature": 0.5}, 2),
        ("dpm++2s", {}, 2),
        ("dpm++2s", {"solver": "heun"}, 2),
        ("dpm++3s", {}, 3),
        ("dpm++3s", {"solver": "midpoint"}, 3),
        ("unipc1", {}, 2),
        ("unipc2", {}, 3),
        ("unipc2", {"form": "bh1"}, 3),
        ("unipc3", {}, 4),
        ("unipc3", {"corrector": False}, 3),
    ],
)
def test_order_of_convergence(sampler, options, order):
    """On points even in logsnr."""
    assert abs(measured(sampler, options, lambda n: np.ones(n)) - order) < 0.15


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        ("heun", {}, 2),
        ("dpm++2m", {}, 2),
        ("dpm++2m", {"solver": "heun"}, 2),
        ("dpm++3m", {}, 3),
        ("dpm++2s", {}, 2),
        ("unipc1", {}, 2),
        ("unipc2", {}, 3),
    ],
)
def test_order_of_convergence_on_steps_of_turning_lengths(sampler, options, order):
    """Where formulas for even steps would lose an order."""
    lengths = [1.0, 2.0, 1.0, 0.7, 1.5, 2.0]
    found = measured(sampler, options, lambda n: np.resize(lengths, n))
    assert abs(found - order) < 0.25


def measured(sampler, options, lengths):
    """Order at 96 to 192 steps, whose lengths in logsnr are in given proportions."""
    x, expected = ode_solution()
    if sampler.startswith(("dpm", "unipc")):
        options = {**options, "lower_order_final": False}
    with jax.enable_x64(True):
        denoise = samplers.denoiser(
            mixture_network, SDE, prediction="x0", time=SDE.logsnr
        )
        errors = []
        for steps in (96, 192):
            low, high = (SDE.logsnr(t) for t in ENDS)
            share = np.cumsum(lengths(steps)) / np.sum(lengths(steps))
            levels = low + (high - low) * np.concatenate([[0], share[:-1]])
            out = samplers.sample(
                denoise,
                noise=jnp.asarray(x),
                sampler=sampler,
                grid=samplers.from_times(SDE, SDE.time(levels), end=ENDS[1]),
                **options,
            )
            errors.append(np.sqrt(np.mean((out - expected) ** 2)))
    print(f"{sampler} {options}: {math.log2(errors[0] / errors[1]):.2f}, {errors}")
    return math.log2(errors[0] / errors[1])


def test_stages_that_share_their_noise_keep_the_variance():
    """Gaussian data and the optimal network: the spread of many samples is the data's.

    Its error is of order one with independent noise in each stage and second order with
    one Brownian path; 60 evaluations tell them apart by far more than chance.
    """
    schedule, spread = noise.edm(), 0.5
    denoise = samplers.denoiser(
        lambda x, t, cond: x * (spread**2 / (spread**2 + t**2))[:, None],
        schedule,
        prediction="x0",
        time="schedule",
    )

    def error(**options):
        x = samplers.sample(
            denoise, KEY, shape=(10_000, 1), sampler="sde-dpm++2s", steps=60, **options
        )
        return abs(float(x.std()) / spread - 1)

    assert error() < 0.05
    assert error(shared_noise=False) > 0.1


# Stochastic samplers.


@pytest.mark.parametrize("name", ["linear", "zero"])
def test_ddpm_takes_the_papers_steps(name):
    """Ho et al. 2020, eq. 7: the posterior's mean and variance, at all 1000 steps."""
    table = noise.linear()
    table = noise.zero_terminal_snr(table) if name == "zero" else table
    denoise = samplers.denoiser(
        network, table, prediction="v", time="schedule", params=W
    )
    bar = np.asarray(table.alphas_bar)
    before = np.concatenate([[1.0], bar[:-1]])
    betas = 1 - bar / before
    for variance, expected in (
        ("fixed_small", (1 - before) / (1 - bar) * betas),
        ("fixed_large", betas),
    ):
        rows = samplers.plan(denoise, sampler="ddpm", steps=1000, variance=variance)
        rows = rows.table.rows[::-1]
        assert [row.at.t for row in rows] == list(range(1000))
        x = np.sqrt(1 - betas) * (1 - before) / (1 - bar)
        assert_allclose([row.x_x for row in rows], x, rtol=1e-8, atol=1e-12)
        m = np.sqrt(before) * betas / (1 - bar)
        assert_allclose([row.x_m[0] for row in rows], m, rtol=1e-8)
        z = np.asarray([row.x_z for row in rows]) ** 2
        assert_allclose(z[1:], expected[1:], rtol=1e-8)
        assert z[0] == 0


def test_ddim_with_all_the_noise_is_ddpm_is_the_first_order_sde():
    fresh = jax.random.normal(jax.random.key(9), (6, *SHAPE))
    run = functools.partial(sample, shape=SHAPE, noise=samplers.GivenNoise(steps=fresh))
    x = run(sampler="ddpm")
    same(run(sampler="ddim", eta=1.0), x)
    same(run(sampler="sde-dpm++1"), x)
    assert np.abs(run(sampler="ddim", eta=0.5) - x).max() > 0.05
    same(run(sampler="ddim", eta=0.0), sample(shape=SHAPE, sampler="ddim"))
    # With numbers far apart no square root is of less than nothing.
    wide = noise.edm(1e-6, 1e5)
    denoise = samplers.denoiser(
        network, wide, prediction="v", time="schedule", params=W
    )
    grid = samplers.from_times(wide, [1e5, 1e-6])
    assert samplers.plan(denoise, sampler="ddim", eta=1.0, grid=grid).nfe == 2


def test_noise_of_the_sde_solvers():
    """Song et al.'s reverse SDE forgets e^{-2h} of the variance in a step of h."""
    for sampler in ("sde-dpm++1", "sde-dpm++2m", "sde-dpm++3m"):
        for row in samplers.plan(DENOISE, sampler=sampler, steps=9).table.rows[:-1]:
            kept = (row.to.sigma * row.at.alpha / (row.at.sigma * row.to.alpha)) ** 2
            assert_allclose(row.x_z, row.to.sigma * math.sqrt(1 - kept), rtol=1e-9)


def test_a_learned_variance_lies_between_its_bounds():
    def learned(share, x, t, cond):
        v = network(W, x, t, cond)
        return jnp.concatenate([v, jnp.full_like(v, share)], -1)

    fresh = jax.random.normal(jax.random.key(9), (6, *SHAPE))

    def run(share, **settings):
        denoise = samplers.denoiser(
            learned, TABLE, prediction="v", time="schedule", params=jnp.float32(share)
        )
        return samplers.sample(
            denoise,
            KEY,
            shape=SHAPE,
            cond=COND,
            sampler="ddpm",
            variance="learned",
            steps=6,
            noise=samplers.GivenNoise(steps=fresh),
            **settings,
        )

    fixed = functools.partial(
        sample, shape=SHAPE, sampler="ddpm", noise=samplers.GivenNoise(steps=fresh)
    )
    same(run(-1.0), fixed(variance="fixed_small"))
    same(run(1.0), fixed(variance="fixed_large"))
    assert np.all(np.abs(run(0.0) - run(1.0)).max((1, 2, 3)) > 1e-4)
    rows = samplers.plan(DENOISE, sampler="ddpm", variance="learned", steps=6)
    bounds = [row.log_variance for row in rows.table.rows]
    assert bounds[-1] is None and all(small < large for small, large in bounds[:-1])
    # Guided, the variance is the conditional one's.
    same(run(-1.0, uncond=COND, guidance=3.0), run(-1.0))


# Grids.


def times(schedule, steps, *args, **options):
    grid = samplers.grid(schedule, steps, *args, **options)
    return [point.t for point in grid.points[:-1]]


def test_grids_are_the_published_ones():
    assert times(TABLE, 20, "trailing") == list(range(999, 0, -50)) == times(TABLE, 20)
    assert times(TABLE, 20, "leading") == list(range(950, -1, -50))
    assert times(TABLE, 20, "leading", offset=1) == list(range(951, 0, -50))
    assert times(TABLE, 3, "trailing") == [999, 666, 332]
    assert times(TABLE, 5, "linspace") == [999, 749, 500, 250, 0]
    assert_allclose(times(FLOW, 4), [1, 0.75, 0.5, 0.25])
    assert_allclose(times(FLOW, 4, "quadratic"), [1, 0.5625, 0.25, 0.0625])
    shifted = [3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25)]
    assert_allclose(times(FLOW, 4, "flow_shifted"), shifted)
    assert_allclose(times(FLOW, 4, "flow_shifted", shift=1.0), times(FLOW, 4))
    edm = noise.edm()
    i = np.arange(18)
    sigma = 80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    assert_allclose(times(edm, 18), sigma**7, rtol=1e-9)  # Karras et al. 2022, eq. 5
    levels = TABLE.logsnr(np.asarray(times(TABLE, 6, "logsnr")))
    assert_allclose(np.diff(levels), np.diff(levels)[0], rtol=1e-9)
    for schedule in (TABLE, FLOW, edm, noise.vp_sde(), noise.vp_cosine()):
        for steps in (1, 2, 3, 18, 50):
            grid = samplers.grid(schedule, steps, "karras")
            assert grid.steps == steps and grid.points[0].t == schedule.t_noise
            assert grid.points[-1][1:] == (1.0, 0.0)
    for end, t in (("schedule", 0.002), (0.5, 0.5)):
        last = samplers.from_times(edm, [80, 10], end=end).points[-1]
        assert last == samplers.GridPoint(t, 1.0, t)


def test_grids_turn_and_end_early():
    grid = samplers.grid(TABLE, 5)
    assert grid.last(2).points == grid.points[-3:]
    back = grid.reversed()
    assert back.inverts and not grid.inverts and back.reversed() == grid
    assert (
        samplers.plan(DENOISE, sampler="ddim", grid=grid, image=INVERTED).grid == back
    )
    part = samplers.SourceImage(None, strength=0.4)
    cut = samplers.plan(DENOISE, grid=grid, image=part).grid
    assert cut == grid.last(2) and hash(cut) == hash(grid.last(2))
