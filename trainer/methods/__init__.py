"""The methods by name: how a student learns, a file each."""

from __future__ import annotations

from trainer.methods.at import Attention
from trainer.methods.at_kd import AttentionAndDistillation
from trainer.methods.grad_at import GradientAttention
from trainer.methods.hints import Hints
from trainer.methods.kd import Distillation
from trainer.methods.method import Batch, Method, Taught
from trainer.methods.min_l2 import MinL2
from trainer.methods.symmetry import Symmetry

__all__ = ["METHODS", "Batch", "Method", "Taught"]

METHODS: dict[str, type[Method]] = {
    "none": Method,
    "at": Attention,
    "kd": Distillation,
    "at+kd": AttentionAndDistillation,
    "hints": Hints,
    "grad-at": GradientAttention,
    "symmetry": Symmetry,
    "min-l2": MinL2,
}
