"""How alike two attention maps are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(maps: Tensor, references: Tensor) -> Tensor:
    """Cosine of the angle between each map and its reference, in fp64.

    Args:
        maps: `(B, h, w)`.
        references: `(B, h', w')`, resized to the maps' grid as the loss resizes a teacher's.

    Returns:
        `(B,)`, from 0 to 1 for maps of values that are not negative.
    """
    if maps.shape != references.shape:
        size = maps.shape[1:]
        references = F.interpolate(references[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    tiny = torch.finfo(torch.float64).tiny  # maps of gradients are small: the default of 1e-8 is not
    return F.cosine_similarity(maps.double().flatten(1), references.double().flatten(1), dim=1, eps=tiny)
