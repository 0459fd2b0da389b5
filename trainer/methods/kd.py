"""Knowledge distillation (Hinton et al., 2015)."""

from __future__ import annotations

from torch import Tensor

import at_fused
from trainer.methods.method import Batch, Method


class Distillation(Method):
    """The distillation loss, which contains (1 - alpha) cross-entropy."""

    needs_teacher = True
    distils = True

    def distillation(self, batch: Batch) -> Tensor | None:
        if batch.teacher_logits is None:
            raise TypeError(f"method {self.config.method} needs the teacher's logits of every batch")
        config = self.config
        logits = batch.logits, batch.teacher_logits
        return at_fused.distillation_loss(*logits, batch.targets, config.temperature, config.alpha)
