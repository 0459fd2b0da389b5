"""What the operators return, uninitialised: one definition for the shape functions and the backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import accumulation_dtype


def empty_map(feat: Tensor) -> Tensor:
    """Uninitialised raw map of `feat` (B, C, *spatial): contiguous (B, *spatial), accumulation dtype."""
    shape = (feat.shape[0], *feat.shape[2:])
    return torch.empty(shape, dtype=accumulation_dtype(feat.dtype), device=feat.device)


def empty_loss_outputs(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    reduce: bool,
    student_slopes: bool,
    teacher_slopes: bool,
    student_grads: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Uninitialised loss () or (n_pairs,), fp64 if any feature is, else fp32; slopes; students' gradients."""
    dtypes = [accumulation_dtype(feat.dtype) for feat in (*students, *teachers)]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    loss = torch.empty(() if reduce else (len(students),), dtype=dtype, device=students[0].device)
    sides = [*(students if student_slopes else ()), *(teachers if teacher_slopes else ())]
    grads = [torch.empty_like(feat) for feat in students] if student_grads else []
    return loss, [empty_map(feat) for feat in sides], grads
