"""What is measured: the features of real pairs of student and teacher, and the bytes that must move."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]  # (C, *spatial)

LAYOUTS = ("nchw", "channels_last")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POWERS = (1, 2, 4)
MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Workload:
    """The features that one pair of networks compares, per sample; the batch sizes in use."""

    title: str
    student: tuple[Shape, ...]
    teacher: tuple[Shape, ...]
    batch: dict[str, int]  # per device type
    layouts: tuple[str, ...] = LAYOUTS


@dataclass(frozen=True)
class Cell:
    """One cell of the loss suite: the features of a student and a teacher, and their layout in memory."""

    workload: str
    batch: int
    student: tuple[Shape, ...]
    teacher: tuple[Shape, ...]
    layout: str  # one of LAYOUTS
    dtype: str  # a key of DTYPES
    p: int = 2

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.layout}-{self.dtype}" + ("" if self.p == 2 else f"-p{self.p}")

    @property
    def student_bytes(self) -> int:
        return self._bytes(self.student)

    @property
    def teacher_bytes(self) -> int:
        return self._bytes(self.teacher)

    @property
    def activation_bytes(self) -> int:
        return self.student_bytes + self.teacher_bytes

    @property
    def loss_scale(self) -> float:
        """Upstream gradient: 1, or in fp16, where gradients underflow, the factor of a GradScaler."""
        return 2.0**22 if self.dtype == "fp16" else 1.0

    def bytes_moved(self, mode: str = "both", one_pass: bool = False) -> int:
        """The bytes that must move between memory and chip; S and T are the activations of both sides.

        Forward reads both, S + T; backward reads the student's and writes its gradient, 2S. In one pass
        forward also writes the gradient of the samples that it holds, 2S + T, and backward does nothing.
        """
        s, t = self.student_bytes, self.teacher_bytes
        if one_pass:
            return {"forward": 2 * s + t, "backward": 0, "both": 2 * s + t}[mode]
        return {"forward": s + t, "backward": 2 * s, "both": 3 * s + t}[mode]

    def describe(self) -> dict[str, Any]:
        """The cell's part of a row of results."""
        return {
            "cell": self.name,
            "workload": self.workload,
            "batch": self.batch,
            "layout": self.layout,
            "dtype": self.dtype,
            "p": self.p,
            "student_bytes": self.student_bytes,
            "teacher_bytes": self.teacher_bytes,
        }

    def make(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Random features (B, C, *spatial); the student's are leaves that require gradients."""
        generator = torch.Generator(device).manual_seed(0)

        def feature(shape: Shape) -> Tensor:
            values = torch.randn(self.batch, *shape, device=device, generator=generator)
            values = values.to(DTYPES[self.dtype])
            return values if self.layout == "nchw" else values.movedim(1, -1).contiguous().movedim(-1, 1)

        return [feature(s).requires_grad_() for s in self.student], [feature(t) for t in self.teacher]

    def _bytes(self, shapes: tuple[Shape, ...]) -> int:
        return self.batch * sum(map(math.prod, shapes)) * DTYPES[self.dtype].itemsize


def _wide_resnet(width: int, blocks: int = 1) -> tuple[Shape, ...]:
    """Groups of a WRN-*-width on 32x32 images; each as often as it has compared blocks."""
    groups = ((16 * width, 32, 32), (32 * width, 16, 16), (64 * width, 8, 8))
    return tuple(shape for shape in groups for _ in range(blocks))


def _resnet(expansion: int = 1) -> tuple[Shape, ...]:
    """Stages of a ResNet on 224x224 images."""
    return tuple((64 * 2**i * expansion, 56 // 2**i, 56 // 2**i) for i in range(4))


_CIFAR = {"cpu": 128, "cuda": 128}
_IMAGENET = {"cpu": 32, "cuda": 256}

WORKLOADS: dict[str, Workload] = {
    "cifar": Workload("WRN-16-1 ← WRN-16-2, groups", _wide_resnet(1), _wide_resnet(2), _CIFAR),
    "cifar-blocks": Workload("WRN-16-1 ← WRN-16-2, blocks", _wide_resnet(1, 2), _wide_resnet(2, 2), _CIFAR),
    "cifar40": Workload("WRN-16-2 ← WRN-40-2, groups", _wide_resnet(2), _wide_resnet(2), _CIFAR),
    "cifar40-blocks": Workload(
        "WRN-16-2 ← WRN-40-2, the student's blocks and every third of the teacher's",
        _wide_resnet(2, 2),
        _wide_resnet(2, 2),
        _CIFAR,
    ),
    "imagenet": Workload("ResNet-18 ← ResNet-34, four groups", _resnet(), _resnet(), _IMAGENET),
    "imagenet-last2": Workload(
        "ResNet-18 ← ResNet-34, last two groups", _resnet()[2:], _resnet()[2:], _IMAGENET
    ),
    "imagenet50": Workload("ResNet-18 ← ResNet-50, four groups", _resnet(), _resnet(4), _IMAGENET),
    "imagenet50-last2": Workload(
        "ResNet-18 ← ResNet-50, last two groups", _resnet()[2:], _resnet(4)[2:], _IMAGENET
    ),
    "resnet50": Workload("ResNet-50 ← ResNet-101, four groups", _resnet(4), _resnet(4), _IMAGENET),
    # Tokens (B, N, C) seen as (B, C, N): channels innermost. 14 * 14 patches and the class token.
    "vit": Workload(
        "DeiT-Ti ← DeiT-S, tokens after blocks 3, 6, 9, 12",
        ((192, 197),) * 4,
        ((384, 197),) * 4,
        _IMAGENET,
        layouts=("channels_last",),
    ),
}
DEFAULT_WORKLOADS = {"cpu": ("cifar", "imagenet"), "cuda": tuple(WORKLOADS)}
DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}


def select_cells(
    pattern: str = "",
    batch: int | None = None,
    *,
    device_type: str = "cpu",
    workloads: Sequence[str] | None = None,
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[str] | None = None,
    powers: Sequence[int] = (2,),
) -> list[Cell]:
    """The cells of the given workloads, layouts, dtypes and exponents whose name contains `pattern`.

    Batch sizes, workloads and dtypes are the device type's own unless given.

    Raises:
        ValueError: no cell matches.
    """
    cells = [
        Cell(name, batch or WORKLOADS[name].batch[device_type], student, teacher, layout, dtype, p)
        for name, p, layout, dtype in itertools.product(
            workloads or DEFAULT_WORKLOADS[device_type],
            powers,
            layouts,
            dtypes or DEFAULT_DTYPES[device_type],
        )
        for student, teacher in [(WORKLOADS[name].student, WORKLOADS[name].teacher)]
        if layout in WORKLOADS[name].layouts
    ]
    chosen = [cell for cell in cells if pattern in cell.name]
    if not chosen:
        names = ", ".join(cell.name for cell in cells)
        raise ValueError(f"no cell contains {pattern!r}; there are: {names or 'none of these layouts'}")
    return chosen


def sweep_cells(device_type: str, layout: str, dtype: str) -> dict[str, list[Cell]]:
    """One pair (128, 28, 28) at batch sizes from 1, and one (C, 28, 28) at channels from 16."""
    small = device_type == "cpu"
    pair = ((128, 28, 28),)
    base = Cell("pair", 32 if small else 128, pair, pair, layout, dtype)
    batches = [2**i for i in range(8 if small else 11)]
    channels = [2**i for i in range(4, 11 if small else 12)]
    shapes = [((c, 28, 28),) for c in channels]
    return {
        "batch": [replace(base, workload=f"batch-{b}", batch=b) for b in batches],
        "channels": [
            replace(base, workload=f"channels-{c}", student=shape, teacher=shape)
            for c, shape in zip(channels, shapes, strict=True)
        ],
    }
