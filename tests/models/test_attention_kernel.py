"""Attention of each backend: which one is used, and that its values are the plain ones.

The kernels for TPUs are interpreted on a CPU. cuDNN runs on GPUs alone: what is
made of its arguments is tested with XLA's own attention in its place.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from scaling_ldm import config, flops
from scaling_ldm.models import attention, attention_backends, denoisers, remat
from scaling_ldm.models.denoisers import dit
from scaling_ldm.training import mesh as mesh_lib

KERNELS = {
    "pallas": functools.partial(attention_backends._pallas, interpret=True),
    "cudnn": functools.partial(attention_backends._cudnn, implementation="xla"),
}
KINDS = {"tpu": "TPU v5 lite", "gpu": "NVIDIA H100 80GB HBM3", "cpu": "cpu"}


def described(platform, kind=None, devices=1):
    """A mesh of devices that are not here, for tracing alone."""
    device = jax.sharding.AbstractDevice(
        device_kind=kind or KINDS[platform], num_cores=None, platform=platform
    )
    return AbstractMesh(
        (devices,), ("rows",), (AxisType.Explicit,), abstract_device=device
    )


def definition(q, k, v, mask):
    """In float32, with gradients that JAX derives; a row of masked keys is uniform."""
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    scores = jnp.einsum("BTKH,BSKH->BKTS", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    return jnp.einsum("BKTS,BSKH->BTKH", jax.nn.softmax(scores, -1), v)


def inputs(T, S, H, masked, dtype, B=2, K=2):
    """q, k, v, a mask without order whose last row sees nothing, and weights."""
    keys = jax.random.split(jax.random.key(T * S + H), 5)
    q = 2 * jax.random.normal(keys[0], (B, T, K, H))
    k, v = (jax.random.normal(key, (B, S, K, H)) for key in keys[1:3])
    mask = jax.random.bernoulli(keys[3], 0.6, (B, 1, 1, S)).at[-1].set(False)
    weights = jax.random.normal(keys[4], q.shape)
    return [a.astype(dtype) for a in (q, k, v)], mask if masked else None, weights


def value_and_gradients(attend, args, mask, weights):
    def loss(q, k, v):
        out = attend(q, k, v, mask)
        return jnp.sum(jnp.tanh(out.astype(jnp.float32)) * weights), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)
    return out, *gradients


def compare(kernel, T, S, H, masked, dtype):
    args, mask, weights = inputs(T, S, H, masked, dtype)

    def attend(q, k, v, mask):
        return KERNELS[kernel](q, k, v, None if mask is None else mask[:, 0, 0])

    ours = value_and_gradients(attend, args, mask, weights)
    theirs = value_and_gradients(definition, args, mask, weights)
    largest = {"float32": 1e-5, "bfloat16": 0.015}[jnp.dtype(dtype).name]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        b = np.asarray(b, np.float32)
        assert np.abs(np.asarray(a, np.float32) - b).max() < largest * np.abs(b).max()
    if masked:  # no gradient reaches a key that is not seen, but by an even mean
        hidden = ~np.asarray(mask[0, 0, 0])
        assert not np.any(ours[2][0][hidden]) and not np.any(ours[3][0][hidden])
        assert not np.any(ours[1][-1]) and not np.any(ours[2][-1])


# Queries, keys, features. 600 and 700 are several tiles with padding at the end.
SHAPES = [
    (128, 128, 32),
    (257, 257, 64),
    (700, 77, 40),
    (130, 600, 160),
    (1100, 1100, 72),
]
DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_are_those_of_the_definition(kernel):
    compare(kernel, 130, 77, 40, True, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_for_every_kind_of_shape(kernel, shape, masked, dtype):
    compare(kernel, *shape, masked, dtype)


def used(mesh, choice, dtype=jnp.bfloat16, T=256, H=64, mask=None):
    """The kernel that is used inside of a mesh, or None."""
    q = jax.ShapeDtypeStruct((2, T, 2, H), dtype)
    with jax.sharding.use_abstract_mesh(mesh):
        return attention_backends._kernel(choice, q, mask)


@pytest.mark.usefixtures("unchecked")
def test_auto_goes_by_the_devices_of_the_mesh_not_by_those_of_this_machine():
    assert jax.default_backend() == "cpu"
    assert used(described("tpu"), "auto") == "pallas"
    assert used(described("gpu"), "auto") == "cudnn"
    assert used(described("cpu"), "auto") is None
    assert used(described("tpu"), "plain") is None
    assert used(described("tpu"), "auto", T=64) is None  # a tile would be padding
    assert used(described("gpu"), "auto", dtype=jnp.float32) is None
    assert used(described("gpu"), "auto", H=160) is None
    assert used(described("gpu", "AMD Instinct MI300X"), "auto") is None
    each = jnp.ones((2, 1, 256, 256), bool)
    assert used(described("tpu"), "auto", mask=each) is None
    # Parts of other axes than rows: a kernel would have to gather them.
    assert used(described("tpu", devices=2), "auto") is None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("platform", "choice", "shape", "why"),
    [
        ("cpu", "pallas", {}, "'pallas' runs on tpu, not on cpu"),
        ("gpu", "pallas", {}, "'pallas' runs on tpu, not on gpu"),
        ("tpu", "cudnn", {}, "'cudnn' runs on gpu, not on tpu"),
        ("gpu", "cudnn", {"dtype": jnp.float32}, "bfloat16, not in float32"),
        ("gpu", "cudnn", {"H": 160}, "160 features; cuDNN takes multiples of 8 up"),
        ("gpu", "cudnn", {"H": 36}, "36 features"),
        ("tpu", "pallas", {"mask": jnp.ones((2, 1, 256, 256), bool)}, "each query"),
    ],
)
def test_what_cannot_run_is_refused_by_name(platform, choice, shape, why):
    with pytest.raises(config.ConfigError) as refused:
        used(described(platform), choice, **shape)
    said = str(refused.value)
    assert f"config.model.attention = '{choice}'" in said and why in said
    assert "\n" not in said


def test_cudnn_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(attention_backends.KERNELS, "cudnn", attention_backends._cudnn)
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    with (
        jax.sharding.use_abstract_mesh(described("gpu")),
        pytest.raises(config.ConfigError, match="install nvidia-cudnn-cu13"),
    ):
        jax.eval_shape(lambda q: attention_backends.attend(q, q, q, None, "auto"), x)


def test_on_a_cpu_the_program_is_that_of_the_plain_form():
    args, mask, _ = inputs(256, 256, 8, True, jnp.float32)
    here = mesh_lib.build(config.MeshConfig(), {}, jax.devices()[:1])
    with jax.set_mesh(here):
        ours, theirs = (
            jax.jit(attend).lower(*args, mask).as_text()
            for attend in (
                lambda *a: attention_backends.attend(*a, "auto"),
                lambda *a: attention.attend(*a),
            )
        )
    assert ours == theirs


@pytest.mark.parametrize(("T", "S"), [(513, 513), (600, 77)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_flops_are_those_of_the_plain_form(kernel, T, S, monkeypatch):
    """Without padding, and with the scores alone as recomputation."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    args, mask, weights = inputs(T, S, 40, True, jnp.bfloat16)
    real = {
        "pallas": attention_backends._pallas,
        "cudnn": attention_backends._cudnn,
    }[kernel]

    def count(attend, gradient):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v).astype(jnp.float32) * weights)

        return flops.count(jax.grad(loss, (0, 1, 2)) if gradient else loss, *args)

    def ours(q, k, v):
        return real(q, k, v, mask[:, 0, 0])

    monkeypatch.setattr(attention, "LONG", 1)
    for gradient in (False, True):
        a = count(ours, gradient)
        b = count(lambda q, k, v: attention.attend(q, k, v, mask), gradient)
        assert (a.model, a.recomputed) == (b.model, b.recomputed)
        assert "dot_general" not in a.by_primitive  # the kernels were counted
    assert b.model == 6 * (2 * 2 * 2 * T * S * 40) and b.recomputed * 6 == b.model
    # Once more where a block is computed again, and once for each of a batch.
    again = count(jax.checkpoint(ours), True)
    assert again.model == b.model and again.recomputed == 3 * b.model // 6


