"""The state of training as a tree, and the checkpoints of version 0.1.0."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from scaling_ldm import config
from scaling_ldm.stages import plan
from scaling_ldm.training import checkpoint, checksum, train_step


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "ema", "opt", "step", "smoothed_loss"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstState:
    """The state as version 0.1.0 had it."""

    params: Any
    ema: Any
    opt: Any
    step: Any
    smoothed_loss: Any


def filled(state):
    """The state of these shapes with other numbers in every leaf."""
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    return tree.unflatten(
        jax.numpy.asarray(rng.uniform(1, 99, leaf.shape), leaf.dtype) for leaf in leaves
    )


def state_of(tiny, averages):
    c = tiny.copy_and_resolve_references()
    c.optimizer.averages = averages
    functions = train_step.train_functions(config.resolve(c), 16, 1, unroll=False)
    return filled(train_step.abstract_state(functions))


def paths(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]


def test_the_default_state_is_the_tree_of_0_1_0(tiny):
    state = state_of(tiny, ("ema",))
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    assert fields.pop("aux") == {}
    first = FirstState(ema=fields.pop("averages")["ema"], **fields)
    assert paths(state) == paths(first)
    assert checksum.of(state) == checksum.of(first)


def test_other_averages_stand_beside_it(tiny):
    state = state_of(tiny, ("power_0.1", "ema", "power_0.05"))
    heads = list(dict.fromkeys(path.split("/")[0] for path in paths(state)))
    first = ["params", "ema", "opt", "step", "smoothed_loss"]
    assert heads == [*first, "power_0.1", "power_0.05"]
    again = jax.tree.map(lambda x: x, state)
    assert list(again.averages) == ["power_0.1", "ema", "power_0.05"]
    jax.tree.map(np.testing.assert_array_equal, again, state)
    for name in ("power_0.1", "power_0.05"):
        assert paths(state.averages[name]) == paths(state.params)


@pytest.mark.parametrize("newer", [False, True], ids=["from 0.1.0", "to 0.1.0"])
def test_a_checkpoint_of_the_default_is_read_both_ways(tiny, tmp_path, newer):
    """And so is its checksum, which depends on the order of the arrays."""
    spec = plan.plan(config.resolve(tiny))[0]
    state = state_of(tiny, ("ema",))
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    assert fields.pop("aux") == {}
    first = FirstState(ema=fields.pop("averages")["ema"], **fields)
    written, read = (state, first) if newer else (first, state)
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    saved.save(1, written, checkpoint.ResumeState(data={}, seconds=0.0, restarts=0))
    saved.wait()
    restored = saved.restore(
        jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), read
        )
    )
    saved.close()
    assert restored is not None and type(restored.state) is type(read)
    jax.tree.map(np.testing.assert_array_equal, restored.state, read)
