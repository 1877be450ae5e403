"""Starts the parameters of one network from those of another.

Names and shapes must be the same, and so must the settings that shapes do not show.
Exceptions are patterns of paths with a treatment. "zero": a kernel keeps its first
inputs, and the weights of further inputs start at zero. "new": the parameter is
initialised anew. "drop": it is not read. "here": the setting of the trained network is
used.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Settings of a network that its parameters show or that change no number of it.
_SHOWN = (
    "width",
    "depth",
    "single_depth",
    "image_shape",
    "text_tokens",
    "text_width",
    "vocab_size",
    "time_width",
    "mlp_ratio",
    "classes",
    "out_channels",
    "extra_channels",
    "pooled_width",
    "guidance",
    "base",
    "multiples",
    "blocks",
    "channels",
    "latent_channels",
    "image_channels",
    "middle_attention",
    "quant_conv",
    "scale",
    "shift",
    "dtype",
    "remat",
    "attention",
    "unroll",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How each parameter of the network that is trained gets its first value.

    problems: the differences that no exception covers, a line each.
    treated: path -> "zero" or "new", of the parameters that are not read as they are.
    pixels: of a patch, if the network is a transformer.
    """

    problems: tuple[str, ...]
    treated: Mapping[str, str]
    pixels: int = 1


def fit(
    theirs: Any,
    ours: Any,
    their_shapes: Any,
    our_shapes: Any,
    exceptions: Sequence[tuple[str, str]],
    unsaid: Sequence[str] = (),
) -> Fit:
    """Compares the network of some parameters with the one that starts from them.

    Args:
      theirs, ours: configs of the networks.
      their_shapes, our_shapes: their parameters, as trees of shapes.
      exceptions: (pattern of paths, one of config.names.INIT_TREATMENTS). A setting of
        the network has the path "network.NAME".
      unsaid: paths of settings that the weights do not say, of the network or of the
        objective. Only an exception gives them.
    """
    used: set[str] = set()

    def treatment(path: str, *allowed: str) -> str:
        """The first allowed treatment that is given for a path; "" if there is none."""
        for pattern, name in exceptions:
            if name in allowed and fnmatch.fnmatchcase(path, pattern):
                used.add(f"{pattern}={name}")
                return name
        return ""

    if type(ours) is not type(theirs):
        there, here = type(theirs).__name__, type(ours).__name__
        return Fit(problems=(f"network: {there} there, {here} here",), treated={})
    problems, treated = [], {}
    for field in dataclasses.fields(ours):
        there, here = (getattr(n, field.name) for n in (theirs, ours))
        name = f"network.{field.name}"
        if name in unsaid and not treatment(name, "here"):
            problems.append(
                f"{name}: not said there, {here!r} here; {name}=here takes this one"
            )
            continue
        if field.name not in _SHOWN and there != here and not treatment(name, "here"):
            problems.append(f"{name}: {there!r} there, {here!r} here")
    settings = {f"network.{field.name}" for field in dataclasses.fields(ours)}
    problems += [
        f"{name}: not said there; {name}=here takes that of the experiment"
        for name in unsaid
        if name not in settings and not treatment(name, "here")
    ]
    before, after = _paths(their_shapes), _paths(our_shapes)
    for path, shape in after.items():
        there = before.get(path)
        chosen = treatment(path, "new")
        if not chosen and there is not None and there != shape:
            chosen = treatment(path, "zero")
        patches = path == _PATCHES and theirs.patch_size != ours.patch_size
        if chosen == "zero" and (patches or not _may_grow(there, shape)):
            problems.append(
                f"{path}: {there} there, {shape} here; only new inputs start at zero"
            )
        elif chosen:
            treated[path] = chosen
        elif there != shape:
            said = "missing" if there is None else f"{there}"
            problems.append(f"{path}: {said} there, {shape} here")
    for path, shape in before.items():
        if path not in after and not treatment(path, "drop"):
            problems.append(f"{path}: {shape} there, none here")
    problems += [
        f"config.train.init_exceptions: {pattern}={name} matches no difference"
        for pattern, name in exceptions
        if f"{pattern}={name}" not in used
        and not (name == "zero" and fnmatch.filter(after, pattern))
    ]
    pixels = getattr(ours, "patch_size", 1) ** 2
    return Fit(problems=tuple(problems), treated=treated, pixels=pixels)


def _paths(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _may_grow(there: tuple[int, ...] | None, here: tuple[int, ...]) -> bool:
    """Whether a kernel has more inputs here, and the same outputs."""
    return (
        there is not None
        and len(there) == len(here) >= 2
        and (*there[:-2], there[-1]) == (*here[:-2], here[-1])
        and there[-2] < here[-2]
    )


def _by_path(tree: Any) -> dict[str, jax.Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


_PATCHES = "entry/patch/kernel"  # of a transformer; its inputs are patch x patch x C


def transferred(found: Fit, params: Any, fresh: Any) -> Any:
    """The parameters of the network that is trained, sharded as `fresh`.

    Args:
      params: of the other network.
      fresh: newly initialised ones of this network.
    """
    theirs = _by_path(params)

    def value(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        chosen = found.treated.get(name)
        if chosen == "new":
            return leaf
        if chosen == "zero":
            return _grown(theirs[name], leaf, found.pixels if name == _PATCHES else 1)
        return theirs[name]

    return jax.tree_util.tree_map_with_path(value, fresh)


def _grown(kernel: jax.Array, like: jax.Array, pixels: int) -> jax.Array:
    """A kernel [..., pixels x C, out] with further channels whose weights are zero."""
    *lead, inputs, outputs = like.shape

    def grow(kernel: jax.Array) -> jax.Array:
        if not jax.sharding.get_abstract_mesh().empty:
            kernel = jax.reshard(kernel, jax.sharding.PartitionSpec())
        old = kernel.reshape(*lead, pixels, -1, outputs)
        more = inputs // pixels - old.shape[-2]
        zeros = jnp.zeros((*lead, pixels, more, outputs), kernel.dtype)
        return jnp.concatenate([old, zeros], axis=-2).reshape(like.shape)

    return jax.jit(grow, out_shardings=like.sharding)(kernel)
