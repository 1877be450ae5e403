"""The objective and the validation loss against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import integrate, special, stats

from scaling_ldm import config
from scaling_ldm.diffusion import noise, prediction
from scaling_ldm.diffusion.losses import denoise, validation
from scaling_ldm.training import mesh

SIGMA = 0.5  # of Gaussian data, per pixel
SCHEDULES = {name: make() for name, make in noise.SCHEDULES.items()} | {
    "zero_terminal": noise.zero_terminal_snr(noise.scaled_linear())
}
FLOW = denoise.DiffusionObjective(
    schedule=noise.rectified_flow(),
    prediction="flow",
    weighting=denoise.uniform_weight(),
    timestep_sampling=denoise.logit_normal(),
    caption_dropout=0.1,
)


def objective(**changes):
    return dataclasses.replace(FLOW, **changes)


def given_time(schedule, unit):
    """t from what the network is told of it."""
    if isinstance(schedule, noise.Discrete):
        return unit * schedule.steps
    return jnp.exp(4 * unit) if schedule == noise.edm() else unit


def optimal(objective):
    """E[prediction | x_t] when x0 ~ N(0, SIGMA^2): linear in x_t."""

    def apply(params, x, unit, cond):
        del params, cond
        t = given_time(objective.schedule, unit)[:, None, None, None]
        a, s = objective.schedule.alpha(t), objective.schedule.sigma(t)
        A, B = wanted(objective.prediction, a, s)
        return x * (A * a * SIGMA**2 + B * s) / (a**2 * SIGMA**2 + s**2)

    return apply


def wanted(kind, a, s):
    """(A, B) such that the kind of prediction is A x0 + B eps."""
    return {
        "epsilon": lambda: (0.0, 1.0),
        "x0": lambda: (1.0, 0.0),
        "v": lambda: (-s, a),
        "flow": lambda: (-1.0, 1.0),
        "score": lambda: (0.0, -1 / s),
    }[kind]()


def least_error(kind, a, s):
    """Var[prediction | x_t] of the same: no network does better."""
    A, B = wanted(kind, a, s)
    return (A * s - B * a) ** 2 * SIGMA**2 / (a**2 * SIGMA**2 + s**2)


def data(n, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(SIGMA * rng.normal(size=(n, 8, 8, 2)), jnp.float32)


def midpoints(n):
    return (np.arange(n) + 0.5) / n


def mean_loss(apply, objective, keys=40):
    loss = jax.jit(
        lambda key: denoise.loss(
            apply, None, {"x": data(512)}, {}, key, objective=objective
        )
    )
    return np.mean([loss(jax.random.key(i)) for i in range(keys)])


def test_the_network_sees_data_and_noise_at_the_ends():
    x, eps, seen = data(2), data(2, seed=1), []

    def spy(params, x, t, cond):
        seen.append(x)
        return x

    for t in (jnp.zeros(2), jnp.ones(2)):
        denoise.per_example_loss(spy, None, x, eps, t, {}, FLOW)
    assert_allclose(seen[0], x)
    assert_allclose(seen[1], eps)


def test_the_default_is_rectified_flow_as_paper_b_trains_it():
    """mean |f(x_t, t) - (eps - x0)|^2 with t = sigmoid(normal), to the last bits."""

    def net(params, x, t, cond):
        return params["a"] * x + params["b"] * t[:, None, None, None]

    def formula(params, x0, key):
        noise_key, time_key, _ = jax.random.split(key, 3)
        eps = jax.random.normal(noise_key, x0.shape)
        t = jax.nn.sigmoid(0.2 + 0.7 * jax.random.normal(time_key, x0.shape[:1]))
        r = t[:, None, None, None]
        residual = net(params, (1 - r) * x0 + r * eps, t, {}) - (eps - x0)
        return jnp.mean(jnp.mean(residual**2, axis=(1, 2, 3)))

    def ours(params, x0, key):
        law = denoise.logit_normal(0.2, 0.7)
        return denoise.loss(
            net, params, {"x": x0}, {}, key, objective=objective(timestep_sampling=law)
        )

    arguments = {"a": jnp.float32(0.3), "b": jnp.float32(-0.1)}, data(16)
    want = jax.jit(jax.value_and_grad(formula))(*arguments, jax.random.key(3))
    got = jax.jit(jax.value_and_grad(ours))(*arguments, jax.random.key(3))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6), got, want)


def spaces():
    """Schedules x predictions; by day each schedule with one or two of them."""
    for i, schedule in enumerate(SCHEDULES):
        for j, kind in enumerate(prediction.PREDICTIONS):
            marks = () if (i - j) % 4 == 0 else pytest.mark.slow
            yield pytest.param(schedule, kind, marks=marks)


@pytest.mark.parametrize(("schedule", "kind"), list(spaces()))
def test_no_error_is_below_the_conditional_variance(schedule, kind):
    """The optimal denoiser's error at each time, over its closed form."""
    n = 256
    goal = objective(
        schedule=SCHEDULES[schedule],
        prediction=kind,
        timestep_sampling=denoise.uniform_times(),
    )
    t = validation.stratified_times(n, goal, seed=0)
    arguments = optimal(goal), None, data(n), {}, jnp.asarray(t), jnp.arange(n)
    got = validation.per_example_loss(*arguments, jax.random.key(0), objective=goal)
    a, s = goal.schedule.alpha(t), goal.schedule.sigma(t)
    noisy = a > 0  # pure noise tells nothing of x0: epsilon is known exactly there
    ratio = np.asarray(got)[noisy] / least_error(kind, a, s)[noisy]
    assert_allclose(ratio.mean(), 1, rtol=0.04)
    assert_allclose(ratio, 1, atol=0.7)


