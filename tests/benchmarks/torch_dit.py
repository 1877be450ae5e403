"""The in-context transformer and its training step in PyTorch: the yardstick.

Same tokens, heads, norms, activation, masks, loss, clipping, AdamW and EMA as
`scaling_ldm`, each in the form that is quickest in PyTorch: fused AdamW,
`scaled_dot_product_attention`, multi-tensor clipping and averaging.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling_ldm import config
from scaling_ldm.models import positions

# Where a parameter of ours lives in the PyTorch module: kernels are transposed, and
# what has head axes is flattened to two.
_DENSE = {
    "entry/patch": "patch",
    "entry/time/up": "time_up",
    "entry/time/out": "time_out",
    "entry/text": "text",
    "exit/patch": "out",
}
_BLOCK_DENSE = {
    "attention/qkv": "qkv",
    "attention/out": "out",
    "mlp_up": "mlp_up",
    "mlp_down": "mlp_down",
}


class Block(nn.Module):
    """A plain pre-norm block."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp_up = nn.Linear(width, mlp_ratio * width)
        self.mlp_down = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor, mask: Tensor, activation: Callable) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x))
        qkv = qkv.view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(h.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp_down(activation(self.mlp_up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """`denoisers.dit` with architecture "in_context"."""

    def __init__(self, experiment: config.Experiment, width: int, depth: int) -> None:
        super().__init__()
        model, data = experiment.model, experiment.data
        if model.architecture != "in_context" or not data.vocab_size:
            raise ValueError("the yardstick is the in_context transformer over words")
        H, W, C = data.shape
        self.patch_size, self.grid = (
            model.patch_size,
            (
                H // model.patch_size,
                W // model.patch_size,
            ),
        )
        self.time_width = model.time_width
        self.activation = {
            "gelu": lambda x: F.gelu(x, approximate="tanh"),
            "relu": F.relu,
            "silu": F.silu,
        }[model.activation]
        pixels = model.patch_size**2 * C
        self.patch = nn.Linear(pixels, width)
        self.time_up = nn.Linear(model.time_width, width)
        self.time_out = nn.Linear(width, width)
        self.words = nn.Embedding(data.vocab_size, model.text_width)
        self.text = nn.Linear(model.text_width, width)
        self.blocks = nn.ModuleList(
            Block(width, model.heads_at(width), model.mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, pixels)
        position = positions.image_positions(*self.grid, width)
        order = positions.sinusoid(np.arange(data.text_tokens), width, 10_000.0)
        frequency = 10_000.0 ** -(
            np.arange(model.time_width // 2) / (model.time_width // 2)
        )
        for name, value in {
            "position": position,
            "order": order,
            "frequency": frequency,
        }.items():
            self.register_buffer(name, torch.tensor(np.asarray(value, np.float32)))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        batch, _, _, channels = x.shape
        (h, w), p = self.grid, self.patch_size
        x = x.view(batch, h, p, w, p, channels).permute(0, 1, 3, 2, 4, 5)
        x = self.patch(x.reshape(batch, h * w, p * p * channels)) + self.position
        angle = 1000.0 * t[:, None] * self.frequency
        time = torch.cat([angle.cos(), angle.sin()], dim=-1)
        time = self.time_out(F.silu(self.time_up(time)))
        words = self.text(self.words(text)) + self.order
        x = torch.cat([time[:, None], words, x], dim=1)
        mask = F.pad(mask, (0, h * w), value=True)  # image tokens are always seen
        mask = F.pad(mask, (1, 0), value=True)[:, None, None]  # so is the time token
        for block in self.blocks:
            x = block(x, mask, self.activation)
        x = self.out(self.norm(x[:, -h * w :])).float()
        x = x.view(batch, h, w, p, p, channels).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, h * p, w * p, channels)

    @torch.no_grad()
    def load(self, params: Mapping[str, Any]) -> None:
        """Copies our parameters.

        Raises:
          ValueError: one of either side has no partner.
        """
        given = dict(_flat(params))
        mine = dict(self.named_parameters())

        def take(target: str, value: np.ndarray) -> None:
            mine.pop(target).copy_(torch.tensor(value))

        def dense(source: str, target: str, module: nn.Linear, row: Any) -> None:
            kernel = given[f"{source}/kernel"][row]
            take(f"{target}.weight", kernel.reshape(module.in_features, -1).T)
            take(f"{target}.bias", given[f"{source}/bias"][row].reshape(-1))

        def norm(source: str, target: str, row: Any) -> None:
            take(f"{target}.weight", given[f"{source}/scale"][row])
            take(f"{target}.bias", given[f"{source}/bias"][row])

        for source, target in _DENSE.items():
            dense(source, target, getattr(self, target), ...)
        norm("exit/norm", "norm", ...)
        take("words.weight", given["entry/word_embedding"])
        for i, block in enumerate(self.blocks):
            for source, target in _BLOCK_DENSE.items():
                module = getattr(block, target)
                dense(f"blocks/{source}", f"blocks.{i}.{target}", module, i)
            for name in ("attention_norm", "mlp_norm"):
                norm(f"blocks/{name}", f"blocks.{i}.{name}", i)
        count = sum(p.numel() for p in self.parameters())
        if mine or count != sum(value.size for value in given.values()):
            raise ValueError(f"the networks' parameters differ: {sorted(mine)}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)


class Trainer:
    """One training step after another, of one batch; `compiled` uses torch.compile."""

    def __init__(
        self,
        experiment: config.Experiment,
        network: Transformer,
        batch: Mapping[str, np.ndarray],
        uncond: Mapping[str, np.ndarray],
        *,
        compiled: bool,
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.experiment = experiment
        self.network = network.to(self.device)
        self.host = {name: torch.tensor(value) for name, value in batch.items()}
        self.uncond = {n: torch.tensor(v).to(self.device) for n, v in uncond.items()}
        self.params = list(self.network.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        cfg = experiment.optimizer
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=1e-4,
            betas=(cfg.b1, cfg.b2),
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            fused=True,
        )
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.done = 0

    def _loss(self, x0: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        objective = self.experiment.objective
        eps = torch.randn_like(x0)
        rows = x0.shape[0]
        normal = torch.randn(rows, device=x0.device)
        t = torch.sigmoid(objective.time_location + objective.time_scale * normal)
        drop = torch.rand(rows, 1, device=x0.device) < objective.caption_dropout
        text = torch.where(drop, self.uncond["text"], text)
        mask = torch.where(drop, self.uncond["mask"], mask)
        s = t[:, None, None, None]
        half = self.experiment.model.compute_dtype == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16, enabled=half):
            prediction = self.network((1 - s) * x0 + s * eps, t, text, mask)
        return ((prediction.float() - (eps - x0)) ** 2).mean()

    def step(self) -> Tensor:
        """One optimizer and EMA update; returns the loss before it."""
        cfg = self.experiment.optimizer
        batch = {
            name: value.to(self.device, non_blocking=True)
            for name, value in self.host.items()
        }
        loss = self.loss(batch["x"], batch["text"], batch["mask"])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, cfg.clip_norm)
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4 * min(1.0, self.done / 100)
        self.optimizer.step()
        decay = min(cfg.ema_decay, (1 + self.done) / (10 + self.done))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
        return loss.detach()

    def advance(self, steps: int) -> None:
        """`steps` steps; the loss of each is read after the next one has started."""
        unseen = None
        for _ in range(steps):
            loss = self.step()
            if unseen is not None:
                unseen.item()
            unseen = loss
        if unseen is not None:
            unseen.item()
        if self.device == "cuda":
            torch.cuda.synchronize()


@torch.no_grad()
def predict(
    network: Transformer, x: np.ndarray, t: np.ndarray, cond: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The network's prediction in float32, on the CPU."""
    arrays = (x, t, cond["text"], cond["mask"])
    return network(*(torch.tensor(np.asarray(a)) for a in arrays)).numpy()
