"""A small gradient, the min-l2 of section 4.1.3 (Drucker & LeCun, 1992)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import at_fused
from trainer.methods.gradients import OfGradients


class MinL2(OfGradients):
    """The squared l2 norm of the gradient is the term."""

    def loss(self, images: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        return at_fused.input_gradient_norm(self.student, images, targets, **options)
