"""The exact likelihood against Gaussians and a mixture with closed forms."""

import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal
from scipy import special, stats

from scaling_ldm.diffusion import noise, prediction
from scaling_ldm.diffusion.losses import likelihood, ode_likelihood
from scaling_ldm.diffusion.losses.ode_likelihood import ExactTrace, HutchinsonTrace
from scaling_ldm.diffusion.losses.ode_solvers import AdaptiveSolver, FixedStepSolver

KEY = jax.random.key(0)
SCHEDULES = [name for name in noise.SCHEDULES if name != "linear"]
LOG2 = math.log(2)


def covariance(dims, seed=0):
    """(mean, covariance) of a Gaussian whose axes are not the coordinates'."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dims, dims)) / np.sqrt(dims)
    return 0.3 * rng.normal(size=dims), 0.3 * root @ root.T + 0.04 * np.eye(dims)


def optimal(schedule, kind, mean, cov):
    """What the perfect network says of N(mean, cov); x is [B, D]."""
    variance, axes = np.linalg.eigh(cov)

    def network(x, t, cond):
        del cond
        m, v, u = (jnp.asarray(array, x.dtype) for array in (mean, variance, axes))
        alpha, sigma = schedule.from_logsnr(schedule.logsnr(t))
        a, s = alpha[:, None], sigma[:, None]
        there = (x - a * m[None]) @ u / (a**2 * v[None] + s**2)
        x0 = m[None] + (a * v[None] * there) @ u.T
        return prediction.target(kind, x0, (s * there) @ u.T, alpha, sigma)

    return network


def angles(schedule, t_max=None):
    ends = likelihood.least_noise(schedule, None), t_max or schedule.t_noise
    return [np.arctan2(schedule.sigma(t), schedule.alpha(t)) for t in ends]


def model_density(schedule, mean, cov, x0, t_max=None):
    """(bits per dim, z at t_max) of the ODE's own Gaussian.

    The ODE carries each principal axis by the ratio of the standard deviations.
    """
    variance, axes = np.linalg.eigh(cov)
    start, end = angles(schedule, t_max)
    before = np.cos(start) ** 2 * variance + np.sin(start) ** 2
    after = np.cos(end) ** 2 * variance + np.sin(end) ** 2
    there = np.cos(start) * (x0 - mean) @ axes * np.sqrt(after / before)
    z = np.cos(end) * mean + there @ axes.T
    std = schedule.prior_std / np.hypot(
        schedule.alpha(schedule.t_noise), schedule.sigma(schedule.t_noise)
    )
    nats = -stats.norm(0, std).logpdf(z).sum(1)
    nats -= 0.5 * np.log(after / before).sum() + len(mean) * np.log(np.cos(start))
    return nats / len(mean) / LOG2, z


def smoothed(schedule, cov):
    """The covariance of x / alpha at t_min."""
    return cov + np.tan(angles(schedule)[0]) ** 2 * np.eye(len(cov))


def measure(network, schedule, x0, key=KEY, **options):
    run = functools.partial(ode_likelihood.bits_per_dim, network, schedule, **options)
    return jax.jit(run)(jnp.asarray(x0, jnp.float32), key)


def contracts():
    """Schedules x kinds x solvers; all are exact, a dozen of them in a quick run."""
    for i, name in enumerate(SCHEDULES):
        for j, kind in enumerate(prediction.PREDICTIONS):
            for k, solver in enumerate((AdaptiveSolver(), FixedStepSolver())):
                quick = (i + 2 * k - j) % 5 == 0
                yield pytest.param(
                    name,
                    kind,
                    solver,
                    marks=() if quick else pytest.mark.slow,
                    id=f"{name}-{kind}-{type(solver).__name__}",
                )


@pytest.mark.parametrize(("name", "kind", "solver"), list(contracts()))
def test_every_schedule_and_prediction_gives_the_density_of_its_gaussian(
    name, kind, solver
):
    schedule = noise.SCHEDULES[name]()
    t_max = None
    if name == "rectified_flow" and kind in ("epsilon", "score"):
        t_max = 0.9999
    mean, cov = covariance(3)
    x0 = np.random.default_rng(1).multivariate_normal(mean, cov, size=5)
    got = measure(
        optimal(schedule, kind, mean, cov),
        schedule,
        x0,
        prediction=kind,
        divergence=ExactTrace(),
        solver=solver,
        t_max=t_max,
    )
    want, z = model_density(schedule, mean, cov, x0, t_max)
    assert_allclose(got.bits_per_dim, want, atol=5e-4)
    assert_allclose(got.nats, want * 3 * LOG2, atol=1.5e-3)
    end = t_max or schedule.t_noise
    assert_allclose(
        got.latent / np.hypot(schedule.alpha(end), schedule.sigma(end)), z, atol=2e-3
    )


@pytest.mark.parametrize(
    ("name", "dims"), [("cosine", 16), ("vp_cosine", 2), ("rectified_flow", 16)]
)
def test_it_is_the_density_of_the_data_where_noise_is_pure_at_the_end(name, dims):
    schedule = noise.SCHEDULES[name]()
    mean, cov = covariance(dims) if dims == 2 else (np.zeros(16), 0.25 * np.eye(16))
    x0 = np.random.default_rng(1).multivariate_normal(mean, cov, size=4)
    network = optimal(schedule, "v", mean, cov)
    got = measure(network, schedule, x0, prediction="v", divergence=ExactTrace())
    want = stats.multivariate_normal(mean, smoothed(schedule, cov)).logpdf(x0)
    assert_allclose(got.bits_per_dim, -want / dims / LOG2, atol=1e-4)


CENTRES = np.array([[1.0, 0.0], [-0.6, 0.8], [-0.3, -1.1]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
WIDTH = 0.25


def mixture(schedule):
    """E[x0 | x_t] of three round Gaussians, and the flow from it."""

    def network(x, t, cond):
        del cond
        alpha, sigma = schedule.from_logsnr(schedule.logsnr(t))
        a, s = alpha[:, None, None], sigma[:, None, None]
        variance = a**2 * WIDTH**2 + s**2
        gap = x[:, None] - a * jnp.asarray(CENTRES, x.dtype)[None]
        log = jnp.log(jnp.asarray(WEIGHTS, x.dtype))[None]
        log = log - 0.5 * jnp.sum(gap**2 / variance, -1)
        share = jax.nn.softmax(log, -1)[..., None]
        eps = jnp.sum(share * s * gap / variance, 1)
        x0 = CENTRES.astype(x.dtype)[None] + a * WIDTH**2 * gap / variance
        x0 = jnp.sum(share * x0, 1)
        return prediction.target("flow", x0, eps, alpha, sigma)

    return network


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("rectified_flow", AdaptiveSolver()),
        ("vp_cosine", FixedStepSolver(steps=100)),
        pytest.param("cosine", AdaptiveSolver(), marks=pytest.mark.slow),
        pytest.param(
            "rectified_flow", FixedStepSolver(steps=100), marks=pytest.mark.slow
        ),
    ],
)
def test_a_mixture_has_its_own_density(name, solver):
    schedule = noise.SCHEDULES[name]()
    rng = np.random.default_rng(2)
    x0 = CENTRES[rng.integers(0, 3, 24)] + WIDTH * rng.normal(size=(24, 2))
    got = measure(
        mixture(schedule),
        schedule,
        x0,
        prediction="flow",
        divergence=ExactTrace(),
        solver=solver,
    )
    std = np.sqrt(WIDTH**2 + np.tan(angles(schedule)[0]) ** 2)
    each = stats.norm(CENTRES, std).logpdf(x0[:, None]).sum(-1)
    want = special.logsumexp(each + np.log(WEIGHTS), axis=1)
    assert_allclose(got.bits_per_dim, -want / 2 / LOG2, atol=1e-3)


@pytest.mark.parametrize(
    "law", ["gaussian", pytest.param("rademacher", marks=pytest.mark.slow)]
)
def test_random_probes_are_unbiased(law):
    schedule = noise.rectified_flow()
    mean, cov = covariance(4)
    x0 = np.full((2000, 4), 0.2)
    network = optimal(schedule, "flow", mean, cov)
    want = model_density(schedule, mean, cov, x0[:1])[0]
    spread = {}
    for probes in (1, 4) if law == "rademacher" else (4,):
        got = measure(
            network,
            schedule,
            x0,
            prediction="flow",
            divergence=HutchinsonTrace(probes=probes, distribution=law),
            solver=FixedStepSolver(steps=20),
        ).bits_per_dim
        spread[probes] = np.std(got)
        assert_allclose(np.mean(got), want, atol=4 * spread[probes] / 2000**0.5)
    assert spread[4] > 0.02
    if law == "rademacher":
        assert_allclose(spread[1] / spread[4], 2, rtol=0.15)


def test_forward_and_backward_derivatives_agree():
    schedule = noise.vp_cosine()
    mean, cov = covariance(4)
    one, other = (
        measure(
            optimal(schedule, "v", mean, cov),
            schedule,
            np.full((2, 4), 0.2),
            prediction="v",
            divergence=HutchinsonTrace(probes=2, derivative=derivative),
            solver=FixedStepSolver(method="heun", steps=10),
        )
        for derivative in ode_likelihood.DERIVATIVES
    )
    assert_allclose(one.nats, other.nats, rtol=1e-5)


@pytest.mark.parametrize(("method", "order"), [("heun", 2), ("rk4", 4)])
def test_fixed_steps_converge_at_their_order(method, order):
    schedule = noise.vp_cosine()
    mean, cov = covariance(3)
    x0 = np.random.default_rng(1).multivariate_normal(mean, cov, size=4)
    with jax.enable_x64(True):
        errors = []
        for steps in (80, 160):
            got = jax.jit(
                lambda x, steps=steps: ode_likelihood.bits_per_dim(
                    optimal(schedule, "x0", mean, cov),
                    schedule,
                    x,
                    KEY,
                    prediction="x0",
                    divergence=ExactTrace(),
                    solver=FixedStepSolver(method=method, steps=steps),
                )
            )(jnp.asarray(x0))
            assert got.nats.dtype == jnp.float64
            want = model_density(schedule, mean, cov, x0)[0]
            errors.append(np.abs(got.bits_per_dim - want).max())
    assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.25)


def test_the_tolerance_is_kept_and_evaluations_are_counted():
    schedule = noise.vp_cosine()
    mean, cov = covariance(3)
    x0 = np.random.default_rng(1).multivariate_normal(mean, cov, size=4)
    perfect = optimal(schedule, "x0", mean, cov)
    calls = []

    def network(x, t, cond):
        jax.debug.callback(lambda t: calls.append(t.item()), t[0])
        return perfect(x, t, cond)

    with jax.enable_x64(True):
        run = jax.jit(
            lambda x, tolerance: ode_likelihood.bits_per_dim(
                network,
                schedule,
                x,
                KEY,
                prediction="x0",
                divergence=ExactTrace(),
                solver=AdaptiveSolver(rtol=tolerance, atol=tolerance),
            )
        )
        want = model_density(schedule, mean, cov, x0)[0]
        evaluations = []
        for tolerance in (1e-3, 1e-6, 1e-9):
            calls.clear()
            got = jax.block_until_ready(run(jnp.asarray(x0), tolerance))
            jax.effects_barrier()
            error = np.abs(got.bits_per_dim - want).max()
            assert error < 20 * tolerance
            assert got.evaluations == len(calls)
            evaluations.append(int(got.evaluations))
        assert run._cache_size() == 1
    assert evaluations[0] < evaluations[1] < evaluations[2] < 700


def test_a_path_that_is_not_finished_is_nan():
    schedule = noise.vp_cosine()
    mean, cov = covariance(2)
    x0 = np.zeros((2, 2))
    short = measure(
        optimal(schedule, "v", mean, cov),
        schedule,
        x0,
        prediction="v",
        solver=AdaptiveSolver(max_steps=3),
    )
    assert np.isnan(short.bits_per_dim).all() and np.isnan(short.latent).all()
    assert short.evaluations == 19
    lost = measure(lambda x, t, cond: x * jnp.nan, schedule, x0, prediction="v")
    assert np.isnan(lost.nats).all() and lost.evaluations == 7


def test_bits_of_levels_are_their_code_length():
    """7 bits more than the density's for levels 1 / 128 apart."""
    schedule = noise.rectified_flow()
    std, spacing = 0.4, 1 / 128
    rng = np.random.default_rng(0)
    x0 = np.round(std * rng.normal(size=(512, 8)) / spacing) * spacing
    options = dict(
        prediction="flow",
        divergence=HutchinsonTrace(),
        solver=FixedStepSolver(steps=40),
    )  # one probe is exact: J is diagonal
    network = optimal(schedule, "flow", np.zeros(8), std**2 * np.eye(8))
    got = measure(network, schedule, x0, spacing=spacing, **options).bits_per_dim
    density = measure(network, schedule, x0, **options).bits_per_dim
    assert_allclose(np.mean(got - density), 7, atol=1e-3)
    mass = np.diff(special.ndtr((x0[..., None] + [-spacing / 2, spacing / 2]) / std))
    assert_allclose(np.mean(got), -np.log2(mass).mean(), atol=1e-3)
    assert np.std(got - density) > 1e-3


