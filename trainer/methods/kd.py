"""Knowledge distillation (Hinton et al., 2015)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import at_fused
from trainer.methods.method import Batch, Method, Taught


class Distillation(Method):
    """The distillation loss, which contains (1 - alpha) cross-entropy."""

    needs_teacher = True
    distils = True
    teacher_can_be_kept = True

    teacher: nn.Module

    @torch.no_grad()
    def teach(self, images: Tensor) -> Taught:
        return Taught(self.teacher(images))

    def distillation(self, batch: Batch) -> Tensor | None:
        if batch.teacher_logits is None:
            raise TypeError(f"method {self.config.method} needs the teacher's logits of every batch")
        config, targets = self.config, batch.targets
        if config.label_smoothing:
            targets = _smoothed(targets, batch.logits.shape[1], config.label_smoothing)
        logits = batch.logits, batch.teacher_logits
        return at_fused.distillation_loss(*logits, targets, config.temperature, config.alpha)


def _smoothed(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels (n,) or probabilities (n, classes) as probabilities, a share of which is spread evenly."""
    if not targets.is_floating_point():
        targets = F.one_hot(targets, classes)
    return (1 - smoothing) * targets + smoothing / classes
