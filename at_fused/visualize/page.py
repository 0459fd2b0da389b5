"""A matplotlib figure measured in inches, and texts that fit into it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE = 0.14  # inches that a line of text takes
SMALL, NORMAL = 7.0, 8.5  # points
CHARACTER = 0.08  # inches, the average at NORMAL


def figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("at_fused.visualize draws with matplotlib: pip install matplotlib") from error
    return Figure


class Page:
    """A figure on which things are placed in inches from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = figure_class()(figsize=(width, height), dpi=150)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without ticks and frame that (unlike after `axis("off")`) still have labels."""
        place = (
            left / self.width,
            1 - (top + height) / self.height,
            width / self.width,
            height / self.height,
        )
        axes = self.figure.add_axes(place)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def text(self, x: float, bottom: float, text: str, points: float, align: str = "center") -> None:
        place = x / self.width, 1 - (bottom - 0.2 * LINE) / self.height
        self.figure.text(*place, text, ha=align, va="bottom", fontsize=points, parse_math=False)


def wrapped(text: str, inches: float, points: float = NORMAL) -> str:
    """`text` in lines of at most so many inches, broken at spaces or after `.`, `_`, `/` and `-`."""
    wrapper = _Wrapper(max(int(inches / CHARACTER * NORMAL / points), 1))
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


class _Wrapper(textwrap.TextWrapper):
    wordsep_re = re.compile(r"(\s+)|(?<=[._/-])(?=\w)")


def lines(texts: Iterable[str]) -> float:
    """Inches that the longest of `texts` needs."""
    return LINE * max((text.count("\n") + 1 for text in texts), default=0)
