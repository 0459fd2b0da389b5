"""Panels of errors against the epoch: the charts of a run, of the demo and of a table are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A method has one colour in every chart.
COLOURS = {
    "none": "tab:red",
    "at": "tab:blue",
    "kd": "tab:green",
    "at+kd": "tab:purple",
    "hints": "tab:brown",
    "grad-at": "tab:cyan",
    "symmetry": "tab:pink",
    "min-l2": "tab:orange",
}
TEACHER = "tab:gray"
LONG = 8  # epochs from which the last quarter has a panel of its own


def panel_count(epochs: int) -> int:
    return 2 if epochs >= LONG else 1


def panels(row: Sequence[Axes], epochs: int) -> list[Panel]:
    """The panels of `row`: all epochs, and in a second one, if there is one, the last quarter of them."""
    return [Panel(axes, first) for axes, first in zip(row, (1, 3 * epochs // 4 + 1), strict=False)]


class Panel:
    """Errors in percent from epoch `first` on."""

    def __init__(self, axes: Axes, first: int = 1) -> None:
        self.axes, self.first = axes, first
        self._shown: list[float] = []  # the errors that must be inside

    def curve(self, errors: Sequence[float], begin: int = 1, **style: Any) -> None:
        """Draw the errors of the epochs from `begin` on. The first quarter may be cut off at the top."""
        skipped = max(0, self.first - begin)
        drawn = list(errors[skipped:])
        if drawn:
            self.axes.plot(range(begin + skipped, begin + len(errors)), drawn, **style)
        self._shown += errors[max(skipped, len(errors) // 4) :]

    def level(self, error: float, **style: Any) -> None:
        """Draw a horizontal line."""
        self.axes.axhline(error, **style)
        if self.first > 1:
            self._shown.append(error)

    def finish(self, title: str) -> None:
        """Set the limits, and name the axes and the panel (the last quarter is called that)."""
        if self.first > 1 and self._shown:
            margin = 0.05 * (max(self._shown) - min(self._shown)) or 1
            self.axes.set_ylim(min(self._shown) - margin, max(self._shown) + margin)
        else:
            self.axes.set_ylim(0, 1.1 * max(self._shown, default=0) or None)
        count_epochs(self.axes)
        self.axes.set(ylabel="error, %", title="the last quarter" if self.first > 1 else title)


def count_epochs(axes: Axes) -> None:
    """Whole epochs below, a grid, and no frame above and on the right."""
    from matplotlib.ticker import MaxNLocator  # seconds to import: only those who plot pay

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
