"""What a student is trained on: cross-entropy or distillation, and a transfer term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.methods import Batch, Method, Taught


@dataclass(frozen=True)
class Losses:
    """Means over a batch, fp32 scalars: `total` is what is minimised, the others are what it consists of.

    `at` is the transfer term with beta in it, `kd` the whole distillation loss, which counts in place of
    `ce`; both are 0 where unused. `taps` (n,) are the parts of `at` by tap, without a graph; none where the
    method compares no features.
    """

    total: Tensor
    ce: Tensor
    at: Tensor
    kd: Tensor
    taps: Tensor


def objective(
    method: Method,
    forward: nn.Module,
    images: Tensor,
    targets: Tensor,
    beta: float,
    taught: Taught | None = None,
) -> tuple[Losses, Tensor]:
    """The losses of a batch, and its logits.

    `forward` is the student as DDP or the compiler wraps it; `taught` is what the teacher has made of these
    images before, in place of its pass.
    """
    used = method.uses_term(beta)
    if taught is None:
        taught = Taught(None)
        if method.teacher is not None and (method.distils or (used and method.compares_features)):
            with torch.no_grad():
                taught = Taught(method.teacher(images))
    if used and method.takes_gradients:
        images = images.detach().requires_grad_()
    logits = forward(images)
    batch = Batch(images, targets, logits, taught.logits, taught.maps)

    ce = cross_entropy(logits, targets, method.config.label_smoothing)
    kd = method.distillation(batch)
    at = method.term(batch, beta) if used else None
    total = ce if kd is None else kd
    if at is not None:
        total = total + at
    zero = torch.zeros_like(ce)
    parts = list(method.losses.values()) if used else []
    taps = torch.stack(parts) if parts else zero.new_zeros(len(method.names))
    return Losses(total, ce, zero if at is None else at, zero if kd is None else kd, taps), logits


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean over a batch, in fp32 whatever autocast has made of the logits; fp64 stays.

    `targets`: labels (n,) int64 or probabilities (n, classes).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
