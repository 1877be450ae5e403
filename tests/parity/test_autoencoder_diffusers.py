"""Autoencoders with diffusers' weights give diffusers' numbers, both ways."""

import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm import flops
from scaling_ldm.models import encoders
from scaling_ldm.models.encoders import presets
from scaling_ldm.models.weights import autoencoder_kl as weights
from scaling_ldm.models.weights import layout

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
flop_counter = pytest.importorskip("torch.utils.flop_counter")

pytestmark = pytest.mark.parity

# The differences between the published families, at small widths and both depths.
FOUR, THREE = (32, 64, 64, 96), (32, 64, 64)
CASES = {
    "sd": {"channels": FOUR, "scaling_factor": 0.18215},
    "sdxl": {"channels": THREE, "scaling_factor": 0.13025},
    "sd3": {
        "channels": THREE,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "quant": False,
    },
    "flux": {
        "channels": FOUR,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "quant": False,
    },
    "no attention": {"channels": THREE, "mid_block_add_attention": False},
    "other groups": {"channels": (24, 48), "norm_num_groups": 8, "blocks": 1},
}


def theirs(channels, quant=True, blocks=2, device="cpu", **options):
    torch.manual_seed(0)
    with torch.device(device):
        net = diffusers.AutoencoderKL(
            block_out_channels=channels,
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
            layers_per_block=blocks,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
            **options,
        )
    for name, parameter in net.named_parameters():
        if device == "cpu" and parameter.ndim == 1:  # norms and biases
            near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, near, 0.3)
    return net.eval()


def published(net):
    return json.loads(net.to_json_string())


def tensors(net):
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


def channels_last(value):
    return value.permute(0, 2, 3, 1).numpy()


def relative(ours, wanted):
    return np.abs(ours - wanted).max() / np.abs(wanted).max()


def inputs(net):
    rng = np.random.default_rng(0)
    side = 2 ** (len(net.config.block_out_channels) - 1)
    x = rng.uniform(-1, 1, size=(2, 3, 4 * side, 6 * side)).astype("f")
    z = rng.normal(size=(2, net.config.latent_channels, 4, 6)).astype("f")
    return torch.from_numpy(x), torch.from_numpy(z)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_encode_and_decode(case):
    net = theirs(**CASES[case])
    x, z = inputs(net)
    config = weights.from_config(published(net))
    if case in presets.AUTOENCODERS:
        preset = presets.AUTOENCODERS[case].config
        for field in ("scale", "shift", "latent_channels", "quant_conv", "blocks"):
            assert getattr(config, field) == getattr(preset, field), field
    params, ours = weights.read(tensors(net), config), encoders.autoencoder(config)
    wanted = net.encode(x).latent_dist
    moments = np.asarray(jax.jit(ours.encode)(params, channels_last(x)))
    mean, log_variance = np.split(moments, 2, axis=-1)
    assert relative(mean, channels_last(wanted.mean)) <= 1e-4
    assert relative(log_variance, channels_last(wanted.logvar)) <= 1e-4
    got = np.asarray(jax.jit(ours.decode)(params, channels_last(z)))
    assert relative(got, channels_last(net.decode(z).sample)) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_directories_go_both_ways(case, tmp_path):
    net = theirs(**CASES[case])
    net.save_pretrained(tmp_path / "theirs")
    config, params = weights.load(tmp_path / "theirs")
    weights.save(params, tmp_path / "ours", config)
    again, back = weights.load(tmp_path / "ours")
    assert again == config
    jax.tree.map(assert_array_equal, back, params)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    for name, value in tensors(loaded).items():
        assert_array_equal(value, tensors(net)[name], err_msg=name)
    for name, value in published(loaded).items():
        if not name.startswith("_") and name not in ("sample_size", "force_upcast"):
            assert value == published(net)[name], name
    x, z = inputs(net)
    with torch.no_grad():
        assert torch.equal(loaded.encode(x).latent_dist.mode(), net.encode(x)[0].mode())
        assert torch.equal(loaded.decode(z).sample, net.decode(z).sample)


def test_the_old_layout_is_theirs(tmp_path):
    """Their loader and ours read the same old file the same way."""
    net = theirs(**CASES["sd"])
    today = {value: key for key, value in weights._OLD.items()}
    old = {}
    for name, tensor in tensors(net).items():
        head, found, tail = name.partition(".mid_block.attentions.0.")
        part, _, leaf = tail.rpartition(".")
        if part in today:
            name = f"{head}{found}{today[part]}.{leaf}"
        old[name] = np.ascontiguousarray(tensor)
    assert old.keys() != tensors(net).keys()
    net.save_config(tmp_path)
    layout.save(old, tmp_path / weights.WEIGHTS)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    config, params = weights.load(tmp_path)
    written = layout.write(weights.pairs(config), params)
    for name, value in tensors(loaded).items():
        assert_array_equal(written[name], value, err_msg=name)


@pytest.mark.parametrize("name", presets.AUTOENCODERS)
@pytest.mark.parametrize("side", [256, 512])
def test_counts_at_full_size(name, side):
    preset = presets.AUTOENCODERS[name]
    config, ours = preset.config, encoders.autoencoder(preset.config)
    z = config.latent_channels
    net = theirs(config.channels, config.quant_conv, device="meta", latent_channels=z)
    assert sum(p.numel() for p in net.parameters()) == preset.params
    params = jax.eval_shape(ours.init, jax.random.key(0))
    image, latent = (1, 3, side, side), (1, z, side // 8, side // 8)
    for ours_fn, theirs_fn, given, gflops in (
        (ours.encode, net.encode, image, preset.encode_gflops),
        (ours.decode, net.decode, latent, preset.decode_gflops),
    ):
        math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        counter = flop_counter.FlopCounterMode(display=False)
        with torch.no_grad(), math_only, counter:
            theirs_fn(torch.empty(given, device="meta"))
        x = jax.ShapeDtypeStruct((1, *given[2:], given[1]), np.float32)
        assert flops.count(ours_fn, params, x).total == counter.get_total_flops()
        if side == 256:
            assert abs(counter.get_total_flops() / 1e9 - gflops) < 0.005
