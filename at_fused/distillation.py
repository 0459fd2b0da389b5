"""Knowledge distillation (Hinton et al., 2015) as used beside attention transfer in section 4.1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_real, check_targets, described
from .reference import accumulation_dtype


def distillation_loss(
    s_logits: Tensor,
    t_logits: Tensor,
    targets: Tensor | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """`alpha * T^2 * KL(teacher || student at T) + (1 - alpha) * CE`.

    KL is averaged over the batch and the positions, with or without a label. CE is averaged over the labelled
    ones, as `F.cross_entropy` does it; where none is labelled, it is 0.

    Args:
        s_logits: student's logits, (B, n_classes), or dense (B, n_classes, *positions) such as
            (B, n_classes, H, W); floating point.
        t_logits: teacher's logits, the same shape.
        targets: class indices (B, *positions) int64, or class probabilities in the shape of the logits. None
            for data without labels: the loss is then `alpha * T^2 * KL`.
        temperature: T > 0; the paper uses 4 for residual networks.
        alpha: weight of the soft part, in [0, 1]; the paper uses 0.9.
        ignore_index: the class index that means "no label". Positions that the teacher should not teach
            either, such as padding, must be left out of all three tensors.

    Returns:
        Scalar in fp32 (fp64 for fp64 logits). Gradients flow to the logits that require them, the teacher's
        included. An empty batch gives 0.

    Raises:
        TypeError: logits that are not floating-point tensors, targets of another kind, T or alpha no number.
        ValueError: the shapes do not fit, T <= 0, or alpha outside [0, 1]; a class index that is out of
            range (checked on the CPU only: a GPU would have to wait).
    """
    for logits in (s_logits, t_logits):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"logits must be floating-point tensors, got {described(logits, dtype=True)}")
    if s_logits.shape != t_logits.shape or s_logits.ndim < 2:
        raise ValueError(
            f"student logits {tuple(s_logits.shape)} and teacher logits {tuple(t_logits.shape)} "
            "must both be (B, n_classes) or (B, n_classes, *positions)"
        )
    for name, value in (("temperature", temperature), ("alpha", alpha)):
        if not isinstance(value, Tensor):  # one that is learnt, say
            check_real(name, value)
    if targets is not None:
        check_targets(targets)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    wide = accumulation_dtype(s_logits.dtype)
    s_logits, t_logits = s_logits.to(wide), t_logits.to(wide)
    positions = max(s_logits.shape[0] * s_logits.shape[2:].numel(), 1)
    s_soft, t_soft = (F.log_softmax(logits / temperature, dim=1) for logits in (s_logits, t_logits))
    # A class that the teacher rules out (-inf) costs nothing.
    surplus = (t_soft - s_soft).masked_fill(t_soft == -torch.inf, 0)
    soft = (t_soft.exp() * surplus).sum()
    if targets is None:
        return alpha * temperature**2 * soft / positions
    hard = summed_cross_entropy(s_logits, targets, ignore_index)
    if not targets.is_floating_point():
        labelled = (targets.long() != ignore_index).sum().clamp(min=1)
        hard = hard * (positions / labelled)  # by exactly 1 where all are
    return (alpha * temperature**2 * soft + (1 - alpha) * hard) / positions


def summed_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Cross-entropy, summed over batch and positions, of logits (B, n_classes, *positions).

    Targets that do not fit: ValueError.
    """
    soft = targets.is_floating_point()
    shape = logits.shape if soft else (logits.shape[0], *logits.shape[2:])
    if targets.shape == shape:
        targets = targets.to(logits.dtype if soft else torch.int64)
        try:
            return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
        except IndexError:
            expected = f"classes from 0 to {logits.shape[1] - 1}, or ignore_index {ignore_index}"
    else:
        positions = tuple(logits.shape[2:])
        expected = f"int64 {(logits.shape[0], *positions)} or probabilities {tuple(logits.shape)}"
    shapes = f"targets {described(targets, dtype=True)} do not fit logits {tuple(logits.shape)}"
    raise ValueError(f"{shapes}: expected {expected}")