@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({"timestep_sampling": denoise.logit_normal(0.3, 0.7)}, lambda snr: 1.0),
        (
            {
                "schedule": SCHEDULES["scaled_linear"],
                "prediction": "v",
                "weighting": denoise.min_snr(2.0),
                "timestep_sampling": denoise.uniform_times(),
            },
            lambda snr: np.minimum(snr, 2.0) / (snr + 1),
        ),
        (
            {
                "schedule": SCHEDULES["vp_cosine"],
                "prediction": "epsilon",
                "weighting": denoise.sigmoid(-1.0),
                "timestep_sampling": denoise.cosmap(),
            },
            lambda snr: 1 / (1 + np.e * snr),
        ),
    ],
)
def test_the_least_training_loss_is_the_weighted_mean_of_the_variance(changes, weight):
    goal = objective(**changes)
    t = goal.times(stats.norm.ppf(midpoints(20_000)))
    a, s = goal.schedule.alpha(t), goal.schedule.sigma(t)
    want = np.mean(weight((a / s) ** 2) * least_error(goal.prediction, a, s))
    assert_allclose(mean_loss(optimal(goal), goal), want, rtol=1e-2)


# The papers' formulas, as each states or derives them for a variance-preserving x_t.
FORMULAS = {
    ("uniform", "epsilon"): lambda r: 1.0 + 0 * r,
    ("uniform", "v"): lambda r: 1.0 + 0 * r,
    ("min_snr", "x0"): lambda r: np.minimum(r, 5),
    ("min_snr", "epsilon"): lambda r: np.minimum(r, 5) / r,
    ("min_snr", "v"): lambda r: np.minimum(r, 5) / (r + 1),
    ("truncated_snr", "x0"): lambda r: np.maximum(r, 1),
    ("truncated_snr", "epsilon"): lambda r: np.maximum(1, 1 / r),
    ("truncated_snr", "v"): lambda r: np.maximum(r, 1) / (r + 1),
    ("p2", "epsilon"): lambda r: 1 / (1 + r),
    ("p2", "x0"): lambda r: r / (1 + r),
    ("p2", "v"): lambda r: r / (1 + r) ** 2,
    ("sigmoid", "epsilon"): lambda r: 1 / (1 + r),
    ("sigmoid", "x0"): lambda r: 1 / (1 + 1 / r),
    ("sigmoid", "score"): lambda r: 1 / (1 + r) ** 2,
}


