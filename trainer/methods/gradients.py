"""What the gradient-based methods share (section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.methods.method import Batch, Method

if TYPE_CHECKING:
    from trainer.config import Config


class OfGradients(Method):
    """Its term is a loss on the gradient of cross-entropy at the images, or at the output of a layer."""

    has_term = True
    takes_gradients = True
    default_beta = (
        1.0  # some percent of cross-entropy's gradient early on CIFAR-10, growing as the loss falls
    )
    forbids: ClassVar[Mapping[str, str]] = {
        "compile": "torch.compile cannot differentiate twice",
        "amp fp16": "second derivatives underflow; bf16 has fp32's range",
        "sync-bn": "SyncBatchNorm cannot be differentiated twice",
        "mixup": "its gradients are those at the label of each image",
        "cutmix": "its gradients are those at the label of each image",
    }

    def __init__(
        self, config: Config, student: nn.Module, teacher: nn.Module | None, example: Tensor
    ) -> None:
        super().__init__(config, student, teacher, example)
        self.options: dict[str, Any] = {"layer": config.gradient_layer, "batch_norm": config.gradient_bn}
        student.eval()
        try:
            self.loss(example, torch.zeros(1, dtype=torch.int64, device=example.device), self.options)
        except (ValueError, TypeError) as error:
            layer = f", gradient-layer {config.gradient_layer}" if config.gradient_layer else ""
            raise ConfigError(f"method {config.method}{layer}: {error}") from None

    def loss(self, images: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        """The loss on the gradients at `images`; `options` are those of all its functions in at_fused."""
        raise NotImplementedError

    def term(self, batch: Batch, beta: float) -> Tensor:
        options = self.options
        if self.config.gradient_layer is None and self.config.gradient_bn != "running":
            options = options | {"logits": batch.logits}  # made with the statistics asked for: no second pass
        return beta * self.loss(batch.images, batch.targets, options)

    def compared(self, per_image: float) -> list[str]:
        config = self.config
        where = f"output of {config.gradient_layer}" if config.gradient_layer else "input"
        return [f"{config.method} at the {where}: beta/2 {per_image / 2:.3g} per image"]
