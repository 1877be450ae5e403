"""The size of what every module of a network returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def with_sizes(apply: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A network that also returns the mean |x| of what each of its modules returns.

    A name is the number of the call, then the module's path in its parent, so that the
    names of two widths of a network agree. The network runs its blocks one by one
    ("unroll") and computes none of them again ("remat").
    """

    def run(*inputs: Any) -> tuple[Any, dict[str, Any]]:
        sizes: dict[str, Any] = {}
        calls = 0

        def measure(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            nonlocal calls
            result = method(*args, **kwargs)
            if context.method_name == "__call__":
                module = context.module
                name = "/".join(module.path) or type(module).__name__
                for i, x in enumerate(jax.tree.leaves(result)):
                    if jnp.issubdtype(x.dtype, jnp.floating):
                        sizes[f"{calls:03d} {name} {i}"] = jnp.mean(jnp.abs(x))
                calls += 1
            return result

        with nn.intercept_methods(measure):
            return apply(*inputs), sizes

    return run