def test_uniform_noise_fills_the_gaps_between_levels():
    assert likelihood.spacing(256) == 2 / 255
    x = jnp.linspace(-1, 1, 256).reshape(1, 256) + jnp.zeros((400, 1))
    offset = (likelihood.dequantise(x, KEY, spacing=2 / 255) - x) * 255 / 2
    assert stats.kstest(np.ravel(offset) + 0.5, "uniform").pvalue > 1e-3


def test_a_picture_does_not_depend_on_its_batch_and_nothing_recompiles():
    schedule = noise.cosine(50)

    def network(x, t, cond):
        said = jnp.tanh(x + 0.5 * x[..., ::-1]) * cond[:, None, None, None]
        said = said - 0.2 * t[:, None, None, None]
        return jnp.concatenate([said, x], axis=-1)  # with a learned variance

    @jax.jit
    def run(x, index, cond):
        keys = jax.vmap(functools.partial(jax.random.fold_in, KEY))(index)
        return ode_likelihood.bits_per_dim(
            network,
            schedule,
            x,
            keys,
            prediction="x0",
            cond=cond,
            spacing=2 / 255,
            solver=FixedStepSolver(steps=5),
        )

    x = jax.random.uniform(KEY, (6, 4, 4, 2), minval=-1)
    index, cond = jnp.arange(6), jnp.linspace(0.1, 0.9, 6)
    whole = run(x, index, cond)
    rows = np.array([5, 1, 2, 0, 4, 3])
    again = run(x[rows], index[rows], cond[rows])
    assert run._cache_size() == 1
    assert whole.latent.shape == x.shape and whole.nats.shape == (6,)
    assert_allclose(again.nats, whole.nats[rows], rtol=1e-5)
    others = run(x.at[2:].set(0.3), index.at[2:].set(9), cond.at[2:].set(2))
    assert_allclose(others.nats[:2], whole.nats[:2], rtol=1e-5)
    assert_allclose(others.latent[:2], whole.latent[:2], atol=1e-5)


