"""Gradient-based attention transfer (section 3.2, Eq. 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import at_fused
from trainer.methods.gradients import OfGradients


class GradientAttention(OfGradients):
    """Compares the student's gradient with the teacher's."""

    needs_teacher = True

    teacher: nn.Module

    def loss(self, images: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        return at_fused.gradient_attention_loss(self.student, self.teacher, images, targets, **options)
