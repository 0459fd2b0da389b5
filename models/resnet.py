"""ResNets for large images (section 4.2 of the AT paper): torchvision's implementation, weights and names."""

from __future__ import annotations

from typing import Any

from torch import nn

from models import torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
from torchvision.models import resnet18, resnet34, resnet50, resnet101

_BUILDERS = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101}


def resnet(depth: int, num_classes: int = 10, *, in_channels: int = 3, **options: Any) -> nn.Module:
    """torchvision's ``resnet<depth>``, whose ``state_dict`` keys it keeps, with ``taps`` added.

    ``forward`` takes ``(B, in_channels, H, W)`` and returns logits ``(B, num_classes)``. Groups (``layer1``
    to ``layer4``) and blocks are tapped after their last ReLU, as post-activation ResNets give them.

    Args:
        depth: 18, 34, 50 or 101.
        options: torchvision's own, e.g. ``zero_init_residual=True``.

    Raises:
        ValueError: another depth, or ``in_channels`` below 1.
    """
    if depth not in _BUILDERS:
        raise ValueError(f"there are resnets of depth {list(_BUILDERS)}, not {depth}")
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")
    model = _BUILDERS[depth](num_classes=num_classes, **options)
    if in_channels != model.conv1.in_channels:
        model.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    groups = ["layer1", "layer2", "layer3", "layer4"]
    blocks = [f"{group}.{i}" for group in groups for i in range(len(model.get_submodule(group)))]
    model.taps = {"groups": groups, "blocks": blocks}
    return model
