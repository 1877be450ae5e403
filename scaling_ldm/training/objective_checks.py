"""Checks which arrays an objective reads, and what its loss returns.

Whatever does not fit is refused by its name before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config
from scaling_ldm.training.objective import Objective

# Names in the log beside those of metrics, and what a dispatch returns with them.
LOGGED = (
    "version",
    "step",
    "flops",
    "hardware_flops",
    "six_nd",
    "images",
    "tokens",
    "flops_per_second",
    "mfu",
    "seconds",
    "stop",
)


def abstract_batch(
    experiment: config.Experiment, rows: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of `rows` pictures, with all that a source gives of them."""
    s, e = experiment.data.text_tokens, experiment.model.text_width
    words = experiment.reads_words
    kinds = {
        "x": (experiment.data.shape, jnp.float32),
        "text": ((s,), jnp.int32) if words else ((s, e), jnp.float32),
        "mask": ((s,), jnp.bool_),
        "label": ((), jnp.int32),
        "image": (experiment.data.shape, jnp.float32),
    }
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype)
        for name, (shape, dtype) in kinds.items()
    }


def abstract_inputs(
    experiment: config.Experiment, learnt: Objective, rows: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes and types of a batch as an objective reads it, and of its null condition.

    Raises:
      ConfigError: it reads arrays that neither a source nor its field `arrays` has.
    """
    every = abstract_batch(experiment, rows) | {
        name: jax.ShapeDtypeStruct((rows, *one.shape), one.dtype)
        for name, one in learnt.arrays.items()
    }
    _check_names(experiment, learnt.conditioning, every, "a source here")
    batch = {name: every[name] for name in ("x", *learnt.conditioning)}
    # A coarse picture is never dropped.
    uncond = {
        name: jax.ShapeDtypeStruct(batch[name].shape[1:], batch[name].dtype)
        for name in learnt.conditioning
        if name != "image" and name not in learnt.arrays
    }
    return batch, uncond


def as_stored(
    experiment: config.Experiment, shapes: Mapping[str, Any]
) -> dict[str, Any]:
    """The same shapes, with features of captions in the type of their records."""
    found = dict(shapes)
    if "text" in found and not experiment.reads_words:
        kind = jnp.dtype(experiment.encode.dtype)
        found["text"] = jax.ShapeDtypeStruct(found["text"].shape, kind)
    return found


def check_source(
    experiment: config.Experiment, objective: Objective, source: Any
) -> None:
    """Refuses a source without the arrays that the objective reads.

    Args:
      source: a `data.Source`, the library's or a user's own.

    Raises:
      ConfigError: the source lacks arrays; the message has these and those it has.
    """
    _check_names(
        experiment, objective.conditioning, source.rows(_FIRST).keys(), "the source"
    )


_FIRST = np.zeros(1, np.int64)  # the position of a source's first picture


def _check_names(
    experiment: config.Experiment,
    wanted: Collection[str],
    there: Collection[str],
    what: str,
) -> None:
    """Refuses a batch that lacks arrays which the objective reads."""
    lacks = [name for name in ("x", *wanted) if name not in there]
    if lacks:
        raise config.ConfigError(
            f"the objective {experiment.objective_kind} reads {', '.join(lacks)} of "
            f"{experiment.model.architecture}'s batch, which {what} does not have; it "
            f"has {', '.join(sorted(there))}"
        )


def check_loss(
    experiment: config.Experiment,
    learnt: Objective,
    before: Any,
    after: Any,
    measured: Mapping[str, Any],
    others: Collection[str],
) -> None:
    """Refuses an objective whose loss does not return what its fields say.

    Args:
      before, after: its state, as the loss got it and as it returned it.
      measured: its metrics.
      others: names of metrics that every objective has.

    Raises:
      ConfigError: the state has another structure than before, or metrics differ.
    """
    where = f"the objective {experiment.objective_kind}"
    one, two = (
        {
            jax.tree_util.keystr(path): f"{jnp.result_type(leaf)} {jnp.shape(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (before, after)
    )
    if one != two or jax.tree.structure(before) != jax.tree.structure(after):
        different = sorted(set(one.items()) ^ set(two.items()))
        raise config.ConfigError(
            f"{where}: its loss returns another aux than init_aux: {different}"
        )
    if set(measured) != set(learnt.metrics):
        raise config.ConfigError(
            f"{where}: its loss measures {sorted(measured)}, its field `metrics` has "
            f"{sorted(learnt.metrics)}"
        )
    taken = sorted(set(measured) & {*others, *LOGGED})
    odd = [name for name, value in measured.items() if jnp.shape(value) != ()]
    if taken or odd:
        raise config.ConfigError(
            f"{where}: metrics that have the name of another: {taken}; that are no "
            f"scalars: {odd}"
        )
