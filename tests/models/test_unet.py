"""Paper A's U-Net: its counts, and what every denoiser promises."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling_ldm import config, flops
from scaling_ldm.flops.operations import inner_jaxprs, open_jaxpr
from scaling_ldm.models import attention, denoisers, layers
from scaling_ldm.models import from_config as from_config_lib
from scaling_ldm.models.denoisers import presets, unet
from scaling_ldm.models.weights import unet as unet_weights
from scaling_ldm.stages import export
from scaling_ldm.training import mesh
from scaling_ldm.training.trained_model import TrainedModel

SMALL = unet.UNetConfig(
    base=32,
    heads=4,
    image_shape=(8, 8, 3),
    extra_channels=0,
    text_tokens=5,
    text_width=6,
    vocab_size=20,
    dtype=jnp.float32,
    remat="none",
    multiples=(1, 2),
    blocks=1,
)
BATCH = 8


NAMES = [
    pytest.param(name, marks=() if name == "unet_866m" else pytest.mark.slow)
    for name in presets.UNETS
]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_the_family(name):
    preset = presets.UNETS[name]
    assert denoisers.count_params(denoisers.u_net(preset.config))[0] == preset.params


@pytest.mark.parametrize(
    "name",
    [pytest.param("unet_39m"), pytest.param("unet_5b", marks=pytest.mark.slow)],
)
def test_flops_of_the_family(name):
    preset = presets.UNETS[name]
    net = denoisers.u_net(preset.config)
    counted = flops.count(
        net.apply,
        jax.eval_shape(lambda: net.init(jax.random.key(0))),
        jax.ShapeDtypeStruct((1, *preset.config.image_shape), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        {"text": jax.ShapeDtypeStruct((1, 77, 1024), jnp.float32)},
    )
    assert_allclose(counted.total / 1e9, preset.forward_gflops, atol=0.05)


def test_the_printed_costs_are_those_of_the_layout():
    """Up to rounding; the paper's FLOPs leave out padding, and add elementwise ones."""
    largest = presets.UNETS["unet_866m"].forward_gflops
    for preset in presets.UNETS.values():
        assert_allclose(
            preset.forward_gflops / largest, preset.relative_cost, atol=0.05
        )


