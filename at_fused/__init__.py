"""Fused attention transfer (Zagoruyko & Komodakis, ICLR 2017) for PyTorch."""

from .attention import AttentionLoss, attention_loss, attention_map
from .backends import available_backends
from .distillation import distillation_loss
from .taps import FeatureTaps

__version__ = "0.1.0"

__all__ = [
    "AttentionLoss",
    "FeatureTaps",
    "__version__",
    "attention_loss",
    "attention_map",
    "available_backends",
    "distillation_loss",
]
