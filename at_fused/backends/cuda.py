"""The CUDA C++ kernels of csrc/cuda: all pairs in one launch forward and one backward (docs/kernels.md)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .._outputs import Outputs
from .._tracing import constant
from ._library import load

_LIBRARY = Path(__file__).parent.parent / "_cuda.so"
_ALIGNMENT = 16  # bytes, of a vector


def unavailable() -> str | None:
    """Loads the library; None when it is there, fits this torch, and there is a GPU."""
    if not torch.cuda.device_count():  # unlike is_available, leaves CUDA to children that are forked later
        return "there is no CUDA device"
    if torch.version.hip:
        return "it serves CUDA devices, not ROCm"
    if not _LIBRARY.exists():
        return "its library was not built (install at_fused where a CUDA build of torch and nvcc are present)"
    return load(_LIBRARY)


def unsupported(feats: Sequence[Tensor], p: float, mapping: str) -> str | None:
    if mapping != "sum":
        return f"it serves sums over the channels, not mapping {mapping!r}"
    for feat in feats:
        if feat.device.type != "cuda":
            return f"it serves CUDA tensors, not {feat.device.type}"
        if feat.dtype == torch.float64:
            return "it serves fp32, bf16 and fp16, not fp64"
        if not rows_are_contiguous(feat):
            return f"it serves channels-first and channels-last memory, not strides {tuple(feat.stride())}"
        positions = feat.shape[2:].numel()
        if feat.shape[1] * positions > 2**30 or max(feat.stride()[1:]) > 2**30:
            return f"it serves samples of at most 2**30 elements, not {tuple(feat.shape)}"
        problem, most = _limits(feat.device.index)
        if problem:
            return f"its library does not run on this device: {problem}"
        if positions > most:
            return f"it serves maps of at most {most} positions on this device, not {positions}"
    return None


def rows_are_contiguous(feat: Tensor) -> bool:
    """Whether positions of `feat` (B, C, *spatial) are evenly spaced, and they or the channels contiguous."""
    if feat.is_contiguous():
        return True
    positions, spacing = 1, 1
    for size, stride in zip(reversed(feat.shape[2:]), reversed(feat.stride()[2:]), strict=True):
        if size == 1:
            continue
        if positions == 1:
            spacing = stride
        elif stride != positions * spacing:
            return False
        positions *= size
    channels, channel_stride = feat.shape[1], feat.stride(1)
    if spacing == 0 or (channel_stride == 0 and channels > 1):
        return False  # expanded: the gradient, which is not, may lie the other way round
    return spacing == 1 or channel_stride == 1 or channels == 1


_known_limits: dict[int, tuple[str, int]] = {}


@constant
def _limits(device: int) -> tuple[str, int]:
    """Why the library can't run on the device, or "", and the positions of its largest map."""
    if device not in _known_limits:  # not functools.cache, which Dynamo looks through
        problem = torch.ops.at_fused_cuda.problem_with(device)
        _known_limits[device] = problem, 0 if problem else torch.ops.at_fused_cuda.largest_map(device)
    return _known_limits[device]


def attention_maps(feats: Sequence[Tensor], maps: Sequence[Tensor], *, p: float, mapping: str) -> None:
    torch.ops.at_fused_cuda.attention_maps(feats, maps, p)


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
    slopes = [grad_map.contiguous() for grad_map in grad_maps]
    note = _note() if _note_is_wanted and scale is not None and scale.numel() == 1 else None
    scale = None if scale is None else scale.float()
    aligned = all(addend.data_ptr() % _ALIGNMENT == 0 for addend in addends)
    added = addends if aligned else []
    torch.ops.at_fused_cuda.attention_maps_backward(feats, slopes, scale, added, grads, p, note, False)
    if not aligned:
        torch._foreach_add_(list(grads), list(addends))


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
    # The samples' partial sums, and room for a counter.
    size = sum(student.shape[0] for student in students) + 1
    workspace = torch.empty(size, dtype=torch.float64, device=outputs.loss.device)
    torch.ops.at_fused_cuda.attention_loss(students, teachers, weights, *outputs, workspace, p, eps)


# --- gradients together with the loss -----------------------------------------------------------------
#
# Reading the upstream gradient would stall the host. The kernels look at it instead: where it is 1, the
# gradients that came with the loss stand; elsewhere they are computed again, bit for bit as without a guess.


def early_gradients_pay(students: Sequence[Tensor], teachers: Sequence[Tensor], p: float) -> bool:
    global _note_is_wanted
    if sum(feat.nbytes for feat in (*students, *teachers)) <= _l2_bytes(students[0].device.index):
        return False  # the second read of the students costs no device memory
    if not torch.ops.at_fused_cuda.one_pass_pays(students, teachers, p):
        return False
    _note_is_wanted = True
    note = _note()
    return note is not None and bool(note.item())


def at_upstream_gradient(
    grads: list[Tensor] | None,
    students: Sequence[Tensor],
    slopes: Sequence[Tensor],
    upstream: Tensor,
    p: float,
) -> list[Tensor] | None:
    if grads is not None:
        torch.ops.at_fused_cuda.attention_maps_backward(
            students, slopes, upstream, [], grads, p, _note(), True
        )
    return grads


@cache
def _l2_bytes(device: int) -> int:
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size


_note_is_wanted = False  # until a call could take one pass: a kernel waits for what it writes to the host
_last_was_one: Tensor | None = None


def _note() -> Tensor | None:
    """An int32 in pinned memory, where backward leaves whether the upstream gradient was 1."""
    global _last_was_one
    if _last_was_one is None and not torch.cuda.is_current_stream_capturing():  # which forbids allocating it
        _last_was_one = torch.ones(1, dtype=torch.int32).pin_memory()
    return _last_was_one
