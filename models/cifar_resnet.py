"""ResNets for small images (He et al., 2016, section 4.2), as RepDistiller and mdistiller have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import torchvision_compat  # noqa: F401  (before torchvision)
from models.tapped import TappedModel

# isort: split
from torchvision.models.resnet import BasicBlock

# Channels of the stem and the three groups, by what follows the depth in a name.
WIDTHS = {"": [16, 16, 32, 64], "x4": [32, 64, 128, 256]}


class CifarResNet(TappedModel):
    """Three groups of `(depth - 2) / 6` basic blocks, torchvision's, behind a 3x3 convolution.

    `forward` takes `(B, in_channels, H, W)` and returns logits `(B, num_classes)`. Groups (`layer1` to
    `layer3`, of the sizes `(H, W)`, `(H/2, W/2)` and `(H/4, W/4)`, rounded up) and blocks are tapped after
    their last ReLU. Where the channels change, the shortcut is a 1x1 convolution and BatchNorm. The keys of
    the `state_dict` are RepDistiller's.

    Args:
        widths: channels of the stem and of the groups; `WIDTHS` has those in use.

    Raises:
        ValueError: `depth` is not 6n + 2 with n >= 1, or `in_channels` is below 1.
    """

    def __init__(self, depth: int, widths: list[int], num_classes: int = 10, *, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"a ResNet for small images has depth 6n + 2 (8, 14, 20, 32, 44, 56, ...), got {depth}"
            )
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _group(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _group(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _group(widths[2], widths[3], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        groups = ["layer1", "layer2", "layer3"]
        self.taps = {"groups": groups, "blocks": [f"{group}.{i}" for group in groups for i in range(blocks)]}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _group(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or in_channels != channels:
        projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))
