"""Activation-based attention transfer (section 3.1)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import at_fused
from trainer.methods.features import ComparesFeatures
from trainer.methods.method import Batch, Taught

if TYPE_CHECKING:
    from trainer.config import Config


class Attention(ComparesFeatures):
    """Compares attention maps, which are taken in the networks' passes."""

    teacher_can_be_kept = True

    def __init__(
        self, config: Config, student: nn.Module, teacher: nn.Module | None, example: Tensor
    ) -> None:
        super().__init__(config, student, teacher, example)
        self.transfer = at_fused.AttentionTransfer(
            student,
            self.teacher,
            self.names,
            self.t_names,
            config.p,
            beta=config.beta,
            weights=self.weights,
            mapping=config.mapping,
            normalize=None if config.normalize == "none" else config.normalize,
            distance=config.distance,
            norm_order=config.norm_order,
            channel_dim=self.dims,
            t_channel_dim=self.t_dims,
            backend=config.backend,
        )
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "the maps of .* have a single position"
                )  # `compared` says so
                self.teacher.eval()(example)
                student.eval()(example)
                self.transfer()
        except (ValueError, TypeError) as error:
            raise self.error(error) from None

    def recording(self, on: bool) -> AbstractContextManager[None]:
        return nullcontext() if on else self.transfer.paused()

    @torch.no_grad()
    def teach(self, images: Tensor) -> Taught:
        logits = self.teacher(images)
        return Taught(logits if self.distils else None, self.transfer.teacher_maps())

    def term(self, batch: Batch, beta: float) -> Tensor:
        self.transfer.beta = beta
        return self.transfer(batch.teacher_maps)

    @property
    def losses(self) -> Mapping[str, Tensor]:
        return self.transfer.losses

    def compared(self, per_image: float) -> list[str]:
        lines = []
        for (pair, student, _), weight in zip(self.pairs(), self.weights, strict=True):
            positions = student[1:].numel()
            if positions == 1 and self.config.normalize != "none":
                lines.append(f"AT {pair}: loss 0, a normalised map of one position is always 1")
            elif self.config.distance == "mse":
                lines.append(f"AT {pair}: beta {weight * per_image / positions:.3g} per element")
            else:
                lines.append(f"AT {pair}: beta {weight * per_image:.3g} per image")
        return lines
