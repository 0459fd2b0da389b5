"""torch's optimizers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from trainer.config import Config


@dataclass(frozen=True)
class Choice:
    """`make` gives the optimizer of some parameters; the others count where a run sets none."""

    make: Callable[[list[nn.Parameter], Config], torch.optim.Optimizer]
    lr: float
    weight_decay: float


# fused: one kernel over all parameters, and fp16's check for inf stays on a GPU


def _sgd(parameters: list[nn.Parameter], config: Config) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _adamw(parameters: list[nn.Parameter], config: Config) -> torch.optim.AdamW:
    first, second = config.adam_betas
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(first, second), weight_decay=config.weight_decay, fused=True
    )


OPTIMIZERS = {
    "sgd": Choice(_sgd, lr=0.1, weight_decay=5e-4),  # the CIFAR-10 schedule of the paper's authors
    "adamw": Choice(_adamw, lr=1e-3, weight_decay=0.01),  # torch's defaults
}
