"""What every sampler promises, on every schedule and grid.

The network is the optimal one for Gaussian data, in closed form. Its schedule's family,
what it predicts and the data are parameters, so that the whole file runs on one program
for each shape of solver.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm.diffusion import noise, prediction, samplers

SHAPE = (128, 4, 4, 4)  # 8192 values: standard errors are std / 90.5 and std / 128
SCHEDULES = {
    "table": noise.scaled_linear(),
    "zero_snr": noise.zero_terminal_snr(noise.scaled_linear()),
    "vp_cosine": noise.vp_cosine(),
    "rectified_flow": noise.rectified_flow(),
    "edm": noise.edm(),
}
FAMILY = {"rectified_flow": 1, "edm": 2}
KINDS = list(prediction.PREDICTIONS)
STOCHASTIC = ["ddpm", *(name for name in samplers.SAMPLERS if name.startswith("sde"))]
DETERMINISTIC = [name for name in samplers.SAMPLERS if name not in STOCHASTIC]
FIRST_ORDER = ["ddim", "euler", "dpm++1"]


def on_every_schedule(names):
    """Each sampler with each schedule; by day each of them with two of the five."""
    return pytest.mark.parametrize(
        ("sampler", "schedule"),
        [
            pytest.param(
                sampler, schedule, marks=() if (i - j) % 5 < 2 else pytest.mark.slow
            )
            for i, sampler in enumerate(names)
            for j, schedule in enumerate(SCHEDULES)
        ],
    )


def level(params, logsnr):
    """alpha and sigma at a logsnr, [B, 1, 1, 1], without the library's schedules."""
    n = logsnr.reshape(-1, 1, 1, 1)
    alphas = jnp.sqrt(jax.nn.sigmoid(n)), jax.nn.sigmoid(n / 2), jnp.ones_like(n)
    sigmas = jnp.sqrt(jax.nn.sigmoid(-n)), jax.nn.sigmoid(-n / 2), jnp.exp(-n / 2)
    return tuple(jnp.stack(each)[params["family"]] for each in (alphas, sigmas))


def optimal(params, x, logsnr, cond):
    a, s = level(params, logsnr)
    variance = params["std"] ** 2
    x0 = params["mean"] + a * variance / (a**2 * variance + s**2) * (
        x - a * params["mean"]
    )
    eps = (x - a * x0) / s
    kinds = jnp.stack([eps, x0, a * eps - s * x0, eps - x0, -eps / s])
    return kinds[params["kind"]] + (0 if cond is None else cond)


def denoiser(schedule, *, kind="x0", mean=0.7, std=0.5, network=optimal):
    params = dict(
        mean=jnp.asarray(mean),
        std=jnp.asarray(std),
        kind=jnp.asarray(KINDS.index(kind)),
        family=jnp.asarray(FAMILY.get(schedule, 0)),
    )
    found = SCHEDULES[schedule]
    return samplers.denoiser(
        network, found, prediction=kind, params=params, time=found.logsnr
    )


@functools.cache
def initial():
    return np.random.default_rng(5).normal(size=SHAPE)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def spacings(schedule):
    """Those a schedule has."""
    flow = schedule == "rectified_flow"
    without = ("linspace", "leading") if flow else ("flow_shifted",)
    return [name for name in samplers.SPACINGS if name not in without]


@on_every_schedule(samplers.SAMPLERS)
def test_every_grid_gives_finite_float32_pictures(sampler, schedule):
    denoise = denoiser(schedule)
    for spacing in spacings(schedule):
        x = samplers.sample(
            denoise,
            jax.random.key(0),
            shape=SHAPE,
            sampler=sampler,
            grid=spacing,
            steps=8,
        )
        assert x.shape == SHAPE and x.dtype == jnp.float32
        assert np.all(np.isfinite(x)), spacing


@on_every_schedule(DETERMINISTIC)
def test_a_point_is_reached_on_its_exact_path(sampler, schedule, x64):
    """Where x0 is the same everywhere, x = alpha x0 + sigma eps with the first eps."""
    denoise = denoiser(schedule, mean=0.7, std=0.0)
    for steps in (1, 2, 3, 5, 20):
        x, path = samplers.sample(
            denoise,
            noise=initial(),
            sampler=sampler,
            steps=steps,
            output=samplers.Output(trajectory=True),
        )
        assert_array_equal(x, np.full(SHAPE, 0.7))
        states = np.asarray(path.x)
        assert states.dtype == np.float64
        eps = (states[0] - path.alpha[0] * 0.7) / path.sigma[0]
        for x, alpha, sigma in zip(states, path.alpha, path.sigma, strict=True):
            assert_allclose(x, alpha * 0.7 + sigma * eps, rtol=1e-8, atol=1e-10)


