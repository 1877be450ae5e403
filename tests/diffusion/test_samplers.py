"""Samplers: order of convergence, compilation, keys, guidance, ways there and back."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import solve_ivp
from scipy.special import softmax

from scaling_ldm import config, flops
from scaling_ldm.diffusion import noise, samplers
from scaling_ldm.diffusion.samplers import guidance, loop
from scaling_ldm.training import mesh

COMPILED = "/jax/core/compile/backend_compile_duration"
TABLE = noise.scaled_linear()
FLOW = noise.rectified_flow()
SHAPE = (8, 2, 2, 4)
KEY = jax.random.key(0)


def network(params, x, t, cond):
    """Anything nonlinear, in which samples do not meet."""
    shift = jnp.sin(0.01 * t + jnp.mean(x, (1, 2, 3))).reshape(-1, 1, 1, 1)
    return params * jnp.tanh(x + cond) + 0.3 * shift


COND = jnp.linspace(-1, 1, 8).reshape(8, 1, 1, 1)
UNCOND = jnp.full((1, 1, 1), 0.4)
W = jnp.float32(0.6)
DENOISE = samplers.denoiser(network, TABLE, prediction="v", params=W)
sample = functools.partial(samplers.sample, DENOISE, KEY, cond=COND, steps=6)
guided = functools.partial(sample, shape=SHAPE, uncond=UNCOND)


def gaussian(params, x, t, cond):
    """v of the optimal denoiser of N(0.5, 0.6^2), from alpha and sigma at t.

    params: alpha and sigma as functions of t, a jitted schedule in all but name.
    """
    a, s = (f.reshape(-1, 1, 1, 1) for f in params(t))
    centred = (x - a * 0.5) / ((0.6 * a) ** 2 + s**2)
    return a * s * centred - s * (0.5 + a * 0.36 * centred)


@functools.cache
def optimal(schedule):
    return samplers.denoiser(
        lambda x, t, cond: gaussian(
            lambda t: (schedule.alpha(t), schedule.sigma(t)), x, t, cond
        ),
        schedule,
        prediction="v",
    )


@contextlib.contextmanager
def compilations():
    events = []

    def heard(event, *_, **__):
        if event == COMPILED:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


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
                initial=jnp.asarray(x),
                sampler=sampler,
                grid=samplers.from_times(SDE, SDE.time(levels), end=ENDS[1]),
                **options,
            )
            errors.append(np.sqrt(np.mean((out - expected) ** 2)))
    print(f"{sampler} {options}: {math.log2(errors[0] / errors[1]):.2f}, {errors}")
    return math.log2(errors[0] / errors[1])


# Compilation.


def test_settings_that_are_data_compile_nothing():
    traced = []

    def counted(params, x, t, cond):
        traced.append(t)
        return network(params, x, t, cond)

    schedules = [TABLE, noise.linear(50), noise.vp_sde(), noise.edm(), FLOW]

    def run(
        schedule=TABLE, kind="v", sampler="dpm++2m", scale=3.0, key=KEY, **settings
    ):
        denoise = samplers.denoiser(counted, schedule, prediction=kind, params=W)
        return samplers.sample(
            denoise,
            key,
            shape=SHAPE,
            cond=COND,
            uncond=UNCOND,
            guidance=scale,
            sampler=sampler,
            **settings,
        )

    programs = loop.compiled._cache_size()
    with compilations() as events:
        run()
        assert events, "the listener hears nothing"
        assert len(traced) == 1
        assert loop.compiled._cache_size() == programs + 1
        events.clear()
        for steps in (1, 2, 3, 20, 137, 1000):
            for scale in (1.0, 7.5):
                run(steps=steps, scale=scale)
        for schedule in schedules:
            for kind in ("v", "flow", "x0"):
                run(schedule, kind)
        for kind in ("epsilon", "score"):
            run(kind=kind)
        for spacing in samplers.SPACINGS:
            run(FLOW if spacing == "flow_shifted" else TABLE, grid=spacing)
        run(grid=samplers.from_times(TABLE, [900, 500.5, 20]))
        run(solver="heun", lower_order_final=False)
        run(key=jax.random.key(7), callback=lambda told: None, callback_every=3)
        assert not events
    assert len(traced) == 1
    assert loop.compiled._cache_size() == programs + 1


# Keys, batches and devices.


def settings_of(name):
    if name == "guided":
        return dict(uncond=UNCOND, guidance=3.0)
    return dict(sampler=name)


@pytest.mark.parametrize("name", ["guided", "ddpm", "sde-dpm++2s"])
def test_a_sample_depends_on_its_own_key_alone(name):
    whole = np.asarray(sample(shape=SHAPE, **settings_of(name)))
    assert len(np.unique(whole[:, 0, 0, 0])) == 8
    for batch in (1, 3):
        some = sample(shape=(batch, *SHAPE[1:]), cond=COND[:batch], **settings_of(name))
        assert_allclose(some, whole[:batch], atol=1e-6)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.asarray([5, 2, 7]))
    picked = samplers.sample(
        DENOISE,
        keys,
        shape=(3, *SHAPE[1:]),
        cond=COND[jnp.asarray([5, 2, 7])],
        steps=6,
        **settings_of(name),
    )
    assert_allclose(picked, whole[[5, 2, 7]], atol=1e-6)


def meshes():
    return {
        "build": (mesh.build(config.MeshConfig(fsdp=2), {}), mesh.BATCH),
        "explicit": (jax.make_mesh((8,), ("rows",)), PartitionSpec("rows")),
        "automatic": (
            jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)),
            PartitionSpec("rows"),
        ),
    }


@pytest.mark.parametrize("which", meshes())
@pytest.mark.parametrize("name", ["guided", "sde-dpm++2s"])
def test_devices_do_not_change_samples(name, which):
    devices, spec = meshes()[which]
    rows, whole = NamedSharding(devices, spec), NamedSharding(devices, PartitionSpec())
    expected = sample(shape=SHAPE, **settings_of(name))

    def check(x, sharding):
        assert x.sharding.is_equivalent_to(sharding, 4)
        assert len({shard.index[0].start for shard in x.addressable_shards}) == 8
        assert_allclose(jax.device_get(x), expected, atol=1e-6)

    check(sample(shape=SHAPE, sharding=rows, **settings_of(name)), rows)
    # Everything on the mesh, uncond where it was put by somebody else.
    placed = samplers.denoiser(
        network, TABLE, prediction="v", params=jax.device_put(W, whole)
    )
    settings = settings_of(name) | dict(cond=jax.device_put(COND, rows))
    if "uncond" in settings:
        settings["uncond"] = jax.device_put(UNCOND, whole)
    settings["step_noise"] = None
    first = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, i), 0))
    drawn = loop.normal(first(jnp.arange(8)), jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    start = jax.device_put(drawn, rows)
    check(samplers.sample(placed, KEY, initial=start, steps=6, **settings), rows)


def test_other_pictures_on_a_mesh():
    devices, spec = meshes()["build"]
    rows = NamedSharding(devices, spec)
    image = jnp.sin(jnp.arange(128.0)).reshape(SHAPE)
    split = jax.device_put(image, rows)
    mask = jnp.arange(4.0) < 2
    for settings in (
        dict(strength=0.5),
        dict(mask=mask),
        dict(invert=True, sampler="ddim"),
        dict(mask=mask, x0_transform=samplers.dynamic_threshold()),
    ):
        x = sample(image=split, **settings)
        assert x.sharding.is_equivalent_to(rows, 4)
        assert_allclose(jax.device_get(x), sample(image=image, **settings), atol=1e-6)


# Guidance.


def by_hand(combine):
    """Samples of a network that does its own guidance, given (c, u, t [B, 1, 1, 1])."""

    def own(params, x, t, cond):
        c = network(params, x, t, cond)
        u = network(params, x, t, UNCOND[None])
        return combine(c, u, t.reshape(-1, 1, 1, 1))

    denoise = samplers.denoiser(own, TABLE, prediction="v", params=W)
    return samplers.sample(denoise, KEY, shape=SHAPE, cond=COND, steps=6)


def same(x, y):
    assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_guidance_is_its_formula_however_it_is_evaluated():
    expected = by_hand(lambda c, u, t: u + 3.0 * (c - u))
    for how in guidance.EVALUATIONS:
        settings = dict(guidance=samplers.Guidance(scale=3.0, evaluation=how))
        same(guided(uncond=UNCOND[None], **settings), expected)
    same(guided(guidance=3.0), expected)
    same(guided(guidance=3.0, uncond=jnp.full_like(COND, 0.4)), expected)
    same(guided(guidance=1.0), sample(shape=SHAPE))
    scales = jnp.linspace(0, 7, 8)
    expected = by_hand(lambda c, u, t: u + scales.reshape(8, 1, 1, 1) * (c - u))
    same(guided(guidance=scales), expected)


def test_a_condition_without_batch_axis_is_evaluated_after_the_other():
    x = sample(
        shape=SHAPE, cond=jnp.float32(0.2), uncond=jnp.float32(0.4), guidance=3.0
    )
    wide = jnp.full_like(COND, 0.2)
    same(x, sample(shape=SHAPE, cond=wide, uncond=UNCOND, guidance=3.0))


def test_rescaled_guidance_and_the_quirk():
    def rescaled(c, u, t):  # Lin et al. 2023, eq. 14-16
        g = u + 3.0 * (c - u)
        ratio = c.std((1, 2, 3), keepdims=True) / g.std((1, 2, 3), keepdims=True)
        return 0.7 * g * ratio + 0.3 * g

    same(guided(guidance=samplers.Guidance(scale=3.0, rescale=0.7)), by_hand(rescaled))

    def three(c, u, t):  # three channels of four
        g = u + 3.0 * (c - u)
        return jnp.concatenate([g[..., :3], c[..., 3:]], -1)

    quirk = samplers.Guidance(scale=3.0, quirk="dit_three_channels")
    same(guided(guidance=quirk), by_hand(three))


@pytest.mark.parametrize(
    ("interval", "count"), [((332.0, 832.0), 3), ((2000.0, 3000.0), 0), ((-1, 999), 6)]
)
def test_guidance_in_an_interval_evaluates_less(interval, count):
    """Times are 999, 832, 666, 499, 332 and 166: one on each end of (332, 832]."""
    how = samplers.Guidance(scale=3.0, interval=interval)
    x, path = guided(guidance=how, return_trajectory=True)

    def inside(c, u, t):
        return jnp.where((t > interval[0]) & (t <= interval[1]), u + 3.0 * (c - u), c)

    same(x, by_hand(inside))
    assert (
        path.nfe[-1] == 6 + count == samplers.plan(DENOISE, steps=6, guidance=how).nfe
    )


# Inside somebody else's program.


def test_sampling_inside_jit_is_the_same():
    @jax.jit
    def inside(key, params, scale):
        denoise = samplers.denoiser(network, TABLE, prediction="v", params=params)
        return samplers.sample(
            denoise, key, shape=SHAPE, cond=COND, uncond=UNCOND, steps=6, guidance=scale
        )

    same(inside(KEY, W, 3.0), guided(guidance=3.0))


@pytest.mark.parametrize("sampler", ["dpm++2m", "heun", "sde-dpm++2s"])
def test_gradients_through_sampling(sampler):
    with jax.enable_x64(True):
        start = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE))
        cond = COND.astype(jnp.float64)

        def loss(params):
            denoise = samplers.denoiser(network, TABLE, prediction="v", params=params)
            x = samplers.sample(
                denoise,
                KEY,
                initial=start,
                cond=cond,
                uncond=jnp.zeros_like(cond),
                guidance=2.0,
                sampler=sampler,
                steps=4,
            )
            return jnp.mean(x**2)

        slope = float(jax.jit(jax.grad(loss))(0.6))
        h = 1e-5
        expected = (loss(jnp.float64(0.6 + h)) - loss(jnp.float64(0.6 - h))) / (2 * h)
    assert_allclose(slope, float(expected), rtol=1e-6)
    assert abs(slope) > 1e-3


def test_the_cell_in_the_docstring_runs():
    text = samplers.__doc__
    names = {}
    exec(text[text.index("import jax") :], names)
    assert names["x"].shape == (4, 32, 32, 4)
    assert np.all(np.isfinite(names["x"]))


# Trajectories, callbacks, transforms, types.


def test_callbacks_are_told_the_steps_asked_for():
    told = []
    x, path = sample(
        shape=SHAPE,
        sampler="heun",
        return_trajectory=True,
        callback=told.append,
        callback_every=4,
    )
    assert [(each.step, each.steps) for each in told] == [(4, 6), (6, 6)]
    assert [each.nfe for each in told] == [8, 11] == list(path.nfe[[4, 6]])
    assert_array_equal(told[0].x, path.x[4])
    assert_array_equal(told[1].x, x)
    told.clear()
    same(sample(shape=SHAPE, sampler="heun", callback=told.append), x)
    assert [each.step for each in told] == [1, 2, 3, 4, 5, 6]


def test_estimates_of_x0_are_transformed():
    wild = samplers.denoiser(lambda x, t, cond: 5 * x, TABLE, prediction="x0")
    run = functools.partial(samplers.sample, wild, KEY, shape=SHAPE, steps=6)
    clipped = run(x0_transform=samplers.clip(0.8))
    assert np.abs(run()).max() > 100 and np.abs(clipped).max() <= 0.8
    own = samplers.denoiser(
        lambda x, t, cond: jnp.clip(5 * x, -0.8, 0.8), TABLE, prediction="x0"
    )
    same(clipped, samplers.sample(own, KEY, shape=SHAPE, steps=6))
    assert samplers.clip(0.8) is samplers.clip(0.8)  # or every call would compile

    x0 = np.random.default_rng(0).normal(size=(3, 40, 5)) * [[[0.1]], [[1]], [[3]]]
    out = samplers.dynamic_threshold(0.9, 1.0)(jnp.asarray(x0, jnp.float32))
    for mine, row in zip(np.asarray(out), x0, strict=True):
        s = max(np.quantile(np.abs(row), 0.9), 1.0)
        assert_allclose(mine, np.clip(row, -s, s) / s, rtol=1e-5)
    threshold = samplers.dynamic_threshold(0.9, 0.5)
    assert np.abs(run(x0_transform=threshold)).max() <= 0.5 + 1e-6


def test_arithmetic_is_float32_or_float64():
    start = np.random.default_rng(0).normal(size=SHAPE)
    expected = sample(initial=jnp.asarray(start, jnp.float32))
    assert_array_equal(sample(initial=start.astype(np.float32)), expected)
    for dtype in (jnp.bfloat16, jnp.float16):
        x = sample(initial=jnp.asarray(start, dtype))
        assert x.dtype == jnp.float32
        assert_allclose(x, expected, atol=0.05)

    def narrow(params, x, t, cond):
        assert x.dtype == t.dtype == jnp.float32
        return network(params, x, t, cond).astype(jnp.bfloat16)

    half = samplers.denoiser(narrow, TABLE, prediction="v", params=W)
    x = samplers.sample(half, KEY, shape=SHAPE, cond=COND, steps=6)
    assert x.dtype == jnp.float32
    # Guidance too is combined in float32: 7 (c - u) would show it.
    by_itself = samplers.denoiser(
        lambda params, x, t, cond: (
            (1 - 8.0) * narrow(params, x, t, UNCOND[None]).astype(jnp.float32)
            + 8.0 * narrow(params, x, t, cond).astype(jnp.float32)
        ),
        TABLE,
        prediction="v",
        params=W,
    )
    settings = dict(shape=SHAPE, cond=COND, steps=1)
    assert_allclose(
        samplers.sample(half, KEY, uncond=UNCOND, guidance=8.0, **settings),
        samplers.sample(by_itself, KEY, **settings),
        atol=1e-5,
    )
    with jax.enable_x64(True):
        x = sample(initial=jnp.asarray(start))
        assert x.dtype == jnp.float64
        assert_allclose(x, expected, atol=1e-5)


def test_a_denoiser_called_by_itself_estimates_x0():
    t = jnp.asarray([999.0, 700, 400, 100, 50, 10, 1, 0])
    x = jax.random.normal(KEY, SHAPE)
    a, s = (v.reshape(8, 1, 1, 1) for v in (TABLE.alpha(t), TABLE.sigma(t)))
    expected = a * x - s * network(W, x, t, COND)
    same(DENOISE(x, t, COND), expected)
    same(DENOISE(x, 100, COND)[3], expected[3])
    told = []  # times that bfloat16 does not have
    probe = samplers.denoiser(
        lambda x, t, cond: told.append(t) or x, TABLE, prediction="v"
    )
    probe(x[:2].astype(jnp.bfloat16), jnp.asarray([999, 701]))
    assert_array_equal(told[0], [999.0, 701.0])
    timed = samplers.denoiser(
        network, TABLE, prediction="v", params=W, time=TABLE.unit_time
    )
    same(timed(x, t, COND), a * x - s * network(W, x, t / 1000, COND))


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
    )

    def error(**options):
        x = samplers.sample(
            denoise, KEY, shape=(50_000, 1), sampler="sde-dpm++2s", steps=60, **options
        )
        return abs(float(x.std()) / spread - 1)

    assert error() < 0.05
    assert error(shared_noise=False) > 0.1


# Ways there and back.


@pytest.mark.parametrize("schedule", [TABLE, FLOW, noise.edm()])
def test_an_inversion_is_undone_by_sampling(schedule):
    denoise = optimal(schedule)
    image = 0.5 + 0.6 * jax.random.normal(KEY, SHAPE)

    def there_and_back(steps):
        settings = dict(sampler="ddim", steps=steps, grid="logsnr")
        hidden = samplers.sample(denoise, image=image, invert=True, **settings)
        back = samplers.sample(denoise, initial=hidden, **settings)
        return hidden, float(jnp.sqrt(jnp.mean((back - image) ** 2)))

    hidden, error = there_and_back(200)
    half_as_fine = there_and_back(100)[1]
    assert error < 0.03 and 1.6 < half_as_fine / error < 2.5
    # Where the probability-flow ODE ends: a standard normal of the same rank.
    a, s = schedule.alpha(schedule.t_noise), schedule.sigma(schedule.t_noise)
    expected = a * 0.5 + math.hypot(0.6 * a, s) * (image - 0.5) / 0.6
    assert_allclose(hidden, expected / schedule.prior_std, atol=0.08)


def test_image_to_image_begins_part_of_the_way():
    image = jnp.sin(jnp.arange(128.0)).reshape(SHAPE)
    start = jax.random.normal(jax.random.key(3), SHAPE)
    _, path = sample(
        image=image, initial=start, strength=0.5, steps=10, return_trajectory=True
    )
    assert len(path.t) == 6 and path.t[0] == 499
    a, s = TABLE.alpha(499), TABLE.sigma(499)
    same(path.x[0], float(a) * image + float(s) * start)
    _, drawn = sample(image=image, strength=0.5, steps=10, return_trajectory=True)
    fresh = (drawn.x[0] - float(a) * image) / float(s)
    same(fresh, sample(shape=SHAPE, return_trajectory=True)[1].x[0])
    assert samplers.plan(DENOISE, steps=10, strength=0.01).nfe == 1
    # The least strength leaves the image nearly as it was.
    denoise = optimal(TABLE)
    run = functools.partial(samplers.sample, denoise, KEY, image=image, steps=50)
    near, far = (np.abs(run(strength=s) - image).mean() for s in (0.02, 1.0))
    assert near < 0.3 * far


POINT = samplers.denoiser(
    lambda x, t, cond: jnp.full_like(x, 0.25), TABLE, prediction="x0"
)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_inpainting_keeps_what_is_known(sampler):
    image = jnp.sin(jnp.arange(128.0)).reshape(SHAPE)
    mask = np.zeros((1, 2, 2, 1), bool)
    mask[:, 0] = True
    run = functools.partial(samplers.sample, POINT, KEY, image=image, sampler=sampler)
    x, path = run(mask=mask, steps=7, return_trajectory=True)
    assert_array_equal(x[:, 1], image[:, 1])
    assert_allclose(x[:, 0], 0.25, rtol=1e-6)
    # On the way there, what is known has the noise it began with.
    start = path.x[0]
    for x, a, s in list(zip(path.x, path.alpha, path.sigma, strict=True))[1:]:
        assert_allclose(x[:, 1], a * image[:, 1] + s * start[:, 1], atol=1e-5)


def test_masks_of_any_rank_and_in_between():
    image = jnp.sin(jnp.arange(128.0)).reshape(SHAPE)
    mask = jnp.asarray([1.0, 0.0, 0.5, 1.0])
    x = sample(image=image, mask=mask)
    same(x, sample(image=image, mask=jnp.broadcast_to(mask, SHAPE)))
    assert_array_equal(x[..., 1], image[..., 1])
    same(sample(image=image, mask=jnp.ones(SHAPE)), sample(shape=SHAPE))


def test_sampling_starts_from_noise_of_the_grids_own_level():
    start = jax.random.normal(jax.random.key(3), SHAPE)
    edm = noise.edm()

    def first(schedule, grid=None):
        denoise = samplers.denoiser(lambda x, t, cond: x, schedule, prediction="v")
        run = samplers.sample(
            denoise, initial=start, steps=5, grid=grid, return_trajectory=True
        )
        return run[1].x[0]

    assert_array_equal(first(TABLE), start)
    assert_array_equal(first(TABLE, "leading"), start)
    assert_array_equal(first(FLOW), start)
    same(first(edm), 80 * start)
    lower = first(edm, samplers.from_times(edm, [10.0, 5.0, 1.0]))
    assert_allclose(lower, 10 * start, rtol=0.01)


# Cost.


def matmul(params, x, t, cond):
    return (x @ params)[..., : x.shape[-1]] + cond


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        (dict(steps=7), 7),
        (dict(steps=7, sampler="heun"), 13),
        (dict(steps=7, guidance=3.0), 14),
        (dict(steps=6, guidance=samplers.Guidance(scale=3.0, interval=(332, 832))), 9),
        (dict(steps=10, strength=0.5, guidance=3.0), 10),
        (dict(steps=5, invert=True, sampler="ddim"), 5),
    ],
)
def test_cost_is_that_of_its_evaluations(settings, evaluations):
    denoise = samplers.denoiser(
        matmul, TABLE, prediction="v", params=jnp.zeros((4, 8), jnp.float32)
    )
    one = flops.count(matmul, denoise.params, jnp.zeros(SHAPE), jnp.zeros(8), COND)
    assert one.model == 2 * 8 * 2 * 2 * 4 * 8
    price = functools.partial(samplers.cost, denoise, SHAPE, cond=COND, uncond=COND)
    assert price(**settings).model == evaluations * one.model
    decoder = jnp.zeros((4, 3))
    with_decoder = price(**settings, decode=lambda x: x @ decoder).model
    assert with_decoder - evaluations * one.model == 2 * 8 * 2 * 2 * 4 * 3


def test_cost_of_networks_that_answer_otherwise():
    for dtype, channels in ((jnp.bfloat16, 4), (jnp.float32, 8)):
        denoise = samplers.denoiser(
            lambda x, t, cond, dtype=dtype, channels=channels: (
                x.astype(dtype) @ jnp.zeros((4, channels), dtype)
            ),
            TABLE,
            prediction="v",
        )
        found = samplers.cost(denoise, SHAPE, steps=3).model
        assert found == 3 * 2 * 32 * 4 * channels


# Stochastic samplers.


@pytest.mark.parametrize("name", ["linear", "zero"])
def test_ddpm_takes_the_papers_steps(name):
    """Ho et al. 2020, eq. 7: the posterior's mean and variance, at all 1000 steps."""
    table = noise.linear()
    table = noise.zero_terminal_snr(table) if name == "zero" else table
    denoise = samplers.denoiser(network, table, prediction="v", params=W)
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
    run = functools.partial(sample, shape=SHAPE, step_noise=fresh)
    x = run(sampler="ddpm")
    same(run(sampler="ddim", eta=1.0), x)
    same(run(sampler="sde-dpm++1"), x)
    assert np.abs(run(sampler="ddim", eta=0.5) - x).max() > 0.05
    same(run(sampler="ddim", eta=0.0), sample(shape=SHAPE, sampler="ddim"))
    # With numbers far apart no square root is of less than nothing.
    wide = noise.edm(1e-6, 1e5)
    denoise = samplers.denoiser(network, wide, prediction="v", params=W)
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
            learned, TABLE, prediction="v", params=jnp.float32(share)
        )
        return samplers.sample(
            denoise,
            KEY,
            shape=SHAPE,
            cond=COND,
            sampler="ddpm",
            variance="learned",
            steps=6,
            step_noise=fresh,
            **settings,
        )

    fixed = functools.partial(sample, shape=SHAPE, sampler="ddpm", step_noise=fresh)
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
    assert samplers.plan(DENOISE, sampler="ddim", grid=grid, invert=True).grid == back
    cut = samplers.plan(DENOISE, grid=grid, strength=0.4).grid
    assert cut == grid.last(2) and hash(cut) == hash(grid.last(2))


