"""The C++ kernels of csrc/cpu: all pairs in one call, samples shared among PyTorch's threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .._outputs import Outputs
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


def attention_maps(feats: Sequence[Tensor], maps: Sequence[Tensor], *, p: float, mapping: str) -> None:
    torch.ops.at_fused_cpu.attention_maps(feats, maps, p, mapping == "max")


def attention_maps_backward(
    feats: Sequence[Tensor],
    grad_maps: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    scale: Tensor | None,
    addends: Sequence[Tensor],
    p: float,
    mapping: str,
) -> None:
    # Maps are small: a gradient that arrives expanded (from sum()) is made dense here.
    slopes = [grad_map.contiguous() for grad_map in grad_maps]
    torch.ops.at_fused_cpu.attention_maps_backward(feats, slopes, scale, addends, grads, p, mapping == "max")


def attention_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    outputs: Outputs,
    *,
    p: float,
    mapping: str,
    eps: float,
) -> None:
    torch.ops.at_fused_cpu.attention_loss(students, teachers, weights, *outputs, p, mapping == "max", eps)


_last_upstream_was_one = True


def early_gradients_pay(students: Sequence[Tensor], teachers: Sequence[Tensor], p: float) -> bool:
    """A sample fits the cache: its gradient costs a write, not another read."""
    return _last_upstream_was_one


def at_upstream_gradient(
    grads: list[Tensor] | None,
    students: Sequence[Tensor],
    slopes: Sequence[Tensor],
    upstream: Tensor,
    p: float,
) -> list[Tensor] | None:
    global _last_upstream_was_one
    _last_upstream_was_one = float(upstream) == 1
    return grads if _last_upstream_was_one else None
