"""Sizes inside a network at several widths: how they are measured, and what they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import coordinates
from numpy.testing import assert_allclose

from scaling_ldm.models import activations, from_config
from scaling_ldm.training import coordinate_check


def test_the_sizes_are_those_of_what_the_modules_return():
    e = coordinates.experiment("in_context", "fixed", 32, 1e-2, 4)
    network = from_config.denoiser(e, 32, 2, True)
    params = jax.jit(network.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    cond = {"text": jnp.ones((4, 4), jnp.int32), "mask": jnp.ones((4, 4), bool)}
    t = jnp.linspace(0.1, 0.9, 4)
    out, sizes = jax.jit(activations.with_sizes(network.apply))(params, x, t, cond)
    assert_allclose(out, jax.jit(network.apply)(params, x, t, cond), atol=1e-6)
    assert float(jnp.abs(out).mean()) == 0  # it starts at zero
    names = [name.split(" ", 1)[1] for name in sizes]
    assert names.count("attention/qkv 0") == 2  # one for each block
    assert names.count("DiTBlock 0") == 2
    patches = sizes["000 patch 0"]
    kernel, bias = params["entry"]["patch"]["kernel"], params["entry"]["patch"]["bias"]
    cut = x.reshape(4, 4, 2, 4, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(4, 16, 12)
    assert float(patches) == pytest.approx(
        np.abs(np.asarray(cut) @ np.asarray(kernel) + np.asarray(bias)).mean(), rel=1e-4
    )


def test_the_size_of_an_update_is_its_spectral_norm_per_root_of_outputs():
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(24, 24)))[0], np.eye(6)
    change = 5.0 * np.outer(u[0], v[0])  # spectral norm 5
    before = {"a": {"kernel": np.ones((24, 6)), "bias": np.zeros(6)}}
    after = {"a": {"kernel": 1 + change, "bias": np.full(6, -2.0)}}
    assert coordinate_check.updates(before, after) == pytest.approx(
        {"a/kernel": 5.0 * (24 / 6) ** 0.5, "a/bias": 2.0}
    )
    # In stacks and with heads: [layers, heads, head, out], [layers, in, heads, head].
    for shape, bias, n_in in (
        ((2, 3, 8, 6), (2, 6), 24),
        ((2, 24, 2, 3), (2, 2, 3), 24),
    ):
        before = {"blocks": {"kernel": np.zeros(shape), "bias": np.zeros(bias)}}
        both = np.stack([change, 3 * change]).reshape(shape)  # the mean is 10
        after = {"blocks": {"kernel": both, "bias": np.zeros(bias)}}
        found = coordinate_check.updates(before, after)["blocks/kernel"]
        assert found == pytest.approx(10.0 * (n_in / 6) ** 0.5)
    # Without a bias: [in, heads, head].
    alone = (
        {"q": {"kernel": np.zeros((24, 2, 3))}},
        {"q": {"kernel": change.reshape(24, 2, 3)}},
    )
    assert coordinate_check.updates(*alone)["q/kernel"] == pytest.approx(10.0)


def test_slopes_are_those_of_logarithms():
    found = coordinate_check.Coordinates(
        widths=(32, 64, 128),
        activations={"a": np.array([1.0, 2.0, 4.0]), "zero": np.zeros(3)},
        updates={"b": np.array([4.0, 2.0, 1.0])},
    )
    assert found.slopes() == pytest.approx({"a": 1.0, "b": -1.0})


# Bounds of |slope| under muP at widths x1 to x8, by family: what was measured, rounded
# up. At a rate of 1e-2 a slope says as much about seeds as about widths.
BOUNDS = {"in_context": 0.06, "cross_attention": 0.09, "adaln_zero": 0.09}
BOUNDS |= {"mmdit": 0.15, "flux": 0.15}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", BOUNDS)
def test_mup_keeps_sizes_at_every_width_and_a_fixed_rate_does_not(architecture):
    widths, largest = (32, 64, 128, 256), BOUNDS[architecture]
    e = coordinates.experiment(architecture, "mup", widths[0], 1e-3, 8)
    found = coordinate_check.check(e, widths, 2, seeds=(0, 1)).slopes()
    worst = max(found, key=lambda name: abs(found[name]))
    assert abs(found[worst]) < largest, (worst, found[worst])
    fixed = coordinates.experiment(architecture, "fixed", widths[0], 1e-3, 8)
    grown = coordinate_check.check(fixed, widths[::3], 2, seeds=(0,)).slopes()
    assert max(grown.values()) > 0.2
