"""What is measured: the features of real pairs of student and teacher, and the bytes that must move."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shape = tuple[int, int, int]  # (C, H, W)

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cell:
    """One cell of the loss suite: the features of a student and a teacher, and how they lie in memory."""

    workload: str
    batch: int
    student: tuple[Shape, ...]
    teacher: tuple[Shape, ...]
    layout: str  # a key of LAYOUTS
    dtype: str  # a key of DTYPES

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.layout}-{self.dtype}"

    @property
    def student_bytes(self) -> int:
        return self._bytes(self.student)

    @property
    def teacher_bytes(self) -> int:
        return self._bytes(self.teacher)

    @property
    def floor_bytes(self) -> int:
        """3S + T: forward reads both sides; backward reads the student's and writes its gradient."""
        return 3 * self.student_bytes + self.teacher_bytes

    def make(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Random features (B, C, H, W); the student's are leaves that require gradients."""
        generator = torch.Generator(device).manual_seed(0)

        def feature(shape: Shape) -> Tensor:
            values = torch.randn(self.batch, *shape, device=device, generator=generator)
            return values.to(DTYPES[self.dtype]).contiguous(memory_format=LAYOUTS[self.layout])

        return [feature(s).requires_grad_() for s in self.student], [feature(t) for t in self.teacher]

    def _bytes(self, shapes: tuple[Shape, ...]) -> int:
        return self.batch * sum(c * h * w for c, h, w in shapes) * DTYPES[self.dtype].itemsize


_RESNET = ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))

# name: batch, student's features, teacher's features
_WORKLOADS: dict[str, tuple[int, tuple[Shape, ...], tuple[Shape, ...]]] = {
    # WRN-16-1 <- WRN-16-2, outputs of the three groups
    "cifar": (
        128,
        ((16, 32, 32), (32, 16, 16), (64, 8, 8)),
        ((32, 32, 32), (64, 16, 16), (128, 8, 8)),
    ),
    # ResNet-18 <- ResNet-34, outputs of the four stages
    "imagenet": (32, _RESNET, _RESNET),
}

CELLS: tuple[Cell, ...] = tuple(
    Cell(name, batch, student, teacher, layout, dtype)
    for (name, (batch, student, teacher)), layout, dtype in itertools.product(
        _WORKLOADS.items(), LAYOUTS, DTYPES
    )
)


def select_cells(pattern: str = "", batch: int | None = None) -> list[Cell]:
    """The cells whose name contains `pattern`, at another batch size if one is given.

    Raises:
        ValueError: no cell matches.
    """
    cells = [cell if batch is None else replace(cell, batch=batch) for cell in CELLS if pattern in cell.name]
    if not cells:
        raise ValueError(f"no cell contains {pattern!r}; there are: {', '.join(cell.name for cell in CELLS)}")
    return cells
