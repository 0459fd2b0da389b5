"""Network-in-Network for small images (Lin et al., 2013), as the AT paper uses it in section 4.1."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.tapped import TappedModel

# The paper gives sizes (0.2M and 1M parameters) but no widths. Ours are the multiples of 8 that come nearest,
# the same for all nine convolutions, as 192 is in most of the NIN of the authors' earlier CIFAR code.
WIDTHS = {"thin": 88, "wide": 200}


class NIN(TappedModel):
    """Three blocks of 3x3, 1x1, 1x1 convolutions, a stride-2 pooling between blocks, a linear classifier.

    `forward` takes `(B, in_channels, H, W)` and returns logits `(B, num_classes)`. The blocks' outputs
    have the sizes `(H, W)`, `(H/2, W/2)` and `(H/4, W/4)`. They are `taps["groups"]`, before pooling;
    `taps["convs"]` are the blocks' last convolutions, before BatchNorm and ReLU.

    Args:
        width: channels of every convolution.
        batch_norm: BatchNorm after every convolution; without it convolutions have biases.
        relu_before_pool: ReLU also at the end of each block. Section 4.1.3 leaves it out of the student
            without BatchNorm, and of the teacher that this student's activations are compared with.

    Raises:
        ValueError: `width` or `in_channels` below 1.
    """

    def __init__(
        self,
        width: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        batch_norm: bool = True,
        relu_before_pool: bool = True,
    ) -> None:
        super().__init__()
        if width < 1 or in_channels < 1:
            raise ValueError(f"width and in_channels must be at least 1, got {width} and {in_channels}")
        self.block1 = _block(in_channels, width, batch_norm, relu_before_pool)
        self.block2 = _block(width, width, batch_norm, relu_before_pool)
        self.block3 = _block(width, width, batch_norm, relu_before_pool)
        self.fc = nn.Linear(width, num_classes)
        blocks = ["block1", "block2", "block3"]
        self.taps = {"groups": blocks, "blocks": blocks, "convs": [f"{block}.conv3" for block in blocks]}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # fan-in: without BatchNorm the signal must keep its size
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.block1(x), 3, stride=2, ceil_mode=True)
        x = F.avg_pool2d(self.block2(x), 3, stride=2, ceil_mode=True)
        return self.fc(self.block3(x).mean((2, 3)))


def _block(in_channels: int, width: int, batch_norm: bool, relu_last: bool) -> nn.Sequential:
    block = nn.Sequential()
    for i, size in enumerate((3, 1, 1), start=1):
        channels = in_channels if i == 1 else width
        block.add_module(f"conv{i}", nn.Conv2d(channels, width, size, padding=size // 2, bias=not batch_norm))
        if batch_norm:
            block.add_module(f"bn{i}", nn.BatchNorm2d(width))
        if i < 3 or relu_last:
            block.add_module(f"relu{i}", nn.ReLU())  # not in place: a tapped convolution keeps its output
    return block
