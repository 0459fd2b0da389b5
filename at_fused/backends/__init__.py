"""Implementations of the three kernels, one file each, and the choice between them.

A backend is a module `backends/NAME.py` with

    unavailable() -> str | None
        Why it can't run on this machine; None when it can.
    unsupported(feats, p, mapping) -> str | None
        Why it can't serve these features; None when it can.
    attention_maps(feats, p, mapping) -> list[Tensor]
        Raw maps (B, *spatial) of features (B, C, *spatial), any strides and dtypes.
    attention_maps_backward(feats, grad_maps, scale, p, mapping, addends) -> list[Tensor]
        Gradients at the features, in their dtype and memory format. `scale` multiplies the map
        gradients: None, a scalar tensor, or one value per feature, read on the device. `addends`, one per
        feature of the gradient's dtype and strides, or none, are added before rounding.
    attention_loss(students, teachers, weights, p, mapping, eps, reduce,
                   student_slopes, teacher_slopes, student_grads) -> (loss, slopes, grads)
        The l2-normalised mean-squared loss, weighted, () if `reduce` else (n_pairs,); where asked for, the
        gradients of each pair's weighted loss at its raw maps, students' first; and, only where
        `single_pass`, the gradients at the students' features.
    single_pass() -> bool
        Whether it can compute the gradients at the features together with the loss, as for an upstream
        gradient of 1. The next two are called only then, and only in eager mode.
    ahead(students, teachers, p) -> bool
        Whether that is the cheapest way to these gradients, supposing that the upstream gradient is 1 if the
        last one was, as it is when beta is among the weights. A wrong guess costs time, never a bit.
    settle(grads, students, slopes, scale, p) -> list[Tensor] | None
        Notes for the next guess whether the upstream gradient `scale` is 1, and makes the gradients that came
        ahead, if any did, right for it. None has them computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import cpu, cuda, triton

# Settled at import, in plain containers, which torch.compile can look into. Best first.
modules: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu}
NAMES = (*modules, "reference")
_unavailable: dict[str, str | None] = {name: module.unavailable() for name, module in modules.items()}
_available = tuple(name for name in NAMES if _unavailable.get(name) is None)


class BackendError(ValueError, RuntimeError):
    """A backend was named that can't serve the call: a bad argument because of the machine or the inputs."""


def named(name: str) -> ModuleType:
    """The module of a fused backend; BackendError where there is none of that name."""
    if name not in modules:
        raise BackendError(f"no fused backend named {name!r}")
    return modules[name]


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine, best first; "reference" is always there."""
    return _available


def select(backend: str, feats: Sequence[Tensor], p: float, mapping: str) -> str:
    """Resolves "auto" to the best backend for `feats`, or checks the named one.

    In a graph of torch.compile or torch.export, the best for a sum over channels is the reference: the
    compiler joins the plain formula to the kernels around it, and keeps no feature for an operator to read.

    Raises:
        BackendError: the named backend is unavailable or can't serve these features.
    """
    if backend == "auto" and mapping == "sum" and torch.compiler.is_compiling():
        return "reference"
    if backend == "auto" and not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return "reference"  # the kernels have no derivatives of forward mode
    for name in _available if backend == "auto" else (backend,):
        if name == "reference":
            return name
        reason = _unavailable[name] or _wrapped(feats) or modules[name].unsupported(feats, p, mapping)
        if reason is None:
            return name
        if backend != "auto":
            raise BackendError(f"backend {backend!r} can't be used here: {reason}")
    return "reference"


def _wrapped(feats: Sequence[Tensor]) -> str | None:
    """Why no kernel can see the memory of these features; None where one can."""
    if torch.compiler.is_compiling():
        return None
    for feat in feats:
        if not is_plain(feat):
            kind = type(feat).__name__
            return f"it can't see into a {kind} that a wrapper (DTensor) or functorch (torch.func) has made"
    return None


# Of tensors within torch.func.grad and vmap, and of the gradients of is_grads_batched=True.
_TRANSFORMED = ("FuncTorchGradWrapper", "FuncTorchBatched", "Batched", "Functionalize")
_transformed = 0
for _key in map(torch._C._dispatch_key_parse, _TRANSFORMED):
    _transformed |= torch._C.DispatchKeySet(_key).raw_repr()


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is no DTensor or other wrapper, and not transformed by vmap or torch.func.grad."""
    if torch.compiler.is_compiling():
        return True
    if type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor):
        return False
    return not torch._C._dispatch_keys(tensor).raw_repr() & _transformed