def drawn(spec):
    """Random parameters without compiling an initialiser."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: unet.init(spec, jax.random.key(0)))
    return jax.tree.map(
        lambda s: rng.normal(scale=0.1, size=s.shape).astype("f"), shapes
    )


def inputs():
    rng = np.random.default_rng(1)
    cond = {
        "text": rng.integers(3, 20, (BATCH, 5)).astype(np.int32),
        "mask": np.arange(5)[None] < 1 + np.arange(BATCH)[:, None] % 4,
    }
    x = rng.normal(size=(BATCH, 8, 8, 3)).astype("f")
    return x, np.linspace(0.05, 0.95, BATCH, dtype="f"), cond


def sines(spec):
    apply = denoisers.u_net(spec).apply
    return jax.jit(
        jax.value_and_grad(lambda p, x, t, c: jnp.mean(jnp.sin(apply(p, x, t, c))))
    )


@pytest.fixture(scope="module")
def reference():
    params = drawn(SMALL)
    return params, sines(SMALL)(params, *inputs())


def test_every_parameter_gets_a_gradient(reference):
    for path, leaf in jax.tree_util.tree_leaves_with_path(reference[1][1]):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 0, name  # a leaf that is not used has exactly 0


@pytest.mark.slow  # that it is traced is tested below
def test_remat_changes_nothing(reference):
    params, (value, gradient) = reference
    again = sines(dataclasses.replace(SMALL, remat="blocks"))(params, *inputs())
    assert_allclose(again[0], value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-7), again[1], gradient
    )


def test_blocks_of_one_shape_are_traced_once():
    """Tracing is what a plan waits for."""
    spec = dataclasses.replace(SMALL, remat="blocks", multiples=(1, 1), blocks=3)
    shapes = jax.eval_shape(lambda: unet.init(spec, jax.random.key(0)))
    apply = functools.partial(unet.apply, spec)
    traced = jax.make_jaxpr(apply)(shapes, *inputs())
    blocks = [
        id(eqn.params["jaxpr"])
        for eqn in traced.eqns
        if eqn.primitive.name.startswith("remat")
    ]
    # At 8 x 8 and at 4 x 4: residual blocks with and without a skip connection, and a
    # transformer.
    assert len(blocks) == 24 and len(set(blocks)) == 6


def test_norms_of_one_shape_are_traced_once(monkeypatch):
    """A residual block of one width normalises twice; no call is left of it."""
    block = unet.UNetResidual(32, jnp.float32)
    x, time = jnp.zeros((3, 5, 7, 32)), jnp.zeros((3, 128))  # a shape of no other test
    traced, rsqrt = [], jax.lax.rsqrt
    monkeypatch.setattr(jax.lax, "rsqrt", lambda v: traced.append(v) or rsqrt(v))
    params = jax.eval_shape(block.init, jax.random.key(0), x, time)
    jaxpr = jax.make_jaxpr(block.apply)(params, x, time)
    assert len(traced) == 1
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("rsqrt") == 2


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"vocab_size": 0, "extra_channels": 2, "remat": "blocks"},
        {"multiples": (1, 2, 2), "blocks": 2, "heads": (2, 4, 8)},
    ],
)
def test_shapes_are_those_of_what_is_drawn(change, monkeypatch):
    spec = dataclasses.replace(SMALL, **change)
    init = denoisers.u_net(spec).init
    drawn = jax.eval_shape(init, jax.random.key(0))
    monkeypatch.setattr(unet.layers, "initialise", None)  # nothing is drawn for them
    shapes = layers.initial_shapes(init)
    assert jax.tree.structure(shapes) == jax.tree.structure(drawn)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
        shapes,
        drawn,
    )


@pytest.mark.slow  # those of its parts: transformers and the autoencoder by day
def test_a_mesh_changes_nothing(reference):
    params, (value, gradient) = reference
    axes = (jax.sharding.AxisType.Explicit,) * 2
    device_mesh = jax.make_mesh((2, 2), ("replica", "fsdp"), axis_types=axes)
    with jax.set_mesh(device_mesh):
        placed = jax.device_put(params, mesh.shardings(device_mesh, params))
        rows = jax.NamedSharding(device_mesh, jax.P(("replica", "fsdp")))
        got, slopes = sines(SMALL)(placed, *jax.device_put(inputs(), rows))
        kernel = slopes["middle_residual0"]["conv1"]["kernel"]
    assert "fsdp" in jax.typeof(kernel).sharding.spec
    assert_allclose(got, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-7), slopes, gradient
    )


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn.params):
            yield from equations(open_jaxpr(inner)[0])


@pytest.mark.parametrize(
    "remat", [pytest.param("none", marks=pytest.mark.slow), "blocks"]
)
def test_gradients_of_weights_are_made_before_that_of_the_input_leaves_a_block(remat):
    """On a mesh; else a compiler may make them at the end, from arrays that live."""
    spec = dataclasses.replace(SMALL, remat=remat, multiples=(1,))
    blocks = 6  # three residuals around the resolution's one, a transformer between two
    shapes = jax.eval_shape(lambda: unet.init(spec, jax.random.key(0)))
    apply = denoisers.u_net(spec).apply
    slope = jax.grad(lambda p, x, t, c: jnp.mean(apply(p, x, t, c)))

    def barriers(*arguments):
        found = equations(jax.make_jaxpr(slope)(*arguments).jaxpr)
        return [e for e in found if e.primitive.name == "optimization_barrier"]

    assert barriers(shapes, *inputs()) == []
    axes = (jax.sharding.AxisType.Explicit,) * 2
    device_mesh = jax.make_mesh((2, 2), ("replica", "fsdp"), axis_types=axes)
    with jax.set_mesh(device_mesh):
        placed = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            shapes,
            mesh.shardings(device_mesh, shapes),
        )
        rows = jax.NamedSharding(device_mesh, jax.P(("replica", "fsdp")))
        found = barriers(placed, *jax.device_put(inputs(), rows))
    joined = [[v.aval.shape for v in e.outvars] for e in found]
    assert len(joined) == blocks
    for of_input, *of_weights in joined:
        assert of_input[:3] == (BATCH // 4, 8, 8)
        assert sum(len(shape) > 1 for shape in of_weights) >= 3  # whole kernels


@pytest.fixture(scope="module")
def beside():
    """The network that reads a picture of two channels, compiled; its parameters."""
    spec = dataclasses.replace(SMALL, extra_channels=2)
    net = denoisers.u_net(spec)
    assert net.conditioning == ("text", "mask", "image")
    return jax.jit(net.apply), drawn(spec)


def test_padding_of_captions_is_not_read(beside):
    apply, params = beside
    x, t, cond = inputs()
    cond["image"] = np.ones((BATCH, 8, 8, 2), "f")
    other = {**cond, "text": np.where(cond["mask"], cond["text"], 19)}
    assert_allclose(apply(params, x, t, other), apply(params, x, t, cond), atol=1e-6)
    words = {**cond, "text": cond["text"] + 0 * x[:, 0, 0, :1].astype(int)}
    words["text"] = np.where(cond["text"] == cond["text"][0, 0], 4, cond["text"])
    assert not np.allclose(apply(params, x, t, words), apply(params, x, t, cond))


def test_a_picture_beside_x_is_read(beside):
    apply, params = beside
    x, t, cond = inputs()
    image = np.ones((BATCH, 8, 8, 2), "f")
    out = apply(params, x, t, {**cond, "image": image})
    assert out.shape == x.shape and out.dtype == jnp.float32
    assert not np.allclose(out, apply(params, x, t, {**cond, "image": 0 * image}))


def test_heads_of_each_resolution(monkeypatch):
    """Stable Diffusion 2's rise with the width; the middle has those of the last."""
    spec = dataclasses.replace(
        SMALL, multiples=(1, 2, 4), heads=(1, 2, 8), image_shape=(8, 8, 3)
    )
    assert denoisers.u_net(spec).conditioning == ("text", "mask")
    params, seen = from_config_lib.parameter_shapes(spec), []

    def attend(q, k, v, mask):
        seen.append(q.shape[-2:])
        return q

    monkeypatch.setattr(attention, "attend", attend)
    jax.eval_shape(
        functools.partial(unet.apply, spec),
        params,
        *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs()),
    )
    first, second, last = [(1, 32)], [(2, 32)], [(8, 16)]
    # Each transformer attends twice: a block down, two up, at two resolutions.
    assert seen == first * 2 + second * 2 + last * 2 + second * 4 + first * 4


