"""The teacher of a run: a frozen network, made as cheap to run as it can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer import checkpoint
from trainer.folding import fold_batch_norms


class Teacher:
    """A trained network in eval mode whose parameters require no gradient.

    `digest` tells its weights, as they were before any was folded.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.digest = checkpoint.digest(network)
        self.network = network.to(device).eval().requires_grad_(False)

    def fold(self) -> None:
        """Save BatchNorm's passes over memory, where nothing between it and its convolution is looked at.

        To be called once what is to be looked at has its hooks.
        """
        fold_batch_norms(self.network)

    def compile(self, **options: Any) -> None:
        """Let torch.compile make kernels of it, with its weights as constants."""
        options["options"] = options.get("options", {}) | {"freezing": True}
        self.network.compile(**options)
