"""Transformers with diffusers' random weights give diffusers' numbers, both ways."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm import flops
from scaling_ldm.models import denoisers
from scaling_ldm.models.denoisers import dit, mmdit, presets
from scaling_ldm.models.weights import dit as dit_weights
from scaling_ldm.models.weights import layout
from scaling_ldm.models.weights import mmdit as mmdit_weights
from scaling_ldm.models.weights import pixart as pixart_weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
flop_counter = pytest.importorskip("torch.utils.flop_counter")

pytestmark = pytest.mark.parity
BATCH, SIDE, WIDE, TOKENS = 2, 8, 12, 5
TIMES = np.asarray([3, 871])
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}


def randomised(net):
    """Changes every parameter, because zeros would hide errors."""
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        scale_of_a_norm = name.endswith(".weight") and parameter.ndim == 1
        parameter.data = 0.15 * torch.randn(parameter.shape) + scale_of_a_norm
    return net.eval()


def tensors(net):
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


def relative(ours, wanted):
    return np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max()


def channels_last(x):
    return x.permute(0, 2, 3, 1)


def given(height=SIDE, width=SIDE):
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype("f")
        for name, shape in {
            "x": (BATCH, height, width, 4),
            "text": (BATCH, TOKENS, 12),
            "pooled": (BATCH, 6),
        }.items()
    } | {
        "label": np.asarray([1, 5]),
        "mask": np.arange(TOKENS)[None] < np.asarray([[3], [TOKENS]]),
        "guidance": np.asarray([3.5, 2.0], "f"),
    }


def as_torch(data, *names):
    return [torch.from_numpy(data[name]) for name in names]


# --- one case per published network: (theirs, config, how each runs, weights) ---


class Dit:
    weights = "diffusers"

    def theirs(self):
        net = randomised(
            diffusers.DiTTransformer2DModel(
                **SMALL,
                num_layers=3,
                out_channels=8,
                sample_size=SIDE,
                num_embeds_ada_norm=5,
                norm_eps=1e-4,
            )
        )
        embedders = [block.norm1.emb for block in net.transformer_blocks]
        for other in embedders[1:]:
            other.load_state_dict(embedders[0].state_dict())
        return net

    def config(self, net):
        return dit_weights.from_config(net.config)

    def pairs(self, config):
        return dit_weights.pairs(config, "diffusers")

    def fixed(self, config):
        return dit_weights.fixed(config, "diffusers")

    def to_config(self, config):
        return dit_weights.to_config(config)

    def run(self, net, data):
        x, label = as_torch(data, "x", "label")
        out = net(x.permute(0, 3, 1, 2), torch.from_numpy(TIMES), label).sample
        return channels_last(out)

    def apply(self, config, params, data):
        t = jnp.asarray(TIMES / 1000, "f")
        return dit.apply(config, params, data["x"], t, {"label": data["label"]})


class PixArt(Dit):
    def theirs(self):
        return randomised(
            diffusers.PixArtTransformer2DModel(
                **SMALL,
                num_layers=3,
                sample_size=SIDE,
                cross_attention_dim=32,
                caption_channels=12,
                interpolation_scale=2,
            )
        )

    def config(self, net):
        return pixart_weights.from_config(net.config, TOKENS)

    def pairs(self, config):
        return pixart_weights.pairs(config)

    def fixed(self, config):
        return []

    def to_config(self, config):
        return pixart_weights.to_config(config)

    def run(self, net, data):
        x, text, mask = as_torch(data, "x", "text", "mask")
        out = net(
            x.permute(0, 3, 1, 2),
            text,
            torch.from_numpy(TIMES),
            encoder_attention_mask=mask.long(),
        ).sample
        return channels_last(out)

    def apply(self, config, params, data):
        cond = {"text": data["text"], "mask": data["mask"]}
        t = jnp.asarray(TIMES / 1000, "f")
        return dit.apply(config, params, data["x"], t, cond)


class Sd3(Dit):
    def __init__(self, qk_norm):
        self.qk_norm = qk_norm

    def theirs(self):
        return randomised(
            diffusers.SD3Transformer2DModel(
                **SMALL,
                sample_size=2 * SIDE,  # positions from the middle of a table
                in_channels=4,
                out_channels=4,
                num_layers=3,
                joint_attention_dim=12,
                caption_projection_dim=32,
                pooled_projection_dim=6,
                pos_embed_max_size=11,
                qk_norm=self.qk_norm,
            )
        )

    def config(self, net):
        return mmdit_weights.sd3_from_config(net.config, TOKENS, side=SIDE)

    def pairs(self, config):
        return mmdit_weights.pairs(config)

    def fixed(self, config):
        return mmdit_weights.fixed(config)

    def to_config(self, config):
        return mmdit_weights.to_config(config)

    def run(self, net, data):
        x, text, pooled = as_torch(data, "x", "text", "pooled")
        out = net(x.permute(0, 3, 1, 2), text, pooled, torch.from_numpy(TIMES)).sample
        return channels_last(out)

    def apply(self, config, params, data):
        cond = {name: data[name] for name in ("text", "pooled")}
        t = jnp.asarray(TIMES / 1000, "f")
        return mmdit.apply(config, params, data["x"], t, cond)


class Flux(Sd3):
    def __init__(self, guidance):
        self.guidance = guidance

    def theirs(self):
        return randomised(
            diffusers.FluxTransformer2DModel(
                **SMALL,
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                joint_attention_dim=12,
                pooled_projection_dim=6,
                guidance_embeds=self.guidance,
                axes_dims_rope=(4, 6, 6),
            )
        )

    def config(self, net):
        return mmdit_weights.flux_from_config(net.config, TOKENS, (SIDE, WIDE))

    def run(self, net, data):
        pipeline = diffusers.FluxPipeline
        x, text, pooled, scale = as_torch(data, "x", "text", "pooled", "guidance")
        packed = pipeline._pack_latents(x.permute(0, 3, 1, 2), BATCH, 4, SIDE, WIDE)
        ids = pipeline._prepare_latent_image_ids(
            BATCH, SIDE // 2, WIDE // 2, "cpu", torch.float32
        )
        out = net(
            packed,
            text,
            pooled,
            torch.from_numpy(TIMES / 1000).float(),
            ids,
            torch.zeros(TOKENS, 3),
            guidance=scale if self.guidance else None,
        ).sample
        out = pipeline._unpack_latents(out, SIDE * 8, WIDE * 8, 8)
        return channels_last(out)

    def apply(self, config, params, data):
        names = ("text", "pooled", "guidance") if self.guidance else ("text", "pooled")
        cond = {name: data[name] for name in names}
        cond["mask"] = np.ones((BATCH, TOKENS), bool)  # every word is real
        t = jnp.asarray(TIMES / 1000, "f")
        return mmdit.apply(config, params, data["x"], t, cond)


CASES = {
    "dit": Dit(),
    "pixart": PixArt(),
    "sd3": Sd3(None),
    "sd3_rms": Sd3("rms_norm"),
    "sd3_layer": Sd3("layer_norm"),
    "flux": Flux(False),
    "flux_guidance": Flux(True),
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    kind = CASES[request.param]
    net = kind.theirs()
    config = kind.config(net)
    data = given(width=WIDE if isinstance(kind, Flux) else SIDE)
    params = layout.read(
        kind.pairs(config), tensors(net), "it", fixed=kind.fixed(config)
    )
    return kind, net, config, data, params


def test_forward(case):
    kind, net, config, data, params = case
    with torch.no_grad():
        wanted = kind.run(net, data).numpy()
    got = jax.jit(lambda p: kind.apply(config, p, data))(params)
    assert got.shape == wanted.shape
    assert relative(got, wanted) <= 1e-4


def test_gradients(case):
    kind, net, config, data, params = case
    # Sines of 3500, FLUX's guidance times 1000, differ by 2e-4 between two float32
    # libraries. Outputs still agree to 1e-4, but small gradients do not.
    data = data | {"guidance": data["guidance"] / 10}
    net.zero_grad()
    kind.run(net, data).pow(2).mean().backward()
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(kind.apply(config, p, data) ** 2)))
    ours = layout.write(kind.pairs(config), gradient(params))
    wanted = {}
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            wanted[name] = parameter.grad.numpy()
    if kind.__class__ is Dit:  # blocks hold copies of one embedder; their gradients sum
        for name in [name for name in wanted if ".norm1.emb." in name]:
            rest = name.split(".norm1.emb.")[1]
            wanted[name] = sum(
                block.norm1.emb.get_parameter(rest).grad.numpy()
                for block in net.transformer_blocks
            )
    scale = max(np.abs(value).max() for value in wanted.values())
    assert len(wanted) > 40
    for name, value in wanted.items():
        # A bias on all keys shifts all scores equally; its gradient is rounding error.
        size = scale if ".to_k.bias" in name else np.abs(value).max()
        assert np.abs(ours[name] - value).max() <= 1e-4 * size, name
    for name in ours.keys() - wanted.keys():  # text queries of SD3's last block
        assert np.abs(ours[name]).max() == 0, name


def test_weights_go_round_and_diffusers_reads_them(case, tmp_path):
    kind, net, config, data, params = case
    written = layout.write(kind.pairs(config), params, kind.fixed(config))
    assert written.keys() == tensors(net).keys()
    layout.save(written, tmp_path / "diffusion_pytorch_model.safetensors")
    back = layout.load(tmp_path / "diffusion_pytorch_model.safetensors")
    again = layout.read(kind.pairs(config), back, "it", fixed=kind.fixed(config))
    jax.tree.map(assert_array_equal, again, params)
    for name, value in tensors(net).items():
        if "pos_embed.pos_embed" in name:
            np.testing.assert_allclose(back[name], value, atol=1e-6)
        else:
            assert_array_equal(back[name], value, err_msg=name)
    (tmp_path / "config.json").write_text(json.dumps(kind.to_config(config)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = type(net).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    with torch.no_grad():
        wanted = kind.run(net, data).numpy()
        np.testing.assert_allclose(kind.run(loaded, data), wanted, rtol=1e-5, atol=1e-5)
    assert kind.config(loaded) == config


def test_embedders_that_differ_between_blocks_are_refused():
    net = CASES["dit"].theirs()
    config = dit_weights.from_config(net.config)
    net.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.data += 1
    with pytest.raises(layout.WeightsError, match="1 differ") as caught:
        layout.read(CASES["dit"].pairs(config), tensors(net), "this DiT's")
    assert "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias" in str(
        caught.value
    )


def test_half_precision_becomes_float32(tmp_path):
    net = CASES["flux"].theirs().to(torch.bfloat16)
    config = CASES["flux"].config(net)
    import safetensors.torch

    safetensors.torch.save_file(net.state_dict(), tmp_path / "half.safetensors")
    params = mmdit_weights.load(tmp_path / "half.safetensors", config)
    wanted = net.proj_out.bias.detach().float().numpy().reshape(4, 2, 2)
    got = params["exit"]["patch"]["bias"].reshape(2, 2, 4).transpose(2, 0, 1)
    assert got.dtype == np.float32
    assert_array_equal(got, wanted)


# ------------------------------- published sizes -------------------------------


def their_flops(net, *inputs, **named):
    math_only = torch.nn.attention.SDPBackend.MATH
    with (
        torch.nn.attention.sdpa_kernel(math_only),
        flop_counter.FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        net(*inputs, **named)
    return counter.get_total_flops(), sum(p.numel() for p in net.parameters())


def our_counts(preset):
    cfg = preset.config
    build = (
        denoisers.transformer if isinstance(cfg, dit.DiTConfig) else denoisers.mm_dit
    )
    net = build(cfg)
    sizes = {
        "text": (1, cfg.text_tokens, cfg.text_width),
        "pooled": (1, getattr(cfg, "pooled_width", 0)),
        "guidance": (1,),
    }
    cond = {
        name: jax.ShapeDtypeStruct(sizes[name], jnp.float32)
        for name in net.conditioning
        if name in sizes
    }
    cond["label"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    cond["mask"] = jax.ShapeDtypeStruct((1, cfg.text_tokens), bool)
    counted = flops.count(
        net.apply,
        jax.eval_shape(lambda: net.init(jax.random.key(0))),
        jax.ShapeDtypeStruct((1, *cfg.image_shape), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        cond,
    )
    assert denoisers.count_params(net)[0] == preset.params
    np.testing.assert_allclose(counted.total / 1e9, preset.forward_gflops, atol=0.006)
    return counted.total, preset.params


@pytest.mark.parametrize("name", ["dit_s_2", "dit_b_4", "dit_l_8", "dit_xl_2"])
def test_counts_of_dit(name):
    """diffusers embeds time and label once per block and once more at the end."""
    preset = presets.DITS[name]
    config = dit_weights.to_config(
        preset.config.__class__(**{**vars(preset.config), "time_ends": 1})
    )
    depth, width = preset.config.depth, preset.config.width
    with torch.device("meta"):
        net = diffusers.DiTTransformer2DModel.from_config(config)
        index = torch.zeros(1, dtype=torch.long)
        theirs, params = their_flops(net, torch.empty(1, 4, 32, 32), index, index)
    ours, our_params = our_counts(preset)
    mlp = 256 * width + width * width
    assert theirs - ours == 2 * depth * mlp
    assert params - our_params == (depth - 1) * (mlp + 2 * width + 1001 * width)
    if name == "dit_xl_2":
        assert theirs == 237_333_676_032


def test_counts_of_pixart():
    preset = presets.PIXARTS["pixart_alpha_xl_2"]
    config = pixart_weights.to_config(preset.config)
    with torch.device("meta"):
        net = diffusers.PixArtTransformer2DModel.from_config(config)
        theirs = their_flops(
            net,
            torch.empty(1, 4, 64, 64),
            torch.empty(1, 120, 4096),
            torch.zeros(1, dtype=torch.long),
        )
    assert our_counts(preset) == theirs


def test_counts_of_sd3():
    """In diffusers the text of the last block attends too, and is then dropped."""
    preset = presets.MMDITS["sd3_medium"]
    config = mmdit_weights.to_config(preset.config)
    with torch.device("meta"):
        net = diffusers.SD3Transformer2DModel.from_config(config)
        theirs, params = their_flops(
            net,
            torch.empty(1, 16, 128, 128),
            torch.empty(1, 154, 4096),
            torch.empty(1, 2048),
            torch.zeros(1, dtype=torch.long),
        )
    ours, our_params = our_counts(preset)
    assert our_params == params == 2_028_328_000
    assert theirs - ours == 4 * 154 * (154 + 4096) * 1536


def test_counts_of_flux():
    preset = presets.MMDITS["flux_1_dev"]
    config = mmdit_weights.to_config(preset.config)
    with torch.device("meta"):
        net = diffusers.FluxTransformer2DModel.from_config(config)
        theirs = their_flops(
            net,
            torch.empty(1, 4096, 64),
            torch.empty(1, 512, 4096),
            torch.empty(1, 768),
            torch.zeros(1),
            torch.zeros(4096, 3),
            torch.zeros(512, 3),
            guidance=torch.zeros(1),
        )
    assert our_counts(preset) == theirs
    assert theirs[1] == 11_901_408_320
