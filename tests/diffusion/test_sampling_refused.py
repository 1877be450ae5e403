"""samplers.sample: what is refused, and with which message."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from small_sampler import (
    COND,
    DENOISE,
    FLOW,
    INVERTED,
    KEY,
    SHAPE,
    TABLE,
    TRAJECTORY,
    network,
    same,
    sample,
)

from scaling_ldm.diffusion import noise, samplers
from scaling_ldm.diffusion.samplers import compiled_loop

# What is refused.

IMAGE = jnp.zeros(SHAPE)
ZERO = noise.zero_terminal_snr(TABLE)
FLOWING = samplers.denoiser(network, FLOW, prediction="flow", time="schedule")
OWN = types.SimpleNamespace(apply=network, time_range=(0.0, 1.0))


def giving(output):
    """A network of x alone."""
    return samplers.denoiser(
        lambda x, t, cond: output(x), TABLE, prediction="epsilon", time="schedule"
    )


REFUSED = {
    "no size": (lambda: sample(), "give shape, noise or image"),
    "sizes": (
        lambda: sample(shape=(4, 2, 2, 4), noise=IMAGE),
        "shapes differ: .*4, 2",
    ),
    "mask": (
        lambda: sample(shape=SHAPE, mask=IMAGE),
        "has no option mask; .* samplers.SourceImage takes mask",
    ),
    "invert": (lambda: sample(shape=SHAPE, invert=True), "samplers.SourceImage takes"),
    "strength": (lambda: sample(shape=SHAPE, strength=0.5), "SourceImage takes streng"),
    "no strength": (
        lambda: samplers.SourceImage(IMAGE, strength=0.0),
        r"lie in \(0, 1\], got 0",
    ),
    "no image": (
        lambda: sample(shape=SHAPE, image=samplers.SourceImage(None)),
        "the image is None",
    ),
    "masked inversion": (
        lambda: samplers.SourceImage(IMAGE, mask=IMAGE, invert=True),
        "begins at its image: leave out mask",
    ),
    "inversion of noise": (
        lambda: sample(
            image=samplers.SourceImage(IMAGE, invert=True), noise=IMAGE, sampler="ddim"
        ),
        "begins at its image: leave out mask",
    ),
    "no uncond": (lambda: sample(shape=SHAPE, guidance=2.0), "guidance needs uncond"),
    "callback": (
        lambda: samplers.Output(callback_every=0),
        "callback_every must be at least 1, got 0",
    ),
    "transform": (
        lambda: samplers.sample(
            dataclasses.replace(DENOISE, x0_transform=samplers.clip(1)),
            image=samplers.SourceImage(IMAGE, invert=True),
            sampler="ddim",
        ),
        "x0_transform does not apply to an inversion",
    ),
    "no key": (lambda: samplers.sample(DENOISE, shape=SHAPE), "give a key"),
    "no key for steps": (
        lambda: samplers.sample(DENOISE, noise=IMAGE, sampler="ddpm"),
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
        lambda: sample(
            shape=SHAPE,
            sampler="ddpm",
            noise=samplers.GivenNoise(steps=jnp.zeros((5, *SHAPE))),
        ),
        r"step noise of shape \(5, 8, 2, 2, 4\), needed: \(6, 8, 2, 2, 4\)",
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
    "channels": (
        lambda: samplers.Guidance(scale=2.0, channels=0),
        "channels must be at least 1, got 0",
    ),
    "interval": (
        lambda: samplers.Guidance(scale=2.0, interval=(1.0, 0.5)),
        r"must be \(low, high\), got \(1.0, 0.5\)",
    ),
    "prediction": (
        lambda: samplers.denoiser(network, TABLE, prediction="eps", time="schedule"),
        "'eps' is none of epsilon, x0, v",
    ),
    "prediction's name": (
        lambda: samplers.denoiser(network, TABLE, prediction="epslon", time="schedule"),
        "'epslon' is none of epsilon, .*, score. Did you mean epsilon?",
    ),
    "unreadable": (
        lambda: samplers.plan(
            samplers.denoiser(network, ZERO, prediction="epsilon", time="schedule")
        ),
        "'epsilon' does not determine x0 at t = 999, where alpha = 0 and sigma = 1;",
    ),
    "unreadable there": (
        lambda: samplers.plan(
            samplers.denoiser(network, TABLE, prediction="x0", time="schedule"),
            sampler="ddim",
            image=INVERTED,
        ),
        "'x0' does not determine epsilon at t = 0",
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
        lambda: samplers.plan(DENOISE, sampler="ddim", eta=1.0, image=INVERTED),
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
        "t = 0, is where the grid ends. .* leave it out of the times",
    ),
    "grid of another": (
        lambda: sample(shape=SHAPE, grid=samplers.grid(FLOW, 5)),
        "the grid is of another schedule",
    ),
    "schedule": (
        lambda: samplers.denoiser(network, "linear", prediction="v", time="schedule"),
        "schedule must be one of scaling_ldm.noise.*got 'linear'",
    ),
    "no time": (
        lambda: samplers.denoiser(network, TABLE, prediction="v"),
        "time = None: state what the network takes as t. 'schedule': .*0 to 999. 'un",
    ),
    "another time": (
        lambda: samplers.denoiser(network, TABLE, prediction="v", time="steps"),
        "time = 'steps': state what",
    ),
    "a time twice": (
        lambda: samplers.denoiser(OWN, TABLE, prediction="v", params=1, time="unit"),
        "time = 'unit': a denoiser states its own range",
    ),
    "no params": (
        lambda: samplers.denoiser(OWN, TABLE, prediction="v"),
        "a denoiser needs params",
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
        lambda: sample(
            shape=jax.ShapeDtypeStruct(
                SHAPE,
                jnp.float32,
                sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            )
        ),
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
    "spacing's name": (
        lambda: samplers.grid(TABLE, 5, "kraras"),
        "'kraras' is none of uniform, .*, flow_shifted. Did you mean karras?",
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
def test_what_cannot_be_is_refused_before_anything_compiles(what, unchecked):
    call, message = REFUSED[what]
    programs = compiled_loop.compiled._cache_size()
    with pytest.raises(ValueError, match=message):
        call()
    assert compiled_loop.compiled._cache_size() == programs


@pytest.mark.parametrize(
    "sampler", [name for name in samplers.SAMPLERS if name not in ("ddim", "euler")]
)
def test_only_first_order_samplers_invert(sampler):
    with pytest.raises(ValueError, match="cannot invert"):
        samplers.plan(DENOISE, sampler=sampler, image=INVERTED)


def test_a_sampler_may_be_a_function():
    def halfway(grid, *, share=0.5):
        """DDIM that goes a share of each step's way to x0."""
        table = samplers.SolverTable()
        for a, b in grid.pairs:
            table.add(a, b, x=1 - share, m=[share])
        return table

    x, path = sample(shape=SHAPE, sampler=halfway, share=0.25, output=TRAJECTORY)
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
