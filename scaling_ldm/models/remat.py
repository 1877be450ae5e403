"""What a block keeps for its backward pass, and what it computes again.

The policies are those of config.names.REMAT_POLICIES, and "none" without remat. Inside
of `sharded.on_rows` whole weights are never kept, nor what follows from them alone:
they are gathered again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from scaling_ldm.models import sharded

_INPUT = "block_input"
POLICIES: dict[str, Callable[..., Any]] = {
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def block(
    apply: Callable[..., Any],
    policy: str,
    dtype: Any,
    *,
    prevent_cse: bool = True,
) -> Callable[..., Any]:
    """A block whose parameters are gathered in it, and gathered again for its gradient.

    Args:
      apply: (x, params, *rest) -> x, with whole parameters.
      policy: "none", or a key of POLICIES.
      dtype: the type of the block's arithmetic, in which its parameters are gathered.
      prevent_cse: as in `jax.checkpoint`; False inside of a loop.

    Raises:
      ValueError: no such policy, such as the True or False of version 0.1.0.
    """
    if policy != "none" and policy not in POLICIES:
        raise ValueError(
            f"remat = {policy!r}; known: none, {', '.join(POLICIES)} (0.1.0 had True "
            'for "blocks" and False for "none")'
        )

    def gathers(x: Any, params: Any, *rest: Any) -> Any:
        if policy == "offload":
            x = jax.tree.map(lambda a: checkpoint_name(a, _INPUT), x)
        return apply(x, sharded.gather(params, dtype), *rest)

    if policy == "none":
        return _gathered_twice(apply, dtype) if sharded.is_manual() else gathers
    return jax.checkpoint(gathers, prevent_cse=prevent_cse, policy=POLICIES[policy])


@jax.custom_vjp
def joined(x: Any, params: Any) -> tuple[Any, Any]:
    """Its inputs; their gradients are given on only when all are computed.

    A block that begins with it, with whole parameters, has computed the gradients of
    its weights before that of its input leaves it. Without a loop around the blocks,
    nothing but a reduce-scatter waits for the gradients of weights. XLA's scheduler for
    GPUs then computes them at the end of the step, and what they are made of lives
    until then. What is scattered may still travel during the next block.
    """
    return x, params


def _joined_forward(x: Any, params: Any) -> tuple[tuple[Any, Any], None]:
    return (x, params), None


def _joined_backward(_: None, gradients: Any) -> Any:
    return jax.lax.optimization_barrier(gradients)


joined.defvjp(_joined_forward, _joined_backward)


def _gathered_twice(apply: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """The block for "none" where devices share its parameters.

    Residuals that follow from the parameters alone are not kept. The backward pass
    computes them from parameters that it gathers.
    """

    def pullback(x: Any, parts: Any, rest: Any) -> tuple[Any, Any]:
        return jax.vjp(apply, x, sharded.gather(parts, dtype), *rest)

    @jax.custom_vjp
    def applied(x: Any, parts: Any, rest: Any) -> Any:
        return apply(x, sharded.gather(parts, dtype), *rest)

    def forward(x: Any, parts: Any, rest: Any) -> tuple[Any, Any]:
        y, pull = pullback(x, parts, rest)
        again = _follows(pullback, x, parts, rest)
        kept = [
            leaf
            for leaf, is_again in zip(jax.tree.leaves(pull), again, strict=True)
            if not is_again
        ]
        leaves, tree = jax.tree.flatten((x, rest))
        inputs = _InputTypes(tuple(jax.typeof(leaf) for leaf in leaves), tree)
        return y, (kept, parts, inputs)

    def backward(saved: Any, g: Any) -> tuple[Any, Any, Any]:
        kept, parts, inputs = saved
        x, rest = inputs.zeros()  # no kept residual follows from them
        _, pull = pullback(x, parts, rest)
        leaves, tree = jax.tree.flatten(pull)
        again, stored = _follows(pullback, x, parts, rest), iter(kept)
        residuals = [
            leaf if is_again else next(stored)
            for leaf, is_again in zip(leaves, again, strict=True)
        ]
        dx, dwhole, *drest = tree.unflatten(residuals)(g)
        _, scatter = jax.vjp(lambda parts: sharded.gather(parts, dtype), parts)
        return dx, scatter(dwhole)[0], tuple(drest)

    applied.defvjp(forward, backward)
    return lambda x, params, *rest: applied(x, params, rest)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _InputTypes:
    """The types of a block's inputs; of no array."""

    types: tuple[Any, ...]
    tree: Any

    def zeros(self) -> Any:
        return self.tree.unflatten(
            jax.lax.pcast(
                jnp.zeros(t.shape, t.dtype),
                tuple(t.manual_axis_type.varying),
                to="varying",
            )
            for t in self.types
        )


def _follows(pullback: Callable[..., Any], x: Any, parts: Any, rest: Any) -> list[bool]:
    """Of each residual of a block: whether it follows from the parameters alone."""

    def residuals(x: Any, rest: Any, parts: Any) -> Any:
        return jax.tree.leaves(pullback(x, parts, rest)[1])

    jaxpr = jax.make_jaxpr(residuals)(x, rest, parts).jaxpr
    inputs = jaxpr.invars[: len(jax.tree.leaves((x, rest)))]
    depends = set(inputs)  # variables that follow from x or rest
    for eqn in jaxpr.eqns:
        if any(isinstance(v, core.Var) and v in depends for v in eqn.invars):
            depends.update(eqn.outvars)
    return [not (isinstance(v, core.Var) and v in depends) for v in jaxpr.outvars]
