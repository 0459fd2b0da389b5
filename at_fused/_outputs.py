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


def pair_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype in which a pair's maps are compared: fp64 as soon as one side is."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def empty_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], reduce: bool) -> Tensor:
    """Uninitialised loss: () or (n_pairs,), fp64 if any pair is, else fp32."""
    dtypes = [pair_dtype(s, t) for s, t in zip(students, teachers, strict=True)]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.empty(() if reduce else (len(dtypes),), dtype=dtype, device=students[0].device)
