"""samplers.sample: compilation, keys, guidance, images, outputs, cost."""

import contextlib
import dataclasses
import functools
import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal
from small_sampler import (
    COND,
    DENOISE,
    FLOW,
    KEY,
    SHAPE,
    TABLE,
    TRAJECTORY,
    UNCOND,
    W,
    guided,
    network,
    optimal,
    same,
    sample,
)

from scaling_ldm import config, flops
from scaling_ldm.diffusion import noise, samplers
from scaling_ldm.diffusion.samplers import compiled_loop, guidance
from scaling_ldm.models import denoisers
from scaling_ldm.models.denoisers import dit
from scaling_ldm.training import mesh

COMPILED = "/jax/core/compile/backend_compile_duration"


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
        denoise = samplers.denoiser(
            counted, schedule, prediction=kind, time="schedule", params=W
        )
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

    programs = compiled_loop.compiled._cache_size()
    with compilations() as events:
        run()
        assert events, "the listener hears nothing"
        assert len(traced) == 1
        assert compiled_loop.compiled._cache_size() == programs + 1
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
        run(
            key=jax.random.key(7),
            output=samplers.Output(callback=lambda told: None, callback_every=3),
        )
        assert not events
    assert len(traced) == 1
    assert compiled_loop.compiled._cache_size() == programs + 1


# Keys, batches and devices.


def settings_of(name):
    if name == "guided":
        return dict(uncond=UNCOND, guidance=3.0)
    return dict(sampler=name)


@pytest.mark.parametrize(
    "name", ["guided", pytest.param("ddpm", marks=pytest.mark.slow), "sde-dpm++2s"]
)
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
        "explicit": (jax.make_mesh((4,), ("rows",)), PartitionSpec("rows")),
        "automatic": (
            jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)),
            PartitionSpec("rows"),
        ),
    }


@pytest.mark.parametrize(
    ("name", "which"),
    [
        pytest.param(name, which, marks=() if by_day else pytest.mark.slow)
        for name in ("guided", "sde-dpm++2s")
        for which in meshes()
        for by_day in [
            (name, which) in (("guided", "build"), ("sde-dpm++2s", "explicit"))
        ]
    ],
)
def test_devices_do_not_change_samples(name, which):
    devices, spec = meshes()[which]
    rows, whole = NamedSharding(devices, spec), NamedSharding(devices, PartitionSpec())
    expected = sample(shape=SHAPE, **settings_of(name))

    def check(x, sharding):
        assert x.sharding.is_equivalent_to(sharding, 4)
        assert len({shard.index[0].start for shard in x.addressable_shards}) == 4
        assert_allclose(jax.device_get(x), expected, atol=1e-6)

    drawn = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=rows)
    check(sample(shape=drawn, **settings_of(name)), rows)
    # Everything on the mesh, uncond where it was put by somebody else.
    placed = samplers.denoiser(
        network, TABLE, prediction="v", time="schedule", params=jax.device_put(W, whole)
    )
    settings = settings_of(name) | dict(cond=jax.device_put(COND, rows))
    if "uncond" in settings:
        settings["uncond"] = jax.device_put(UNCOND, whole)
    first = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, i), 0))
    drawn = compiled_loop.normal(
        first(jnp.arange(8)), jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    )
    start = jax.device_put(drawn, rows)
    check(samplers.sample(placed, KEY, noise=start, steps=6, **settings), rows)


@pytest.mark.slow
def test_other_pictures_on_a_mesh():
    devices, spec = meshes()["build"]
    rows = NamedSharding(devices, spec)
    image = jnp.sin(jnp.arange(128.0)).reshape(SHAPE)
    split = jax.device_put(image, rows)
    mask = jnp.arange(4.0) < 2
    limited = dataclasses.replace(DENOISE, x0_transform=samplers.dynamic_threshold())

    def run(denoise, image, sampler="dpm++2m", **of_image):
        source = samplers.SourceImage(image, **of_image)
        return samplers.sample(
            denoise, KEY, cond=COND, steps=6, image=source, sampler=sampler
        )

    for denoise, settings in (
        (DENOISE, dict(strength=0.5)),
        (DENOISE, dict(mask=mask)),
        (DENOISE, dict(invert=True, sampler="ddim")),
        (limited, dict(mask=mask)),
    ):
        x = run(denoise, split, **settings)
        assert x.sharding.is_equivalent_to(rows, 4)
        assert_allclose(jax.device_get(x), run(denoise, image, **settings), atol=1e-6)


# Guidance.


def by_hand(combine):
    """Samples of a network that does its own guidance, given (c, u, t [B, 1, 1, 1])."""

    def own(params, x, t, cond):
        c = network(params, x, t, cond)
        u = network(params, x, t, UNCOND[None])
        return combine(c, u, t.reshape(-1, 1, 1, 1))

    denoise = samplers.denoiser(own, TABLE, prediction="v", time="schedule", params=W)
    return samplers.sample(denoise, KEY, shape=SHAPE, cond=COND, steps=6)


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


