"""How each tensor of a denoiser is trained at another size than the base size.

Maximal update parametrisation (muP) for Adam: Yang et al. 2022 (arXiv 2203.03466), in
the form of their package `mup`; for diffusion transformers Zheng et al. 2025 (arXiv
2505.15270). A tensor's role says which of its axes grow with the width. It is read from
the shapes of the network at two widths, not from names:

  input   one growing axis, but no growing sum of inputs: patches, biases, tables, norms
  hidden  a matrix that sums over a growing axis and gives a growing one
  output  a matrix that sums over a growing axis and gives a fixed number
  finite  no growing axis: the table of words, the norms of a head, the last bias

The heads' width must not grow, so that attention keeps its scale of 1 / sqrt(head).

CompleteP (Dey et al. 2025, arXiv 2505.01618, with alpha = 1) adds the depth. With l =
depth / base depth, what a branch adds to the residual stream is multiplied by 1 / l,
and Adam's epsilon by 1 / (m l). The branches of a transformer end in matrices with
names of their own, `_LAST`; their biases belong to them. A U-Net's second number is not
a depth.

A forward multiplier a of a tensor W is not applied in the network. The stored tensor is
a W. Its gradient is multiplied by a, which gives that of W, and its update, too. So
clipping and Adam meet what they would meet in a network with the multiplier. The stored
weights are those of a network without it: sampling, export and other tools read them as
they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from scaling_ldm import config
from scaling_ldm.models import from_config

INPUT, HIDDEN, OUTPUT, FINITE = "input", "hidden", "output", "finite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Powers:
    """What a tensor of one role is multiplied by, as powers of m = width / base width.

    deviation: the standard deviation of its initial values, against the base width's.
    rate: its learning rate.
    multiplier: its forward multiplier.
    weight_decay: its decoupled weight decay, which the rate multiplies.
    """

    deviation: float = 0.0
    rate: float = 0.0
    multiplier: float = 0.0
    weight_decay: float = 0.0


# The rate of a hidden matrix times its weight decay is the same at every width.
MUP: Mapping[str, Powers] = {
    INPUT: Powers(),
    HIDDEN: Powers(deviation=-0.5, rate=-1.0, weight_decay=1.0),
    OUTPUT: Powers(multiplier=-1.0),
    FINITE: Powers(),
}
# The last layers of the branches, in the parts of a network that are its depth.
_DEPTH = ("blocks", "last", "single_blocks")
_LAST = ("out", "mlp_down", "image_out", "text_out", "image_down", "text_down")
# Tensors whose usual initial deviation falls as 1 / sqrt(width), other than matrices
# that sum over a growing axis.
_SHRINKING = ("modulation_table",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Factors of a network's tensors, each a tree of numbers like the parameters.

    initial: of the initial values that the network draws.
    gradient: of the gradient, before it is clipped.
    update: of Adam's direction.
    decay: of the weight decay.
    epsilon: of Adam's epsilon; one number for all tensors.
    """

    initial: Any
    gradient: Any
    update: Any
    decay: Any
    epsilon: float = 1.0


def multiply(tree: Any, factors: Any) -> Any:
    """Each leaf times its factor; leaves whose factor is 1 are left as they are."""
    return jax.tree.map(lambda x, f: x if f == 1.0 else x * f, tree, factors)


def of_network(
    experiment: config.Experiment,
    width: int,
    depth: int,
    powers: Mapping[str, Powers],
    with_depth: bool = False,
) -> Scaling | None:
    """The factors at one size; None at the base size, where all of them are 1.

    Args:
      powers: role -> powers, such as `MUP`.
      with_depth: whether the factors follow the depth, as in CompleteP.
    """
    cfg = experiment.optimizer
    m = width / cfg.policy_width
    branches = depth / cfg.policy_depth if with_depth else 1.0
    if m == 1.0 and branches == 1.0:
        return None
    shapes, wider = (
        from_config.parameter_shapes(from_config.network_config(experiment, w, depth))
        for w in (width, 2 * width)
    )
    found = scaling(shapes, roles(shapes, wider), m, powers, branches)
    epsilon = 1.0 / (m * branches) if with_depth else 1.0
    return dataclasses.replace(found, epsilon=epsilon)


def scaling(
    shapes: Any,
    found: Any,
    m: float,
    powers: Mapping[str, Powers],
    branches: float = 1.0,
) -> Scaling:
    """The factors of tensors of these shapes and roles at m = width / base width.

    Args:
      branches: what the residual branches are divided by.
    """

    def factors(keys: Any, shape: Any, role: str) -> tuple[float, ...]:
        del shape
        p, path = powers[role], [key.key for key in keys]
        sums = path[-1] == "kernel" and role in (HIDDEN, OUTPUT)
        usual = -0.5 if sums or path[-1] in _SHRINKING else 0.0
        multiplier = m**p.multiplier
        if path[0] in _DEPTH and path[-2] in _LAST:
            multiplier /= branches
        return (
            multiplier * m ** (p.deviation - usual),
            multiplier,
            m**p.rate * multiplier,
            m ** (p.rate + p.weight_decay),
        )

    every = jax.tree_util.tree_map_with_path(factors, shapes, found)
    parts = [
        jax.tree.map(lambda f, i=i: f[i], every, is_leaf=lambda f: isinstance(f, tuple))
        for i in range(4)
    ]
    return Scaling(initial=parts[0], gradient=parts[1], update=parts[2], decay=parts[3])


def roles(shapes: Any, wider: Any) -> Any:
    """The role of every tensor, as a tree of names like the parameters.

    Args:
      shapes, wider: the shapes of a network at two widths, nested dicts of leaves whose
        names are those of flax.

    Raises:
      ValueError: a tensor whose axes grow in a way that no role describes.
    """
    if not isinstance(shapes, Mapping):
        raise ValueError(f"the tensor {shapes} has no name")
    found = {}
    for name, leaf in shapes.items():
        if isinstance(leaf, Mapping):
            found[name] = roles(leaf, wider[name])
            continue
        growing = _growing(leaf, wider[name])
        if name == "kernel":
            found[name] = _of_kernel(growing, _bias(shapes, wider))
        elif len(growing) < 2:
            found[name] = INPUT if growing else FINITE
        else:
            found[name] = ""
        if not found[name]:
            raise ValueError(
                f"{name} {leaf.shape}, at another width {wider[name].shape}: no role "
                "has these growing axes"
            )
    return found


def _growing(leaf: Any, wider: Any) -> list[int]:
    """The axes that differ between two widths."""
    pairs = zip(leaf.shape, wider.shape, strict=True)
    return [axis for axis, (a, b) in enumerate(pairs) if a != b]


def _bias(shapes: Any, wider: Any) -> bool | None:
    """Whether the bias beside a kernel grows; None if there is none."""
    if "bias" not in shapes:
        return None
    return bool(_growing(shapes["bias"], wider["bias"]))


def _of_kernel(growing: list[int], bias: bool | None) -> str:
    """The role of a kernel; "" if there is none.

    A bias has the axes that a kernel gives. A kernel without a bias is [E, heads, head]
    here, or begins with its layers, so it sums over its first growing axis only if
    another one grows.
    """
    if not growing:
        return FINITE
    if len(growing) == 2:
        return HIDDEN if bias is not False else ""
    if len(growing) == 1:
        return OUTPUT if bias is False else INPUT
    return ""
