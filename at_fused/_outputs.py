"""What the operators return, uninitialised: one definition for the shape functions and the backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import accumulation_dtype


class Outputs(NamedTuple):
    """What a backend fills where it computes the loss. An empty list: not wanted."""

    loss: Tensor  # () for the sum over the pairs, (n_pairs,) for each pair's
    student_slopes: list[Tensor]  # gradients of the weighted losses at the students' raw maps
    teacher_slopes: list[Tensor]
    grads: list[Tensor]  # gradients at the students' features, for which their slopes are wanted, too


def empty_map(feat: Tensor) -> Tensor:
    """Raw map of `feat` (B, C, *spatial): contiguous (B, *spatial), accumulation dtype."""
    shape = (feat.shape[0], *feat.shape[2:])
    return torch.empty(shape, dtype=accumulation_dtype(feat.dtype), device=feat.device)


def empty_maps(feats: Sequence[Tensor]) -> list[Tensor]:
    return [empty_map(feat) for feat in feats]


def empty_gradients(feats: Sequence[Tensor]) -> list[Tensor]:
    """One per feature, of its dtype and memory format."""
    return [torch.empty_like(feat) for feat in feats]


def empty_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], reduce: bool) -> Tensor:
    """() if `reduce`, else (n_pairs,); fp64 if any feature is, else fp32."""
    precise = any(feat.dtype == torch.float64 for feat in (*students, *teachers))
    shape = () if reduce else (len(students),)
    return torch.empty(shape, dtype=torch.float64 if precise else torch.float32, device=students[0].device)