def test_rescaled_guidance_and_guidance_of_some_channels():
    def rescaled(c, u, t):  # Lin et al. 2023, eq. 14-16
        g = u + 3.0 * (c - u)
        ratio = c.std((1, 2, 3), keepdims=True) / g.std((1, 2, 3), keepdims=True)
        return 0.7 * g * ratio + 0.3 * g

    same(guided(guidance=samplers.Guidance(scale=3.0, rescale=0.7)), by_hand(rescaled))

    def three(c, u, t):  # three channels of four
        g = u + 3.0 * (c - u)
        return jnp.concatenate([g[..., :3], c[..., 3:]], -1)

    first = samplers.Guidance(scale=3.0, channels=3)
    same(guided(guidance=first), by_hand(three))


@pytest.mark.parametrize(
    ("interval", "count"),
    [((332.0, 832.0), 3), ((2000.0, 3000.0), 0), ((-1.0, 999.0), 6)],
)
def test_guidance_in_an_interval_evaluates_less(interval, count):
    """Times are 999, 832, 666, 499, 332 and 166: one on each end of (332, 832]."""
    how = samplers.Guidance(scale=3.0, interval=interval)
    x, path = guided(guidance=how, output=TRAJECTORY)

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
        denoise = samplers.denoiser(
            network, TABLE, prediction="v", time="schedule", params=params
        )
        return samplers.sample(
            denoise, key, shape=SHAPE, cond=COND, uncond=UNCOND, steps=6, guidance=scale
        )

    same(inside(KEY, W, 3.0), guided(guidance=3.0))


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param("dpm++2m", marks=pytest.mark.slow),
        pytest.param("heun", marks=pytest.mark.slow),
        "sde-dpm++2s",
    ],
)
def test_gradients_through_sampling(sampler):
    with jax.enable_x64(True):
        start = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE))
        cond = COND.astype(jnp.float64)

        def loss(params):
            denoise = samplers.denoiser(
                network, TABLE, prediction="v", time="schedule", params=params
            )
            x = samplers.sample(
                denoise,
                KEY,
                noise=start,
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
    exec(textwrap.dedent(text[text.index("    import jax") :]), names)
    assert names["x"].shape == (4, 32, 32, 4)
    assert np.all(np.isfinite(names["x"]))


# Trajectories, callbacks, transforms, types.


def test_callbacks_are_told_the_steps_asked_for():
    told = []
    x, path = sample(
        shape=SHAPE,
        sampler="heun",
        output=samplers.Output(trajectory=True, callback=told.append, callback_every=4),
    )
    assert [(each.step, each.steps) for each in told] == [(4, 6), (6, 6)]
    assert [each.nfe for each in told] == [8, 11] == list(path.nfe[[4, 6]])
    assert_array_equal(told[0].x, path.x[4])
    assert_array_equal(told[1].x, x)
    told.clear()
    output = samplers.Output(callback=told.append)
    same(sample(shape=SHAPE, sampler="heun", output=output), x)
    assert [each.step for each in told] == [1, 2, 3, 4, 5, 6]


def test_estimates_of_x0_are_transformed():
    wild = samplers.denoiser(
        lambda x, t, cond: 5 * x, TABLE, prediction="x0", time="schedule"
    )

    def run(transform=None):
        denoise = dataclasses.replace(wild, x0_transform=transform)
        return samplers.sample(denoise, KEY, shape=SHAPE, steps=6)

    clipped = run(samplers.clip(0.8))
    assert np.abs(run()).max() > 100 and np.abs(clipped).max() <= 0.8
    own = samplers.denoiser(
        lambda x, t, cond: jnp.clip(5 * x, -0.8, 0.8),
        TABLE,
        prediction="x0",
        time="schedule",
    )
    same(clipped, samplers.sample(own, KEY, shape=SHAPE, steps=6))
    assert samplers.clip(0.8) is samplers.clip(0.8)  # or every call would compile

    x0 = np.random.default_rng(0).normal(size=(3, 40, 5)) * [[[0.1]], [[1]], [[3]]]
    out = samplers.dynamic_threshold(0.9, 1.0)(jnp.asarray(x0, jnp.float32))
    for mine, row in zip(np.asarray(out), x0, strict=True):
        s = max(np.quantile(np.abs(row), 0.9), 1.0)
        assert_allclose(mine, np.clip(row, -s, s) / s, rtol=1e-5)
    threshold = samplers.dynamic_threshold(0.9, 0.5)
    assert np.abs(run(threshold)).max() <= 0.5 + 1e-6


def test_ddim_keeps_the_epsilon_of_the_network_where_it_is_told():
    network = samplers.denoiser(
        lambda x, t, cond: jnp.tanh(2 * x + 1e-3 * t[:, None, None]),
        TABLE,
        prediction="epsilon",
        time="schedule",
        x0_transform=samplers.clip(0.5),
    )
    grid = samplers.grid(TABLE, 5)
    given = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f")

    def run(x0_transform=network.x0_transform, **options):
        denoise = dataclasses.replace(network, x0_transform=x0_transform)
        given_noise = samplers.GivenNoise(initial=jnp.asarray(given))
        how = dict(noise=given_noise, sampler="ddim", grid=grid, **options)
        return samplers.sample(denoise, KEY, **how)

    x = given * np.hypot(grid.points[0].alpha, grid.points[0].sigma)
    for a, b in grid.pairs:
        epsilon = np.tanh(2 * x + 1e-3 * a.t)
        x0 = np.clip((x - a.sigma * epsilon) / a.alpha, -0.5, 0.5)
        x = b.alpha * x0 + b.sigma * epsilon
    assert_allclose(run(keeps_epsilon=True), x, rtol=1e-4, atol=1e-5)
    assert np.abs(run() - x).max() > 0.1
    # Without a limit there is one epsilon.
    free = [run(None, keeps_epsilon=keeps, eta=0.5) for keeps in (False, True)]
    assert_allclose(*free, rtol=1e-4, atol=1e-4)


def test_arithmetic_is_float32_or_float64():
    start = np.random.default_rng(0).normal(size=SHAPE)
    expected = sample(noise=jnp.asarray(start, jnp.float32))
    assert_array_equal(sample(noise=start.astype(np.float32)), expected)
    for dtype in (jnp.bfloat16, jnp.float16):
        x = sample(noise=jnp.asarray(start, dtype))
        assert x.dtype == jnp.float32
        assert_allclose(x, expected, atol=0.05)

    def narrow(params, x, t, cond):
        assert x.dtype == t.dtype == jnp.float32
        return network(params, x, t, cond).astype(jnp.bfloat16)

    half = samplers.denoiser(narrow, TABLE, prediction="v", time="schedule", params=W)
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
        time="schedule",
        params=W,
    )
    settings = dict(shape=SHAPE, cond=COND, steps=1)
    assert_allclose(
        samplers.sample(half, KEY, uncond=UNCOND, guidance=8.0, **settings),
        samplers.sample(by_itself, KEY, **settings),
        atol=1e-5,
    )
    with jax.enable_x64(True):
        x = sample(noise=jnp.asarray(start))
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
        lambda x, t, cond: told.append(t) or x, TABLE, prediction="v", time="schedule"
    )
    probe(x[:2].astype(jnp.bfloat16), jnp.asarray([999, 701]))
    assert_array_equal(told[0], [999.0, 701.0])
    timed = samplers.denoiser(
        network, TABLE, prediction="v", params=W, time=TABLE.unit_time
    )
    same(timed(x, t, COND), a * x - s * network(W, x, t / 1000, COND))