@pytest.mark.slow
def test_probes_of_a_likelihood_go_through_the_kernel_together():
    """The gradient of several directions at once, as `ode_likelihood` takes it."""
    args, mask, weights = inputs(128, 128, 8, True, jnp.float32)
    probes = jnp.stack([weights, -2 * weights])
    found = []
    for attend in (lambda *a: KERNELS["pallas"](*a, mask[:, 0, 0]), None):
        attend = attend or (lambda *a: definition(*a, mask))
        _, pull = jax.vjp(attend, *args)
        found.append(jax.jit(jax.vmap(pull))(probes))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_derivatives_that_the_kernel_does_not_have_are_refused():
    args, _, weights = inputs(128, 128, 8, False, jnp.float32)

    def attend(q):
        return jnp.sum(KERNELS["pallas"](q, *args[1:], None) * weights)

    with pytest.raises(TypeError, match="jvp"):
        jax.jit(lambda q: jax.jvp(attend, (q,), (q,))).lower(args[0])
    twice = jax.grad(lambda q: jnp.sum(jax.grad(attend)(q) ** 2))
    with pytest.raises(NotImplementedError, match="attention = 'plain'"):
        jax.eval_shape(twice, args[0])


def small(policy="none", unroll=False):
    """A transformer of 144 pictures' tokens and five of words."""
    return denoisers.transformer(
        dit.DiTConfig(
            architecture="in_context",
            width=32,
            depth=2,
            heads=2,
            image_shape=(24, 24, 4),
            patch_size=2,
            text_tokens=5,
            text_width=8,
            time_width=8,
            remat=policy,
            unroll=unroll,
        )
    )


