"""A backend's kernels, called past the operators: their outputs are allocated here."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from at_fused._outputs import Outputs, empty_gradients, empty_loss, empty_maps


def maps(backend: ModuleType, feats: Sequence[Tensor], p: float = 2.0, mapping: str = "sum") -> list[Tensor]:
    found = empty_maps(feats)
    backend.attention_maps(feats, found, p=p, mapping=mapping)
    return found


def gradients(
    backend: ModuleType,
    feats: Sequence[Tensor],
    grad_maps: Sequence[Tensor],
    scale: Tensor | None = None,
    p: float = 2.0,
    mapping: str = "sum",
) -> list[Tensor]:
    grads = empty_gradients(feats)
    backend.attention_maps_backward(feats, grad_maps, grads, scale=scale, addends=[], p=p, mapping=mapping)
    return grads


def outputs(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    reduce: bool = True,
    student_slopes: bool = True,
    teacher_slopes: bool = False,
    grads: bool = False,
) -> Outputs:
    return Outputs(
        empty_loss(students, teachers, reduce),
        empty_maps(students) if student_slopes else [],
        empty_maps(teachers) if teacher_slopes else [],
        empty_gradients(students) if grads else [],
    )


def loss(
    backend: ModuleType,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    p: float = 2.0,
    mapping: str = "sum",
    **wanted: bool,
) -> Outputs:
    """With the outputs that are wanted."""
    found = outputs(students, teachers, **wanted)
    weights = [0.5] * len(students) if weights is None else weights
    backend.attention_loss(students, teachers, weights, found, p=p, mapping=mapping, eps=1e-12)
    return found