class Own:
    """A network that says its time, as a `denoisers.Denoiser` does."""

    def __init__(self, *time_range):
        self.apply, self.time_range = network, time_range


@pytest.mark.parametrize("schedule", [TABLE, FLOW, noise.edm()], ids=repr)
def test_a_network_that_says_its_time_is_given_that_time(schedule):
    given = {"prediction": "v", "params": W}
    unit = samplers.denoiser(network, schedule, time="unit", **given)
    own = samplers.denoiser(Own(0.0, 1.0), schedule, **given)
    assert own.network is network
    times = np.array([schedule.t_data, schedule.t_noise])
    assert_array_equal(own.time(times), schedule.unit_time(times))
    assert_array_equal(own.time(times), unit.time(times))
    wide = samplers.denoiser(Own(-1.0, 9.0), schedule, **given)
    assert_allclose(wide.time(times), 10 * schedule.unit_time(times) - 1)
    again = samplers.denoiser(Own(-1.0, 9.0), schedule, **given)
    assert samplers.plan(wide) is samplers.plan(again)
    # The plan holds what the loop gives the network.
    held = samplers.plan(wide, steps=3).packed(np.float64)[:3, 0]
    assert_allclose(
        held, [wide.time(p.t) for p in samplers.plan(wide, steps=3).grid.points[:3]]
    )


def test_networks_of_this_library_take_unit_time():
    net = denoisers.transformer(
        dit.DiTConfig(
            architecture="adaln_zero",
            width=8,
            depth=1,
            heads=1,
            classes=2,
            image_shape=(4, 4, 1),
            patch_size=4,
        )
    )
    assert net.time_range == (0.0, 1.0)
    denoise = samplers.denoiser(net, TABLE, prediction="v", params={})
    assert denoise.network is net.apply and denoise.time(500.0) == 0.5


