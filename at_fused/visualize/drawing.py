"""Draws images and maps where a layout places them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BAR_WIDTH, CELL, LEFT, Layout
from .page import NORMAL, SMALL, Page, lines
from .similarity import similarity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key = tuple[str, float]  # a network and an exponent
Maps = Mapping[Key, Sequence[Tensor]]  # per group (B, h, w) fp32

_ACROSS: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center"}  # a text left of a picture
_OPACITY = 0.6  # of a map over its image


@dataclass(frozen=True)
class Row:
    """A line of pictures: the image, and the networks whose maps are side by side in each group."""

    image: int
    keys: Sequence[Key]
    shows_image: bool


@dataclass(frozen=True)
class Style:
    """The options of `attention_grid` of the same names."""

    compare_to: str | None
    scale: str
    overlay: bool
    colours: str


def draw(pictures: Any, rows: Sequence[Row], maps: Maps, layout: Layout, style: Style) -> Figure:
    """The figure; `pictures` is an array (B, H, W) or (B, H, W, 3) in 0..1."""
    page = Page(layout.width, layout.bottom)
    _draw_headings(page, layout)
    for row, top in zip(rows, layout.tops, strict=True):
        if row.shows_image:
            axes = page.axes(LEFT, top, CELL, layout.height)
            axes.imshow(pictures[row.image], cmap="gray", vmin=0, vmax=1)
            if layout.texts.labels:
                _write_left(axes, layout.texts.labels[row.image], **_ACROSS)
        if any(name != style.compare_to for name, _ in row.keys) and layout.texts.below:
            bottom = top + layout.height + lines([layout.texts.below])
            page.text(LEFT + CELL / 2, bottom, layout.texts.below, SMALL)
        for group in range(len(layout.lefts)):
            drawn = _draw_maps(page, pictures, row, group, top, maps, layout, style)
    bar_axes = page.axes(layout.bar_left, layout.bar_top, BAR_WIDTH, layout.bar_height)
    bar = page.figure.colorbar(drawn, cax=bar_axes, ticks=[0, 1])
    most = "max" if style.scale == "own" else "max of\ngroup"
    bar.ax.set_yticklabels(["0", most], fontsize=NORMAL)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    if layout.note:
        page.text(LEFT, layout.note_bottom, layout.note, NORMAL, align="left")
    return page.figure


def _draw_headings(page: Page, layout: Layout) -> None:
    page.text(LEFT + CELL / 2, layout.titles_bottom, "image", NORMAL)
    for group, heading in enumerate(layout.texts.headings):
        middle = layout.lefts[group] + layout.group_width / 2
        page.text(middle, layout.headings_bottom, heading, NORMAL + 1)
        for place, title in enumerate(layout.texts.titles):
            page.text(layout.column(group, place) + CELL / 2, layout.titles_bottom, title, NORMAL)


def _draw_maps(
    page: Page, pictures: Any, row: Row, group: int, top: float, maps: Maps, layout: Layout, style: Style
) -> Any:
    """A row's maps of one group; returns the last of them."""
    texts, picture = layout.texts, pictures[row.image]
    # All networks' maps of this image and group, those of other rows too: they share a scale.
    cells = {key: _enlarged(groups[group][row.image], picture.shape[:2]) for key, groups in maps.items()}
    largest = max(cell.max() for cell in cells.values())
    for place, key in enumerate(row.keys):
        name, exponent = key
        first = place == 0 or row.keys[place - 1][0] != name  # of its network
        axes = page.axes(layout.column(group, place), top, CELL, layout.height)
        if style.overlay:
            axes.imshow(_grey(picture), cmap="gray", vmin=0, vmax=1)
        drawn = axes.imshow(
            cells[key] / ((cells[key].max() if style.scale == "own" else largest) or 1),
            cmap=style.colours,
            vmin=0,
            vmax=1,
            alpha=_OPACITY if style.overlay else None,
        )
        if group == 0 and first and name in texts.names:
            _write_left(axes, texts.names[name], **(_ACROSS if layout.flat else {"labelpad": 2}))
        if group == 0 and first and name in texts.captions:
            axes.set_title(texts.captions[name][row.image], fontsize=SMALL, pad=2, parse_math=False)
        if style.compare_to not in (None, name):
            reference = maps[str(style.compare_to), exponent][group][row.image]
            alike = similarity(maps[key][group][row.image][None], reference[None]).item()
            axes.set_xlabel(f"{alike:.2f}", fontsize=SMALL, labelpad=1)
    return drawn


def _write_left(axes: Axes, text: str, **how: Any) -> None:
    axes.set_ylabel(text, **how, fontsize=NORMAL, parse_math=False)


def _grey(picture: Any) -> Any:
    return picture if picture.ndim == 2 else picture.mean(-1)


def _enlarged(attention: Tensor, size: Sequence[int]) -> Any:
    """A map (h, w) as an array of the image's size, scaled to a root mean square of 1 (zeros stay zeros).

    That is the l2 norm which the loss divides by, for any number of positions.
    """
    tiny = torch.finfo(attention.dtype).tiny
    attention = attention / attention.max().clamp_min(tiny)  # else the squares might overflow
    attention = attention / attention.square().mean().sqrt().clamp_min(tiny)
    return _resized(attention, size).numpy()


def _resized(attention: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(attention[None, None], tuple(size), mode="bilinear", align_corners=False)[0, 0]
