"""Folders that pipelines of diffusers wrote: captions, one evaluation, points of t."""

import json
import types

import numpy as np
import pytest
from numpy.testing import assert_allclose

import scaling_ldm
from scaling_ldm.diffusion import samplers
from scaling_ldm.workdir import pipelines, scheduler_config

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.parity
CAPTIONS = ["red", "red, 4 a red red x"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,"
T5_TOKENS, SIDE = 16, 8


def clip_tokenizer(folder, pad):
    """A CLIPTokenizer; SD3's second one pads with "!", its first with the end."""
    special = ("<|startoftext|>", "<|endoftext|>")
    words = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "re", "red</w>", "!", *special]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    found = transformers.CLIPTokenizer.from_pretrained(folder, pad_token=pad)
    found.model_max_length = 77
    return found, len(words)


def t5_tokenizer():
    words = ["<pad>", "</s>", "<unk>", "red", "a", "x", ",", "4"]
    table = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def clip_tower(kind, words, act):
    cfg = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=24,
        hidden_act=act,
        eos_token_id=words - 1,
        bos_token_id=words - 2,
    )
    return kind(cfg).eval()


def t5_encoder():
    cfg = transformers.T5Config(
        vocab_size=8,
        d_model=96,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(cfg).eval()


def drawn(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            near = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
            p.normal_(near, 0.2, generator=generator)
    return module.eval()


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )


def sd3(folder, t5=True):
    first, words = clip_tokenizer(folder / "one", "<|endoftext|>")
    second, _ = clip_tokenizer(folder / "two", "!")
    network = diffusers.SD3Transformer2DModel(
        sample_size=SIDE,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        caption_projection_dim=48,
        joint_attention_dim=96,
        pooled_projection_dim=48,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    kind = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=drawn(network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=drawn(clip_tower(kind, words, "quick_gelu")),
        tokenizer=first,
        text_encoder_2=drawn(clip_tower(kind, words, "gelu")),
        tokenizer_2=second,
        text_encoder_3=drawn(t5_encoder()) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def flux(folder, guidance=True):
    first, words = clip_tokenizer(folder / "one", "<|endoftext|>")
    network = diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=96,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(8, 12, 12),
    )
    tower = clip_tower(transformers.CLIPTextModel, words, "quick_gelu")
    return diffusers.FluxPipeline(
        transformer=drawn(network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True
        ),
        vae=vae(),
        text_encoder=drawn(tower),
        tokenizer=first,
        text_encoder_2=drawn(t5_encoder()),
        tokenizer_2=t5_tokenizer(),
    )


@pytest.fixture
def smaller(monkeypatch):
    """Fewer tokens of the T5 and a smaller side than published."""
    import dataclasses

    for name in ("StableDiffusion3Pipeline", "FluxPipeline"):
        how = pipelines.PIPELINES[name]
        how = dataclasses.replace(how, tokens=T5_TOKENS, side=SIDE)
        monkeypatch.setitem(pipelines.PIPELINES, name, how)


def close(ours, theirs, tolerance=1e-4):
    theirs = theirs.numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert np.asarray(ours).shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def latents(count):
    x = np.random.default_rng(0).normal(size=(count, SIDE, SIDE, 16)).astype("f")
    return x, torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("t5", [True, False])
def test_stable_diffusion_3(tmp_path, smaller, t5):
    pipeline = sd3(tmp_path, t5)
    pipeline.save_pretrained(tmp_path / "sd3")
    model = scaling_ldm.load(tmp_path / "sd3")
    cond = model.encode_text(CAPTIONS)
    with torch.no_grad():
        text, empty, pooled, _ = pipeline.encode_prompt(
            CAPTIONS, None, None, max_sequence_length=T5_TOKENS
        )
    close(cond["text"], text)
    close(cond["pooled"], pooled)
    close(model._captions.uncond["text"], empty[0])
    assert cond["mask"].all() and cond["text"].shape == (2, 77 + T5_TOKENS, 96)
    x, theirs = latents(2)
    how = dict(
        prompt=CAPTIONS,
        latents=theirs,
        output_type="latent",
        max_sequence_length=T5_TOKENS,
        height=SIDE * 2,
        width=SIDE * 2,
    )
    with torch.no_grad():
        once = pipeline(**how, num_inference_steps=1, guidance_scale=1.0).images
        guided = pipeline(**how, num_inference_steps=4, guidance_scale=5.0).images
    close(model.denoise(x, 1.0, cond), once.permute(0, 2, 3, 1))
    _, uncond = model._conditions(CAPTIONS, None, {})
    ours = samplers.sample(
        model.denoise,
        noise=x,
        cond=cond,
        uncond=uncond,
        sampler=model.drawing["sampler"],
        steps=4,
        grid=model.drawing["grid"](4),
        guidance=5.0,
    )
    close(ours, guided.permute(0, 2, 3, 1), 1e-3)
    pictures = model.sample("red", n=2, steps=2)
    assert pictures.shape == (2, 2 * SIDE, 2 * SIDE, 3)


@pytest.mark.parametrize("guidance", [True, False])
def test_flux(tmp_path, smaller, guidance):
    pipeline = flux(tmp_path, guidance)
    pipeline.save_pretrained(tmp_path / "flux")
    model = scaling_ldm.load(tmp_path / "flux")
    cond = model.encode_text(CAPTIONS)
    with torch.no_grad():
        text, pooled, _ = pipeline.encode_prompt(
            CAPTIONS, None, max_sequence_length=T5_TOKENS
        )
    close(cond["text"], text)
    close(cond["pooled"], pooled)
    x, theirs = latents(2)
    packed = pipeline._pack_latents(theirs, 2, 16, SIDE, SIDE)
    with torch.no_grad():
        drawn_there = [
            pipeline(
                prompt=CAPTIONS,
                latents=packed,
                output_type="latent",
                max_sequence_length=T5_TOKENS,
                height=SIDE * 2,
                width=SIDE * 2,
                num_inference_steps=steps,
                guidance_scale=2.5,
            ).images
            for steps in (1, 4)
        ]
    once, four = (
        pipeline._unpack_latents(z, SIDE * 2, SIDE * 2, 2).permute(0, 2, 3, 1)
        for z in drawn_there
    )
    given, uncond = model._conditions(CAPTIONS, None, {}, 2.5)
    assert ("guidance" in given) == guidance
    close(model.denoise(x, 1.0, given), once)
    ours = samplers.sample(
        model.denoise,
        noise=x,
        cond=given,
        sampler=model.drawing["sampler"],
        steps=4,
        grid=model.drawing["grid"](4),
    )
    close(ours, four, 1e-3)
    assert model.drawing["guidance"] == (3.5 if guidance else None)
    if guidance:  # which changes the picture
        one, other = (
            model.sample("red", steps=2, guidance=g).astype(int) for g in (1.0, 30.0)
        )
        assert np.abs(one - other).max() > 0


SPACED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")  # theirs
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"steps_offset": 1}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}),
        ("DDPMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
        ("UniPCMultistepScheduler", {}),
        ("DEISMultistepScheduler", {}),
        ("LMSDiscreteScheduler", {}),
    ],
)
def test_a_network_is_evaluated_where_the_scheduler_does(tmp_path, kind, more):
    scheduler = getattr(diffusers, kind)(**SPACED, **more)
    scheduler.save_pretrained(tmp_path)
    path = tmp_path / scheduler_config.FILE
    said = json.loads(path.read_text())
    written = {k: v for k, v in said.items() if k in SPACED or k in more}
    path.write_text(json.dumps(written | {"_class_name": kind}))
    scheduler.set_timesteps(10)
    found = scheduler_config.read("load", tmp_path)
    ours = [point.t for point in found.grid(10, 64).points[:-1]]
    theirs = scheduler.timesteps.numpy()
    assert_allclose(ours, np.round(theirs), atol=0)
    assert types.SimpleNamespace(**said).num_train_timesteps == found.schedule.steps
