"""The definition of attention transfer in plain PyTorch: any device, differentiable any number of times.

Every backend is tested against this file. Features are `(B, C, *spatial)`; maps are `(B, *spatial)`
in fp32 (fp64 for fp64 features).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Computes in the dtypes of its inputs, also on devices that know no autocast ("meta")."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_map(feat: Tensor, p: float, mapping: str) -> Tensor:
    """Raw map F_sum^p or F_max^p of `feat` (B, C, *spatial): (B, *spatial), section 3.1 of the paper."""
    with without_autocast(feat.device.type):
        feat = feat.to(accumulation_dtype(feat.dtype))
        if mapping == "max":
            # argmax names the first channel on ties; amax would share the gradient among them.
            strongest = feat.detach().abs().argmax(1, keepdim=True)
            return _abs_power(feat.gather(1, strongest), p).squeeze(1)
        return _abs_power(feat, p).sum(1)


def attention_map_backward(feat: Tensor, grad_map: Tensor, p: float, mapping: str) -> Tensor:
    """Gradient at `feat` of its raw map, given the gradient at the map: dQ * p * |A|^(p-1) * sign(A)."""
    with without_autocast(feat.device.type):
        wide = feat.to(accumulation_dtype(feat.dtype))
        grad = grad_map.unsqueeze(1) * _abs_power_derivative(wide, p)
        if mapping == "max":
            strongest = wide.detach().abs().argmax(1, keepdim=True)
            grad = torch.zeros_like(grad).scatter(1, strongest, grad.gather(1, strongest))
        return grad.to(feat.dtype)


def _abs_power(x: Tensor, p: float) -> Tensor:
    if p == 1:
        return x.abs()
    if p == 2:
        return x.square()
    if p == 4:
        return x.square().square()
    magnitude = x.abs()
    # pow has infinite higher derivatives at 0; every derivative we define there is 0.
    is_zero = magnitude == 0
    return magnitude.masked_fill(is_zero, 1).pow(p).masked_fill(is_zero, 0)


def _abs_power_derivative(x: Tensor, p: float) -> Tensor:
    if p == 1:
        return x.sgn()
    if p == 2:
        return 2 * x
    if p == 4:
        return 4 * x * x.square()
    return p * _abs_power(x, p - 1) * x.sgn()


def normalize_map(attention: Tensor, order: str | None, eps: float) -> Tensor:
    """Divides each sample's map by its l2 or l1 norm over all positions, clamped below by `eps`."""
    if order is None:
        return attention
    positions = attention.flatten(1)
    # In fp64, which MPS lacks: the squares of large maps overflow fp32.
    wide = positions.dtype if positions.device.type == "mps" else torch.float64
    norm = torch.linalg.vector_norm(positions, 2 if order == "l2" else 1, dim=1, keepdim=True, dtype=wide)
    return (positions / norm.to(positions.dtype).clamp_min(eps)).view_as(attention)


def resize_map(attention: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Interpolates (B, *spatial) maps to `size`; "bilinear" means linear in 1-D and trilinear in 3-D."""
    if tuple(attention.shape[1:]) == tuple(size):
        return attention
    attention = attention.unsqueeze(1)
    if mode == "nearest":
        return F.interpolate(attention, size=tuple(size), mode="nearest").squeeze(1)
    method = _INTERPOLATION[len(size)]
    return F.interpolate(attention, size=tuple(size), mode=method, align_corners=False).squeeze(1)


def map_distance(student: Tensor, teacher: Tensor, distance: str, norm_order: float) -> Tensor:
    """Mean squared difference ("mse"), or Eq. 2's mean over samples of the q-norm ("norm"): a scalar."""
    difference = (student - teacher).flatten(1)
    if distance == "mse":
        # An empty batch gives 0, where mean() would give NaN.
        return difference.square().sum() / max(difference.numel(), 1)
    if not difference.shape[1]:
        return difference.sum()  # no maximum of no positions: 0
    # By its largest, and of ones where there is none: no power underflows, and no derivative at 0 is needed.
    largest = difference.detach().abs().amax(1)
    equal = largest == 0
    scale = largest.masked_fill(equal | largest.isinf(), 1)
    norms = torch.linalg.vector_norm(
        (difference / scale[:, None]).masked_fill(equal[:, None], 1), norm_order, dim=1
    )
    return (norms * scale).masked_fill(equal, 0).sum() / max(norms.numel(), 1)


def loss_from_maps(
    student_map: Tensor,
    teacher_map: Tensor,
    *,
    normalize: str | None,
    distance: str,
    norm_order: float,
    resize: str,
    eps: float,
) -> Tensor:
    """One pair's loss from its raw maps; the teacher's is resized to the student's grid, then normalised."""
    with without_autocast(student_map.device.type):
        teacher_map = resize_map(teacher_map, student_map.shape[1:], resize)
        student_map = normalize_map(student_map, normalize, eps)
        teacher_map = normalize_map(teacher_map, normalize, eps)
        return map_distance(student_map, teacher_map, distance, norm_order)


def combine(losses: Sequence[Tensor], weights: Sequence[float], reduce: bool) -> Tensor:
    """Weights the pairs' scalar losses and stacks them into (n_pairs,), or sums them into a scalar."""
    weighted = torch.stack([loss * weight for loss, weight in zip(losses, weights, strict=True)])
    return weighted.sum() if reduce else weighted


def attention_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    p: float,
    mapping: str,
    *,
    reduce: bool,
    eps: float,
    normalize: str | None = "l2",
    distance: str = "mse",
    norm_order: float = 2,
    resize: str = "error",
) -> Tensor:
    """Attention-transfer loss over all pairs: a scalar if `reduce`, else (n_pairs,)."""
    losses = [
        loss_from_maps(
            attention_map(student, p, mapping),
            attention_map(teacher, p, mapping),
            normalize=normalize,
            distance=distance,
            norm_order=norm_order,
            resize=resize,
            eps=eps,
        )
        for student, teacher in zip(students, teachers, strict=True)
    ]
    return combine(losses, weights, reduce)
