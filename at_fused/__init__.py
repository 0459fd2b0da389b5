"""Fused attention transfer (Zagoruyko & Komodakis, ICLR 2017) for PyTorch."""

from .attention import AttentionLoss, attention_loss, attention_map
from .backends import available_backends
from .distillation import distillation_loss
from .gradients import gradient_attention_loss, input_gradient, input_gradient_norm, symmetry_loss
from .hints import FeatureHints
from .taps import FeatureTaps, suggest_taps
from .transfer import AttentionTransfer

__version__ = "0.2.0"

__all__ = [
    "AttentionLoss",
    "AttentionTransfer",
    "FeatureHints",
    "FeatureTaps",
    "__version__",
    "attention_loss",
    "attention_map",
    "available_backends",
    "distillation_loss",
    "gradient_attention_loss",
    "input_gradient",
    "input_gradient_norm",
    "suggest_taps",
    "symmetry_loss",
]
