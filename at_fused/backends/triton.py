"""The Triton kernels of _triton_kernels.py: all pairs in two launches forward and one backward.

Under TRITON_INTERPRET=1 they run in Triton's interpreter, on CPU tensors: slow, for tests.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import math
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._outputs import Outputs, empty_maps

if TYPE_CHECKING:
    from ._triton_kernels import Kind

_OLDEST = (3, 6)  # 3.5 forgets, after a loop, the constants within a tuple of arguments
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_interpreter = threading.Lock()  # the interpreter keeps the program's number in a global


def unavailable() -> str | None:
    """Looks for Triton without importing it, and for GPUs without initialising CUDA, which forbids forks."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if _version() < _OLDEST:
        return f"it needs Triton {'.'.join(map(str, _OLDEST))} or newer, which torch 2.10 brings"
    if not _INTERPRETED and torch.cuda.device_count() == 0 and torch.xpu.device_count() == 0:
        return "there is no GPU (TRITON_INTERPRET=1 would run it on the CPU, slowly)"
    return None


def _version() -> tuple[int, ...]:
    """Version of the installed Triton; a build under another package name counts as new."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return _OLDEST


def unsupported(feats: Sequence[Tensor], p: float, mapping: str) -> str | None:
    served = ("cpu",) if _INTERPRETED else ("cuda", "xpu")  # ROCm's devices are called cuda, too
    if mapping not in ("sum", "max"):
        return f"it serves sums and maxima over the channels, not mapping {mapping!r}"
    for feat in feats:
        if feat.device.type not in served:
            return f"it serves {' and '.join(served)} tensors, not {feat.device.type}"
    return None


def attention_maps(feats: Sequence[Tensor], maps: Sequence[Tensor], *, p: float, mapping: str) -> None:
    _launch_maps(feats, maps, None, p, mapping)


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
    layouts = [
        _layout(feat.dtype, mapping, feat.shape, feat.stride(), grad_map.stride(), grad.stride())
        for feat, grad_map, grad in zip(feats, grad_maps, grads, strict=True)
    ]
    _launch(
        "gradients_kernel",
        grads[0],
        sum(layout.programs for layout in layouts),
        tuple((feat, *layout.feat) for feat, layout in zip(feats, layouts, strict=True)),
        tuple((grad_map, *layout.map) for grad_map, layout in zip(grad_maps, layouts, strict=True)),
        tuple((grad, *layout.grad) for grad, layout in zip(grads, layouts, strict=True)),
        tuple(addends) or None,
        tuple(layout.grid for layout in layouts),
        scale,
        0 if scale is None or scale.numel() == 1 else scale.stride(0),
        **_mapping(p, mapping),
        KINDS=tuple(layout.kind for layout in layouts),
    )


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
    samples = [student.shape[0] for student in students]
    loss = outputs.loss
    if sum(samples) == 0:
        loss.zero_()
        return

    # The maps' gradients take the place of the maps.
    student_maps = outputs.student_slopes or empty_maps(students)
    teacher_maps = outputs.teacher_slopes or empty_maps(teachers)
    counter = torch.empty(1, dtype=torch.int32, device=loss.device)
    distances = torch.empty(sum(samples), dtype=torch.float64, device=loss.device)
    _launch_maps([*students, *teachers], [*student_maps, *teacher_maps], counter, p, mapping)
    elements = [max(attention.numel(), 1) for attention in student_maps]
    _launch(
        "loss_kernel",
        loss,
        sum(samples),
        tuple(student_maps),
        tuple(teacher_maps),
        tuple(
            (unspecialised(count), math.prod(student.shape[2:]))
            for count, student in zip(samples, students, strict=True)
        ),
        tuple(_parts(weight / count) for weight, count in zip(weights, elements, strict=True)),
        _parts(eps),
        distances,
        counter,
        loss,
        REDUCE=loss.ndim == 0,
        STUDENT_SLOPES=bool(outputs.student_slopes),
        TEACHER_SLOPES=bool(outputs.teacher_slopes),
    )
    if outputs.grads:
        slopes, grads = outputs.student_slopes, outputs.grads
        attention_maps_backward(students, slopes, grads, scale=None, addends=[], p=p, mapping=mapping)


def _launch_maps(
    feats: Sequence[Tensor], maps: Sequence[Tensor], counter: Tensor | None, p: float, mapping: str
) -> None:
    layouts = [
        _layout(feat.dtype, mapping, feat.shape, feat.stride(), attention.stride())
        for feat, attention in zip(feats, maps, strict=True)
    ]
    _launch(
        "maps_kernel",
        maps[0],
        sum(layout.programs for layout in layouts) or int(counter is not None),
        tuple((feat, *layout.feat) for feat, layout in zip(feats, layouts, strict=True)),
        tuple((attention, *layout.map) for attention, layout in zip(maps, layouts, strict=True)),
        tuple(layout.grid for layout in layouts),
        counter,
        **_mapping(p, mapping),
        KINDS=tuple(layout.kind for layout in layouts),
    )


def _launch(kernel: str, at: Tensor, programs: int, *arguments: Any, **constants: Any) -> None:
    """Runs `programs` programs of a kernel on the device and the current stream of `at`."""
    if programs == 0:
        return
    from . import _triton_kernels  # imports Triton: only where it is used

    function = getattr(_triton_kernels, kernel)[(programs,)]
    if _INTERPRETED:
        with _interpreter:
            function(*arguments, **constants)
        return
    with (torch.xpu if at.device.type == "xpu" else torch.cuda).device(at.device):
        function(*arguments, **constants, **options(_target()))


def options(target: str) -> dict[str, Any]:
    """How to compile for Triton's target "cuda", "hip" (ROCm) or "xpu"; only the first takes `maxnreg`."""
    common = {"num_warps": 4, "enable_fp_fusion": True}
    # Left to itself, NVIDIA's assembler keeps to 96 registers or fewer, and spills 8 bytes of some kernels.
    return common | {"maxnreg": 128} if target == "cuda" else common


