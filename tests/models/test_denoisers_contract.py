"""What every denoiser promises, for all architectures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling_ldm import config, flops
from scaling_ldm.models import denoisers, layers
from scaling_ldm.models.denoisers import dit, mmdit
from scaling_ldm.training import mesh

BATCH = 8


def one_stream(architecture, **changes):
    return dataclasses.replace(
        dit.DiTConfig(
            architecture=architecture,
            width=16,
            depth=2,
            heads=2,
            image_shape=(8, 12, 3),
            patch_size=4,
            mlp_ratio=4,
            activation="gelu",
            text_tokens=5,
            text_width=6,
            time_width=8,
            vocab_size=20,
            classes=7 if architecture == "adaln_zero" else 0,
            dtype=jnp.float32,
            remat="none",
            unroll=False,
        ),
        **changes,
    )


def two_streams(architecture, **changes):
    depth, single = (2, 0) if architecture == "mmdit" else (1, 2)
    return dataclasses.replace(
        mmdit.MMDiTConfig(
            width=16,
            depth=depth,
            single_depth=single,
            heads=2,
            image_shape=(8, 12, 3),
            patch_size=4,
            mlp_ratio=4,
            activation="gelu",
            text_tokens=5,
            text_width=6,
            time_width=8,
            vocab_size=20,
            dtype=jnp.float32,
            remat="none",
            unroll=False,
        ),
        **changes,
    )


FLUX = {"qk_norm": "rms", "positions": "rope"}
CASES = {
    **{name: one_stream(name) for name in ("cross_attention", "adaln_zero")},
    "in_context_rope": one_stream("in_context", norm="rms", **FLUX),
    "flux": two_streams("flux", pooled_width=4, guidance=True, **FLUX),
}
AT_NIGHT = {
    "in_context": one_stream("in_context"),
    "cross_attention_learned": one_stream(
        "cross_attention", qk_norm="layer", positions="learned"
    ),
    "adaln_zero_rope": one_stream("adaln_zero", qk_norm="layer", positions="rope"),
    "mmdit_learned": two_streams(
        "mmdit", qk_norm="layer", positions="learned", pooled_width=4
    ),
    "mmdit": two_streams("mmdit", norm="rms"),
    "flux_rms": two_streams("flux", norm="rms", **FLUX),
}
# Of tests that compile a network once more: one of one stream and one of two by day.
COMPILED_BY_DAY = ("cross_attention", "flux")


def names(by_day):
    """All cases; those that are not in by_day only at night."""
    return [
        pytest.param(name, marks=() if name in by_day else pytest.mark.slow)
        for name in CASES | AT_NIGHT
    ]


compiles_again = pytest.mark.parametrize("case", names(COMPILED_BY_DAY), indirect=True)


def build(spec):
    if isinstance(spec, mmdit.MMDiTConfig):
        return denoisers.mm_dit(spec)
    return denoisers.transformer(spec)


def inputs():
    rng = np.random.default_rng(0)
    cond = {
        "text": jnp.asarray(rng.integers(3, 20, (BATCH, 5)), jnp.int32),
        "mask": jnp.asarray(np.arange(5)[None] < 1 + np.arange(BATCH)[:, None] % 4),
        "label": jnp.arange(BATCH, dtype=jnp.int32) % 7,
        "pooled": jnp.asarray(rng.normal(size=(BATCH, 4)), jnp.float32),
        "guidance": jnp.linspace(0.0, 1.0, BATCH),
    }
    x = jnp.asarray(rng.normal(size=(BATCH, 8, 12, 3)), jnp.float32)
    return x, jnp.linspace(0.05, 0.95, BATCH), cond


def noisy(params, seed=1):
    """Parameters without zeros, so that every one of them has an effect."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree,
        [leaf + 0.2 * rng.normal(size=leaf.shape).astype("f") for leaf in leaves],
    )


