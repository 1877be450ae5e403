"""The state of training as a tree, and the checkpoints of version 0.1.0."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from scaling_ldm import config
from scaling_ldm.stages import plan
from scaling_ldm.training import (
    checkpoint,
    checksum,
    compiler_options,
    mesh,
    objective,
    train_step,
)


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


@pytest.mark.slow
def test_a_first_moment_in_bfloat16_is_sharded_saved_and_counted(tiny, tmp_path):
    def functions(dtype):
        c = tiny.copy_and_resolve_references()
        c.optimizer.first_moment_dtype = dtype
        e = config.resolve(c)
        return e, train_step.train_functions(e, 64, 1, unroll=False)

    (e, wide), (own, narrow) = functions("float32"), functions("bfloat16")
    spec = plan.plan(own)[0]
    costs = [train_step.cost(e, wide, 8), train_step.cost(own, narrow, 8)]
    values = sum(leaf.size for leaf in jax.tree.leaves(costs[0].params))
    assert costs[0].state_bytes - costs[1].state_bytes == 2 * values
    abstract = train_step.abstract_state(narrow)
    specs = mesh.partition_specs(abstract, 2)
    assert specs.opt[1].mu == specs.params == mesh.partition_specs(abstract.params, 2)
    state = filled(abstract)
    saved = checkpoint.Checkpoints(tmp_path, spec, keep=2)
    saved.save(1, state, checkpoint.ResumeState(data={}, seconds=0.0, restarts=0))
    saved.wait()
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    restored = saved.restore(shapes)
    saved.close()
    assert {str(a.dtype) for a in jax.tree.leaves(state.opt[1].mu)} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_objectives_are_given_float32_text(dtype):
    """Every value that a stored type has, and nothing else of a batch is changed."""
    bits = np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype))
    stored = bits[np.isfinite(bits.astype(np.float32))]
    batch = {"x": np.ones(3, np.dtype(dtype)), "mask": np.ones(2, bool)}
    found = jax.jit(objective.widened)(batch | {"text": stored})
    assert found["text"].dtype == np.float32 and found["x"].dtype == batch["x"].dtype
    np.testing.assert_array_equal(found["text"], stored.astype(np.float32))
    words = batch | {"text": np.arange(4, dtype=np.int32)}
    assert objective.widened(words) is words and objective.widened(batch) is batch


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_text_features_in_their_stored_type_give_the_same_step(tiny, dtype):
    """To the bit: the state, what is measured, and each held-out loss."""
    c = tiny.copy_and_resolve_references()
    c.model.text_width, c.data.text_tokens = 12, 5
    c.train.optimize_code = False
    c.data.source, c.encode.text_encoder = "memory", "owner/encoder"
    e = config.resolve(c)
    functions = train_step.train_functions(e, 16, 1, unroll=False)
    step = jax.jit(
        functions.step, compiler_options=compiler_options.quick_to_compile("cpu")
    )
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((4, 5, 12), np.float32).astype(np.dtype(dtype))
    x = rng.standard_normal((4, *e.data.shape), np.float32)
    mask = np.arange(5) < np.array([[1], [3], [5], [0]])
    key = jax.random.key(0)
    hyper = {"peak": np.float32(1e-2), "warmup": np.float32(1), "key": key}
    batches = [
        {"x": x, "text": text, "mask": mask}
        for text in (stored, stored.astype(np.float32))
    ]
    assert batches[0]["text"].nbytes * 2 == batches[1]["text"].nbytes
    device_mesh = mesh.build(e.mesh, {})
    with jax.set_mesh(device_mesh):
        compiled = train_step.compile_functions(e, 16, 1, device_mesh)
        found = []
        for batch in batches:
            uncond = {name: batch[name][0] for name in ("text", "mask")}
            state = functions.init(key)
            state, metrics = step(state, batch, uncond, hyper)
            times, index = np.linspace(0.1, 0.9, 4, dtype="f"), np.arange(4, dtype="i")
            losses = compiled.per_example_loss(state.params, batch, times, index, key)
            found.append((state, metrics, losses))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert float(found[0][1]["loss"]) > 0 and (np.asarray(found[0][2]) > 0).all()