@functools.cache
def _target() -> str:
    """What Triton compiles for in this process."""
    from triton.runtime import driver

    target: str = driver.active.get_current_target().backend
    return target


def unspecialised(count: int) -> int:
    """`count`, encoded so that Triton does not specialise on it: it would compile a kernel anew for 1 and for
    multiples of 16, which takes a second or two for many a size of a batch."""
    return 2 * count + 3


def _mapping(p: float, mapping: str) -> dict[str, Any]:
    return {"WHOLE": int(p), "FRACTION": p - int(p), "MAX": mapping == "max"}


def _parts(value: float) -> tuple[float, float, float]:
    """Three fp32 numbers whose sum is `value`: Triton passes a float as fp32."""
    high = ctypes.c_float(value).value
    if math.isinf(high):
        return high, 0.0, 0.0
    middle = ctypes.c_float(value - high).value
    return high, middle, value - high - middle


# --- layouts ----------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the kernels walk a feature, in so many programs; what follows, but for `kind`, are arguments."""

    programs: int
    grid: tuple[int, int, int, tuple[int, ...]]  # programs (unspecialised), channels, positions, inner sizes
    feat: tuple[int, int, tuple[int, ...]]  # strides of batch, channels, space
    map: tuple[int, tuple[int, ...]]  # strides of batch, space
    grad: tuple[int, int, tuple[int, ...]]  # as feat
    kind: Kind


