"""Policies of the learning rate: the role of every tensor, and what follows from it."""

import fnmatch
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import config
from scaling_ldm.models import from_config
from scaling_ldm.models.denoisers import dit
from scaling_ldm.training import (
    objective_checks,
    optimizer,
    rate_policies,
    train_step,
    width_scaling,
)

BASE = 32  # width
# Role -> patterns of the paths of tensors, for every architecture. Stated by hand.
HEADS = ["*k_norm/*", "*q_norm/*"]
ENTRY = ["entry/patch/*", "entry/time/up/*", "entry/*_table", "entry/label_embedding"]
ROLES = {
    "in_context": {
        "input": [*ENTRY, "entry/text/*", "*/bias", "*_norm/scale", "exit/norm/scale"],
        "hidden": [
            "entry/time/out/kernel",
            "blocks/attention/out/kernel",
            "*/qkv/kernel",
        ]
        + ["blocks/mlp_*/kernel"],
    },
    "cross_attention": {
        "input": [*ENTRY, "entry/text_up/*", "*/modulation_table", "*/bias"],
        "hidden": ["entry/time/out/kernel", "entry/text_out/kernel", "*/q/kernel"]
        + [
            "*attention/out/kernel",
            "*/qkv/kernel",
            "*/kv/kernel",
            "blocks/mlp_*/kernel",
        ]
        + ["entry/modulation/kernel"],
    },
    "adaln_zero": {
        "input": [*ENTRY, "*/bias"],
        "hidden": ["entry/time/out/kernel", "*/modulation/kernel", "*/qkv/kernel"]
        + ["blocks/attention/out/kernel", "blocks/mlp_*/kernel"],
    },
    "mmdit": {
        "input": [*ENTRY, "entry/text/*", "entry/pooled_up/*", "*/bias"],
        "hidden": ["entry/time/out/kernel", "entry/pooled_out/kernel"]
        + ["*_modulation/kernel", "*_qkv/kernel", "*/image_out/kernel"]
        + [
            "*/text_out/kernel",
            "*_up/kernel",
            "*_down/kernel",
            "exit/modulation/kernel",
        ],
    },
    "flux": {
        "input": [*ENTRY, "entry/text/*", "entry/pooled_up/*", "*/bias"],
        "hidden": ["entry/time/out/kernel", "entry/pooled_out/kernel"]
        + ["*modulation/kernel", "*qkv/kernel", "blocks/*_out/kernel"]
        + ["blocks/*_up/kernel", "*_down/kernel", "single_blocks/up/kernel"]
        + ["single_blocks/out/kernel"],
    },
    "unet": {
        "input": ["enter/*", "*/cross_attention/[kv]/kernel", "*/bias", "*norm*/scale"],
        "hidden": ["time/*/kernel", "*/conv[12]/kernel", "*/time/kernel", "*/up/kernel"]
        + ["*/down/kernel", "*/enter/kernel", "*/leave/kernel", "*/shortcut/kernel"]
        + ["*/self_attention/*/kernel", "*/cross_attention/q/kernel"]
        + ["*/cross_attention/out/kernel", "*_halve/kernel", "*_double/kernel"],
    },
}
ALL = {"output": ["exit/patch/kernel", "exit/kernel"]} | {
    "finite": ["entry/word_embedding", "exit/patch/bias", "exit/bias", *HEADS]
}


def experiment(architecture, policy="mup", **optimizer_fields):
    c = config.default()
    c.data.shape = (8, 8, 3)
    c.data.text_tokens, c.data.vocab_size = 3, 24
    c.encode.text_encoder = "vocabulary"
    c.model.architecture = architecture
    c.model.head_dim = 8
    c.model.compute_dtype = "float32"
    if architecture != "adaln_zero":
        c.model.text_width = 6
    if architecture != "unet":
        c.model.time_width, c.model.positions, c.model.qk_norm = 8, "learned", "rms"
    if architecture == "adaln_zero":
        c.model.classes = 16
    c.optimizer.learning_rate_policy = policy
    if policy != "fixed":
        c.optimizer.policy_width = BASE
    for name, value in optimizer_fields.items():
        setattr(c.optimizer, name, value)
    c.plan.sizes = ((BASE, 2),)
    c.train.batch_size = 4
    return config.resolve(c)