@on_every_schedule(STOCHASTIC)
def test_a_point_is_reached_through_noise(sampler, schedule):
    """Every state is Gaussian around alpha x0, with the schedule's sigma."""
    denoise = denoiser(schedule, mean=0.7, std=0.0)
    for steps in (1, 3, 12):
        x, path = samplers.sample(
            denoise,
            jax.random.key(1),
            shape=SHAPE,
            sampler=sampler,
            steps=steps,
            output=samplers.Output(trajectory=True),
        )
        assert_array_equal(x, np.full(SHAPE, np.float32(0.7)))
        for i in range(1, len(path.t) - 1):
            around = np.asarray(path.x[i]) - path.alpha[i] * 0.7
            assert abs(around.mean()) < 4 * path.sigma[i] / 90.5
            assert_allclose(around.std(), path.sigma[i], rtol=4 / 128)


def exact(schedule, start, mean=0.7, std=0.5):
    """Where the probability-flow ODE takes Gaussian data."""
    s = SCHEDULES[schedule]
    a, sigma = s.alpha(s.t_noise), s.sigma(s.t_noise)
    return mean + std * (start - a * mean) / np.sqrt((a * std) ** 2 + sigma**2)


@on_every_schedule(DETERMINISTIC)
def test_gaussian_data_are_mapped_as_by_the_ode(sampler, schedule, x64):
    def error(sampler, steps):
        x = samplers.sample(
            denoiser(schedule),
            noise=initial(),
            sampler=sampler,
            steps=steps,
            grid=None if schedule in ("table", "zero_snr") else "logsnr",
        )
        start = initial() * SCHEDULES[schedule].prior_std
        return np.sqrt(np.mean((x - exact(schedule, start)) ** 2))

    few, many, first_order = error(sampler, 12), error(sampler, 60), error("ddim", 60)
    assert many < few / 3 and first_order < 0.1
    if sampler in FIRST_ORDER:
        assert_allclose(many, first_order, rtol=1e-6)
    else:
        assert many < 0.7 * first_order


@on_every_schedule(STOCHASTIC)
def test_noise_along_the_way_keeps_mean_and_deviation(sampler, schedule):
    few, many = (
        samplers.sample(
            denoiser(schedule),
            jax.random.key(2),
            shape=SHAPE,
            sampler=sampler,
            steps=steps,
        )
        for steps in (12, 120)
    )
    # 4 standard errors; and the solver's own error, which falls.
    assert abs(np.mean(many) - 0.7) < 4 * 0.5 / 90.5
    errors = [abs(np.std(x) - 0.5) for x in (few, many)]
    assert errors[1] < 0.3 * errors[0] + 4 * 0.5 / 128
    assert errors[1] < 0.05


@pytest.mark.parametrize(
    "schedule",
    [
        "table",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("vp_cosine", "rectified_flow", "edm")
        ),
    ],
)
def test_every_kind_of_prediction_gives_the_same_pictures(schedule):
    grid = {
        "table": samplers.grid(SCHEDULES["table"], 10),
        "vp_cosine": samplers.from_times(
            SCHEDULES["vp_cosine"], np.linspace(0.95, 0.05, 10)
        ),
        "rectified_flow": samplers.from_times(
            SCHEDULES["rectified_flow"], np.linspace(0.95, 0.05, 10)
        ),
        "edm": samplers.grid(SCHEDULES["edm"], 10),
    }[schedule]
    for sampler in samplers.SAMPLERS:
        pictures = [
            samplers.sample(
                denoiser(schedule, kind=kind),
                jax.random.key(3),
                noise=initial(),
                sampler=sampler,
                grid=grid,
            )
            for kind in KINDS
        ]
        for kind, x in zip(KINDS, pictures, strict=True):
            error = np.abs(x - pictures[1])
            where = f"{sampler} {kind}"
            assert np.mean(error) < 1e-5 and np.max(error) < 5e-5, where


