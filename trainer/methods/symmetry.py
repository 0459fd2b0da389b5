"""Symmetry of the gradient under horizontal flips (section 3.2, Eq. 6)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import at_fused
from trainer.methods.gradients import OfGradients


class Symmetry(OfGradients):
    """Compares the gradient with that of the mirrored images, and the outputs too."""

    def loss(self, images: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        weight = self.config.output_weight
        return at_fused.symmetry_loss(self.student, images, targets, output_weight=weight, **options)
