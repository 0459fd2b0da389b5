"""The C++ kernels of csrc/cpu: all pairs in one call, samples shared among PyTorch's threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .._outputs import empty_loss_outputs, empty_map
from ._library import load

_LIBRARY = Path(__file__).parent.parent / "_cpu.so"
_MAX_SPATIAL_DIMS = 8  # as in csrc/cpu/feature.h


def unavailable() -> str | None:
    """Loads the library; None when it is there and fits this torch."""
    if not _LIBRARY.exists():
        return "its library was not built (install at_fused where torch and a C++ compiler are present)"
    return load(_LIBRARY)


def unsupported(feats: Sequence[Tensor], p: float, mapping: str) -> str | None:
    if mapping not in ("sum", "max"):
        return f"it serves sums and maxima over the channels, not mapping {mapping!r}"
    for feat in feats:
        if feat.device.type != "cpu":
            return f"it serves CPU tensors, not {feat.device.type}"
        if feat.ndim > 2 + _MAX_SPATIAL_DIMS:
            return f"it serves at most {_MAX_SPATIAL_DIMS} spatial dimensions, not {feat.ndim - 2}"
    return None


def attention_maps(feats: Sequence[Tensor], p: float, mapping: str) -> list[Tensor]:
    maps = [empty_map(feat) for feat in feats]
    torch.ops.at_fused_cpu.attention_maps(feats, maps, p, mapping == "max")
    return maps


def attention_maps_backward(
    feats: Sequence[Tensor],
    grad_maps: Sequence[Tensor],
    scale: Tensor | None,
    p: float,
    mapping: str,
    addends: Sequence[Tensor] = (),
) -> list[Tensor]:
    grads = [torch.empty_like(feat) for feat in feats]
    # Maps are small: a gradient that arrives expanded (from sum()) is made dense here.
    slopes = [grad_map.contiguous() for grad_map in grad_maps]
    added = list(addends) or None
    torch.ops.at_fused_cpu.attention_maps_backward(feats, slopes, scale, grads, p, mapping == "max", added)
    return grads


def attention_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    p: float,
    mapping: str,
    eps: float,
    reduce: bool,
    student_slopes: bool,
    teacher_slopes: bool,
    student_grads: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    loss, slopes, grads = empty_loss_outputs(
        students, teachers, reduce, student_slopes, teacher_slopes, student_grads
    )
    torch.ops.at_fused_cpu.attention_loss(
        students,
        teachers,
        weights,
        loss,
        slopes,
        grads,
        p,
        mapping == "max",
        eps,
        student_slopes,
        teacher_slopes,
    )
    return loss, slopes, grads


def single_pass() -> bool:
    """A sample fits the cache: its gradient costs a write, not another read."""
    return True


_expects_one = True


def ahead(students: Sequence[Tensor], teachers: Sequence[Tensor], p: float) -> bool:
    return _expects_one


def settle(
    grads: list[Tensor] | None, students: Sequence[Tensor], slopes: Sequence[Tensor], scale: Tensor, p: float
) -> list[Tensor] | None:
    global _expects_one
    _expects_one = float(scale) == 1
    return grads if _expects_one else None