def shapes(e, width):
    return from_config.parameter_shapes(from_config.network_config(e, width, 2))


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in keys): leaf for keys, leaf in leaves}


def stated_role(architecture, path):
    """The role of the first pattern that fits; finite and output ones come first."""
    for role, patterns in (*reversed(ALL.items()), *ROLES[architecture].items()):
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            return role
    return None


@pytest.mark.parametrize("architecture", config.OBJECTIVES["denoising"])
def test_every_tensor_has_the_role_that_the_table_states(architecture):
    e = experiment(architecture)
    found = by_path(width_scaling.roles(shapes(e, 32), shapes(e, 64)))
    stated = {path: stated_role(architecture, path) for path in found}
    assert found == stated
    assert set(found.values()) == {"input", "hidden", "output", "finite"}
    # The same from any other two widths.
    assert by_path(width_scaling.roles(shapes(e, 128), shapes(e, 96))) == found
    for patterns in ROLES[architecture].values():
        for pattern in {*patterns} - {*ENTRY}:
            assert fnmatch.filter(found, pattern), f"{pattern} fits no tensor"


def test_a_tensor_whose_axes_no_role_describes_is_refused():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    with pytest.raises(ValueError, match=r"bias \(4, 4\), at another width \(8, 8\)"):
        width_scaling.roles({"a": {"bias": leaf(4, 4)}}, {"a": {"bias": leaf(8, 8)}})
    three = {"kernel": leaf(4, 4, 4)}, {"kernel": leaf(8, 8, 8)}
    with pytest.raises(ValueError, match="no role"):
        width_scaling.roles(*three)
    two = (
        {"kernel": leaf(4, 4), "bias": leaf(2)},
        {"kernel": leaf(8, 8), "bias": leaf(2)},
    )
    with pytest.raises(ValueError, match="no role"):  # what it gives does not grow
        width_scaling.roles(*two)


def test_factors_are_those_of_the_closed_table():
    """At four times the width: Zheng et al. 2025, table of muP for Adam."""
    e = experiment("cross_attention")
    s = width_scaling.of_network(e, 4 * BASE, 2, width_scaling.MUP)
    roles = by_path(width_scaling.roles(shapes(e, BASE), shapes(e, 2 * BASE)))
    wanted = {  # gradient, update, decay
        "input": (1, 1, 1),
        "finite": (1, 1, 1),
        "hidden": (1, 1 / 4, 1),
        "output": (1 / 4, 1 / 4, 1),
    }
    parts = [by_path(part) for part in (s.gradient, s.update, s.decay)]
    for path, role in roles.items():
        assert tuple(part[path] for part in parts) == wanted[role], path
    changed = {path: f for path, f in by_path(s.initial).items() if f != 1}
    assert changed == {
        "blocks/modulation_table": 2,  # it is drawn with deviation 1 / sqrt(width)
        "exit/modulation_table": 2,
        "exit/patch/kernel": 1 / 2,  # it is zero
    }


AT_NIGHT = [
    name if name == "cross_attention" else pytest.param(name, marks=pytest.mark.slow)
    for name in config.OBJECTIVES["denoising"]
]


@pytest.mark.parametrize("architecture", AT_NIGHT)
def test_initial_values_have_the_deviation_of_their_role(architecture):
    e = experiment(architecture)
    roles = by_path(width_scaling.roles(shapes(e, BASE), shapes(e, 2 * BASE)))

    def drawn(width):
        functions = train_step.train_functions(e, width, 2, unroll=False)
        params = jax.jit(lambda key: functions.init(key).params)(jax.random.key(0))
        return by_path(params)

    base, wide = drawn(BASE), drawn(4 * BASE)
    seen = set()
    for path, role in roles.items():
        small, large = (float(jnp.std(values[path])) for values in (base, wide))
        if small == 0:
            assert large == 0, path
            continue
        seen.add(role)
        ratio = {"input": 1.0, "finite": 1.0, "hidden": 0.5}[role]
        spread = 5 * (base[path].size ** -0.5 + wide[path].size ** -0.5) / math.sqrt(2)
        assert large / small == pytest.approx(ratio, rel=min(spread, 0.35)), path
    assert {"input", "hidden"} <= seen