@pytest.mark.parametrize(("weighting", "kind"), list(FORMULAS))
def test_weights_are_the_papers(weighting, kind):
    snr = np.array([1e-4, 0.3, 1.0, 4.0, 6.0, 80.0, 1e4])
    goal = objective(
        schedule=noise.vp_cosine(),
        prediction=kind,
        weighting=denoise.WEIGHTINGS[weighting](),
    )
    t = jnp.asarray(goal.schedule.time(np.log(snr)), jnp.float32)
    got = goal.weight(t)
    assert got.dtype == jnp.float32
    assert_allclose(got, FORMULAS[weighting, kind](snr), rtol=2e-3)


def test_weights_follow_their_parameters():
    snr = np.array([0.01, 0.5, 3.0, 50.0])
    flow = noise.rectified_flow()
    t = jnp.asarray(flow.time(np.log(snr)), jnp.float32)

    def weight(weighting, kind):
        return objective(weighting=weighting, prediction=kind).weight(t)

    t_ = np.asarray(t, np.float64)  # the x0 error is t^2 times the flow error
    assert_allclose(
        weight(denoise.min_snr(2.0), "flow"), t_**2 * np.minimum(snr, 2), rtol=1e-4
    )
    assert_allclose(
        weight(denoise.p2(0.5, k=3.0), "epsilon"), (3 + snr) ** -0.5, rtol=1e-4
    )
    assert_allclose(
        weight(denoise.sigmoid(1.5), "epsilon"),
        special.expit(1.5 - np.log(snr)),
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "weighting",
    [
        pytest.param(
            name, marks=() if name in ("uniform", "min_snr") else pytest.mark.slow
        )
        for name in denoise.WEIGHTINGS
    ],
)
def test_one_estimate_has_one_loss_and_gradient_in_every_space(weighting):
    """A network of x0, read as a prediction of each kind: only `uniform` cares."""
    schedule = noise.vp_cosine(logsnr_limit=5.0)

    def value(kind):
        goal = objective(
            schedule=schedule,
            prediction=kind,
            weighting=denoise.WEIGHTINGS[weighting](),
            timestep_sampling=denoise.uniform_times(),
        )

        def net(params, x, t, cond):
            x0 = jnp.tanh(params * x)
            a, s = schedule.alpha(t), schedule.sigma(t)
            return prediction.convert(x0, x, a, s, source="x0", to=kind)

        loss = jax.value_and_grad(
            lambda p: denoise.loss(
                net, p, {"x": data(32)}, {}, jax.random.key(0), objective=goal
            )
        )
        return loss(jnp.float32(0.4))

    reference = value("x0")
    for kind in ("epsilon", "v", "flow", "score"):
        same = np.allclose(value(kind), reference, rtol=2e-4)
        assert same == (weighting != "uniform"), kind


ENDS_BY_DAY = ("zero_terminal", "vp_sde", "rectified_flow", "edm")


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(name, marks=() if name in ENDS_BY_DAY else pytest.mark.slow)
        for name in SCHEDULES
    ],
)
def test_all_is_finite_at_both_ends(schedule):
    """Weights, losses and gradients, with no noise, no picture, and no luck."""
    schedule = SCHEDULES[schedule]
    normal = jnp.array([-50.0, -9.0, -5.0, 0.0, 5.0, 9.0, 50.0])
    x, eps = data(7), data(7, seed=1)

    def net(params, x, t, cond):
        return params * x + t[:, None, None, None]

    for law in denoise.TIMESTEP_SAMPLING.values():
        t = objective(schedule=schedule, timestep_sampling=law()).times(normal)
        assert t.dtype == jnp.float32
        low, high = sorted((schedule.t_data, schedule.t_noise))
        assert t.min() >= np.float32(low)
        assert t.max() <= np.float32(high)
    assert_allclose(t[-1], schedule.t_noise)
    if schedule != noise.vp_sde():
        assert_allclose(t[0], schedule.t_data, atol=1e-6)
    for kind in prediction.PREDICTIONS:
        if kind == "score" and schedule == noise.rectified_flow():
            continue  # -eps / 0; refused by config.resolve
        for weighting in denoise.WEIGHTINGS.values():
            goal = objective(schedule=schedule, prediction=kind, weighting=weighting())

            def per_sample(params, goal=goal):
                error = denoise.per_example_loss(net, params, x, eps, t, {}, goal)
                return goal.weight(t) * error

            assert np.isfinite(goal.weight(t)).all(), (kind, goal.weight(t))
            got = jax.jvp(per_sample, (jnp.float32(0.3),), (jnp.float32(1.0),))
            assert np.isfinite(got).all(), (kind, got)


