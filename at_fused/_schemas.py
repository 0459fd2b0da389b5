"""The operators behind the public functions: their schemas, what computes them, and the shapes they return.

All pairs go through one call. The operators are opaque to torch.compile and torch.export, and are
served by whichever backend the caller names (`backends/`). Their derivatives are in `_ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from ._outputs import empty_loss_outputs, empty_map

library = torch.library.Library("at_fused", "DEF")
library.define("attention_maps(Tensor[] feats, float p, str mapping, str backend) -> Tensor[]")
library.define(
    "attention_maps_backward(Tensor[] feats, Tensor[] grad_maps, Tensor? scale, float p, str mapping, "
    "str backend, Tensor[]? addends=None) -> Tensor[]"
)
library.define(
    "attention_loss(Tensor[] students, Tensor[] teachers, float[] weights, float p, str mapping, float eps, "
    "bool reduce, str backend) -> Tensor"
)
# What a backward pass needs besides: without a derivative of its own.
library.define(
    "attention_loss_forward(Tensor[] students, Tensor[] teachers, float[] weights, float p, str mapping, "
    "float eps, bool reduce, bool student_slopes, bool teacher_slopes, bool student_grads, str backend) "
    "-> (Tensor loss, Tensor[] slopes, Tensor[] grads)"
)
attention_maps = torch.ops.at_fused.attention_maps.default
attention_maps_backward = torch.ops.at_fused.attention_maps_backward.default
attention_loss = torch.ops.at_fused.attention_loss.default
attention_loss_forward = torch.ops.at_fused.attention_loss_forward.default


def _attention_maps(feats: list[Tensor], p: float, mapping: str, backend: str) -> list[Tensor]:
    return backends.named(backend).attention_maps(feats, p, mapping)


def _attention_maps_backward(
    feats: list[Tensor],
    grad_maps: list[Tensor],
    scale: Tensor | None,
    p: float,
    mapping: str,
    backend: str,
    addends: list[Tensor] | None = None,
) -> list[Tensor]:
    return backends.named(backend).attention_maps_backward(feats, grad_maps, scale, p, mapping, addends or [])


def _attention_loss_forward(
    students: list[Tensor], teachers: list[Tensor], weights: list[float], *options: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return backends.named(options[-1]).attention_loss(students, teachers, weights, *options[:-1])


def _attention_loss(
    students: list[Tensor], teachers: list[Tensor], weights: list[float], *options: Any
) -> Tensor:
    wanted = (False, False, False)  # no slopes, no gradients
    return _attention_loss_forward(students, teachers, weights, *options[:-1], *wanted, options[-1])[0]


_computations: dict[Any, Callable[..., Any]] = {
    attention_maps: _attention_maps,
    attention_maps_backward: _attention_maps_backward,
    attention_loss: _attention_loss,
    attention_loss_forward: _attention_loss_forward,
}
for _operator, _computation in _computations.items():
    library.impl(_operator, _computation, "CompositeExplicitAutograd")


def dispatched() -> bool:
    """Whether a compiler, mode or tracer could see a call of an operator.

    Elsewhere what the dispatcher would find is called directly: each pass through it and back to Python costs
    as much as several checks.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """The operator's result, without a graph."""
    with torch._C._AutoDispatchBelowAutograd():
        return (operator if dispatched() else _computations[operator])(*arguments)


# --- shapes -----------------------------------------------------------------------------------------


@torch.library.register_fake("at_fused::attention_maps", lib=library)
def _fake_maps(feats: list[Tensor], *options: Any) -> list[Tensor]:
    return [empty_map(feat) for feat in feats]


@torch.library.register_fake("at_fused::attention_maps_backward", lib=library)
def _fake_maps_backward(feats: list[Tensor], *others: Any) -> list[Tensor]:
    return [torch.empty_like(feat) for feat in feats]


@torch.library.register_fake("at_fused::attention_loss", lib=library)
def _fake_loss(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: list[float],
    p: float,
    mapping: str,
    eps: float,
    reduce: bool,
    backend: str,
) -> Tensor:
    return empty_loss_outputs(students, teachers, reduce, False, False, False)[0]


@torch.library.register_fake("at_fused::attention_loss_forward", lib=library)
def _fake_loss_forward(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: list[float],
    p: float,
    mapping: str,
    eps: float,
    reduce: bool,
    student_slopes: bool,
    teacher_slopes: bool,
    student_grads: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return empty_loss_outputs(students, teachers, reduce, student_slopes, teacher_slopes, student_grads)
