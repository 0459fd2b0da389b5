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
from ._outputs import Outputs, empty_gradients, empty_loss, empty_maps

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
# Fills an `Outputs`, and has no derivative of its own.
library.define(
    "fill_loss(Tensor[] students, Tensor[] teachers, float[] weights, float p, str mapping, float eps, "
    "str backend, Tensor(a!) loss, Tensor(b!)[] student_slopes, Tensor(c!)[] teacher_slopes, "
    "Tensor(d!)[] grads) -> ()"
)
attention_maps = torch.ops.at_fused.attention_maps.default
attention_maps_backward = torch.ops.at_fused.attention_maps_backward.default
attention_loss = torch.ops.at_fused.attention_loss.default
fill_loss = torch.ops.at_fused.fill_loss.default


def _attention_maps(feats: list[Tensor], p: float, mapping: str, backend: str) -> list[Tensor]:
    maps = empty_maps(feats)
    backends.named(backend).attention_maps(feats, maps, p=p, mapping=mapping)
    return maps


def _attention_maps_backward(
    feats: list[Tensor],
    grad_maps: list[Tensor],
    scale: Tensor | None,
    p: float,
    mapping: str,
    backend: str,
    addends: list[Tensor] | None = None,
) -> list[Tensor]:
    grads = empty_gradients(feats)
    backends.named(backend).attention_maps_backward(
        feats, grad_maps, grads, scale=scale, addends=addends or [], p=p, mapping=mapping
    )
    return grads


def _attention_loss(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: list[float],
    p: float,
    mapping: str,
    eps: float,
    reduce: bool,
    backend: str,
) -> Tensor:
    loss = empty_loss(students, teachers, reduce)
    _fill_loss(students, teachers, weights, p, mapping, eps, backend, loss, [], [], [])
    return loss


def _fill_loss(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: list[float],
    p: float,
    mapping: str,
    eps: float,
    backend: str,
    *outputs: Any,
) -> None:
    backends.named(backend).attention_loss(
        students, teachers, weights, Outputs(*outputs), p=p, mapping=mapping, eps=eps
    )


_computations: dict[Any, Callable[..., Any]] = {
    attention_maps: _attention_maps,
    attention_maps_backward: _attention_maps_backward,
    attention_loss: _attention_loss,
    fill_loss: _fill_loss,
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
def _maps_shapes(feats: list[Tensor], *options: Any) -> list[Tensor]:
    return empty_maps(feats)


@torch.library.register_fake("at_fused::attention_maps_backward", lib=library)
def _gradients_shapes(feats: list[Tensor], *others: Any) -> list[Tensor]:
    return empty_gradients(feats)


@torch.library.register_fake("at_fused::attention_loss", lib=library)
def _loss_shape(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: list[float],
    p: float,
    mapping: str,
    eps: float,
    reduce: bool,
    backend: str,
) -> Tensor:
    return empty_loss(students, teachers, reduce)


@torch.library.register_fake("at_fused::fill_loss", lib=library)
def _nothing(*arguments: Any) -> None:
    return None
