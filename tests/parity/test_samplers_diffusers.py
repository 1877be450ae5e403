"""Our samplers give the pictures that diffusers' schedulers give, from the same noise.

The network is a fixed nonlinear formula, the same one in torch and in jax; noise is
injected into both. Both compute in float32. A difference is the largest of any element
over the standard deviation of their result (0.05 to 10, most near 0.6), which is
stricter than over the largest value, and at most 1e-4 for every prediction, spacing and
number of steps.

Where diffusers does something else, or cannot do it, the last part of the file says
what, why and by how much, and checks that too, so that a change is noticed.

Not compared: EDMEulerScheduler and EDMDPMSolverMultistepScheduler, which precondition
the network inside the scheduler; UniPC with Karras sigmas and final_sigmas_type=
"sigma_min", whose last step has no length but corrects.
"""

import functools
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm.diffusion import noise, samplers
from scaling_ldm.diffusion.samplers import diffusion, dpm, table

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning"),  # theirs
]

TOLERANCE = 1e-4
STEPS = (4, 6, 10, 20, 50, 250)
FEW = (4, 6, 10, 20)  # on both sides of the 15 steps below which orders fall
SHAPE = (2, 4, 4, 3)
START = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
DRAWS = np.random.default_rng(1).normal(size=(max(STEPS), *SHAPE)).astype(np.float32)

SCHEDULE = noise.scaled_linear()
FLOW = noise.rectified_flow()
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
KINDS = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
BEFORE_FLOW = list(KINDS)[:3]
SPACINGS = ("leading", "linspace", "trailing")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These arrays are far too small to be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The network, and both ways to run it.


def formula(xp, x, t):
    u = t / 1000
    return xp.tanh(x + xp.sin(3 * u)) + 0.5 * xp.sin(x - 5 * u)


def variance(xp, x, t):
    return xp.sin(3 * x + t / 200)


def network(x, t, cond):
    return formula(jnp, x, t[:, None, None, None])


def network_with_variance(x, t, cond):
    t = t[:, None, None, None]
    return jnp.concatenate([formula(jnp, x, t), variance(jnp, x, t)], -1)


def theirs(
    scheduler, *, start=START, learned=False, last_draw=True, eta=None, clipped=False
):
    """Their loop, as their pipelines write it: [B, H, W, C] of numpy."""
    options = {} if eta is None else {"eta": eta, "use_clipped_model_output": clipped}
    draws = [torch.from_numpy(draw).movedim(-1, 1) for draw in DRAWS]
    if not last_draw:
        draws[len(scheduler.timesteps) - 1] = torch.zeros_like(draws[0])
    draws = iter(draws)
    module = sys.modules[type(scheduler).__module__]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else Karras times that repeat confuse it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "randn_tensor", lambda *_, **__: next(draws), raising=False
        )
        x = torch.from_numpy(np.array(start)).movedim(-1, 1)
        for t in scheduler.timesteps:
            scaled = x
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(x, t)
            at = t.float()
            out = formula(torch, scaled, at)
            if learned:
                out = torch.cat([out, variance(torch, scaled, at)], 1)
            x = scheduler.step(out, t, x, **options).prev_sample
    return x.movedim(1, -1).numpy()


def ours(kind, sampler, grid, *, start=START, learned=False, time=None, **options):
    # Ours starts with the noise of the first point's level, a flow of theirs with 1.
    first = np.hypot(grid.points[0].alpha, grid.points[0].sigma)
    denoise = samplers.denoiser(
        network_with_variance if learned else network,
        grid.schedule,
        prediction=KINDS[kind],
        time=time,
    )
    return np.asarray(
        samplers.sample(
            denoise,
            initial=jnp.asarray(start / np.float32(first)),
            step_noise=jnp.asarray(DRAWS[: grid.steps]),
            sampler=sampler,
            grid=grid,
            **options,
        )
    )


def difference(our, their):
    """The largest, in standard deviations of their result."""
    return float(np.abs(our - their).max() / np.std(their))


def close(pair, steps=STEPS):
    """`pair` makes (ours, theirs) of a number of steps."""
    found = {n: difference(*pair(n)) for n in steps}
    print(f"largest difference {max(found.values()):.1e}")  # pytest -rP shows it
    wrong = {n: d for n, d in found.items() if not d <= TOLERANCE}
    assert not wrong, f"differences by steps: {wrong}"


