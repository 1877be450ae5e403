"""Parameters and FLOPs of published encoders equal torch's, on the meta device."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from scaling_ldm import flops
from scaling_ldm.models.encoders import bert, clip, presets, t5

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
flop_counter = pytest.importorskip("torch.utils.flop_counter")

pytestmark = pytest.mark.parity
BATCH = 2


def theirs(config):
    """The same network, made by transformers."""
    if isinstance(config, t5.T5Config):
        return transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=config.vocab_size,
                d_model=config.width,
                d_kv=config.head_width,
                d_ff=config.hidden,
                num_layers=config.depth,
                num_heads=config.heads,
                feed_forward_proj="gated-gelu",
            )
        )
    common = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": config.activation,
        "attn_implementation": "eager",
    }
    if isinstance(config, clip.ClipVisionConfig):
        return transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                **common,
                image_size=config.image_size,
                patch_size=config.patch_size,
                projection_dim=config.projection,
            )
        )
    common["vocab_size"] = config.vocab_size
    common["max_position_embeddings"] = config.max_tokens
    if isinstance(config, bert.BertConfig):
        return transformers.BertModel(transformers.BertConfig(**common))
    if not config.projection:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**common))
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**common, projection_dim=config.projection)
    )


def ours(config):
    """(init, what torch's forward pass does) of a config."""
    if isinstance(config, t5.T5Config):
        return t5.init, lambda p, ids: t5.apply(config, p, ids, None)
    if isinstance(config, clip.ClipVisionConfig):
        return clip.init_vision, lambda p, x: clip.embed_image(config, p, x)
    if isinstance(config, clip.ClipTextConfig):
        return clip.init, lambda p, ids: clip.embed_text(config, p, ids, None)

    def whole(p, ids):
        return bert.first_token(config, p, bert.apply(config, p, ids, None))

    return bert.init, whole


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("name", presets.PRESETS)
def test_counts(name, unroll):
    preset = presets.PRESETS[name]
    config = dataclasses.replace(preset.config, unroll=unroll)
    with torch.device("meta"):
        net = theirs(config).eval()
    if isinstance(config, clip.ClipVisionConfig):
        side = config.image_size
        size, kind = (BATCH, side, side, 3), jnp.float32
        given = {"pixel_values": torch.empty((BATCH, 3, side, side), device="meta")}
    else:
        size, kind = (BATCH, min(config.max_tokens, 77)), jnp.int32
        given = {"input_ids": torch.zeros(size, dtype=torch.long, device="meta")}
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        net(**given)
    init, apply = ours(config)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    counted = flops.count(apply, params, jax.ShapeDtypeStruct(size, kind))
    assert counted.total == counter.get_total_flops()
    wanted = sum(p.numel() for p in net.parameters())
    assert wanted == preset.params
    assert wanted == sum(math.prod(p.shape) for p in jax.tree.leaves(params))
