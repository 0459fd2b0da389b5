"""Implementations of the three kernels, one file each, and the choice between them.

A backend is a module `backends/NAME.py` with

    unavailable() -> str | None
        Why it can't run on this machine; None when it can.
    unsupported(feats, p, mapping) -> str | None
        Why it can't serve these features; None when it can.
    attention_maps(feats, maps, *, p, mapping)
        Fills the raw maps (B, *spatial) of features (B, C, *spatial) of any strides and dtypes.
    attention_maps_backward(feats, grad_maps, grads, *, scale, addends, p, mapping)
        Fills the gradients at the features, given those at the maps. `scale` multiplies the latter: None, a
        scalar tensor, or one value per feature, read on the device. `addends`, of the gradients' dtypes and
        strides, one for each or none, are added before rounding.
    attention_loss(students, teachers, weights, outputs, *, p, mapping, eps)
        Fills `outputs` (`_outputs.Outputs`): the l2-normalised mean-squared loss, weighted, and its gradients
        at the maps and, as for an upstream gradient of 1, at the students' features, where they are wanted.

and, if it can compute the gradients at the features together with the loss faster than after it,

    early_gradients_pay(students, teachers, p) -> bool
        Whether that is the cheapest way to these gradients, supposing that the upstream gradient is 1 if the
        last one was, as it is when beta is among the weights. A wrong guess is slower; the result is
        identical. Called only in eager mode, as is the next.
    at_upstream_gradient(grads, students, slopes, upstream, p) -> list[Tensor] | None
        The early gradients `grads`, if there are any, at the upstream gradient, or None: compute them anew.
        Remembers for the next guess whether the upstream gradient was 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._known import Known, kinds
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


def gives_early_gradients(name: str) -> bool:
    """Whether a fused backend can compute the gradients at the features together with the loss."""
    return hasattr(named(name), "early_gradients_pay")


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
    if torch.compiler.is_compiling():
        return _select(backend, feats, p, mapping)
    if backend == "auto" and forward_ad._current_level >= 0:
        return "reference"  # the kernels have no derivatives of forward mode
    question = backend, _available, kinds(feats), p, mapping
    selected = _selected.get(question)
    if selected is None:
        selected = _select(backend, feats, p, mapping)
        _selected.keep(question, selected)
    return selected


_selected: Known[str] = Known()


def _select(backend: str, feats: Sequence[Tensor], p: float, mapping: str) -> str:
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
