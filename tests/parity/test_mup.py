"""Training steps under muP, against the package of its authors on a PyTorch twin.

What the package requires besides torch and pyyaml is for its plots, so it is installed
alone: `python -m pip install --no-deps mup==1.0.0`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling_ldm import config
from scaling_ldm.models import from_config
from scaling_ldm.training import optimizer, rate_policies

torch = pytest.importorskip("torch")
mup = pytest.importorskip("mup")

from benchmarks import torch_dit  # noqa: E402

pytestmark = pytest.mark.parity
BASE, DEPTH, RATE, STEPS = 32, 2, 3e-3, 5


def experiment():
    c = config.default()
    c.data.shape = (8, 8, 3)
    c.data.text_tokens, c.data.vocab_size = 3, 24
    c.encode.text_encoder = "vocabulary"
    c.model.head_dim, c.model.compute_dtype = 8, "float32"
    c.model.text_width, c.model.time_width = 6, 8
    c.optimizer.learning_rate_policy, c.optimizer.policy_width = "mup", BASE
    # Some gradients are 0 but for rounding; eps is above that.
    c.optimizer.eps, c.optimizer.weight_decay = 1e-5, 0.3
    c.plan.sizes = ((BASE, DEPTH),)
    return config.resolve(c)


def with_output(params, factor):
    """The parameters with the last matrix times a factor."""
    last = {**params["exit"]["patch"]}
    last["kernel"] = last["kernel"] * factor
    return {**params, "exit": {**params["exit"], "patch": last}}


def twin(e, width):
    """The network in PyTorch, with muP's last layer."""
    network = torch_dit.Transformer(e, width, DEPTH)
    network.out = mup.MuReadout(network.out.in_features, network.out.out_features)
    return network


@pytest.mark.parametrize("width", [16, 32, 128])
def test_training_steps_are_those_of_the_package(width):
    e, m = experiment(), width / BASE
    denoiser = from_config.denoiser(e, width, DEPTH, True)
    params = denoiser.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    shape = params["exit"]["patch"]["kernel"].shape
    params["exit"]["patch"]["kernel"] = jnp.asarray(rng.normal(size=shape) / width, "f")
    x, target = rng.normal(size=(2, 4, 8, 8, 3)).astype("f")
    t = rng.uniform(size=4).astype("f")
    text, mask = rng.integers(0, 24, (4, 3)), np.ones((4, 3), bool)

    theirs = twin(e, width)
    mup.set_base_shapes(
        theirs, twin(e, BASE), delta=twin(e, 2 * BASE), rescale_params=False
    )
    theirs.load(with_output(params, m))
    adamw = mup.MuAdamW(theirs.parameters(), lr=RATE, eps=1e-5, weight_decay=0.3)
    for _ in range(STEPS):
        given = (torch.tensor(a) for a in (x, t, text, mask))
        loss = ((theirs(*given) - torch.tensor(target)) ** 2).mean()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), e.optimizer.clip_norm)
        adamw.step()

    def of(params):
        cond = {"text": jnp.asarray(text), "mask": jnp.asarray(mask)}
        return jnp.mean((denoiser.apply(params, x, t, cond) - target) ** 2)

    ours = optimizer.adamw(e.optimizer, rate_policies.scaling(e, width, DEPTH))
    state, gradient = ours.init(params), jax.jit(jax.value_and_grad(of))
    first = params
    for _ in range(STEPS):
        value, slope = gradient(params)
        direction, state = ours.update(slope, state, params)
        params = optimizer.descend(params, direction, np.asarray(RATE, "f"))
    assert float(value) == pytest.approx(loss.item(), rel=1e-4)
    before, after = twin(e, width), twin(e, width)
    before.load(with_output(first, m))
    after.load(with_output(params, m))
    given = {name: p.detach().numpy() for name, p in before.named_parameters()}
    wanted = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    for name, p in after.named_parameters():
        moved = np.abs(wanted[name] - given[name]).max()
        assert_allclose(
            p.detach().numpy(), wanted[name], atol=0.01 * moved, err_msg=name
        )