# What is refused.

IMAGE = jnp.zeros(SHAPE)
ZERO = noise.zero_terminal_snr(TABLE)
FLOWING = samplers.denoiser(network, FLOW, prediction="flow")


def giving(output):
    """A network of x alone."""
    return samplers.denoiser(lambda x, t, cond: output(x), TABLE, prediction="epsilon")


REFUSED = {
    "no size": (lambda: sample(), "give shape, initial or image"),
    "sizes": (
        lambda: sample(shape=(4, 2, 2, 4), initial=IMAGE),
        "shapes differ: .*4, 2",
    ),
    "mask": (lambda: sample(shape=SHAPE, mask=IMAGE), "invert need an image"),
    "invert": (lambda: sample(shape=SHAPE, invert=True), "invert need an image"),
    "strength": (lambda: sample(shape=SHAPE, strength=0.5), "invert need an image"),
    "no strength": (lambda: sample(image=IMAGE, strength=0), r"lie in \(0, 1\], got 0"),
    "masked inversion": (
        lambda: sample(image=IMAGE, mask=IMAGE, invert=True, sampler="ddim"),
        "begins at its image: no mask, no initial",
    ),
    "no uncond": (lambda: sample(shape=SHAPE, guidance=2.0), "guidance needs uncond"),
    "callback": (
        lambda: sample(shape=SHAPE, callback_every=0),
        "callback_every must be at least 1, got 0",
    ),
    "transform": (
        lambda: sample(
            image=IMAGE, invert=True, sampler="ddim", x0_transform=samplers.clip(1)
        ),
        "x0_transform does not apply to an inversion",
    ),
    "no key": (lambda: samplers.sample(DENOISE, shape=SHAPE), "give a key"),
    "no key for steps": (
        lambda: samplers.sample(DENOISE, initial=IMAGE, sampler="ddpm"),
        "give a key: there is noise to draw",
    ),
    "seed": (lambda: samplers.sample(DENOISE, 0, shape=SHAPE), "must be a typed key"),
    "raw key": (
        lambda: samplers.sample(DENOISE, jax.random.PRNGKey(0), shape=SHAPE),
        "must be a typed key",
    ),
    "keys": (
        lambda: samplers.sample(DENOISE, jax.random.split(KEY, 3), shape=SHAPE),
        r"keys of shape \(3,\) for 8 samples",
    ),
    "step noise": (
        lambda: sample(shape=SHAPE, sampler="ddpm", step_noise=jnp.zeros((5, *SHAPE))),
        r"step_noise of shape \(5, 8, 2, 2, 4\), needed: \(6, 8, 2, 2, 4\)",
    ),
    "batched": (
        lambda: sample(
            shape=SHAPE,
            cond=jnp.zeros(()),
            uncond=jnp.zeros(()),
            guidance=samplers.Guidance(scale=2.0, evaluation="batched"),
        ),
        "arrays all have a first axis of 8; 'sequential' takes any",
    ),
    "evaluation": (
        lambda: samplers.Guidance(scale=2.0, evaluation="both"),
        "'both' is none of auto, batched, sequential",
    ),
    "quirk": (lambda: samplers.Guidance(scale=2.0, quirk="dit"), "'dit' is none of"),
    "interval": (
        lambda: samplers.Guidance(scale=2.0, interval=(1.0, 0.5)),
        r"must be \(low, high\), got \(1.0, 0.5\)",
    ),
    "prediction": (
        lambda: samplers.denoiser(network, TABLE, prediction="eps"),
        "'eps' is none of epsilon, x0, v",
    ),
    "unreadable": (
        lambda: samplers.plan(samplers.denoiser(network, ZERO, prediction="epsilon")),
        "'epsilon' says nothing of x0 at t = 999, where alpha = 0 and sigma = 1; pred",
    ),
    "unreadable there": (
        lambda: samplers.plan(
            samplers.denoiser(network, TABLE, prediction="x0"),
            sampler="ddim",
            invert=True,
        ),
        "'x0' says nothing of epsilon at t = 0",
    ),
    "sampler": (
        lambda: samplers.plan(DENOISE, sampler="plms"),
        "'plms' is none of ddim",
    ),
    "option": (
        lambda: samplers.plan(DENOISE, sampler="dpm++2m", eta=1.0),
        "has no option eta; its options: solver, lower_order_final, curv",
    ),
    "option of none": (
        lambda: samplers.plan(DENOISE, sampler="heun", eta=1.0),
        "'heun' has no option eta; its options: none",
    ),
    "eta": (
        lambda: samplers.plan(DENOISE, sampler="ddim", eta=1.5),
        r"eta must lie in \[0, 1\], got 1.5",
    ),
    "eta there": (
        lambda: samplers.plan(DENOISE, sampler="ddim", eta=1.0, invert=True),
        "an inversion is deterministic: eta must be 0",
    ),
    "variance": (
        lambda: samplers.plan(DENOISE, sampler="ddpm", variance="large"),
        "'large' is none of fixed_small, fixed_large, learned",
    ),
    "solver": (
        lambda: samplers.plan(DENOISE, sampler="dpm++2s", solver="rk"),
        "'rk' is none of midpoint, heun",
    ),
    "form": (
        lambda: samplers.plan(DENOISE, sampler="unipc2", form="bh3"),
        "'bh3' is none of bh1, bh2",
    ),
    "steps": (
        lambda: samplers.grid(TABLE, 0),
        "steps must be a whole number, at least 1; got 0",
    ),
    "part of a step": (lambda: samplers.grid(TABLE, 2.5), "whole number.*got 2.5"),
    "end": (lambda: samplers.grid(TABLE, 5, end="zero"), "'zero' is none of data, sch"),
    "end twice": (
        lambda: samplers.sample(FLOWING, KEY, shape=SHAPE, grid="leading"),
        "t = 0, is where the grid ends: .* leave it out of the times",
    ),
    "grid of another": (
        lambda: sample(shape=SHAPE, grid=samplers.grid(FLOW, 5)),
        "the grid is of another schedule",
    ),
    "schedule": (
        lambda: samplers.denoiser(network, "linear", prediction="v"),
        "schedule must be one of scaling_ldm.noise.*got 'linear'",
    ),
    "a misspelt argument": (
        lambda: sample(shape=SHAPE, guidence=3.0),
        "has no option guidence; .* Did you mean guidance?",
    ),
    "a misspelt sampler": (
        lambda: samplers.plan(DENOISE, sampler="dpm2m"),
        r"Did you mean dpm\+\+2m?",
    ),
    "rescale": (
        lambda: samplers.Guidance(scale=2.0, rescale=2.0),
        r"rescale must lie in \[0, 1\], got 2.0",
    ),
    "sharding": (
        lambda: sample(shape=SHAPE, sharding="batch"),
        "sharding must be a NamedSharding",
    ),
    "many steps": (
        lambda: samplers.grid(TABLE, 1001),
        "steps = 1001, but the schedule has only 1000",
    ),
    "spacing": (
        lambda: samplers.grid(TABLE, 5, "even"),
        "'even' is none of uniform, linspace, leading, trailing, quadratic, logsnr, k",
    ),
    "spacing's option": (
        lambda: samplers.grid(TABLE, 5, "karras", shift=3.0),
        "spacing 'karras' has no option shift; its options: rho",
    ),
    "flow's spacing": (
        lambda: samplers.grid(TABLE, 5, "flow_shifted"),
        r"is for noise.rectified_flow\(\) only",
    ),
    "times": (
        lambda: samplers.from_times(TABLE, [1000.0, 1.0]),
        r"times must lie in \[0, 999\], got \[1000.    1.\]",
    ),
    "order of times": (
        lambda: samplers.from_times(TABLE, [10, 500, 1]),
        "noise must fall .* but sigma goes from 0.0978197 at t = 10 to 0.85.* at 500",
    ),
    "times twice": (
        lambda: samplers.from_times(FLOW, [1.0, 1.0]),
        "noise must fall .* but sigma goes from 1 at t = 1 to 1 at 1",
    ),
    "no times": (lambda: samplers.from_times(FLOW, []), "2 points at least"),
    "last": (lambda: samplers.grid(TABLE, 5).last(6), "must be 1 to 5, got 6"),
    "row": (
        lambda: samplers.SolverTable().add(None, None, m=[1.0, 2.0]),
        "2 predictions, but 1 are kept",
    ),
    "saved": (
        lambda: samplers.SolverTable().add(None, None, s=1.0),
        "its table says is not",
    ),
    "drawn": (
        lambda: samplers.SolverTable().add(None, None, z=1.0),
        "its table says is not",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_anything_compiles(what):
    call, message = REFUSED[what]
    programs = loop.compiled._cache_size()
    with pytest.raises(ValueError, match=message):
        call()
    assert loop.compiled._cache_size() == programs


@pytest.mark.parametrize(
    "sampler", [name for name in samplers.SAMPLERS if name not in ("ddim", "euler")]
)
def test_only_first_order_samplers_invert(sampler):
    with pytest.raises(ValueError, match="cannot invert"):
        samplers.plan(DENOISE, sampler=sampler, invert=True)


def test_a_sampler_may_be_a_function():
    def halfway(grid, *, share=0.5):
        """DDIM that goes a share of each step's way to x0."""
        table = samplers.SolverTable()
        for a, b in grid.pairs:
            table.add(a, b, x=1 - share, m=[share])
        return table

    x, path = sample(shape=SHAPE, sampler=halfway, share=0.25, return_trajectory=True)
    assert path.nfe[-1] == 6
    estimate = DENOISE(path.x[0], path.t[0], COND)
    same(path.x[1], 0.75 * path.x[0] + 0.25 * estimate)
    with pytest.raises(ValueError, match="has no option eta; its options: share"):
        sample(shape=SHAPE, sampler=halfway, eta=1.0)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        (lambda x: x[:1], {}, r"of shape \(1, 2, 2, 4\) for x of \(8, 2, 2, 4\)"),
        (lambda x: x.mean(-1, keepdims=True), {}, r"of shape \(8, 2, 2, 1\)"),
        (
            lambda x: jnp.concatenate([x, x], -1),
            {},
            "use ddpm with variance=.learned., or leave",
        ),
        (
            lambda x: x,
            {"sampler": "ddpm", "variance": "learned"},
            r"for x of \(8, 2, 2, 4\), not \(8, 2, 2, 8\)",
        ),
        (lambda x: (x,), {}, "the network gave <class 'tuple'>"),
    ],
    ids=["lost batch", "lost channels", "variance", "no variance", "no array"],
)
def test_a_network_of_another_shape_is_refused(output, options, message):
    with pytest.raises(ValueError, match=message):
        samplers.sample(giving(output), KEY, shape=SHAPE, **options)