LAWS = {
    "uniform": (denoise.uniform_times(), lambda t: t),
    "logit_normal": (
        denoise.logit_normal(-0.5, 1.5),
        lambda t: stats.norm.cdf((np.log(t / (1 - t)) + 0.5) / 1.5),
    ),
    "cosmap": (  # the density of Esser et al. 2024, section 3.1
        denoise.cosmap(),
        np.vectorize(
            lambda t: integrate.quad(
                lambda u: 2 / (np.pi - 2 * np.pi * u + 2 * np.pi * u**2), 0, t
            )[0]
        ),
    ),
}


def test_every_law_is_tested():
    assert set(LAWS) == set(denoise.TIMESTEP_SAMPLING)


@pytest.mark.parametrize("name", list(LAWS))
def test_a_law_has_its_distribution(name):
    law, cdf = LAWS[name]
    quantile = np.array([0.001, 0.1, 0.25, 0.5, 0.8, 0.999])
    normal = stats.norm.ppf(quantile)
    t = law(normal)
    assert t.dtype == np.float64
    assert_allclose(cdf(t), quantile, rtol=1e-9)
    assert_allclose(law(jnp.asarray(normal, jnp.float32)), t, rtol=1e-5)


def test_training_draws_from_the_law():
    seen = []

    def spy(params, x, t, cond):
        seen.append(t)
        return x

    goal = objective(timestep_sampling=denoise.logit_normal(-0.5, 1.5))
    batch = {"x": jnp.zeros((20_000, 1, 1, 1))}
    denoise.loss(spy, None, batch, {}, jax.random.key(0), objective=goal)
    t = np.asarray(seen[0], np.float64)
    assert stats.kstest(LAWS["logit_normal"][1](t), "uniform").pvalue > 1e-3


def test_a_shift_lowers_logsnr_alike_everywhere():
    normal = np.linspace(-3, 3, 7)
    plain, shifted = FLOW.times(normal), objective(time_shift=3.0).times(normal)
    flow = FLOW.schedule
    assert_allclose(flow.logsnr(shifted), flow.logsnr(plain) - 2 * np.log(3))


@pytest.mark.parametrize("steps", [4, 1000])
def test_a_table_of_steps_is_drawn_whole_and_evenly(steps):
    goal = objective(
        schedule=noise.cosine(steps), timestep_sampling=denoise.uniform_times()
    )
    t = np.asarray(goal.times(jax.random.normal(jax.random.key(0), (40_000,))))
    assert (t == np.floor(t)).all()
    counts = np.bincount(t.astype(int), minlength=steps)
    assert len(counts) == steps
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_loss_of_a_sharded_batch_is_the_same():
    """A table of steps is looked up where each sample lies."""
    goal = objective(
        schedule=SCHEDULES["zero_terminal"],
        prediction="v",
        weighting=denoise.min_snr(),
        timestep_sampling=denoise.uniform_times(),
    )
    batch = {"x": data(16)}

    def loss(batch):
        key = jax.random.key(0)
        return denoise.loss(optimal(goal), None, batch, {}, key, objective=goal)

    whole = jax.jit(loss)(batch)
    device_mesh = mesh.build(config.MeshConfig(fsdp=2), {})
    with jax.set_mesh(device_mesh):
        sharded = jax.jit(loss)(mesh.put(device_mesh, batch))
    assert_allclose(sharded, whole, rtol=1e-5)


