"""diffusers' schedulers and our samplers on the same network, from the same noise.

For the parity tests. The network is a fixed nonlinear formula, the same one in torch
and in jax; noise is injected into both. Both compute in float32. A difference is the
largest of any element over the standard deviation of their result (0.05 to 10, most
near 0.6), which is stricter than over the largest value. It is at most 1e-4 for every
prediction, spacing and number of steps.

Where diffusers does something else, or cannot do it, a test says what, why and by how
much, and checks that too, so that a change is noticed.

Not compared: EDMEulerScheduler and EDMDPMSolverMultistepScheduler, which precondition
the network inside the scheduler; UniPC with Karras sigmas and final_sigmas_type=
"sigma_min", whose last step has no length but corrects.
"""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm.diffusion import noise, samplers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
MARKS = [
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these arrays are far too small to be shared
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
    torch.set_num_threads(threads)
    return x.movedim(1, -1).numpy()


def ours(
    kind,
    sampler,
    grid,
    *,
    start=START,
    learned=False,
    time=None,
    x0_transform=None,
    **options,
):
    # Ours starts with the noise of the first point's level, a flow of theirs with 1.
    first = np.hypot(grid.points[0].alpha, grid.points[0].sigma)
    denoise = samplers.denoiser(
        network_with_variance if learned else network,
        grid.schedule,
        prediction=KINDS[kind],
        time=time or "schedule",
        x0_transform=x0_transform,
    )
    return np.asarray(
        samplers.sample(
            denoise,
            noise=samplers.GivenNoise(
                initial=jnp.asarray(start / np.float32(first)),
                steps=jnp.asarray(DRAWS[: grid.steps]),
            ),
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


def differs(pair, expected):
    found = {n: difference(*pair(n)) for n in expected}
    wrong = [n for n, d in found.items() if not 0.5 < d / expected[n] < 2]
    assert not wrong, f"expected {expected}, found {found}"
