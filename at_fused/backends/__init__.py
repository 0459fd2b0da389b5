"""Implementations of the three kernels, one file each, and the choice between them.

A backend is a module `backends/NAME.py` with

    unavailable() -> str | None
        Why it can't run on this machine; None when it can.
    unsupported(feats, p, mapping) -> str | None
        Why it can't serve these features; None when it can.
    attention_maps(feats, p, mapping) -> list[Tensor]
        Raw maps (B, *spatial) of features (B, C, *spatial), any strides and dtypes.
    attention_maps_backward(feats, grad_maps, scale, p, mapping) -> list[Tensor]
        Gradients at the features, in their dtype and memory format. `scale` multiplies the map
        gradients: None, a scalar tensor, or one value per feature, read on the device.
    attention_loss(students, teachers, weights, p, mapping, eps, reduce, student_slopes, teacher_slopes)
        -> (loss, slopes): the l2-normalised mean-squared loss, weighted, () if `reduce` else (n_pairs,),
        and, where asked for, the gradients of each pair's weighted loss at its raw maps, students' first.

A name listed here whose file does not exist yet is simply unavailable.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

FUSED = ("cuda", "triton", "cpu")  # best first
NAMES = (*FUSED, "reference")


class BackendError(ValueError, RuntimeError):
    """A backend was named that can't serve the call: a bad argument because of the machine or the inputs."""


@functools.cache
def load(name: str) -> ModuleType | None:
    """The module of a fused backend; None when this version has none of that name."""
    qualified = f"{__name__}.{name}"
    return importlib.import_module(qualified) if importlib.util.find_spec(qualified) else None


@functools.cache
def why_unavailable(name: str) -> str | None:
    """Why the backend can't run on this machine; None when it can."""
    if name == "reference":
        return None
    module = load(name)
    return "this version of at_fused has no such backend" if module is None else module.unavailable()


@functools.cache
def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine, best first; "reference" is always there."""
    return tuple(name for name in NAMES if why_unavailable(name) is None)


def select(backend: str, feats: Sequence[Tensor], p: float, mapping: str) -> str:
    """Resolves "auto" to the best backend for `feats`, or checks the named one.

    Raises:
        BackendError: the named backend is unavailable or can't serve these features.
    """
    if backend == "auto":
        for name in available_backends():
            if name == "reference" or _unsupported(name, feats, p, mapping) is None:
                return name
    reason = why_unavailable(backend)
    if reason is None and backend != "reference":
        reason = _unsupported(backend, feats, p, mapping)
    if reason is not None:
        raise BackendError(f"backend {backend!r} can't be used here: {reason}")
    return backend


def _unsupported(name: str, feats: Sequence[Tensor], p: float, mapping: str) -> str | None:
    module = load(name)
    return "no such backend" if module is None else module.unsupported(feats, p, mapping)