def one_batch(e, functions):
    """A batch of random pictures and captions, and the empty condition."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        return jnp.ones(leaf.shape, leaf.dtype)

    inputs = objective_checks.abstract_inputs(e, functions.objective, 4)
    return jax.tree.map(fill, inputs)


def steps(e, width, count=3):
    """The state after a few steps, and the program of a step."""
    functions = train_step.train_functions(e, width, 2, unroll=False)
    batch, uncond = one_batch(e, functions)
    numbers = optimizer.schedule_numbers(e.optimizer, 1e-2, 0, count)
    hyper = {"key": jax.random.key(1)} | numbers
    state = jax.jit(functions.init)(jax.random.key(0))
    traced = jax.jit(functions.step).trace(state, batch, uncond, hyper)  # once
    step = traced.lower().compile()
    for _ in range(count):
        state, _ = step(state, batch, uncond, hyper)
    return state, str(traced.jaxpr)


def test_mup_at_the_base_width_is_fixed_to_the_bit():
    decayed = {"weight_decay": 0.1}
    fixed, program = steps(experiment("cross_attention", "fixed", **decayed), BASE)
    mup, same = steps(experiment("cross_attention", "mup", **decayed), BASE)
    assert program == same
    jax.tree.map(assert_array_equal, fixed, mup)


@pytest.mark.parametrize("architecture", config.OBJECTIVES["denoising"])
def test_at_the_base_width_no_tensor_has_a_factor(architecture):
    e = experiment(architecture)
    assert rate_policies.scaling(e, BASE, 2) is None
    wide = rate_policies.scaling(e, 2 * BASE, 2)
    assert {1.0, 0.5} == set(jax.tree.leaves(wide.update))
    assert rate_policies.scaling(experiment(architecture, "fixed"), 64, 2) is None


def test_a_stored_multiplier_trains_like_one_in_the_network():
    """Two layers, with the multiplier of the second one in the network and stored."""
    m, rate, rng = 4.0, np.float32(0.05), np.random.default_rng(0)
    cfg = config.OptimizerConfig(weight_decay=0.3, clip_norm=0.05)
    x, y = rng.normal(size=(8, 5)), rng.normal(size=(8, 2))
    inner = jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
    outer = jnp.asarray(rng.normal(size=(16, 2)), jnp.float32)

    def loss(params, multiplier):
        out = multiplier * jnp.tanh(x @ params["in"]) @ params["out"]
        return jnp.mean((out - y) ** 2)

    def trained(params, multiplier, scaling):
        adamw = optimizer.adamw(cfg, scaling)
        state = adamw.init(params)
        for _ in range(5):
            gradient = jax.grad(loss)(params, multiplier)
            direction, state = adamw.update(gradient, state, params)
            params = optimizer.descend(params, direction, np.asarray(rate))
        return params

    plain = trained({"in": inner, "out": outer}, 1 / m, None)
    one = {"in": 1.0, "out": 1.0}
    stored = trained(
        {"in": inner, "out": outer / m},
        1.0,
        width_scaling.Scaling(
            initial=one,
            gradient=one | {"out": 1 / m},
            update=one | {"out": 1 / m},
            decay=one,
        ),
    )
    assert_allclose(stored["in"], plain["in"], rtol=1e-5, atol=1e-7)
    assert_allclose(stored["out"], plain["out"] / m, rtol=1e-5, atol=1e-7)


# The last layers of what is added to a residual stream, written by hand.
BRANCHES = {
    "in_context": ["blocks/attention/out", "blocks/mlp_down"],
    "cross_attention": ["blocks/attention/out", "blocks/cross_attention/out"]
    + ["blocks/mlp_down"],
    "adaln_zero": ["blocks/attention/out", "blocks/mlp_down"],
    "mmdit": [f"blocks/{s}_{end}" for s in ("image", "text") for end in ("out", "down")]
    + ["last/image_out", "last/image_down"],
    "flux": [f"blocks/{s}_{end}" for s in ("image", "text") for end in ("out", "down")]
    + ["single_blocks/out"],
}


@pytest.mark.parametrize("architecture", BRANCHES)
def test_completep_divides_every_branch_by_the_depth(architecture):
    e = experiment(architecture, "completep")
    assert rate_policies.scaling(e, BASE, 2) is None
    deep = rate_policies.scaling(e, BASE, 6)
    ends = ("kernel", "bias")
    divided = {f"{name}/{end}" for name in BRANCHES[architecture] for end in ends}
    for part in (deep.initial, deep.gradient, deep.update):
        factors = by_path(part)
        assert {path for path, f in factors.items() if f != 1} == divided
        assert {factors[path] for path in divided} == {1 / 3}
    assert {*jax.tree.leaves(deep.decay)} == {1}
    assert deep.epsilon == 1 / 3
    wide = rate_policies.scaling(e, 2 * BASE, 6)
    assert wide.epsilon == pytest.approx(1 / 6)
    mup = by_path(rate_policies.scaling(experiment(architecture), 2 * BASE, 6).update)
    for path, factor in by_path(wide.update).items():
        third = 1 / 3 if path in divided else 1
        assert factor == pytest.approx(mup[path] * third), path


def test_a_divided_last_layer_divides_what_a_block_adds():
    e = experiment("in_context", "completep")
    network = from_config.network_config(e, BASE, 6)
    params = jax.jit(lambda: dit.init(network, jax.random.key(0)))()
    scaled = width_scaling.multiply(params, rate_policies.scaling(e, BASE, 6).initial)
    x = jax.random.normal(jax.random.key(1), (2, 20, BASE))
    mask = jnp.ones((2, 1, 1, 20), bool)

    def added(params, without):
        block = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        block = {**block, "attention": {**block["attention"]}}
        holder = block if without == "mlp_down" else block["attention"]
        holder[without] = jax.tree.map(jnp.zeros_like, holder[without])
        return dit.DiTBlock(network).apply({"params": block}, x, {"mask": mask}) - x

    for without in ("mlp_down", "out"):  # the other branch is left
        whole = added(params, without)
        assert float(jnp.abs(whole).mean()) > 0.1
        assert_allclose(added(scaled, without), whole / 3, rtol=1e-4, atol=1e-5)


def test_the_epsilon_of_completep_is_that_of_adam():
    """A gradient as large as epsilon is halved; of a third of it, three quarters."""
    cfg = config.OptimizerConfig(eps=1e-3, clip_norm=1e9)
    one = {"w": 1.0}
    for epsilon, left in ((1.0, 1 / 2), (1 / 3, 3 / 4)):
        factors = width_scaling.Scaling(
            initial=one, gradient=one, update=one, decay=one, epsilon=epsilon
        )
        adamw = optimizer.adamw(cfg, factors)
        params = {"w": jnp.ones(3)}
        slope = {"w": jnp.full(3, 1e-3)}
        direction, _ = adamw.update(slope, adamw.init(params), params)
        assert_allclose(direction["w"], left, rtol=1e-5)


def test_the_policies_are_those_of_the_table_of_names():
    assert rate_policies.POLICIES.keys() == config.LEARNING_RATE_POLICIES.keys()
    by_tensor = [name for name, p in rate_policies.POLICIES.items() if p.tensors]
    assert tuple(by_tensor) == config.names.BY_TENSOR
    assert all(policy.source for policy in rate_policies.POLICIES.values())


def test_the_depth_of_a_unet_is_not_one():
    with pytest.raises(config.ConfigError, match="second number is its resolutions"):
        experiment("unet", "completep")


@pytest.mark.parametrize("policy", config.names.BY_TENSOR)
def test_what_a_policy_by_tensor_cannot_train_is_refused(policy, tmp_path):
    c = config.to_config_dict(experiment("in_context", policy))
    c.model.heads, c.model.head_dim = 4, 0
    with pytest.raises(config.ConfigError, match="needs heads of one width"):
        config.resolve(c)
    (tmp_path / "own.py").write_text("build = None\n")
    c = config.to_config_dict(experiment("in_context", policy))
    c.objective.kind, c.objective.folder = "own.py:build", str(tmp_path)
    with pytest.raises(config.ConfigError, match="the roles of a denoiser's tensors"):
        config.resolve(c)