def made(scheduler, n, **config):
    """A scheduler with its times set."""
    config = {**BETAS, **config} if "shift" not in config else config
    scheduler = scheduler(**config)
    scheduler.set_timesteps(n)
    return scheduler


def points_of(scheduler, schedule=SCHEDULE):
    """The grid of a scheduler's own sigmas and of the times it tells the network.

    For sigmas that no time of the schedule has: interpolated, Karras', shifted.
    """
    sigmas = scheduler.sigmas.double().numpy()
    times = scheduler.timesteps.double().numpy()
    if scheduler.order == 2:  # Heun: all but the ends are there twice
        sigmas, times = [sigmas[0], *sigmas[1::2]], [times[0], *times[1::2]]
    points = []
    for t, sigma in zip([*times, 0.0], sigmas, strict=True):
        flow = isinstance(schedule, noise.RectifiedFlow)
        alpha = 1 - sigma if flow else 1 / np.sqrt(1 + sigma**2)
        scaled = sigma if flow else sigma * alpha
        points.append(samplers.GridPoint(float(t), float(alpha), float(scaled)))
    if points[-1][1:] == points[-2][1:]:  # sigma_min twice: a step of no length
        points.pop()
    return samplers.TimeGrid(schedule, tuple(points))


def times_of(scheduler, *, end="data"):
    """The grid of our schedule at a scheduler's times."""
    return samplers.from_times(SCHEDULE, scheduler.timesteps.numpy(), end=end)


# Our named spacings are theirs, where the names mean the same.

ODD = (1, 3, 7, 13, 30, 77, 333, 999)


@pytest.mark.parametrize("n", STEPS + ODD)
def test_named_times(n):
    def times(steps, spacing, **options):
        points = samplers.grid(SCHEDULE, steps, spacing, **options).points
        return [point.t for point in points[:-1]]

    one_step = diffusers.DDIMScheduler, diffusers.DDPMScheduler
    sigma = diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler
    multi = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
    for offset in (0, 1):
        for each in one_step + sigma[:1]:
            s = made(each, n, timestep_spacing="leading", steps_offset=offset)
            assert s.timesteps.tolist() == times(n, "leading", offset=offset)
    for each in one_step + sigma[:1] + multi:
        s = made(each, n, timestep_spacing="trailing")
        assert s.timesteps.tolist() == times(n, "trailing")
    for each in one_step:
        s = made(each, n, timestep_spacing="linspace")
        # Of one step theirs is at t = 0, where no noise is left to remove.
        assert s.timesteps.tolist() == (times(n, "linspace") if n > 1 else [0])
    if n > 1:
        s = made(sigma[0], n, timestep_spacing="linspace")  # not rounded to whole steps
        np.testing.assert_allclose(s.timesteps, times(n, "linspace"), atol=0.5001)
    # Theirs are the first n of the n + 1 times that the name gives elsewhere.
    for each in (*multi, diffusers.DPMSolverSinglestepScheduler):
        assert made(each, n).timesteps.tolist() == times(n + 1, "linspace")[:-1]
    for each in multi:
        s = made(each, n, timestep_spacing="leading")
        assert s.timesteps.tolist() == times(n + 1, "leading")[:-1]


