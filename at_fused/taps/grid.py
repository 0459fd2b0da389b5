"""Where a feature of images has their positions: of convolutions, with channels last, or as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Tokens that may stand before those of the image: for class and distillation, and 1, 4 or 8 registers.
_BEFORE = (0, 1, 2, 4, 5, 8, 9)


class Grid(NamedTuple):
    """The positions of a feature."""

    channel_dim: int  # 1, or -1 where the channels come last
    height: int
    width: int
    before: int = 0  # tokens before those of the image

    @property
    def positions(self) -> int:
        return self.height * self.width


def find_grid(shape: Sequence[int], image: Sequence[int]) -> Grid | None:
    """The positions of a feature of this shape, made of images (B, C, H, W): None where it has none.

    It is (B, C, h, w), (B, h, w, C) or tokens (B, N, C), of which some may stand before the image's; h and w
    are in the proportion of H and W, to the nearest.
    """
    if len(shape) not in (3, 4) or shape[0] != image[0]:
        return None
    if len(shape) == 4:
        for channel_dim, (height, width) in ((1, shape[2:]), (-1, shape[1:3])):
            if _proportional(height, width, image):
                return Grid(channel_dim, height, width)
        return None
    for before in _BEFORE:
        tokens = shape[1] - before
        height = round((tokens * image[-2] / image[-1]) ** 0.5) if tokens > 0 else 0
        if tokens > 1 and height and tokens % height == 0 and _proportional(height, tokens // height, image):
            return Grid(-1, height, tokens // height, before)
    return None


def _proportional(height: int, width: int, image: Sequence[int]) -> bool:
    return abs(height * image[-1] - width * image[-2]) < max(image[-2:])
