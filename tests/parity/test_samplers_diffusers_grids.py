"""Our named grids and schedules are diffusers', where the names mean the same."""

import numpy as np
import pytest
from diffusers_samplers import (
    BETAS,
    FLOW,
    MARKS,
    SCHEDULE,
    STEPS,
    differs,
    diffusers,
    made,
    ours,
    theirs,
)

from scaling_ldm.diffusion import noise, samplers

pytestmark = MARKS
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
        our = samplers.SPACINGS["trailing"](SCHEDULE, n, 0)
        assert np.abs(their[:n] - our).max() <= 1
        if len(their) > n:
            assert their[n:].tolist() == [-1]
            longer.append(n)
        elif np.any(their != our):
            uneven.append(n)
    assert (len(uneven), len(longer)) == (55, 62)
    assert (uneven[0], longer[0]) == (48, 61)


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
