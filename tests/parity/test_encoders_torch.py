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


def theirs(shape):
    """The same network of transformers'."""
    if isinstance(shape, t5.T5Config):
        return transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=shape.vocab_size,
                d_model=shape.width,
                d_kv=shape.head_width,
                d_ff=shape.hidden,
                num_layers=shape.depth,
                num_heads=shape.heads,
                feed_forward_proj="gated-gelu",
            )
        )
    common = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
        "hidden_act": shape.activation,
        "attn_implementation": "eager",
    }
    if isinstance(shape, clip.ClipVisionConfig):
        return transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                **common,
                image_size=shape.image_size,
                patch_size=shape.patch_size,
                projection_dim=shape.projection,
            )
        )
    common["vocab_size"] = shape.vocab_size
    common["max_position_embeddings"] = shape.max_tokens
    if isinstance(shape, bert.BertConfig):
        return transformers.BertModel(transformers.BertConfig(**common))
    if not shape.projection:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**common))
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**common, projection_dim=shape.projection)
    )


def ours(shape):
    """(init, what torch's forward pass does) of a shape."""
    if isinstance(shape, t5.T5Config):
        return t5.init, lambda p, ids: t5.apply(shape, p, ids, None)
    if isinstance(shape, clip.ClipVisionConfig):
        return clip.init_vision, lambda p, x: clip.embed_image(shape, p, x)
    if isinstance(shape, clip.ClipTextConfig):
        return clip.init, lambda p, ids: clip.embed_text(shape, p, ids, None)

    def whole(p, ids):
        return bert.first_token(shape, p, bert.apply(shape, p, ids, None))

    return bert.init, whole


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("name", presets.PRESETS)
def test_counts(name, unroll):
    preset = presets.PRESETS[name]
    shape = dataclasses.replace(preset.shape, unroll=unroll)
    with torch.device("meta"):
        net = theirs(shape).eval()
    if isinstance(shape, clip.ClipVisionConfig):
        side = shape.image_size
        size, kind = (BATCH, side, side, 3), jnp.float32
        given = {"pixel_values": torch.empty((BATCH, 3, side, side), device="meta")}
    else:
        size, kind = (BATCH, min(shape.max_tokens, 77)), jnp.int32
        given = {"input_ids": torch.zeros(size, dtype=torch.long, device="meta")}
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        net(**given)
    init, apply = ours(shape)
    params = jax.eval_shape(lambda: init(shape, jax.random.key(0)))
    counted = flops.count(apply, params, jax.ShapeDtypeStruct(size, kind))
    assert counted.total == counter.get_total_flops()
    wanted = sum(p.numel() for p in net.parameters())
    assert wanted == preset.params
    assert wanted == sum(math.prod(p.shape) for p in jax.tree.leaves(params))
