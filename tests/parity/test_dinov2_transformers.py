"""DINOv2 with transformers' random weights gives its numbers, both ways."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import flops
from scaling_ldm.models.encoders import dinov2, presets
from scaling_ldm.models.weights import dinov2 as weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
flop_counter = pytest.importorskip("torch.utils.flop_counter")

pytestmark = pytest.mark.parity

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 20,
    "patch_size": 4,
}


def noisy(gated):
    """A network without parameters that are 0 or 1."""
    config = transformers.Dinov2Config(**SMALL, use_swiglu_ffn=gated)
    torch.manual_seed(0)
    net = transformers.Dinov2Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return net.eval()


def pictures(height, width):
    rng = np.random.default_rng(1)
    return rng.uniform(0, 255, (3, height, width, 3)).astype("f")


def run(net, x):
    x = torch.from_numpy((x / 255 - dinov2.MEAN) / dinov2.STD)
    with torch.no_grad():
        return net(x.permute(0, 3, 1, 2))


def relative(ours, wanted):
    wanted = wanted.numpy()
    return np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_features_of_all_sizes(gated, unroll, tmp_path):
    net = noisy(gated)
    net.save_pretrained(tmp_path)
    config, params = weights.open_directory(tmp_path, unroll=unroll)
    for size in [(20, 20), (12, 12), (28, 28), (12, 32), (100, 4)]:
        x = pictures(*size)
        wanted = run(net, x)
        got = jax.jit(lambda *a: dinov2.tokens(config, *a))(params, x)
        assert relative(got, wanted.last_hidden_state) <= 1e-4
        got = jax.jit(lambda *a: dinov2.apply(config, *a))(params, x).features
        assert relative(got, wanted.pooler_output) <= 1e-4


@pytest.mark.parametrize("gated", [False, True])
def test_exports_load_in_transformers(gated, tmp_path):
    net = noisy(gated)
    net.save_pretrained(tmp_path / "theirs")
    config, params = weights.open_directory(tmp_path / "theirs")
    place = tmp_path / "ours"
    net.config.save_pretrained(place)
    weights.save(params, place / "model.safetensors", config)
    jax.tree.map(assert_array_equal, weights.load(place, config), params)
    again, report = transformers.Dinov2Model.from_pretrained(
        place, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
    for name, value in net.state_dict().items():
        assert_array_equal(again.state_dict()[name], value, err_msg=name)
    x = pictures(12, 16)
    wanted = run(net, x).last_hidden_state
    assert_array_equal(run(again.eval(), x).last_hidden_state, wanted)


def test_what_modules_call_their_tensors_is_read_too(tmp_path):
    from safetensors.torch import save_file

    net = noisy(gated=True)
    net.config.save_pretrained(tmp_path)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    config, params = weights.open_directory(tmp_path)
    net.save_pretrained(tmp_path)
    jax.tree.map(assert_array_equal, weights.load(tmp_path, config), params)


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("size", [(16, 16), (5, 40), (37, 36), (1, 2)])
def test_positions_are_torchs(size, offset):
    config = dataclasses.replace(presets.DINOV2["dinov2_s14"].config, offset=offset)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(1 + config.grid**2, 5)).astype("f")
    grid = torch.from_numpy(table[1:]).reshape(1, config.grid, config.grid, 5)
    how = {"size": size}
    if offset:
        how = {"scale_factor": tuple((n + offset) / config.grid for n in size)}
    wanted = torch.nn.functional.interpolate(
        grid.permute(0, 3, 1, 2), mode="bicubic", **how
    )
    assert tuple(wanted.shape[2:]) == size
    got = dinov2.positions(config, jnp.asarray(table), *size)[1:]
    wanted = wanted.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("name", presets.DINOV2)
def test_counts(name):
    preset = presets.DINOV2[name]
    config = preset.config
    with torch.device("meta"):
        net = transformers.Dinov2Model(
            transformers.Dinov2Config(
                hidden_size=config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                use_swiglu_ffn=config.gated,
                image_size=config.image_size,
                attn_implementation="eager",
            )
        ).eval()
    params = jax.eval_shape(lambda: dinov2.init(config, jax.random.key(0)))
    wanted = sum(p.numel() for p in net.parameters())
    assert wanted == preset.params
    assert wanted == sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    for side in (dinov2.SIZE, config.image_size):
        x = torch.empty((2, 3, side, side), device="meta")
        with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x)
        x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
        counted = flops.count(lambda p, x: dinov2.apply(config, p, x), params, x)
        assert counted.total == counter.get_total_flops()