@pytest.mark.parametrize("n", STEPS)
def test_named_sigmas(n):
    karras = samplers.grid(SCHEDULE, n, "karras")
    ratios = [point.sigma / point.alpha for point in karras.points]
    times = [round(point.t) for point in karras.points[:-1]]
    for each in (
        diffusers.DPMSolverMultistepScheduler,
        diffusers.DPMSolverSinglestepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.EulerDiscreteScheduler,
    ):
        s = made(each, n, use_karras_sigmas=True)
        np.testing.assert_allclose(s.sigmas, ratios, rtol=1e-4)
        np.testing.assert_allclose(s.timesteps.round(), times, atol=1)
    # Pipelines of flow models pass these sigmas; the shift is the scheduler's.
    for shift in (1.0, 3.0):
        s = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        s.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
        named = samplers.grid(FLOW, n, "flow_shifted", shift=shift)
        np.testing.assert_allclose(s.sigmas, [p.sigma for p in named.points], rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_named_schedules(name, zero_terminal):
    theirs_of = {"cosine": "squaredcos_cap_v2"}.get(name, name)
    ends = {} if name != "scaled_linear" else BETAS
    scheduler = diffusers.DDIMScheduler(
        **{**ends, "beta_schedule": theirs_of}, rescale_betas_zero_snr=zero_terminal
    )
    schedule = noise.SCHEDULES[name]()
    schedule = noise.zero_terminal_snr(schedule) if zero_terminal else schedule
    # Their products of a thousand float32 factors; the last betas of the cosine are
    # 0.999, of which 1 - beta keeps four digits.
    rtol = 1e-3 if name == "cosine" else 1e-4
    np.testing.assert_allclose(
        schedule.alphas_bar, scheduler.alphas_cumprod, rtol=rtol, atol=1e-12
    )


# DDIM and DDPM.


def step_as_ddim(grid, *, gap, eta=0.0):
    """Their DDIM steps to t - 1000 // n, whatever time is evaluated next."""
    rows = table.SolverTable(stochastic=eta > 0)
    for a in grid.points[:-1]:
        b = grid.points[-1]
        if a.t >= gap:
            t = a.t - gap
            b = samplers.GridPoint(
                t, float(grid.schedule.alpha(t)), float(grid.schedule.sigma(t))
            )
        if b.t < a.t or b.sigma < a.sigma:
            pair = samplers.TimeGrid(grid.schedule, (a, b))
            rows.rows += diffusion.ddim(pair, eta=eta).rows
    return rows


def ddim_pair(kind, spacing, n, *, eta=0.0, offset=0, to_one=True):
    scheduler = made(
        diffusers.DDIMScheduler,
        n,
        prediction_type=kind,
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=to_one,
        clip_sample=False,
    )
    end = "data" if to_one else "schedule"
    times = scheduler.timesteps.numpy()
    if not to_one and times[-1] == 0:
        times = times[:-1]  # their last step goes from t = 0 to t = 0
    grid = samplers.from_times(SCHEDULE, times, end=end)
    meant = spacing == "leading" or (spacing == "trailing" and 1000 % n == 0)
    rule = "ddim" if meant else functools.partial(step_as_ddim, gap=1000 // n)
    return ours(kind, rule, grid, eta=eta), theirs(scheduler, eta=eta)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_ddim(kind, spacing, eta):
    close(functools.partial(ddim_pair, kind, spacing, eta=eta))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_ddim_that_ends_at_the_schedule(kind, offset, eta):
    """set_alpha_to_one=False, as Stable Diffusion's own settings have it."""
    pair = functools.partial(
        ddim_pair, kind, "leading", eta=eta, offset=offset, to_one=False
    )
    close(pair, FEW)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_ddim_clipped(kind, eta):
    """Ours recomputes epsilon from the clipped x0: use_clipped_model_output=True."""

    def pair(n):
        scheduler = made(
            diffusers.DDIMScheduler, n, prediction_type=kind, clip_sample_range=0.6
        )
        our = ours(
            kind, "ddim", times_of(scheduler), eta=eta, x0_transform=samplers.clip(0.6)
        )
        return our, theirs(scheduler, eta=eta, clipped=True)

    close(pair, FEW)


def zero_terminal_pair(kind, eta, n):
    scheduler = made(
        diffusers.DDIMScheduler,
        n,
        prediction_type=kind,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )
    grid = samplers.grid(noise.zero_terminal_snr(SCHEDULE), n, "trailing")
    return ours(kind, "ddim", grid, eta=eta), theirs(scheduler, eta=eta)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_zero_terminal_snr(kind, eta):
    close(functools.partial(zero_terminal_pair, kind, eta), (4, 10, 20, 50, 250))


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_ddim_on_other_schedules(name, kind):
    schedule = noise.SCHEDULES[name]()
    betas = {"cosine": "squaredcos_cap_v2"}.get(name, name)

    def pair(n):
        scheduler = diffusers.DDIMScheduler(
            beta_schedule=betas,
            prediction_type=kind,
            timestep_spacing="trailing",
            clip_sample=False,
        )
        scheduler.set_timesteps(n)
        return ours(kind, "ddim", samplers.grid(schedule, n, "trailing")), theirs(
            scheduler
        )

    close(pair, (4, 10, 20, 50, 250))


VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_large": "fixed_large",
    "learned": "learned_range",
}


def ddpm_pair(kind, spacing, variance, n, *, last_draw=False, limit=None):
    learned = variance == "learned"
    scheduler = made(
        diffusers.DDPMScheduler,
        n,
        prediction_type=kind,
        timestep_spacing=spacing,
        variance_type=VARIANCES[variance],
        clip_sample=limit is not None,
        clip_sample_range=limit,
    )
    return (
        ours(
            kind,
            "ddpm",
            samplers.grid(SCHEDULE, n, spacing),
            learned=learned,
            variance=variance,
            x0_transform=None if limit is None else samplers.clip(limit),
        ),
        theirs(scheduler, learned=learned, last_draw=last_draw),
    )


@pytest.mark.parametrize("variance", list(VARIANCES))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_ddpm(kind, spacing, variance):
    """Of theirs, the draw that it adds to the finished picture is set to zero."""
    close(functools.partial(ddpm_pair, kind, spacing, variance))


@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_ddpm_clipped(kind):
    close(functools.partial(ddpm_pair, kind, "leading", "fixed_small", limit=0.6), FEW)


def test_ddim_inversion():
    """Theirs tells the network the time where a step ends, ours where it begins.

    So the grid has the next point's time at each point; see the last part.
    """

    def pair(n):
        scheduler = made(
            diffusers.DDIMInverseScheduler, n, set_alpha_to_one=False, clip_sample=False
        )
        grid = inversion_grid(scheduler, n, shifted=True)
        return inverted(grid), theirs(scheduler)

    close(pair)


def inversion_grid(scheduler, n, *, shifted):
    times = scheduler.timesteps.numpy()
    levels = [t for t in times - 1000 // n if t >= 0] + [times[-1]]
    told = [*times[-len(levels) + 1 :], 0] if shifted else levels
    points = tuple(
        samplers.GridPoint(
            float(now), float(SCHEDULE.alpha(level)), float(SCHEDULE.sigma(level))
        )
        for now, level in zip(told, map(float, levels), strict=True)
    )
    return samplers.TimeGrid(SCHEDULE, points)


def inverted(grid):
    denoise = samplers.denoiser(network, SCHEDULE, prediction="epsilon")
    image = jnp.asarray(START)
    return np.asarray(
        samplers.sample(denoise, image=image, invert=True, sampler="ddim", grid=grid)
    )


# DPM-Solver++, in several steps and in one.

# Not epsilon: at alpha = 1e-6, where theirs begin, the first estimate is all there is.
FLOW_KINDS = ("flow_prediction", "sample")


def multistep_name(order, stochastic):
    return ("sde-" if stochastic else "") + (
        "dpm++1" if order == 1 else f"dpm++{order}m"
    )


def dpm_options(order):
    """The third order of theirs is the published code's."""
    return {"curvature": 0.5} if order == 3 else {}


def dpm_grid(scheduler):
    config = scheduler.config
    if config.use_flow_sigmas:
        return points_of(scheduler, FLOW)
    if config.use_karras_sigmas:
        return points_of(scheduler)
    least = config.final_sigmas_type == "sigma_min"
    return times_of(scheduler, end="schedule" if least else "data")


def multistep_pair(
    kind, order, n, *, stochastic=False, rule=None, ours_has=(), **config
):
    scheduler = made(
        diffusers.DPMSolverMultistepScheduler,
        n,
        prediction_type=kind,
        solver_order=order,
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        **config,
    )
    return (
        ours(
            kind,
            rule or multistep_name(order, stochastic),
            dpm_grid(scheduler),
            **dpm_options(order),
            **dict(ours_has),
        ),
        theirs(scheduler),
    )


ODE_AND_SDE = [(1, False), (2, False), (3, False), (1, True), (2, True)]


@pytest.mark.parametrize("order, stochastic", ODE_AND_SDE)
@pytest.mark.parametrize("spacing", [*SPACINGS, "karras"])
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_multistep(kind, spacing, order, stochastic):
    config = (
        dict(use_karras_sigmas=True)
        if spacing == "karras"
        else dict(timestep_spacing=spacing)
    )
    close(
        functools.partial(multistep_pair, kind, order, stochastic=stochastic, **config)
    )


@pytest.mark.parametrize("order, stochastic", ODE_AND_SDE)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_multistep_flow(kind, shift, order, stochastic):
    pair = functools.partial(
        multistep_pair,
        kind,
        order,
        stochastic=stochastic,
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    close(pair, STEPS if kind == "flow_prediction" else FEW)


@pytest.mark.parametrize("order, stochastic", ODE_AND_SDE)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_multistep_options(spacing, solver, lower, final, order, stochastic):
    pair = functools.partial(
        multistep_pair,
        "v_prediction",
        order,
        stochastic=stochastic,
        timestep_spacing=spacing,
        solver_type=solver,
        lower_order_final=lower,
        final_sigmas_type=final,
        ours_has={"solver": solver, "lower_order_final": lower},
    )
    close(pair, FEW)


@pytest.mark.parametrize("order, stochastic", ODE_AND_SDE)
def test_multistep_euler_at_final(order, stochastic):
    """What ours does anyway on a grid that ends without noise."""
    pair = functools.partial(
        multistep_pair,
        "epsilon",
        order,
        stochastic=stochastic,
        euler_at_final=True,
        lower_order_final=False,
        ours_has={"lower_order_final": False},
    )
    close(pair, FEW)


def singlestep_rule(order, stochastic):
    return functools.partial(
        dpm.singlestep, order=order, stochastic=stochastic, shared_noise=False
    )


def singlestep_pair(kind, order, n, *, stochastic=False, rule=None, **config):
    config = {"solver_type": "midpoint", "lower_order_final": True, **config}
    scheduler = made(
        diffusers.DPMSolverSinglestepScheduler,
        n,
        prediction_type=kind,
        solver_order=order,
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        **config,
    )
    return (
        ours(
            kind,
            rule or singlestep_rule(order, stochastic),
            dpm_grid(scheduler),
            solver=config["solver_type"],
            lower_order_final=config["lower_order_final"],
        ),
        theirs(scheduler),
    )


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order, stochastic", ODE_AND_SDE)
@pytest.mark.parametrize("spacing", ["linspace", "karras"])
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_singlestep(kind, spacing, order, stochastic, solver):
    pair = functools.partial(
        singlestep_pair,
        kind,
        order,
        stochastic=stochastic,
        solver_type=solver,
        use_karras_sigmas=spacing == "karras",
    )
    close(pair, STEPS if solver == "midpoint" else FEW)


@pytest.mark.parametrize("order, stochastic", [(3, True)])
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_singlestep_third_order_sde(kind, order, stochastic):
    """In the midpoint form, which has no curvature; for the other see below."""
    close(functools.partial(singlestep_pair, kind, order, stochastic=stochastic), FEW)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_singlestep_flow(kind, order, shift):
    pair = functools.partial(
        singlestep_pair, kind, order, use_flow_sigmas=True, flow_shift=shift
    )
    close(pair, STEPS if kind == "flow_prediction" else FEW)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("order, steps", [(1, FEW), (2, FEW), (3, (6, 9, 18))])
def test_singlestep_to_the_schedules_end(order, steps, lower, solver):
    pair = functools.partial(
        singlestep_pair,
        "v_prediction",
        order,
        solver_type=solver,
        final_sigmas_type="sigma_min",
        lower_order_final=lower,
    )
    close(pair, steps)


# UniPC.


def unipc_pair(kind, order, form, n, *, corrector=True, **config):
    config = {"lower_order_final": True, **config}
    scheduler = made(
        diffusers.UniPCMultistepScheduler,
        n,
        prediction_type=kind,
        solver_order=order,
        solver_type=form,
        disable_corrector=[] if corrector else list(range(n)),
        **config,
    )
    return (
        ours(
            kind,
            f"unipc{order}",
            dpm_grid(scheduler),
            form=form,
            corrector=corrector,
            lower_order_final=config["lower_order_final"],
        ),
        theirs(scheduler),
    )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", [*SPACINGS, "karras"])
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_unipc(kind, spacing, order):
    config = (
        dict(use_karras_sigmas=True)
        if spacing == "karras"
        else dict(timestep_spacing=spacing)
    )
    close(functools.partial(unipc_pair, kind, order, "bh2", **config))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("form", ["bh1", "bh2"])
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_unipc_options(kind, form, lower, corrector, order):
    pair = functools.partial(
        unipc_pair,
        kind,
        order,
        form,
        corrector=corrector,
        lower_order_final=lower,
        final_sigmas_type="sigma_min",
    )
    close(pair, FEW)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_unipc_flow(kind, order, shift):
    pair = functools.partial(
        unipc_pair, kind, order, "bh2", use_flow_sigmas=True, flow_shift=shift
    )
    close(pair, STEPS if kind == "flow_prediction" else FEW)


# Euler and Heun. Theirs works on x / alpha and, but for "leading", starts from
# sigma / alpha times the noise, where ours starts from the noise: x / alpha is that
# over sigma. The same start is given to both.


def sigma_pair(scheduler, kind, sampler):
    first = float(scheduler.sigmas[0])
    start = START * float(scheduler.init_noise_sigma)
    grid = points_of(scheduler)
    our = ours(kind, sampler, grid, start=(start / np.hypot(first, 1)).astype("f"))
    return our / grid.points[-1].alpha, theirs(scheduler, start=start)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_euler(kind, spacing, karras, final):
    def pair(n):
        scheduler = made(
            diffusers.EulerDiscreteScheduler,
            n,
            prediction_type=kind,
            timestep_spacing=spacing,
            use_karras_sigmas=karras,
            final_sigmas_type=final,
        )
        return sigma_pair(scheduler, kind, "euler")

    close(pair, STEPS if final == "zero" else FEW)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_heun(kind, spacing, karras):
    def pair(n):
        scheduler = made(
            diffusers.HeunDiscreteScheduler,
            n,
            prediction_type=kind,
            timestep_spacing=spacing,
            use_karras_sigmas=karras,
        )
        return sigma_pair(scheduler, kind, "heun")

    close(pair)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_flow_matching(sampler, shift):
    name = f"FlowMatch{sampler.title()}DiscreteScheduler"

    def pair(n):
        scheduler = made(getattr(diffusers, name), n, shift=shift)
        grid = points_of(scheduler, FLOW)
        return ours("flow_prediction", sampler, grid), theirs(scheduler)

    close(pair)


def thousandfold(t):
    return 1000 * t


def named_flow(shift, n):
    return ours(
        "flow_prediction",
        "euler",
        samplers.grid(FLOW, n, "flow_shifted", shift=shift),
        time=thousandfold,
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_as_pipelines_run_it(shift):
    """They pass sigmas 1 ... 1 / n: our named grid, whatever the scheduler's is."""

    def pair(n):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
        return named_flow(shift, n), theirs(scheduler)

    close(pair)


# Expected differences: at these numbers of steps, of this size, to a factor of two.


def differs(pair, expected):
    found = {n: difference(*pair(n)) for n in expected}
    wrong = [n for n, d in found.items() if not 0.5 < d / expected[n] < 2]
    assert not wrong, f"expected {expected}, found {found}"


def test_ddim_that_evaluates_elsewhere():
    """Their DDIM steps to t - 1000 // n, then evaluates the grid's next time there.

    The two are the same where n divides 1000 and for "leading". With "linspace" they
    are up to 1000 / n apart, with "trailing" one or two. Ours steps to the next time.
    (`step_as_ddim` is ours stepping as theirs: so test_ddim agrees.)
    """

    def pair(spacing, n):
        scheduler = made(
            diffusers.DDIMScheduler,
            n,
            prediction_type="v_prediction",
            timestep_spacing=spacing,
            clip_sample=False,
        )
        grid = samplers.grid(SCHEDULE, n, spacing)
        return ours("v_prediction", "ddim", grid), theirs(scheduler)

    differs(functools.partial(pair, "linspace"), {4: 1.1, 10: 0.54, 250: 0.0078})
    differs(functools.partial(pair, "trailing"), {6: 0.17, 7: 0.18, 30: 0.033})


def test_trailing_times_by_accumulation():
    """np.arange adds up a rounded step: x.5 falls either way, or one time is too many.

    So for 117 of 1 ... 1000 steps, of which 48 is the first: off by one where it is x.5
    (ours is exact, and rounds to the even step), or a last t = -1 from 61 steps on.
    """
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    uneven, longer = [], []
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        their = scheduler.timesteps.numpy()
        our = samplers.grids.SPACINGS["trailing"](SCHEDULE, n, 0)
        assert np.abs(their[:n] - our).max() <= 1
        if len(their) > n:
            assert their[n:].tolist() == [-1]
            longer.append(n)
        elif np.any(their != our):
            uneven.append(n)
    assert (len(uneven), len(longer)) == (55, 62)
    assert (uneven[0], longer[0]) == (48, 61)


def test_ddim_clips_x0_alone_by_default():
    """use_clipped_model_output=False keeps the epsilon that the clipped x0 denies."""

    def pair(n):
        scheduler = made(
            diffusers.DDIMScheduler,
            n,
            prediction_type="v_prediction",
            clip_sample_range=0.6,
        )
        transform = samplers.clip(0.6)
        grid = times_of(scheduler)
        our = ours("v_prediction", "ddim", grid, x0_transform=transform)
        return our, theirs(scheduler)

    differs(pair, {10: 0.19, 50: 0.73})


@pytest.mark.parametrize(
    "variance, expected",
    [("fixed_large", {10: 1.1, 50: 0.74}), ("learned", {10: 1.1, 50: 0.46})],
)
def test_ddpm_adds_noise_to_the_finished_picture(variance, expected):
    """Theirs leaves the last draw out only where t = 0; ours where no noise is left.

    With "trailing" the last step starts at t = 1000 / n - 1, and adds noise of all its
    beta. ("fixed_small" is 0 there anyway.)
    """
    pair = functools.partial(
        ddpm_pair, "v_prediction", "trailing", variance, last_draw=True
    )
    differs(pair, expected)


def test_ddim_of_zero_terminal_snr_at_eta_one():
    """1 - alphas_bar - std^2 is zero in the first step, and below it once rounded."""
    for n in (4, 50):
        our, their = zero_terminal_pair("v_prediction", 1.0, n)
        assert np.all(np.isfinite(our))
        assert np.all(np.isnan(their)) == (n == 50)


def test_multistep_of_zero_terminal_snr():
    """Theirs puts alphas_bar = 2^-24 in place of zero; ours takes the limit."""

    def pair(n):
        scheduler = made(
            diffusers.DPMSolverMultistepScheduler,
            n,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        )
        grid = samplers.grid(noise.zero_terminal_snr(SCHEDULE), n, "trailing")
        return ours("v_prediction", "dpm++2m", grid), theirs(scheduler)

    differs(pair, {4: 0.088, 10: 0.0068, 50: 0.0008})


def test_ddim_inversion_evaluates_where_a_step_ends():
    """Theirs tells the network the time it steps to; ours (as the paper) the time of x.

    Given the same times, test_ddim_inversion agrees.
    """

    def pair(n):
        scheduler = made(
            diffusers.DDIMInverseScheduler, n, set_alpha_to_one=False, clip_sample=False
        )
        return inverted(inversion_grid(scheduler, n, shifted=False)), theirs(scheduler)

    differs(pair, {10: 0.68, 50: 0.18, 250: 0.038})


def test_curvature_of_third_order():
    """Theirs (and the authors' code) halves it: order two. Ours is of order three."""

    def pair(n):
        scheduler = made(
            diffusers.DPMSolverMultistepScheduler,
            n,
            prediction_type="v_prediction",
            solver_order=3,
        )
        our = ours("v_prediction", "dpm++3m", dpm_grid(scheduler), curvature=1.0)
        return our, theirs(scheduler)

    differs(pair, {6: 0.017, 10: 0.024, 20: 0.0056, 50: 0.0016, 250: 0.00039})


def wrong_sign(h, k=1, count=3):
    """The weights with which theirs solves the SDE: w2 - 1 for w2."""
    found = right_weights(h, k, count)
    if k == 2 and count > 2:
        found[2] -= 1
    return found


right_weights = dpm.weights


@pytest.mark.parametrize("name", ["multistep", "singlestep"])
def test_third_order_sde_has_a_wrong_sign(name, monkeypatch):
    """Of w2 = (e^-2h - 1 + 2h) / (2h)^2 ... + 1/2, theirs has - 1/2.

    The error is the whole second difference: it does not vanish with more steps. With
    that one sign in ours, both agree.
    """
    options = {}
    if name == "multistep":
        pair, config = multistep_pair, {}
        expected = {6: 0.59, 10: 1.4, 20: 1.6, 50: 1.0, 250: 4.0}
    else:
        pair, config = singlestep_pair, {"solver_type": "heun"}
        options = {"shared_noise": False}
        expected = {6: 2.9, 10: 3.6, 20: 3.6, 50: 3.6, 250: 2.5}
    pair = functools.partial(pair, "v_prediction", 3, stochastic=True, **config)
    differs(pair, expected)
    # A partial of its own, whose plans are not kept for other tests.
    rule = functools.partial(getattr(dpm, name), order=3, stochastic=True, **options)
    monkeypatch.setattr(dpm, "weights", wrong_sign)
    found = {n: difference(*pair(n, rule=rule)) for n in FEW}
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh1_without_noise_at_the_end(order):
    """B = h is infinite in the last step: theirs multiplies it by zero, all is NaN."""
    our, their = unipc_pair("v_prediction", order, "bh1", 10)
    assert np.all(np.isfinite(our)) and np.all(np.isnan(their))


def test_unipc_of_full_order_without_noise_at_the_end():
    """Theirs needs lower_order_final there; ours falls to order 1 by itself."""
    pair = functools.partial(unipc_pair, "v_prediction", n=10, lower_order_final=False)
    their = made(
        diffusers.UniPCMultistepScheduler,
        10,
        prediction_type="v_prediction",
        lower_order_final=False,
    )
    assert not np.any(np.isfinite(theirs(their)))
    our = ours("v_prediction", "unipc2", dpm_grid(their), lower_order_final=False)
    assert np.all(np.isfinite(our))
    assert difference(*pair(order=1, form="bh2")) <= TOLERANCE


def test_euler_at_final_of_a_grid_that_ends_with_noise():
    """An order of 1 in the last step alone: ours falls there below 15 steps, or not."""
    pair = functools.partial(
        multistep_pair,
        "v_prediction",
        2,
        euler_at_final=True,
        final_sigmas_type="sigma_min",
    )
    differs(pair, {20: 0.23, 50: 0.075, 250: 0.0068})


def test_karras_times_are_rounded():
    """For the network alone: the sigmas are not. Ours tells it the time they are at."""

    def pair(n):
        scheduler = made(
            diffusers.DPMSolverMultistepScheduler,
            n,
            prediction_type="v_prediction",
            use_karras_sigmas=True,
        )
        our = ours("v_prediction", "dpm++2m", samplers.grid(SCHEDULE, n, "karras"))
        return our, theirs(scheduler)

    differs(pair, {4: 0.00079, 10: 0.00024, 20: 0.0013})


def test_euler_starts_below_the_schedule():
    """From sigma x noise, all but sqrt(1 - alpha^2) of what noising would give."""

    def pair(n):
        scheduler = made(
            diffusers.EulerDiscreteScheduler,
            n,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        )
        start = START * float(scheduler.init_noise_sigma)
        our = ours("v_prediction", "euler", points_of(scheduler))
        return our, theirs(scheduler, start=start)

    differs(pair, {4: 0.009, 50: 0.01})


@pytest.mark.parametrize(
    "shift, expected", [(1.0, {4: 0.07, 50: 0.00026}), (3.0, {4: 0.12, 50: 0.00083})]
)
def test_flow_matching_by_itself_stops_short(shift, expected):
    """Without a pipeline's sigmas theirs evaluates down to 1 / 1000, shifted twice."""

    def pair(n):
        scheduler = made(diffusers.FlowMatchEulerDiscreteScheduler, n, shift=shift)
        return named_flow(shift, n), theirs(scheduler)

    differs(pair, expected)
