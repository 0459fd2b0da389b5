"""Wide residual networks for small images (Zagoruyko & Komodakis, BMVC 2016; section 4.1 of the AT paper)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.tapped import TappedModel


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """Pre-activation basic block. Its output is raw: the sum, before the next BatchNorm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
        # The authors project exactly where the number of channels changes, and then from the activated input.
        self.shortcut = _conv(in_channels, out_channels, 1, stride) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(TappedModel):
    """WRN-depth-width: three groups of `(depth - 4) / 6` blocks with 16, 32, 64 times `width` channels.

    `forward` takes `(B, in_channels, H, W)` and returns logits `(B, num_classes)`. The groups' outputs
    have the sizes `(H, W)`, `(H/2, W/2)` and `(H/4, W/4)`, rounded up.

    Raises:
        ValueError: `depth` is not 6n + 4 with n >= 1, or `width` or `in_channels` is below 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, *, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a wide ResNet has depth 6n + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}")
        if width < 1 or in_channels < 1:
            raise ValueError(f"width and in_channels must be at least 1, got {width} and {in_channels}")
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv = _conv(in_channels, channels[0], 3)
        self.group1 = self._group(channels[0], channels[1], blocks, stride=1)
        self.group2 = self._group(channels[1], channels[2], blocks, stride=2)
        self.group3 = self._group(channels[2], channels[3], blocks, stride=2)
        self.bn = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)
        groups = ["group1", "group2", "group3"]
        self.taps = {"groups": groups, "blocks": [f"{group}.{i}" for group in groups for i in range(blocks)]}
        self._initialise()

    @staticmethod
    def _group(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(in_channels, out_channels, stride)
        return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group3(self.group2(self.group1(self.conv(x))))
        x = F.relu(self.bn(x), inplace=True)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
