"""Attention transfer together with distillation (section 4.1.2)."""

from __future__ import annotations

from trainer.methods.at import Attention
from trainer.methods.kd import Distillation


class AttentionAndDistillation(Attention, Distillation):
    """The distillation loss and the term of `at`, whose weight decays, as "AT+KD" in the paper."""

    default_schedule = "linear"