def test_captions_are_dropped_at_the_stated_rate():
    seen = []

    def spy(params, x, t, cond):
        seen.append(cond)
        return x

    n = 4000
    batch = {
        "x": jnp.zeros((n, 1, 1, 1)),
        "text": jnp.full((n, 3), 7),
        "mask": jnp.ones((n, 3), bool),
    }
    uncond = {"text": jnp.array([2, 0, 0]), "mask": jnp.array([True, False, False])}
    goal = objective(caption_dropout=0.25)
    denoise.loss(spy, None, batch, uncond, jax.random.key(0), objective=goal)
    dropped = np.asarray(seen[0]["text"][:, 0] == 2)
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)
    assert (np.asarray(seen[0]["text"])[dropped] == [2, 0, 0]).all()
    assert (np.asarray(seen[0]["mask"])[dropped] == [True, False, False]).all()
    assert (np.asarray(seen[0]["text"])[~dropped] == 7).all()


def test_strata_are_covered_once_in_a_fixed_order():
    goal = objective(timestep_sampling=denoise.logit_normal(0.2, 0.8))
    t = validation.stratified_times(64, goal, seed=3)
    assert t.dtype == np.float32
    quantile = special.ndtr((special.logit(t.astype(np.float64)) - 0.2) / 0.8)
    assert_allclose(np.sort(quantile), midpoints(64), rtol=1e-4)
    assert (t == validation.stratified_times(64, goal, seed=3)).all()
    assert (t != validation.stratified_times(64, goal, seed=4)).any()


def test_bins_of_times_are_equally_likely_parts_of_their_distribution():
    for samples in (7, 64, 500):
        for goal in (
            objective(timestep_sampling=denoise.logit_normal(0.2, 0.8)),
            objective(
                schedule=noise.linear(), timestep_sampling=denoise.uniform_times()
            ),
        ):
            t = validation.stratified_times(samples, goal, seed=3)
            number = validation.bins_of_times(samples, 10, seed=3)
            counts = np.bincount(number, minlength=10)
            assert len(counts) == 10
            assert set(counts) <= {samples // 10, -(-samples // 10)}
            assert (np.diff(number[np.argsort(t)]) >= 0).all()


def test_strata_of_a_table_are_whole_steps():
    goal = objective(schedule=noise.linear(), timestep_sampling=denoise.uniform_times())
    t = validation.stratified_times(500, goal, seed=0)
    assert_allclose(np.sort(t), 1 + 2 * np.arange(500))


def test_validation_does_not_depend_on_the_weighting():
    def errors(weighting):
        goal = objective(weighting=weighting)
        t = jnp.asarray(validation.stratified_times(4, goal, seed=0))
        arguments = optimal(goal), None, data(4), {}, t, jnp.arange(4)
        return validation.per_example_loss(
            *arguments, jax.random.key(5), objective=goal
        )

    assert_allclose(errors(denoise.min_snr()), errors(denoise.uniform_weight()))


def test_validation_errors_do_not_depend_on_the_batch():
    x, key = np.asarray(data(12)), jax.random.key(5)
    t = validation.stratified_times(12, FLOW, seed=0)
    index = np.arange(12)
    jitted = jax.jit(
        lambda x, t, index: validation.per_example_loss(
            optimal(FLOW), None, x, {}, t, index, key, objective=FLOW
        )
    )

    def errors(rows):
        return jitted(x[rows], t[rows], index[rows])

    whole = errors(slice(0, 12))
    parts = np.concatenate([errors(slice(0, 5)), errors(slice(5, 12))])
    assert_allclose(parts, whole, rtol=1e-6)
    shuffled = errors(np.array([7, 2, 11]))
    assert_allclose(shuffled, whole[np.array([7, 2, 11])], rtol=1e-6)


def test_stratification_takes_the_variance_over_t_away():
    """The validation loss of the optimal denoiser, against its closed form."""
    n = 2048
    goal = objective(timestep_sampling=denoise.logit_normal(-1.0, 2.0))
    t = validation.stratified_times(n, goal, seed=0)
    arguments = optimal(goal), None, data(n), {}, jnp.asarray(t), jnp.arange(n)
    got = validation.per_example_loss(*arguments, jax.random.key(0), objective=goal)
    law = special.expit(2 * stats.norm.ppf(midpoints(20_000)) - 1)
    assert_allclose(np.mean(got), least_error("flow", 1 - law, law).mean(), rtol=5e-3)
