"""The U-Net with diffusers' random weights gives diffusers' numbers, both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import flops
from scaling_ldm.models import denoisers
from scaling_ldm.models.denoisers import presets, unet
from scaling_ldm.models.weights import layout
from scaling_ldm.models.weights import unet as unet_weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

pytestmark = pytest.mark.parity
SIDE, TOKENS, BATCH = 16, 7, 2


def theirs(base, text_width, linear_projection, heads=8):
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=[base * multiple for multiple in unet.MULTIPLES],
        layers_per_block=unet.BLOCKS,
        cross_attention_dim=text_width,
        attention_head_dim=heads,  # diffusers calls the number of heads so
        use_linear_projection=linear_projection,
    )
    return net.eval()


def network(base, text_width, heads=8):
    return unet.UNetConfig(
        base=base,
        heads=heads,
        image_shape=(SIDE, SIDE, 4),
        extra_channels=0,
        text_tokens=TOKENS,
        text_width=text_width,
        vocab_size=0,
        dtype=jnp.float32,
        remat="none",
    )


def inputs(text_width):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, SIDE, SIDE, 4)).astype("f")
    text = rng.normal(size=(BATCH, TOKENS, text_width)).astype("f")
    return x, np.asarray([3, 871]), text


def tensors(net):
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


def relative(ours, wanted):
    return np.abs(ours - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(
    ("base", "text_width", "linear"),
    [(32, 1024, True), (32, 768, False), (64, 64, True)],
)
def test_forward(base, text_width, linear):
    net, spec = theirs(base, text_width, linear), network(base, text_width)
    x, t, text = inputs(text_width)
    with torch.no_grad():
        wanted = net(
            torch.from_numpy(x).permute(0, 3, 1, 2),
            torch.from_numpy(t),
            torch.from_numpy(text),
        ).sample
    params = layout.read(unet_weights.pairs(spec, linear), tensors(net), "the U-Net's")
    got = jax.jit(lambda *a: unet.apply(spec, *a))(
        params, x, jnp.asarray(t / 1000, jnp.float32), {"text": text}
    )
    assert relative(np.asarray(got), wanted.permute(0, 2, 3, 1).numpy()) <= 1e-4


def test_forward_at_the_width_of_stable_diffusion():
    """A width of 320 channels, two resolutions, one block each."""
    spec = dataclasses.replace(
        network(320, 1024), multiples=(1, 2), blocks=1, image_shape=(8, 8, 4)
    )
    torch.manual_seed(0)
    config = unet_weights.to_config(spec)
    net = diffusers.UNet2DConditionModel.from_config(config).eval()
    x, t, text = inputs(1024)
    x = x[:, :8, :8]
    with torch.no_grad():
        wanted = net(
            torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2),
            torch.from_numpy(t),
            torch.from_numpy(text),
        ).sample
    params = layout.read(unet_weights.pairs(spec), tensors(net), "the U-Net's")
    got = jax.jit(lambda *a: unet.apply(spec, *a))(
        params, x, jnp.asarray(t / 1000, jnp.float32), {"text": text}
    )
    assert relative(np.asarray(got), wanted.permute(0, 2, 3, 1).numpy()) <= 1e-4


@pytest.mark.parametrize("linear", [True, False])
def test_configurations_go_both_ways(linear):
    spec = network(64, 96)
    net = theirs(64, 96, linear)
    assert unet_weights.from_config(dict(net.config), TOKENS) == (spec, linear)
    config = unet_weights.to_config(spec, linear)
    ours = diffusers.UNet2DConditionModel.from_config(config)
    assert tensors(ours).keys() == tensors(net).keys()
    wide = dataclasses.replace(spec, extra_channels=4)
    assert unet_weights.from_config(unet_weights.to_config(wide), TOKENS)[0] == wide
    other = dict(net.config) | {"act_fn": "gelu", "norm_num_groups": 16}
    with pytest.raises(layout.WeightsError, match="act_fn.*\n.*norm_num_groups"):
        unet_weights.from_config(other)


def test_gradients():
    net, spec = theirs(32, 64, True), network(32, 64)
    x, t, text = inputs(64)
    net(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(t),
        torch.from_numpy(text),
    ).sample.pow(2).mean().backward()
    pairs = unet_weights.pairs(spec)
    params = layout.read(pairs, tensors(net), "the U-Net's")

    def loss(params):
        out = unet.apply(spec, params, x, jnp.asarray(t / 1000, "f"), {"text": text})
        return jnp.mean(out**2)

    got = layout.write(pairs, jax.jit(jax.grad(loss))(params))
    scale = max(p.grad.abs().max().item() for p in net.parameters())
    for name, parameter in net.named_parameters():
        wanted = parameter.grad.numpy()
        assert_allclose(got[name], wanted, rtol=1e-3, atol=1e-5 * scale, err_msg=name)


def test_weights_go_round_bit_for_bit(tmp_path):
    net, spec = theirs(32, 64, True), network(32, 64)
    given = tensors(net)
    layout.save(given, tmp_path / "in.safetensors")
    params = unet_weights.load(tmp_path / "in.safetensors", spec)
    unet_weights.save(params, tmp_path / "out.safetensors", spec)
    back = layout.load(tmp_path / "out.safetensors")
    assert back.keys() == given.keys()
    for name, value in given.items():
        assert_array_equal(back[name], value, err_msg=name)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()})


def test_every_difference_is_listed():
    given = tensors(theirs(32, 64, True))
    given["conv_in.weight"] = given["conv_in.weight"][:, :3]
    del given["conv_out.bias"]
    given["spare"] = np.zeros(1)
    with pytest.raises(layout.WeightsError) as caught:
        layout.read(unet_weights.pairs(network(32, 64)), given, "this U-Net's")
    text = str(caught.value)
    assert "(3 differ)" in text
    assert "missing: conv_out.bias" in text and "unknown: spare" in text
    assert "shape of conv_in.weight: (32, 3, 3, 3), wanted (32, 4, 3, 3)" in text


@pytest.mark.parametrize("name", presets.UNETS)
def test_flops_and_parameters_are_torchs(name):
    """FLOPs with a latent of 64 x 64 x 4 and 77 tokens, every tap counted."""
    preset = presets.UNETS[name]
    config = unet_weights.to_config(preset.config)
    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel.from_config(config).eval()
        given = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 1024)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*given)
    ours = denoisers.u_net(preset.config)
    counted = flops.count(
        ours.apply,
        jax.eval_shape(lambda: ours.init(jax.random.key(0))),
        jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        {"text": jax.ShapeDtypeStruct((1, 77, 1024), jnp.float32)},
    )
    assert counted.total == counter.get_total_flops()
    assert sum(p.numel() for p in net.parameters()) == preset.params
