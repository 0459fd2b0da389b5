"""What the operators' autograd.Functions share: what they save, and gradients through plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference


def requires_grad(*groups: Sequence[Tensor]) -> bool:
    if forward_ad._current_level >= 0:  # its tangents are refused by the Functions; past them they get lost
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for group in groups for tensor in group)


def save_for_backward(ctx: Any, *tensors: Tensor) -> None:
    """Inference tensors, such as a teacher's features, can't be saved: they are held as they are."""
    ctx.held = None
    if any(tensor.is_inference() for tensor in tensors):
        ctx.held = [tensor if tensor.is_inference() else None for tensor in tensors]
        pairs = zip(tensors, ctx.held, strict=True)
        ctx.save_for_backward(*(tensor if held is None else None for tensor, held in pairs))
    else:
        ctx.save_for_backward(*tensors)


def saved_tensors_of(ctx: Any) -> tuple[Tensor, ...]:
    """Read once: each read unpacks, which checkpointing allows only once."""
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    if ctx.held is None:
        return saved
    return tuple(tensor if held is None else held for tensor, held in zip(saved, ctx.held, strict=True))


def recomputed_gradients(
    function: Any, inputs: Sequence[Tensor | None], needed: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients at the needed inputs through a differentiable recomputation in plain PyTorch."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Inference tensors can't be saved by what is recomputed from them, their copies can.
        inputs = [x.clone() if x is not None and x.is_inference() else x for x in inputs]
        # Views keep the graph of the inputs when it is wanted, and cut it when it is not.
        inputs = [
            None if x is None else (reference.alias(x) if create_graph else x.detach().requires_grad_(need))
            for x, need in zip(inputs, needed, strict=True)
        ]
        outputs = function(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [
        reference.in_format(next(found), reference.strides_of(x)) if need and x is not None else None
        for x, need in zip(inputs, needed, strict=True)
    ]