def gradient(net):
    def loss(params, x, t, cond):
        return jnp.mean((net.apply(params, x, t, cond) - x) ** 2)

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture
def without_axes(monkeypatch):
    """The interpreter does not know of the axes of a shard_map; it runs without."""
    lowering = pytest.importorskip("jax._src.pallas.pallas_call")
    core = pytest.importorskip("jax._src.core")
    state = pytest.importorskip("jax._src.config")
    mlir = lowering.mlir

    class Shim:
        def __getattr__(self, name):
            return getattr(mlir, name)

        def lower_fun(self, fn, multiple_results=True):
            inner = mlir.lower_fun(fn, multiple_results=multiple_results)

            def lowered(ctx, *nodes):
                ins, outs = (
                    tuple(core.ShapedArray(a.shape, a.dtype) for a in avals)
                    for avals in (ctx.avals_in, ctx.avals_out)
                )
                with state._check_vma(False):
                    return inner(ctx.replace(avals_in=ins, avals_out=outs), *nodes)

            return lowered

    monkeypatch.setattr(lowering, "mlir", Shim())


@pytest.mark.slow
@pytest.mark.usefixtures("without_axes", "unchecked")
@pytest.mark.parametrize("policy", ["none", *remat.POLICIES])
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_device_of_a_mesh_applies_the_kernel_to_its_rows(
    kernel, policy, monkeypatch
):
    if policy == "offload":
        pytest.skip("a CPU has no memory of its own to offload from")
    draw = np.random.default_rng(0).normal
    x = draw(size=(8, 24, 24, 4)).astype(np.float32)
    t = np.linspace(0, 1, 8, dtype=np.float32)
    cond = {
        "text": draw(size=(8, 5, 8)).astype(np.float32),
        "mask": np.arange(5)[None] < np.arange(8)[:, None] % 6,
    }
    params = small().init(jax.random.key(0))
    params = jax.tree.map(
        lambda a: a + 0.05 * jax.random.normal(jax.random.key(1), a.shape), params
    )
    value, gradients = gradient(small())(params, x, t, cond)
    seen = []

    def counted(*args):
        seen.append(args[0].shape)
        return KERNELS[kernel](*args)

    monkeypatch.setattr(attention_backends, "_kernel", lambda *_: kernel)
    monkeypatch.setitem(attention_backends.KERNELS, kernel, counted)
    mesh = mesh_lib.build(config.MeshConfig(fsdp=2), {})
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, mesh_lib.shardings(mesh, params))
        put = functools.partial(mesh_lib.put, mesh)
        got = gradient(small(policy))(placed, put(x), put(t), jax.tree.map(put, cond))
    assert seen and set(seen) == {(2, 150, 2, 16)}  # of 8 rows on 4 devices
    np.testing.assert_allclose(got[0], value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "cudnn", "pallas"])
def test_the_choice_belongs_to_no_recipe(tiny, name):
    experiment = config.resolve(tiny)
    other = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, attention=name)
    )
    assert other.recipe_hash == experiment.recipe_hash


def test_an_unknown_choice_is_refused(tiny):
    c = tiny.copy_and_resolve_references()
    c.model.attention = "cuddn"
    with pytest.raises(config.ConfigError, match="did you mean 'cudnn'"):
        config.resolve(c)


@pytest.mark.parametrize(
    ("kind", "capability", "kernel"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", "cudnn"),
        ("NVIDIA A100-SXM4-40GB", "8.0", "cudnn"),
        ("NVIDIA GeForce RTX 2080 Ti", "7.5", None),
        ("NVIDIA H100 80GB HBM3", None, "cudnn"),  # described
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_auto_takes_cudnn_on_gpus_since_ampere(kind, capability, kernel):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    if capability:
        device.compute_capability = capability
    assert attention_backends.kernel_of("auto", device) == kernel
