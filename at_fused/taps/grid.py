"""Where a feature of images has their positions: of convolutions, with channels last, or as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..reference import are_proportional, tokens_grid

# Numbers of tokens that may precede those of the image: for class and distillation, and 1, 4 or 8 registers.
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
    are in the proportions of H and W, to the nearest. Of tokens those grids come first that are so exactly.
    """
    size = image[-2:]
    if len(shape) not in (3, 4) or shape[0] != image[0]:
        return None
    if len(shape) == 4:
        for channel_dim, (height, width) in ((1, shape[2:]), (-1, shape[1:3])):
            if are_proportional((height, width), size):
                return Grid(channel_dim, height, width)
        return None
    for rounded in (False, True):
        for before in _BEFORE:
            tokens = shape[1] - before
            if tokens > 1 and (found := tokens_grid(tokens, size, rounded=rounded)):
                return Grid(-1, *found, before)
    return None