@pytest.mark.parametrize("schedule", ["zero_snr", "rectified_flow"])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_pure_noise_needs_a_prediction_that_can_be_read(sampler, schedule):
    def run(kind):
        return samplers.sample(
            denoiser(schedule, kind=kind),
            jax.random.key(3),
            noise=initial(),
            sampler=sampler,
            steps=10,
        )

    for kind in ("v", "flow"):
        assert_allclose(run(kind), run("x0"), atol=1e-5)
    for kind in ("epsilon", "score"):
        with pytest.raises(ValueError, match=f"{kind!r} does not determine x0 at t = "):
            run(kind)
        with pytest.raises(
            ValueError, match="alpha = 0 .* predict x0, v or flow, or cho"
        ):
            run(kind)


counts = []


def counting(params, x, logsnr, cond):
    jax.debug.callback(lambda rows: counts.append(int(rows)), x.shape[0])
    return optimal(params, x, logsnr, cond)


GUIDANCE = {
    "none": None,
    "batched": samplers.Guidance(scale=1.5, evaluation="batched"),
    "sequential": samplers.Guidance(scale=1.5, evaluation="sequential"),
    "interval": samplers.Guidance(scale=1.5, interval=(0.3, 0.8)),
}
COUNTED = [(name, "none") for name in samplers.SAMPLERS]
COUNTED += [(name, how) for name in ("heun", "dpm++2s") for how in list(GUIDANCE)[1:]]
# By day: of one and several stages, with and without noise, and every guidance.
COUNTED_BY_DAY = [(name, "none") for name in ("ddim", "dpm++3s", "sde-dpm++2s")]
COUNTED_BY_DAY += [("unipc3", "none"), *(("heun", how) for how in GUIDANCE)]


@pytest.mark.parametrize(
    ("sampler", "guidance"),
    [
        pytest.param(*each, marks=() if each in COUNTED_BY_DAY else pytest.mark.slow)
        for each in COUNTED
    ],
)
def test_evaluations_are_what_was_planned(sampler, guidance):
    denoise = denoiser("rectified_flow", network=counting)
    how = GUIDANCE[guidance]
    settings = dict(sampler=sampler, steps=7, guidance=how)
    cond = jnp.zeros((2, 1, 1, 1))
    conditions = {} if how is None else dict(cond=cond, uncond=cond)
    counts.clear()
    x, path = samplers.sample(
        denoise,
        jax.random.key(0),
        shape=(2, 1, 1, 1),
        output=samplers.Output(trajectory=True),
        **settings,
        **conditions,
    )
    x.block_until_ready()
    jax.effects_barrier()
    plan = samplers.plan(denoise, **settings)
    times = [1 - i / 7 for i in range(7)]
    if sampler == "heun":  # both ends of every step but the last, which has one
        times = [t for i in range(6) for t in times[i : i + 2]] + times[-1:]
    twice = {"none": 0, "interval": sum(0.3 < t <= 0.8 for t in times)}
    expected = len(times) + twice.get(guidance, len(times))
    assert sum(counts) / 2 == path.nfe[-1] == plan.nfe == expected
    assert path.nfe[0] == 0 and np.all(np.diff(path.nfe) > 0)


@on_every_schedule(samplers.SAMPLERS)
def test_a_trajectory_has_every_step_and_ends_in_the_sample(sampler, schedule):
    denoise = denoiser(schedule)
    settings = dict(shape=SHAPE, sampler=sampler, steps=5)
    x = samplers.sample(denoise, jax.random.key(4), **settings)
    again, path = samplers.sample(
        denoise, jax.random.key(4), **settings, output=samplers.Output(trajectory=True)
    )
    assert_array_equal(x, again)
    assert_array_equal(path.x[-1], x)
    steps = len(path.t) - 1
    assert path.x.shape == (steps + 1, *SHAPE)
    assert path.t.shape == path.alpha.shape == path.sigma.shape == path.nfe.shape
    assert (path.alpha[-1], path.sigma[-1]) == (1.0, 0.0)
    assert_allclose(path.t[0], SCHEDULES[schedule].t_noise)
    assert path.nfe[-1] == samplers.plan(denoise, sampler=sampler, steps=5).nfe
    # Solvers of several evaluations a step pass over grid points inside it.
    inside = {"dpm++2s": 3, "dpm++3s": 3, "sde-dpm++2s": 3}
    if schedule not in ("zero_snr", "rectified_flow"):  # alpha = 0: one point at a time
        assert steps == inside.get(sampler, 5)
