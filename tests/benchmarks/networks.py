"""Time of the networks of latent diffusion on this machine, against PyTorch.

    python tests/benchmarks/networks.py

Forward and training step (AdamW) of paper A's 39M U-Net, encoding with Stable
Diffusion's autoencoder, and MiniLM's features, each against diffusers or transformers
(the "parity" extra) in eager mode, float32, with the same random weights. That both
give the same numbers is checked first. They take turns, as timing.py says; times and
ratios are medians over the rounds, with the range of the ratio. A ratio above 1 means
that ours is faster. Each takes the threads that it takes by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import contest
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from scaling_ldm import config, flops
from scaling_ldm.models import denoisers, encoders
from scaling_ldm.models.denoisers import presets
from scaling_ldm.models.encoders import bert, blocks
from scaling_ldm.models.encoders import presets as encoder_presets
from scaling_ldm.models.weights import autoencoder_kl as autoencoder_weights
from scaling_ldm.models.weights import bert as bert_weights
from scaling_ldm.models.weights import layout
from scaling_ldm.models.weights import unet as unet_weights
from scaling_ldm.training import optimizer as optimizer_lib

SIDE = 32  # of the U-Net's latents
RATE = 1e-4


def unet_parts(batch: int) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """Their network, our denoiser and parameters, the input of both."""
    preset = presets.UNETS["unet_39m"]
    cfg = dataclasses.replace(preset.config, image_shape=(SIDE, SIDE, 4))
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        cross_attention_dim=1024,
        attention_head_dim=8,
        use_linear_projection=True,
    )
    pairs = unet_weights.pairs(cfg)
    params = jax.device_put(layout.read(pairs, contest.tensors_of(net), "the U-Net's"))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, SIDE, SIDE, 4)).astype("f")
    t = rng.integers(0, 1000, batch)
    text = rng.normal(size=(batch, 77, 1024)).astype("f")
    return net, denoisers.u_net(cfg), params, (x, t, text)


def unet_forward(batch: int) -> contest.Contest:
    """Paper A's smallest network on 32 x 32 latents."""
    net, ours, params, (x, t, text) = unet_parts(batch)
    net.eval()
    apply = jax.jit(ours.apply)
    given = jax.device_put((x, (t / 1000).astype("f"), {"text": text}))
    theirs = [torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))]
    theirs += [torch.from_numpy(t), torch.from_numpy(text)]

    @torch.inference_mode()
    def run_theirs() -> np.ndarray:
        return net(*theirs).sample.permute(0, 2, 3, 1).numpy()

    return contest.Contest(
        ours=lambda: np.asarray(apply(params, *given)),
        theirs=run_theirs,
        flops=flops.count(ours.apply, params, *given).total,
    )


def unet_train(batch: int) -> contest.Contest:
    """One AdamW step of it, both from the same weights; the result is the losses."""
    net, ours, params, (x, t, text) = unet_parts(batch)
    net.train()
    noise = np.random.default_rng(1).normal(size=x.shape).astype("f")
    cfg = config.OptimizerConfig(clip_norm=1e9)
    adamw = optimizer_lib.adamw(cfg)
    given = jax.device_put((x, (t / 1000).astype("f"), {"text": text}))

    def loss(params: Any, x: Any, t: Any, cond: Any) -> jax.Array:
        return jnp.mean((ours.apply(params, x, t, cond) - noise) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt: Any) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, *given)
        direction, opt = adamw.update(gradient, opt, params)
        return optimizer_lib.descend(params, direction, jnp.float32(RATE)), opt, value

    counted = flops.count(jax.value_and_grad(loss), params, *given).total
    state = [params, adamw.init(params)]
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=RATE, betas=(cfg.b1, cfg.b2), weight_decay=0.0
    )
    theirs = [torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))]
    theirs += [torch.from_numpy(t), torch.from_numpy(text)]
    target = torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2)))

    def run_ours() -> np.ndarray:
        *state[:], value = step(*state)
        return np.asarray(value)

    def run_theirs() -> np.ndarray:
        optimizer.zero_grad()
        value = torch.nn.functional.mse_loss(net(*theirs).sample, target)
        value.backward()
        optimizer.step()
        return value.detach().numpy()

    return contest.Contest(ours=run_ours, theirs=run_theirs, flops=counted)


