"""Every network that the docs name, in its published configuration, on random weights.

Widths are the published ones where a network runs within a minute; every other setting
always is. The weights are read from a folder, as a user would read them, so the
config.json decides all that tensors do not show.
"""

import inspect
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import other_settings
import published_configurations as configurations
import pytest

from scaling_ldm.models import encoders
from scaling_ldm.models.denoisers import dit, mmdit, unet
from scaling_ldm.models.encoders import clip, dinov2
from scaling_ldm.models.weights import bert as bert_weights
from scaling_ldm.models.weights import clip as clip_weights
from scaling_ldm.models.weights import dinov2 as dinov2_weights
from scaling_ldm.models.weights import published
from scaling_ldm.models.weights import t5 as t5_weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
BATCH, TOKENS = 2, 7
TIMES = np.asarray([3, 871])


# Of rows to look up; a matrix with "embed" in its name is none.
TABLES = (
    "embedding_table.weight",
    "word_embeddings.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
    "token_embedding.weight",
    "position_embedding.weight",
    "shared.weight",
)


def drawn(net):
    """Numbers for every parameter that keep activations near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:  # norms, biases and scales of layers
                near = 1.0 if name.endswith(("weight", "lambda1")) else 0.0
                p.normal_(near, 0.2, generator=generator)
            elif name.endswith(TABLES):
                p.normal_(0, 0.5, generator=generator)
            else:
                inputs = p[0].numel()
                p.normal_(0, 0.7 * inputs**-0.5, generator=generator)
    for block in getattr(net, "transformer_blocks", ()):
        if getattr(block.norm1, "emb", None) is not None:  # DiT's copies are equal
            first = net.transformer_blocks[0].norm1.emb
            block.norm1.emb.load_state_dict(first.state_dict())
    return net.eval()


def relative(ours, wanted):
    return np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max()


def torch_of(x):
    return torch.from_numpy(np.ascontiguousarray(x))


def channels_first(x):
    return torch_of(x.transpose(0, 3, 1, 2))


def channels_last(x):
    return x.permute(0, 2, 3, 1).numpy()


class Kind:
    """How one kind of network is built there, read here, and run on both sides."""

    LIKE = types.SimpleNamespace(text_tokens=TOKENS, image_shape=(16, 16, 16))

    def theirs(self, config):
        name = config["_class_name"]
        if name == "Transformer2DModel":
            of_norm = {"ada_norm_zero": "DiT", "ada_norm_single": "PixArt"}
            name = f"{of_norm[config['norm_type']]}Transformer2DModel"
            config = {k: v for k, v in config.items() if v not in (None, False)}
            config["_class_name"] = name
        return getattr(diffusers, name).from_config(config)

    def read(self, folder):
        found = published.find(folder, self.LIKE)
        return found.network, found.load()


class UNet(Kind):
    def inputs(self, rng):
        return {
            "x": rng.normal(size=(BATCH, 8, 8, 4)).astype("f"),
            "text": rng.normal(size=(BATCH, TOKENS, self.text)).astype("f"),
        }

    def theirs(self, config):
        self.text = config["cross_attention_dim"]
        return super().theirs(config)

    def run(self, net, data):
        x, text = channels_first(data["x"]), torch_of(data["text"])
        return channels_last(net(x, torch_of(TIMES), text).sample)

    def apply(self, config, params, data):
        t = jnp.asarray(TIMES / 1000, "f")
        return unet.apply(config, params, data["x"], t, {"text": data["text"]})


class DiT(Kind):
    def inputs(self, rng):
        x = rng.normal(size=(BATCH, 32, 32, 4)).astype("f")
        return {"x": x, "label": np.asarray([1, 1000])}

    def run(self, net, data):
        x, label = channels_first(data["x"]), torch_of(data["label"])
        return channels_last(net(x, torch_of(TIMES), label).sample)

    def apply(self, config, params, data):
        t = jnp.asarray(TIMES / 1000, "f")
        return dit.apply(config, params, data["x"], t, {"label": data["label"]})


class PixArt(Kind):
    def inputs(self, rng):
        return {
            "x": rng.normal(size=(BATCH, 64, 64, 4)).astype("f"),
            "text": rng.normal(size=(BATCH, TOKENS, 4096)).astype("f"),
            "mask": np.arange(TOKENS)[None] < np.asarray([[3], [TOKENS]]),
        }

    def run(self, net, data):
        x, text, mask = channels_first(data["x"]), data["text"], data["mask"]
        out = net(
            x,
            torch_of(text),
            torch_of(TIMES),
            encoder_attention_mask=torch_of(mask).long(),
        )
        return channels_last(out.sample)

    def apply(self, config, params, data):
        t = jnp.asarray(TIMES / 1000, "f")
        cond = {"text": data["text"], "mask": data["mask"]}
        return dit.apply(config, params, data["x"], t, cond)


class MMDiT(Kind):
    """At the published side of 128, of which a table of positions is cut."""

    def inputs(self, rng):
        return {
            "x": rng.normal(size=(1, 128, 128, 16)).astype("f"),
            "text": rng.normal(size=(1, TOKENS, 4096)).astype("f"),
            "pooled": rng.normal(size=(1, 2048)).astype("f"),
        }

    def run(self, net, data):
        x, text, pooled = channels_first(data["x"]), data["text"], data["pooled"]
        out = net(x, torch_of(text), torch_of(pooled), torch_of(TIMES[1:]))
        return channels_last(out.sample)

    def apply(self, config, params, data):
        cond = {name: data[name] for name in ("text", "pooled")}
        t = jnp.asarray(TIMES[1:] / 1000, "f")
        return mmdit.apply(config, params, data["x"], t, cond)


class Flux(Kind):
    SIDE = 16

    def inputs(self, rng):
        return {
            "x": rng.normal(size=(BATCH, self.SIDE, self.SIDE, 16)).astype("f"),
            "text": rng.normal(size=(BATCH, TOKENS, 4096)).astype("f"),
            "pooled": rng.normal(size=(BATCH, 768)).astype("f"),
            "guidance": np.asarray([3.5, 2.0], "f"),
            "mask": np.ones((BATCH, TOKENS), bool),
        }

    def run(self, net, data):
        pipeline, side = diffusers.FluxPipeline, self.SIDE
        packed = pipeline._pack_latents(
            channels_first(data["x"]), BATCH, 16, side, side
        )
        ids = pipeline._prepare_latent_image_ids(
            BATCH, side // 2, side // 2, "cpu", torch.float32
        )
        out = net(
            packed,
            torch_of(data["text"]),
            torch_of(data["pooled"]),
            torch_of(TIMES / 1000).float(),
            ids,
            torch.zeros(TOKENS, 3),
            guidance=torch_of(data["guidance"]),
        ).sample
        return channels_last(pipeline._unpack_latents(out, side * 8, side * 8, 8))

    def apply(self, config, params, data):
        t = jnp.asarray(TIMES / 1000, "f")
        cond = {name: data[name] for name in ("text", "pooled", "guidance", "mask")}
        return mmdit.apply(config, params, data["x"], t, cond)


class Autoencoder(Kind):
    """Pictures to scaled latents and back, as a pipeline of diffusers does it."""

    def inputs(self, rng):
        return {"x": rng.uniform(-1, 1, (BATCH, 32, 32, 3)).astype("f")}

    def run(self, net, data):
        scale, shift = net.config.scaling_factor, net.config.shift_factor or 0.0
        z = (net.encode(channels_first(data["x"])).latent_dist.mean - shift) * scale
        back = net.decode(z / scale + shift).sample
        return channels_last(z), channels_last(back)

    def apply(self, config, params, data):
        network = encoders.autoencoder(config)
        mean, _ = jnp.split(network.encode(params, data["x"]), 2, axis=-1)
        z = (mean - config.shift) * config.scale
        return z, network.decode(params, z / config.scale + config.shift)


class Transformers(Kind):
    """A network of transformers: its class there, and how its folder is read here."""

    def __init__(self, theirs, read):
        self._theirs, self.read = theirs, read

    def theirs(self, config):
        net = self._theirs(self._theirs.config_class(**config))
        return net


class Text(Transformers):
    def inputs(self, rng):
        ids = rng.integers(3, 20000, (BATCH, TOKENS))
        return {"ids": ids, "mask": np.arange(TOKENS)[None] < [[4], [TOKENS]]}

    def run(self, net, data):
        mask = torch_of(data["mask"]).long()
        out = net(input_ids=torch_of(data["ids"]), attention_mask=mask)
        return np.where(data["mask"][..., None], out.last_hidden_state.numpy(), 0)

    def apply(self, config, params, data):
        ids, mask = data["ids"].astype(np.int32), data["mask"]
        out = encoders.text_encoder(config).apply(params, ids, mask)
        return jnp.where(mask[..., None], out, 0)


class ClipText(Text):
    """Features and, with a projection, the vector at the end of the text."""

    def inputs(self, rng):
        data = super().inputs(rng)
        data["ids"][:, 4] = 49407  # which ends the text
        return data

    def run(self, net, data):
        out = net(input_ids=torch_of(data["ids"]))
        vector = getattr(out, "text_embeds", None)
        features = out.last_hidden_state.numpy()
        return features if vector is None else (features, vector.numpy())

    def apply(self, config, params, data):
        ids = data["ids"].astype(np.int32)
        features = clip.apply(config, params, ids, None)
        if not config.projection:
            return features
        return features, clip.embed_text(config, params, ids, None)


class ClipVision(Transformers):
    def inputs(self, rng):
        return {"x": rng.normal(size=(1, 224, 224, 3)).astype("f")}

    def run(self, net, data):
        return net(channels_first(data["x"])).image_embeds.numpy()

    def apply(self, config, params, data):
        return clip.embed_image(config, params, data["x"])


class Dino(ClipVision):
    """Ours reads pixels from 0 to 255."""

    def inputs(self, rng):
        return {"x": rng.uniform(0, 255, (1, 224, 224, 3)).astype("f")}

    def run(self, net, data):
        x = (data["x"] / 255 - dinov2.MEAN) / dinov2.STD
        return net(channels_first(x)).last_hidden_state.numpy()

    def apply(self, config, params, data):
        return dinov2.tokens(config, params, data["x"])


def kind(name, config):
    """How a configuration is built, read and run."""
    if "_class_name" in config:
        return {
            "UNet2DConditionModel": UNet,
            "Transformer2DModel": (
                DiT if config.get("norm_type") == "ada_norm_zero" else PixArt
            ),
            "SD3Transformer2DModel": MMDiT,
            "FluxTransformer2DModel": Flux,
            "AutoencoderKL": Autoencoder,
        }[config["_class_name"]]()
    with_vector = not name.startswith("stable-diffusion")
    text = transformers.CLIPTextModelWithProjection
    return {
        "t5": Text(transformers.T5EncoderModel, t5_weights.open_directory),
        "bert": Text(transformers.BertModel, bert_weights.open_directory),
        "clip_text_model": ClipText(
            text if with_vector else transformers.CLIPTextModel,
            clip_weights.open_directory,
        ),
        "clip_vision_model": ClipVision(
            transformers.CLIPVisionModelWithProjection,
            clip_weights.open_vision_directory,
        ),
        "dinov2": Dino(transformers.Dinov2Model, dinov2_weights.open_directory),
    }[config["model_type"]]


@pytest.mark.parametrize("name", configurations.CONFIGURATIONS)
def test_forward(name, tmp_path):
    config = configurations.CONFIGURATIONS[name] | configurations.NARROW.get(name, {})
    one = kind(name, config)
    net = drawn(one.theirs(dict(config)))
    data = one.inputs(np.random.default_rng(0))
    with torch.no_grad():
        wanted = one.run(net, data)
    net.save_pretrained(tmp_path)
    del net
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        network, params = one.read(tmp_path)
    finally:
        shutil.rmtree(tmp_path)  # gigabytes
    got = jax.jit(lambda params, data: one.apply(network, params, data))(params, data)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert np.abs(theirs).max() > 0.01
        assert relative(ours, theirs) <= 1e-4


# Another value of a setting that the shapes of tensors do not show; layers are fewer
# than published.
INVISIBLE = [
    ("stable-diffusion-1", {"attention_head_dim": 4}),
    ("DiT-XL-2-256", {"norm_eps": 0.1}),
    ("DiT-XL-2-256", {"num_attention_heads": 8, "attention_head_dim": 144}),
    ("PixArt-XL-2-512x512", {"interpolation_scale": 2}),
    ("PixArt-XL-2-512x512", {"num_attention_heads": 2, "attention_head_dim": 144}),
    (
        "stable-diffusion-3-medium",
        {"num_attention_heads": 2, "attention_head_dim": 128},
    ),
    ("FLUX.1-dev", {"axes_dims_rope": [32, 48, 48]}),
    ("sd-vae", {"norm_num_groups": 16}),
    ("sd-vae", {"scaling_factor": 0.5}),
    ("sd-vae", {"shift_factor": 0.5}),
    ("t5-v1_1-small", {"feed_forward_proj": "gated-silu"}),
    ("t5-v1_1-small", {"layer_norm_epsilon": 0.1}),
    ("t5-v1_1-small", {"relative_attention_max_distance": 17}),
    ("bert-base-uncased", {"hidden_act": "relu"}),
    ("bert-base-uncased", {"layer_norm_eps": 0.1}),
    ("bert-base-uncased", {"num_attention_heads": 6}),
    ("clip-vit-large-patch14, text", {"eos_token_id": 9}),
    ("clip-vit-large-patch14, text", {"hidden_act": "gelu"}),
    ("clip-vit-large-patch14, text", {"layer_norm_eps": 0.1}),
    ("clip-vit-large-patch14, text", {"num_attention_heads": 6}),
    ("clip-vit-large-patch14, vision", {"hidden_act": "gelu"}),
    ("clip-vit-large-patch14, vision", {"layer_norm_eps": 0.1}),
    ("clip-vit-large-patch14, vision", {"num_attention_heads": 8}),
    ("dinov2-small", {"hidden_act": "relu"}),
    ("dinov2-small", {"layer_norm_eps": 0.1}),
    ("dinov2-small", {"num_attention_heads": 3}),
]
FEW = {"num_layers", "num_single_layers", "num_hidden_layers"}


@pytest.mark.parametrize(("name", "change"), INVISIBLE)
def test_a_setting_that_shapes_do_not_show_is_that_of_the_file(name, change, tmp_path):
    before = configurations.CONFIGURATIONS[name] | configurations.NARROW.get(name, {})
    if name == "stable-diffusion-1":
        before |= {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1}
    before |= {key: 2 for key in FEW & set(before)}
    one = kind(name, before | change)
    net = drawn(one.theirs(before | change))
    data = one.inputs(np.random.default_rng(0))
    if "ids" in data:  # longer than the distances that have buckets of their own
        rng = np.random.default_rng(1)
        data["ids"] = rng.integers(10, 20000, (BATCH, 40))
        data["mask"] = np.ones((BATCH, 40), bool)
        data["ids"][:, [4, 8]] = 9, 49407 if "CLIP" in type(net).__name__ else 11
    with torch.no_grad():
        wanted = one.run(net, data)
    net.save_pretrained(tmp_path)
    outputs = []
    for config in (before | change, before):
        (tmp_path / "config.json").write_text(json.dumps(config))
        network, params = one.read(tmp_path)
        run = jax.jit(lambda params, data, n=network: one.apply(n, params, data))
        outputs.append(run(params, data))
    ours, unchanged = map(jax.tree.leaves, outputs)
    theirs = jax.tree.leaves(wanted)
    assert max(map(relative, ours, theirs)) <= 1e-4
    assert max(map(relative, unchanged, theirs)) > 1e-3


CLASSES = {
    "t5": transformers.T5Config,
    "bert": transformers.BertConfig,
    "clip_text_model": transformers.CLIPTextConfig,
    "clip_vision_model": transformers.CLIPVisionConfig,
    "dinov2": transformers.Dinov2Config,
}


@pytest.mark.parametrize("kind", other_settings.OTHER)
def test_every_setting_that_the_other_library_knows_is_tried(kind):
    """tests/models/test_published_settings.py tries them."""
    if kind in CLASSES:
        names = set(CLASSES[kind].__dataclass_fields__)
        names -= set(transformers.PreTrainedConfig.__dataclass_fields__)
    else:
        names = set(inspect.signature(getattr(diffusers, kind)).parameters)
    names = {name for name in names if not name.startswith("_")}
    assert names and names <= set(other_settings.OTHER[kind])
