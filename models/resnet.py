"""ResNets for large images (section 4.2 of the AT paper): torchvision's implementation, weights and names."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from models import torchvision_compat  # noqa: F401  (before torchvision)
from models.tapped import TappedModel

# isort: split
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

BLOCKS = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
}


# "34" of the authors' ImageNet code has two blocks more than torchvision's.
AUTHORS_BLOCKS = {18: (BasicBlock, [2, 2, 2, 2]), 34: (BasicBlock, [3, 4, 6, 5])}


class ResNet(TorchvisionResNet, TappedModel):
    """torchvision's `resnet<depth>`, whose `state_dict` keys it keeps, with `taps` added.

    `forward` takes `(B, in_channels, H, W)` and returns logits `(B, num_classes)`. Groups (`layer1`
    to `layer4`) and blocks are tapped after their last ReLU, as post-activation ResNets give them.

    Args:
        depth: 18, 34, 50 or 101.
        options: torchvision's own, e.g. `zero_init_residual=True`.

    Raises:
        ValueError: another depth, or `in_channels` below 1.
    """

    blocks: ClassVar[dict[int, tuple[type[BasicBlock | Bottleneck], list[int]]]] = BLOCKS

    def __init__(self, depth: int, num_classes: int = 10, *, in_channels: int = 3, **options: Any) -> None:
        if depth not in self.blocks:
            raise ValueError(f"there are ResNets of depth {', '.join(map(str, self.blocks))}, not {depth}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        block, counts = self.blocks[depth]
        super().__init__(block, counts, num_classes=num_classes, **options)
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        groups = ["layer1", "layer2", "layer3", "layer4"]
        names = [f"{group}.{i}" for group, count in zip(groups, counts, strict=True) for i in range(count)]
        self.taps = {"groups": groups, "blocks": names}


class AuthorsResNet(ResNet):
    """The ResNets of the authors' ImageNet code (attention-transfer, imagenet.py): no BatchNorm on shortcuts.

    `depth` 18 has 2, 2, 2, 2 blocks, "34" has 3, 4, 6, 5. All else is as in `ResNet`.
    """

    blocks = AUTHORS_BLOCKS

    def __init__(self, depth: int, num_classes: int = 10, *, in_channels: int = 3, **options: Any) -> None:
        super().__init__(depth, num_classes, in_channels=in_channels, **options)
        for group in ("layer2", "layer3", "layer4"):
            first = self.get_submodule(f"{group}.0")
            first.downsample = self.get_submodule(f"{group}.0.downsample.0")