@pytest.mark.slow
def test_all_devices_take_the_same_steps():
    """Sharded over eight devices: the same numbers, sharded as the data."""
    schedule = noise.rectified_flow()
    mean, cov = covariance(2)
    perfect = optimal(schedule, "flow", mean, cov)
    seen = []

    def network(x, t, cond):
        seen.append(jax.typeof(t).sharding.spec)
        return perfect(x, t, cond)

    run = functools.partial(
        ode_likelihood.bits_per_dim,
        network,
        schedule,
        prediction="flow",
        spacing=0.01,
    )
    x0 = jnp.linspace(-1, 1, 16, dtype=jnp.float32).reshape(8, 2)
    alone = jax.jit(run)(x0, KEY)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    spec = PartitionSpec("data", None)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(jax.device_put(x0, NamedSharding(mesh, spec)), KEY)
    assert got.latent.sharding.spec == spec
    assert seen[-1] == PartitionSpec("data")
    assert got.nats.sharding.spec == PartitionSpec("data")
    assert_array_equal(got.evaluations, alone.evaluations)
    assert_allclose(got.nats, alone.nats, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(prediction="noise"), "none of epsilon"),
        (dict(prediction="epsilon"), "smaller t_max"),
        (dict(prediction="flow", t_min=0.0), "t_min = 0 has no noise"),
    ],
)
def test_what_cannot_be_is_refused(options, says):
    schedule = noise.rectified_flow()
    with pytest.raises(ValueError, match=says):
        ode_likelihood.bits_per_dim(
            lambda x, t, c: x, schedule, jnp.zeros((1, 2)), KEY, **options
        )