def autoencoder_encode(batch: int) -> contest.Contest:
    """Stable Diffusion's autoencoder on pictures of 256 px, to moments."""
    preset = encoder_presets.AUTOENCODERS["sd"]
    torch.manual_seed(0)
    settings = autoencoder_weights.to_config(preset.config)
    net = diffusers.AutoencoderKL.from_config(settings).eval()
    params = jax.device_put(
        autoencoder_weights.read(contest.tensors_of(net), preset.config)
    )
    ours = encoders.autoencoder(preset.config)
    x = np.random.default_rng(1).uniform(-1, 1, size=(batch, 256, 256, 3)).astype("f")
    given, encode = jax.device_put(x), jax.jit(ours.encode)
    torch_x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    @torch.inference_mode()
    def run_theirs() -> np.ndarray:
        latent = net.encode(torch_x).latent_dist
        moments = torch.cat([latent.mean, latent.logvar], dim=1)
        return moments.permute(0, 2, 3, 1).numpy()

    return contest.Contest(
        ours=lambda: np.asarray(encode(params, given)),
        theirs=run_theirs,
        flops=flops.count(ours.encode, params, given).total,
    )


def minilm(batch: int) -> contest.Contest:
    """MiniLM's features of captions of up to 32 words."""
    cfg, tokens = encoder_presets.PRESETS["minilm_l6"].config, 32
    torch.manual_seed(0)
    net = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.width,
            num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.heads,
            intermediate_size=cfg.hidden,
        )
    ).eval()
    with tempfile.TemporaryDirectory() as scratch:
        net.save_pretrained(scratch)
        params = bert_weights.load(scratch, cfg)
    # Layers in a list: a frozen network's are taken apart once, not at every call.
    params = {**params, "blocks": jax.jit(blocks.unstacked)(params["blocks"])}
    params = jax.device_put(params)
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, cfg.vocab_size, (batch, tokens)).astype(np.int32)
    lengths = rng.integers(tokens // 2, tokens + 1, batch)
    mask = np.arange(tokens)[None] < lengths[:, None]
    encode = functools.partial(bert.apply, cfg)
    compiled = jax.jit(encode)

    @torch.inference_mode()
    def run_theirs() -> np.ndarray:
        out = net(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
        )
        return out.last_hidden_state.numpy()

    return contest.Contest(
        ours=lambda: np.asarray(compiled(params, ids, mask)),
        theirs=run_theirs,
        flops=flops.count(encode, params, ids, mask).total,
    )


CONTESTS = {  # with the batch
    "unet_forward": (unet_forward, 2),
    "unet_train": (unet_train, 2),
    "autoencoder_encode": (autoencoder_encode, 1),
    "minilm": (minilm, 32),
    "minilm_one": (minilm, 1),
}
COLUMNS = (
    "| network | batch | ours, ms | PyTorch, ms | ours, GFLOP/s "
    "| PyTorch, GFLOP/s | PyTorch / ours | disturbed | first call, s |"
)


def line(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    least, most = row["ratio_range"]
    return (
        f"| {row['name']} | {row['batch']} | {1e3 * row['ours']:.1f} "
        f"| {1e3 * row['theirs']:.1f} | {row['gflops']['ours']:.0f} "
        f"| {row['gflops']['theirs']:.0f} | {row['ratio']:.2f} ({least:.2f}-{most:.2f})"
        f" | {row['disturbed_rounds']} | {row['first_call']:.1f} |"
    )


def main() -> None:
    """Times one network after the other."""
    flags = contest.parser(__doc__, CONTESTS).parse_args()
    if flags.one_core:
        contest.one_core(torch)
    facts = contest.machine(jax, torch, diffusers, transformers)
    facts["torch_threads"] = torch.get_num_threads()
    contest.run(flags, CONTESTS, facts, COLUMNS, line)


if __name__ == "__main__":
    main()