def test_a_width_of_heads_gives_heads_of_each_resolution():
    c = config.default()
    c.data.source, c.data.shape = "memory", (8, 8, 3)
    c.model.architecture, c.model.heads, c.model.head_dim = "unet", 0, 16
    c.plan.sizes, c.plan.steps, c.plan.budgets_flops = ((32, 4),), 10, ()
    network = from_config_lib.network_config(config.resolve(c), 32, 4)
    assert network.heads == (2, 4, 8, 8)
    assert from_config_lib.network_config(config.resolve(c), 32, 1).heads == 2
    c.model.head_dim = 24
    with pytest.raises(config.ConfigError, match="32 is not a multiple of .*dim = 24"):
        config.resolve(c)
    for heads, head_dim in ((0, 0), (8, 16)):
        c.model.heads, c.model.head_dim = heads, head_dim
        with pytest.raises(config.ConfigError, match="exactly one of them is positive"):
            config.resolve(c)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 48}, "divisible by 32 groups"),
        ({"heads": 3}, "and 3 heads"),
        ({"heads": (4,)}, "for 2 resolutions: one number, or one for each"),
        ({"heads": (4, 5)}, "width 64 must be divisible by 32 groups and 5 heads"),
        ({"heads": (4, 0)}, "and 0 heads"),
        ({"image_shape": (9, 8, 3)}, "9 x 8 input cannot be halved 1 times"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        denoisers.u_net(dataclasses.replace(SMALL, **change))


@pytest.mark.slow
def test_an_experiments_network_is_exported_as_others_read_it(tmp_path):
    c = config.default()
    c.data.source, c.data.shape, c.data.text_tokens = "memory", (8, 8, 3), 5
    c.encode.text_encoder, c.model.text_width = "a/folder", 6
    c.model.architecture, c.model.heads, c.model.head_dim = "unet", 4, 0
    c.plan.sizes, c.plan.steps, c.plan.budgets_flops = ((32, 2),), 10, ()
    c.model.compute_dtype = "float32"
    experiment = config.resolve(c)
    net = from_config_lib.denoiser(experiment, 32, 2, unroll=False)
    params = jax.device_get(net.init(jax.random.key(0)))
    (tmp_path / "export").mkdir()
    model = TrainedModel(
        run_id="a", width=32, depth=2, step=1, train_flops=None, load=lambda _: params
    )
    said = export._unet(experiment, tmp_path, tmp_path / "export", model, params)
    assert "UNet2DConditionModel" in said
    settings = json.loads((tmp_path / "export" / "config.json").read_text())
    cfg, linear = unet_weights.from_config(settings, text_tokens=5)
    assert cfg == from_config_lib.unet_config(experiment, 32, 2) and linear
    file = tmp_path / "export" / "diffusion_pytorch_model.safetensors"
    jax.tree.map(np.testing.assert_array_equal, unet_weights.load(file, cfg), params)