# Ways there and back.


@pytest.mark.parametrize("schedule", [TABLE, FLOW, noise.edm()])
def test_an_inversion_is_undone_by_sampling(schedule):
    denoise = optimal(schedule)
    image = 0.5 + 0.6 * jax.random.normal(KEY, SHAPE)

    def there_and_back(steps):
        settings = dict(sampler="ddim", steps=steps, grid="logsnr")
        source = samplers.SourceImage(image, invert=True)
        hidden = samplers.sample(denoise, image=source, **settings)
        back = samplers.sample(denoise, noise=hidden, **settings)
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
    half = samplers.SourceImage(image, strength=0.5)
    _, path = sample(image=half, noise=start, steps=10, output=TRAJECTORY)
    assert len(path.t) == 6 and path.t[0] == 499
    a, s = TABLE.alpha(499), TABLE.sigma(499)
    same(path.x[0], float(a) * image + float(s) * start)
    _, drawn = sample(image=half, steps=10, output=TRAJECTORY)
    fresh = (drawn.x[0] - float(a) * image) / float(s)
    same(fresh, sample(shape=SHAPE, output=TRAJECTORY)[1].x[0])
    little = samplers.SourceImage(None, strength=0.01)
    assert samplers.plan(DENOISE, steps=10, image=little).nfe == 1
    # The least strength leaves the image nearly as it was.
    denoise = optimal(TABLE)

    def change(strength):
        source = samplers.SourceImage(image, strength=strength)
        x = samplers.sample(denoise, KEY, image=source, steps=50)
        return np.abs(x - image).mean()

    near, far = change(0.02), change(1.0)
    assert near < 0.3 * far


# By day: of one and several stages, of one and several steps, with and without noise.
INPAINTED = ("ddim", "ddpm", "heun", "dpm++3m", "sde-dpm++2s", "unipc2")
POINT = samplers.denoiser(
    lambda x, t, cond: jnp.full_like(x, 0.25), TABLE, prediction="x0", time="schedule"
)


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(name, marks=() if name in INPAINTED else pytest.mark.slow)
        for name in samplers.SAMPLERS
    ],
)
def test_inpainting_keeps_what_is_known(sampler):
    image = jnp.sin(jnp.arange(128.0)).reshape(SHAPE)
    mask = np.zeros((1, 2, 2, 1), bool)
    mask[:, 0] = True
    x, path = samplers.sample(
        POINT,
        KEY,
        image=samplers.SourceImage(image, mask=mask),
        sampler=sampler,
        steps=7,
        output=TRAJECTORY,
    )
    assert_array_equal(x[:, 1], image[:, 1])
    assert_allclose(x[:, 0], 0.25, rtol=1e-6)
    # On the way there, what is known has the noise it began with.
    start = path.x[0]
    for x, a, s in list(zip(path.x, path.alpha, path.sigma, strict=True))[1:]:
        assert_allclose(x[:, 1], a * image[:, 1] + s * start[:, 1], atol=1e-5)


def test_masks_of_any_rank_and_in_between():
    image = jnp.sin(jnp.arange(128.0)).reshape(SHAPE)
    mask = jnp.asarray([1.0, 0.0, 0.5, 1.0])

    def run(mask):
        return sample(image=samplers.SourceImage(image, mask=mask))

    x = run(mask)
    same(x, run(jnp.broadcast_to(mask, SHAPE)))
    assert_array_equal(x[..., 1], image[..., 1])
    same(run(jnp.ones(SHAPE)), sample(shape=SHAPE))


def test_sampling_starts_from_noise_of_the_grids_own_level():
    start = jax.random.normal(jax.random.key(3), SHAPE)
    edm = noise.edm()

    def first(schedule, grid=None):
        denoise = samplers.denoiser(
            lambda x, t, cond: x, schedule, prediction="v", time="schedule"
        )
        run = samplers.sample(
            denoise, noise=start, steps=5, grid=grid, output=TRAJECTORY
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
        (
            dict(
                steps=6, guidance=samplers.Guidance(scale=3.0, interval=(332.0, 832.0))
            ),
            9,
        ),
        (
            dict(
                steps=10,
                image=samplers.SourceImage(None, strength=0.5),
                guidance=3.0,
            ),
            10,
        ),
        (
            dict(
                steps=5,
                image=samplers.SourceImage(None, invert=True),
                sampler="ddim",
            ),
            5,
        ),
    ],
)
def test_cost_is_that_of_its_evaluations(settings, evaluations):
    denoise = samplers.denoiser(
        matmul,
        TABLE,
        prediction="v",
        time="schedule",
        params=jnp.zeros((4, 8), jnp.float32),
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
            time="schedule",
        )
        found = samplers.cost(denoise, SHAPE, steps=3).model
        assert found == 3 * 2 * 32 * 4 * channels
