"""Our DDIM and DDPM give diffusers' pictures; see diffusers_samplers."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers_samplers import (
    BEFORE_FLOW,
    FEW,
    MARKS,
    SCHEDULE,
    SPACINGS,
    START,
    close,
    differs,
    diffusers,
    made,
    network,
    ours,
    theirs,
    times_of,
)

from scaling_ldm.diffusion import noise, samplers
from scaling_ldm.diffusion.samplers import ddim_ddpm
from scaling_ldm.workdir import scheduler_config

pytestmark = MARKS


def step_as_ddim(grid, *, gap, eta=0.0):
    """Their DDIM steps to t - 1000 // n, whatever time is evaluated next."""
    rows = samplers.SolverTable(stochastic=eta > 0)
    for a in grid.points[:-1]:
        b = grid.points[-1]
        if a.t >= gap:
            t = a.t - gap
            b = samplers.GridPoint(
                t, float(grid.schedule.alpha(t)), float(grid.schedule.sigma(t))
            )
        if b.t < a.t or b.sigma < a.sigma:
            pair = samplers.TimeGrid(grid.schedule, (a, b))
            rows.rows += ddim_ddpm.ddim(pair, eta=eta).rows
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
    """Our default recomputes epsilon from the clipped x0, as theirs if it is asked."""

    def pair(n):
        scheduler = made(
            diffusers.DDIMScheduler, n, prediction_type=kind, clip_sample_range=0.6
        )
        our = ours(
            kind, "ddim", times_of(scheduler), eta=eta, x0_transform=samplers.clip(0.6)
        )
        return our, theirs(scheduler, eta=eta, clipped=True)

    close(pair, FEW)


@pytest.mark.parametrize(
    "said",
    [
        {"clip_sample_range": 0.6},
        {"thresholding": True, "sample_max_value": 1.5},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.5},
    ],
)
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("kind", BEFORE_FLOW)
def test_ddim_limited_as_a_folder_of_theirs_says(tmp_path, kind, eta, said):
    """By default theirs limits x0 alone, and keeps epsilon."""

    def pair(n):
        scheduler = made(diffusers.DDIMScheduler, n, prediction_type=kind, **said)
        scheduler.save_config(tmp_path)
        found = scheduler_config.read("load", tmp_path)
        our = ours(
            kind,
            grid=found.grid(n, 1),
            x0_transform=found.x0_transform,
            eta=eta,
            **found.sampler,
        )
        return our, theirs(scheduler, eta=eta)

    close(pair, (4, 6, 10))  # with 20, all elements of a picture become the same


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
    denoise = samplers.denoiser(
        network, SCHEDULE, prediction="epsilon", time="schedule"
    )
    image = samplers.SourceImage(jnp.asarray(START), invert=True)
    return np.asarray(samplers.sample(denoise, image=image, sampler="ddim", grid=grid))


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
    """1 - alphas_bar - std^2 is zero in the first step, and may be below once rounded.

    Theirs takes its root. On some processors that is nan at 50 steps.
    """
    for n in (4, 50):
        our, their = zero_terminal_pair("v_prediction", 1.0, n)
        assert np.all(np.isfinite(our))
        if n == 4 or not np.any(np.isnan(their)):
            assert np.abs(our - their).max() <= 1e-5 * np.abs(their).max()


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