@functools.lru_cache(maxsize=4096)
def _layout(
    dtype: torch.dtype,
    mapping: str,
    shape: tuple[int, ...],
    feat_strides: tuple[int, ...],
    map_strides: tuple[int, ...],
    grad_strides: tuple[int, ...] | None = None,
) -> Layout:
    """Layout of a feature (B, C, *spatial), its map (B, *spatial) and, if given, its gradient.

    Spatial dimensions are walked in the order of the feature's memory, and neighbours merged where the
    strides of all three allow it: the space of dense tensors has one dimension.
    """
    from ._triton_kernels import Kind

    batch, channels = shape[:2]
    grad_strides = grad_strides or feat_strides
    dims: list[tuple[int, ...]] = []  # size, strides in the feature, the map and the gradient
    space = zip(shape[2:], feat_strides[2:], map_strides[1:], grad_strides[2:], strict=True)
    for size, *strides in sorted(space, key=lambda dim: -dim[1]):
        if size == 1:
            continue
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1:], strides, strict=True)):
            size *= dims.pop()[0]
        dims.append((size, *strides))
    sizes, feat_space, map_space, grad_space = zip(*(dims or [(1, 0, 0, 0)]), strict=True)
    positions = math.prod(sizes)

    # A dimension of size 1 may have any stride: 0 is a multiple of every vector.
    feat_batch, map_batch, grad_batch = (
        strides[0] if batch > 1 else 0 for strides in (feat_strides, map_strides, grad_strides)
    )
    feat_channel, grad_channel = (
        strides[1] if channels > 1 else 0 for strides in (feat_strides, grad_strides)
    )

    folded = 1
    if feat_space == grad_space == (1,) and feat_channel == grad_channel == positions:
        folded = _channels_of_a_row(dtype, channels, positions, math.gcd(feat_batch, grad_batch))
    if folded > 1:
        channels //= folded
        positions = feat_channel = grad_channel = positions * folded
        sizes = (positions,)

    # Vectors of channels (NHWC) or of positions (NCHW), such that every row starts at a multiple of theirs.
    position_vector = channel_vector = 1
    if feat_channel == grad_channel == 1:
        channel_vector = math.gcd(_VECTOR, channels, feat_batch, grad_batch, *feat_space, *grad_space)
    elif feat_space[-1] == grad_space[-1] == 1:
        rows = (sizes[-1], *feat_space[:-1], *grad_space[:-1])
        position_vector = math.gcd(_VECTOR, *rows, feat_batch, grad_batch, feat_channel, grad_channel)

    last = [
        sum((size - 1) * stride for size, stride in zip((channels, *sizes), strides, strict=True))
        for strides in ((feat_channel, *feat_space), (0, *map_space), (grad_channel, *grad_space))
    ]
    vector = max(position_vector, channel_vector)
    row = _WHOLE_MAP * folded if folded > 1 or position_vector == 1 else 2 * _WHOLE_MAP
    block_c, block_p = _tile(channels, positions, dtype, vector, row, mapping)
    programs = batch * -(-positions // block_p)
    return Layout(
        programs,
        (unspecialised(programs), channels, positions, sizes[1:]),
        (feat_batch, feat_channel, feat_space),
        (map_batch, map_space),
        (grad_batch, grad_channel, grad_space),
        Kind(position_vector, channel_vector, int(max(*last, positions) >= 2**31), block_c, block_p, folded),
    )


_VECTOR = 16  # elements: 16 bytes of the narrowest dtype, and to spare
_WHOLE_MAP = 64  # positions that one program takes in any case


def _channels_of_a_row(dtype: torch.dtype, channels: int, positions: int, batch_stride: int) -> int:
    """How many channels of a dense channels-first feature to take as one row, so that every row begins at a
    multiple of 16 bytes: 8 of 7x7 positions in bf16. 1 where that is impossible, or no help."""
    vector = 16 // dtype.itemsize
    folded = vector // math.gcd(vector, positions)
    fits = 1 < positions <= _WHOLE_MAP and channels % folded == 0 and batch_stride % vector == 0
    return folded if fits else 1


def _tile(
    channels: int, positions: int, dtype: torch.dtype, vector: int, row: int, mapping: str
) -> tuple[int, int]:
    """Channels and positions of a tile: what 128 threads hold in registers, `row` positions side by side."""
    elements = 4096 if mapping == "sum" else 2048  # max keeps the strongest channels as well
    if dtype == torch.float64 or vector < 4:
        elements = 1024  # addresses of single elements take registers, too
    block_c = _block(channels, elements // _block(positions, row))
    block_p = _block(positions, elements // block_c)
    return block_c, block_p


def _block(size: int, most: int) -> int:
    """A power of two from 16 to `most`, no greater than it need be for `size`."""
    return min(max(1 << (size - 1).bit_length(), 16), most)
