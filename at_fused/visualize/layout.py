"""The positions of the parts of a grid of maps, in inches from the top left corner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .page import LINE, SMALL, lines, wrapped

CELL = 1.2  # width of a picture
LEFT = 1.0  # margin, where the images' labels are
BAR_WIDTH = 0.1  # of the colour bar
_GAP, _GROUP_GAP, _EDGE = 0.07, 0.2, 0.1
_RIGHT, _BAR_LEFT = 0.85, 0.15  # margin, and the colour bar in it
_LEAST_BAR, _MOST_BAR = 0.5, 3.0  # its height
_FLAT = 0.6  # beside lower pictures names are written across


@dataclass(frozen=True)
class Texts:
    """What is written in a grid."""

    headings: Sequence[str]  # of the groups
    titles: Sequence[str]  # of a group's columns
    labels: Sequence[str]  # of the images, if any
    names: dict[str, str]  # of the networks, where each has rows of its own
    captions: Mapping[str, Sequence[str]]  # of the images, by network
    below: str = ""  # what the numbers below the maps are, if there are any
    note: str = ""  # below all


class Layout:
    """Places and sizes, and the texts broken into lines that fit.

    `aspect` is height by width of a picture.
    """

    def __init__(self, aspect: float, rows: int, texts: Texts) -> None:
        columns, groups = len(texts.titles), len(texts.headings)
        self.height = CELL * aspect
        self.flat = self.height < _FLAT
        self.group_width = columns * (CELL + _GAP) - _GAP
        self.texts = texts = self._fitted(texts)

        names_width = LEFT if self.flat and texts.names else lines(texts.names.values())
        step = self.group_width + _GROUP_GAP
        self.lefts = [LEFT + CELL + _GROUP_GAP + names_width + group * step for group in range(groups)]
        self.width = self.lefts[-1] + self.group_width + _RIGHT

        self.headings_bottom = _EDGE + lines(texts.headings) * 1.1
        self.titles_bottom = self.headings_bottom + lines(texts.titles) + 0.2 * LINE
        above = lines(text for texts in texts.captions.values() for text in texts)
        room = max(self.height, lines(texts.labels), lines(texts.names.values()) if self.flat else 0)
        pitch = above + room + (lines([texts.below]) if texts.below else 0) + _GAP
        first = self.titles_bottom + above
        self.tops = [first + row * pitch + (room - self.height) / 2 for row in range(rows)]

        self.bar_left, self.bar_top = self.width - _RIGHT + _BAR_LEFT, first
        self.bar_height = min(max((rows - 1) * pitch + room, _LEAST_BAR), _MOST_BAR)
        self.bottom = max(self.titles_bottom + rows * pitch, self.bar_top + self.bar_height) + _EDGE
        self.note = wrapped(texts.note, self.width - LEFT - _EDGE)
        self.note_bottom = self.bottom + lines([self.note])
        if self.note:
            self.bottom = self.note_bottom + _EDGE

    def column(self, group: int, place: int) -> float:
        """The left edge of a group's pictures at `place`."""
        return self.lefts[group] + place * (CELL + _GAP)

    def _fitted(self, texts: Texts) -> Texts:
        across = LEFT if self.flat else self.height  # else names are written upwards
        return Texts(
            headings=[wrapped(heading, self.group_width + _GROUP_GAP) for heading in texts.headings],
            titles=[wrapped(title, CELL) for title in texts.titles],
            labels=[wrapped(label, LEFT) for label in texts.labels],
            names={name: wrapped(text, across) for name, text in texts.names.items()},
            captions={
                name: [wrapped(caption, CELL) for caption in captions]
                for name, captions in texts.captions.items()
            },
            below=wrapped(texts.below, CELL, SMALL),
            note=texts.note,
        )
