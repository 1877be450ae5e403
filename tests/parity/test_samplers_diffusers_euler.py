"""Our Euler and Heun give diffusers' pictures; see diffusers_samplers."""

import numpy as np
import pytest
from diffusers_samplers import (
    BEFORE_FLOW,
    FEW,
    FLOW,
    MARKS,
    SPACINGS,
    START,
    STEPS,
    close,
    differs,
    diffusers,
    made,
    ours,
    points_of,
    theirs,
)

from scaling_ldm.diffusion import samplers

pytestmark = MARKS

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