@pytest.fixture(scope="module", params=names(CASES))
def case(request):
    spec = (CASES | AT_NIGHT)[request.param]
    net = build(spec)
    net = dataclasses.replace(net, init=jax.jit(net.init), apply=jax.jit(net.apply))
    x, t, cond = inputs()
    cond = {name: cond[name] for name in net.conditioning}
    params = noisy(net.init(jax.random.key(0)))
    return spec, net, params, x, t, cond


def sines(apply):
    """A jitted function of (params, x, t, cond): a nonlinear loss and its gradient."""
    return jax.jit(
        jax.value_and_grad(lambda p, x, t, c: jnp.mean(jnp.sin(apply(p, x, t, c))))
    )


@pytest.fixture(scope="module")
def reference(case):
    """Value and gradient of the plain network, computed once per architecture."""
    _, net, *arguments = case
    return sines(net.apply)(*arguments)


def test_predicts_zero_in_float32_before_training(case):
    spec, net, _, x, t, cond = case
    out = net.apply(net.init(jax.random.key(0)), x, t, cond)
    assert out.shape == x.shape
    assert out.dtype == jnp.float32
    assert_allclose(out, 0.0)


def test_every_parameter_gets_a_gradient(reference):
    for path, leaf in jax.tree_util.tree_leaves_with_path(reference[1]):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        if "['last']['text_q_norm']" in name:  # of queries that nothing reads
            assert not np.any(leaf), name
            continue
        # A bias on all keys shifts all scores equally, so it has no gradient.
        if not ("kv" in name or "k_norm" in name) or "bias" not in name:
            assert np.abs(leaf).max() > 1e-8, name


