"""Whether a policy of the rate keeps the sizes inside a network when it gets wider.

The coordinate check of Yang et al. 2022 (arXiv 2203.03466): a network of several widths
is trained for a few steps, and the mean |x| of what each of its modules returns is
compared. The sizes of the updates are compared, too: a matrix W with n_in inputs should
change by a spectral norm that grows like sqrt(n_out / n_in). A slope is that of ln size
on ln width. It is near 0 everywhere if the policy fits the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scaling_ldm import config
from scaling_ldm.models import activations, from_config
from scaling_ldm.training import (
    objective_checks,
    optimizer,
    rate_policies,
    train_step,
)

_STACKS = ("blocks", "single_blocks")  # their tensors begin with an axis of layers
_NOTHING = 1e-12  # smaller sizes are 0, as of what starts at zero

Sizes = dict[str, Float[np.ndarray, " widths"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Sizes at every width, after the last step.

    activations: module -> its mean |x|.
    updates: tensor -> spectral norm of its change, over sqrt(n_out / n_in); of a vector
      its root mean square.
    """

    widths: tuple[int, ...]
    activations: Sizes
    updates: Sizes

    def slopes(self) -> dict[str, float]:
        """The slope of every size that is not 0, by module or tensor."""
        found = {}
        x = np.log(self.widths)
        for sizes in (self.activations, self.updates):
            for name, values in sizes.items():
                if np.all(values > _NOTHING):
                    found[name] = float(np.polyfit(x, np.log(values), 1)[0])
        return found


def check(
    experiment: config.Experiment,
    widths: Sequence[int],
    depth: int,
    *,
    steps: int = 4,
    seeds: Sequence[int] = (0, 1, 2),
) -> Coordinates:
    """Trains one network at each width on random pictures, and measures it.

    Args:
      experiment: with a denoiser; its rate is constant, and its batch, policy and
        policy_width are used as they are.
      widths: at least two, ascending.
      depth: of all networks.
      steps: optimizer steps before the sizes are measured.
      seeds: of weights and pictures; sizes are means over them.
    """
    found = [_at(experiment, width, depth, steps, seeds) for width in widths]
    moved, changed = (
        {name: np.array([sizes[i][name] for sizes in found]) for name in found[0][i]}
        for i in range(2)
    )
    return Coordinates(widths=tuple(widths), activations=moved, updates=changed)


def _at(
    experiment: config.Experiment,
    width: int,
    depth: int,
    steps: int,
    seeds: Sequence[int],
) -> tuple[dict[str, float], dict[str, float]]:
    """(mean |x| of modules, sizes of updates) at one width."""
    functions = train_step.train_functions(experiment, width, depth, unroll=True)
    denoiser = from_config.denoiser(experiment, width, depth, True)
    sized = activations.with_sizes(denoiser.apply)
    policy = rate_policies.POLICIES[experiment.optimizer.learning_rate_policy]
    peak = policy.peak(experiment.optimizer, experiment.optimizer.learning_rate, width)
    numbers = optimizer.schedule_numbers(experiment.optimizer, peak, 0, steps)
    inputs = objective_checks.abstract_inputs(
        experiment, functions.objective, experiment.train.batch_size
    )
    init, step = jax.jit(functions.init), jax.jit(functions.step)
    measure = jax.jit(lambda *given: sized(*given)[1])
    moved: list[dict[str, float]] = []
    changed: list[dict[str, float]] = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        batch, uncond = (_filled(part, rng) for part in inputs)
        first = state = init(jax.random.key(seed))
        hyper = {"key": jax.random.key(seed + 1), **numbers}
        for _ in range(steps):
            state, _ = step(state, batch, uncond, hyper)
        cond = {name: batch[name] for name in denoiser.conditioning}
        t = jnp.linspace(0.1, 0.9, len(batch["x"]))
        sizes = measure(state.params, batch["x"], t, cond)
        moved.append({name: float(size) for name, size in sizes.items()})
        changed.append(updates(first.params, state.params))
    return _mean(moved), _mean(changed)


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _filled(shapes: Any, rng: np.random.Generator) -> Any:
    """Random arrays of these shapes: normal numbers, small ids, masks all true."""

    def fill(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        if leaf.dtype == bool:
            return jnp.ones(leaf.shape, bool)
        return jnp.asarray(rng.integers(0, 4, size=leaf.shape), leaf.dtype)

    return jax.tree.map(fill, shapes)


def updates(before: Any, after: Any, path: str = "") -> dict[str, float]:
    """Tensor -> the size of its change."""
    found: dict[str, float] = {}
    for name, value in after.items():
        here = f"{path}{name}"
        if isinstance(value, Mapping):
            found |= updates(before[name], value, f"{here}/")
            continue
        change = np.asarray(value, np.float64) - np.asarray(before[name], np.float64)
        stacked = here.split("/")[0] in _STACKS
        if name != "kernel":
            found[here] = float(np.sqrt(np.mean(change**2)))
            continue
        # What the kernel gives has the axes of its bias; without one it is [in, ...].
        outputs = np.ndim(after["bias"]) - stacked if "bias" in after else -1
        layers = change if stacked else change[None]
        axes = np.ndim(layers) - outputs if outputs > 0 else 2
        n_in = int(np.prod(layers.shape[1:axes]))
        matrices = layers.reshape(len(layers), n_in, -1)
        norms = [np.linalg.norm(matrix, 2) for matrix in matrices]
        found[here] = float(np.mean(norms) * (n_in / matrices.shape[2]) ** 0.5)
    return found
