"""Converts a teacher's maps and logits of an image to a row of numbers and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.methods import Taught

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """Of each row: the maps' sizes (*spatial), None where none are kept, then the number of logits."""

    maps: tuple[tuple[int, ...], ...] | None
    logits: int
    dtype: str

    @classmethod
    def of(cls, example: Taught, dtype: str) -> Layout:
        maps = None if example.maps is None else tuple(tuple(one.shape[1:]) for one in example.maps)
        return cls(maps, 0 if example.logits is None else example.logits.shape[1], dtype)

    @property
    def width(self) -> int:
        return sum(map(prod, self.maps or ())) + self.logits

    @property
    def bytes(self) -> int:
        return self.width * DTYPES[self.dtype].itemsize

    def pack(self, taught: Taught) -> Tensor:
        """Rows (n, bytes) uint8, on the CPU.

        Raises:
            ConfigError: a number lies beyond the dtype's range.
        """
        parts: list[Tensor] = [*(taught.maps or ())] + ([] if taught.logits is None else [taught.logits])
        wide = torch.cat([part.flatten(1).float() for part in parts], 1)
        rows = wide.to(DTYPES[self.dtype]).cpu()
        if not bool(rows.isfinite().all()) and bool(wide.isfinite().all()):
            raise ConfigError(
                f"teacher-cache-dtype {self.dtype} can't hold the teacher's numbers, which reach "
                f"{wide.abs().max().item():.3g}; bf16 and fp32 can"
            )
        return rows.view(torch.uint8)

    def unpack(self, rows: Tensor, device: torch.device) -> Taught:
        """The maps and logits that `pack` took, rounded to the dtype, in fp32."""
        wide = rows.view(DTYPES[self.dtype]).to(device, non_blocking=True).float()
        *flat, logits = wide.split([*map(prod, self.maps or ()), self.logits], 1)
        maps = None
        if self.maps is not None:
            maps = [part.unflatten(1, size) for part, size in zip(flat, self.maps, strict=True)]
        return Taught(logits if self.logits else None, maps)


def parts_of(taught: Taught, count: int) -> Sequence[Taught]:
    """As `Tensor.chunk` divides their images."""
    logits = None if taught.logits is None else taught.logits.chunk(count)
    maps = None if taught.maps is None else list(zip(*(one.chunk(count) for one in taught.maps), strict=True))
    number = len(logits if logits is not None else maps or ())
    return [Taught(logits[i] if logits else None, maps[i] if maps else None) for i in range(number)]