@pytest.mark.parametrize("change", [{"unroll": True}, {"remat": "blocks"}])
@compiles_again
def test_scan_unroll_and_remat_agree(case, reference, change):
    spec, _, *arguments = case
    other = build(dataclasses.replace(spec, **change))
    value, gradient = sines(other.apply)(*arguments)
    assert_allclose(value, reference[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: assert_allclose(b, a, rtol=1e-3, atol=1e-7),
        reference[1],
        gradient,
    )


@compiles_again
def test_remat_recomputes(case):
    """remat has an effect: more hardware FLOPs, the same model FLOPs."""
    spec, net, params, x, t, cond = case
    other = build(dataclasses.replace(spec, remat="blocks"))

    def counted(apply):
        loss = lambda p: jnp.sum(apply(p, x, t, cond) ** 2)  # noqa: E731
        return flops.count(jax.grad(loss), params)

    plain, remat = counted(net.apply), counted(other.apply)
    assert remat.model == plain.model == plain.hardware
    assert remat.hardware > 1.2 * plain.hardware


def test_rows_do_not_mix(case):
    _, net, params, x, t, cond = case
    whole = net.apply(params, x, t, cond)
    part = net.apply(params, x[2:3], t[2:3], {k: v[2:3] for k, v in cond.items()})
    assert_allclose(part[0], whole[2], rtol=1e-4, atol=1e-5)


def test_time_and_condition_matter(case):
    _, net, params, x, t, cond = case
    base = net.apply(params, x, t, cond)
    assert np.abs(net.apply(params, x, t * 0.5, cond) - base).max() > 1e-3
    name = net.conditioning[0]
    other = cond | {name: (cond[name] + 1) % 7 + 3 * (name == "text")}
    assert np.abs(net.apply(params, x, t, other) - base).max() > 1e-3


def test_padding_is_invisible(case):
    _, net, params, x, t, cond = case
    if "text" not in net.conditioning:
        assert "mask" not in net.conditioning
        return
    base = net.apply(params, x, t, cond)
    scrambled = jnp.where(cond["mask"], cond["text"], 19 - cond["text"])
    assert np.any(scrambled != cond["text"])
    out = net.apply(params, x, t, cond | {"text": scrambled})
    assert_allclose(out, base, rtol=1e-5, atol=1e-6)


def test_in_context_without_text_is_a_plain_transformer():
    """With every text token masked, attention reads only time and image tokens."""
    spec = one_stream("in_context", depth=1)
    net = denoisers.transformer(spec)
    params = noisy(jax.jit(net.init)(jax.random.key(0)))
    x, t, cond = inputs()
    hidden = cond | {"mask": jnp.zeros_like(cond["mask"])}
    got = jax.jit(net.apply)(params, x, t, hidden)

    @jax.jit
    def plain(params):
        entry = dit.DiTEmbed(spec)
        tokens, _ = entry.apply({"params": params["entry"]}, x, t, hidden)
        tokens = jnp.concatenate([tokens[:, :1], tokens[:, 6:]], axis=1)
        block = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        tokens = dit.DiTBlock(spec).apply({"params": block}, tokens, {})
        return dit.DiTHead(spec).apply({"params": params["exit"]}, tokens, {})

    want = plain(params)
    assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fsdp", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("case", names(by_day=["flux"]), indirect=True)
def test_sharded_equals_unsharded(case, reference, fsdp, monkeypatch):
    monkeypatch.setattr(mesh, "MIN_SHARDED_SIZE", 1)
    _, net, params, *arguments = case
    device_mesh = mesh.build(config.MeshConfig(fsdp=fsdp), {})
    with jax.set_mesh(device_mesh):
        placed = mesh.shardings(device_mesh, params)
        sharded = jax.device_put(params, placed)
        value, gradient = sines(net.apply)(sharded, *mesh.put(device_mesh, arguments))
    assert_allclose(value, reference[0], rtol=1e-5)
    split = 0
    for want, got, sharding in zip(
        jax.tree.leaves(reference[1]),
        jax.tree.leaves(gradient),
        jax.tree.leaves(placed),
        strict=True,
    ):
        assert_allclose(got, want, rtol=1e-3, atol=1e-7)
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        split += not sharding.is_fully_replicated
    assert (split > 5) == (fsdp > 1)


@compiles_again
def test_bfloat16_computes_close_to_float32(case):
    spec, net, params, x, t, cond = case
    half = build(dataclasses.replace(spec, dtype=jnp.bfloat16))
    out = jax.jit(half.apply)(params, x, t, cond)
    assert out.dtype == jnp.float32
    want = net.apply(params, x, t, cond)
    error = np.abs(out - want).max() / np.abs(want).max()
    assert 1e-5 < error < 5e-2  # it did compute in another precision
    drawn = jax.eval_shape(lambda: half.init(jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}


def test_params_and_embeddings_are_counted(case):
    _, net, params, *_ = case
    total, bare = denoisers.count_params(net)
    assert total == sum(leaf.size for leaf in jax.tree.leaves(params))
    tables = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key.endswith("_embedding")
    ]
    assert len(tables) == 1
    assert bare == total - tables[0]


def test_in_context_flops_have_a_closed_form():
    """Per layer and token 24 d^2 + 4 T d (section 4 of the accounting notes)."""
    spec = one_stream("in_context")
    net = denoisers.transformer(spec)
    params = jax.eval_shape(lambda: net.init(jax.random.key(0)))
    x, t, cond = jax.eval_shape(inputs)
    cond = {name: cond[name] for name in net.conditioning}
    counted = flops.count(net.apply, params, x, t, cond)
    d, T, N, L = spec.width, 1 + 5 + 6, 6, spec.depth
    patch = 4 * 4 * 3
    blocks = L * T * (24 * d * d + 4 * T * d)
    edges = 2 * (N * patch * d * 2 + 5 * 6 * d + 8 * d + d * d)
    assert counted.total == BATCH * (blocks + edges)


def test_patches_round_trip():
    x = inputs()[0]
    tokens = layers.patchify(x, 4)
    assert tokens.shape == (BATCH, 6, 48)
    assert_allclose(tokens[0, 1].reshape(4, 4, 3), x[0, :4, 4:8])
    assert_allclose(layers.unpatchify(tokens, 4, (8, 12, 3)), x)


def test_unknown_architecture_lists_the_known():
    with pytest.raises(ValueError, match="in_context, cross_attention"):
        denoisers.transformer(one_stream("unet"))
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        denoisers.transformer(one_stream("in_context", heads=3))