def test_a_network_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"given \(1, 2\) and returned \(1,\)"):
        ode_likelihood.bits_per_dim(
            lambda x, t, c: x[:, 0],
            noise.vp_cosine(),
            jnp.zeros((1, 2)),
            KEY,
            prediction="v",
        )


def test_settings_are_checked():
    for make, says in (
        (lambda: HutchinsonTrace(probes=0), "at least 1"),
        (lambda: HutchinsonTrace(distribution="uniform"), "rademacher, gaussian"),
        (lambda: HutchinsonTrace(derivative="both"), "none of jvp, vjp"),
        (lambda: ExactTrace(derivative="both"), "none of jvp, vjp"),
        (lambda: FixedStepSolver(method="euler"), "heun, rk4"),
        (lambda: FixedStepSolver(steps=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
    x = jnp.zeros((3, 2))
    assert_array_equal(
        jax.random.key_data(likelihood.sample_keys(KEY, x))[2],
        jax.random.key_data(jax.random.fold_in(KEY, 2)),
    )
    with pytest.raises(ValueError, match="3 samples"):
        likelihood.sample_keys(jax.random.split(KEY, 2), x)
    with pytest.raises(ValueError, match=r"jax\.random\.key"):
        likelihood.sample_keys(jax.random.PRNGKey(0), x)


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(ode_likelihood)
    assert result.attempted > 5 and result.failed == 0
