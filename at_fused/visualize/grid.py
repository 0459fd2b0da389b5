"""The picture: images, and beside or under them the attention maps of several networks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALES = ("own", "group")

# Inches: the width of a picture, the gaps within and between groups, a line of text, the margins.
_CELL, _GAP, _GROUP_GAP, _LINE = 1.2, 0.07, 0.2, 0.14
_LEFT, _RIGHT, _EDGE = 1.0, 0.85, 0.1
_SMALL, _NORMAL = 7, 8.5  # points
_CHARACTER = 0.08  # inches, the average of _NORMAL
_OPACITY = 0.6  # of a map over its image


def attention_grid(
    images: Tensor,
    networks: Mapping[str, Sequence[Tensor]],
    *,
    groups: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    compare_to: str | None = None,
    p: float | Sequence[float] = 2,
    mapping: str = "sum",
    scale: str = "own",
    overlay: bool = False,
    colours: str = "viridis",
) -> Figure:
    """The images, and for each group of features the attention maps of every network.

    With one exponent there is a row per image, and the networks stand side by side (Figures 2 and 6 of the
    paper). With several there is a row per image and network, the exponents side by side (Figure 4).

    ```
    with FeatureTaps(student, names) as s, FeatureTaps(teacher, names) as t, torch.no_grad():
        student(x), teacher(x)
        figure = attention_grid(images, {"student": s.features, "teacher": t.features}, compare_to="teacher")
    figure.savefig("maps.png")
    ```

    Args:
        images: (B, 3, H, W) or (B, 1, H, W), uint8 or floating point in 0..1, to look at (not normalised).
        networks: name of each network -> its features (B, C, h, w), or ready maps (B, h, w), one per group.
            Gradients at the input or at a layer (`input_gradient`) may stand in for features.
        groups: a heading per group; by default "group 1", "group 2", ...
        labels: a text per image, shown left of it.
        captions: name of a network -> a text per image, such as its prediction, shown above its first map.
        compare_to: name of the network with which the others' maps are compared: the cosine similarity of
            the two maps is written below each (1 where the AT loss of section 3.1 is 0).
        p: exponent of the maps, or several.
        mapping: "sum" or "max", as in `attention_map`.
        scale: "own" draws each map from 0 to its own maximum. "group" divides the maps by their l2 norm, as
            the loss does, and gives those of one image and group one scale: it shows whose are more focused.
        overlay: lay the maps over the image in grey.
        colours: name of a matplotlib colour map.

    Maps are enlarged to the image (bilinear). Their absolute size means nothing: the loss normalises it away.

    Returns:
        matplotlib Figure, bound to no window and no global state; save it with `figure.savefig(path)`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: images of another dtype.
        ValueError: shapes or numbers of images, groups, labels or captions that do not fit together, no
            exponent, several exponents of ready maps, or an unknown option.
    """
    figure_class = _figure_class()
    pictures = _pictures(images)
    size = pictures.shape[1:3]
    exponents = tuple(p) if isinstance(p, Sequence) else (p,)
    if not exponents:
        raise ValueError("p must be an exponent or several, got none")
    maps = {
        (name, exponent): _maps(name, features, len(images), exponent, mapping, len(exponents) > 1)
        for name, features in networks.items()
        for exponent in exponents
    }
    count = _group_count(networks)
    groups = [f"group {i + 1}" for i in range(count)] if groups is None else list(groups)
    captions = captions or {}
    _check_texts(len(images), list(networks), count, groups, labels, captions, compare_to)
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")

    columns: list[Any]
    if len(exponents) > 1:  # a row per image and network
        rows: list[tuple[int, str | None]] = [(i, name) for i in range(len(images)) for name in networks]
        columns, titles = list(exponents), [f"p = {exponent:g}" for exponent in exponents]
    else:
        rows = [(i, None) for i in range(len(images))]
        columns, titles = list(networks), list(networks)

    captions = {name: [_wrapped(text, _CELL) for text in texts] for name, texts in captions.items()}
    above = _lines(text for texts in captions.values() for text in texts)
    height = _CELL * size[0] / size[1]
    pitch = above + height + (_LINE if compare_to else 0) + _GAP
    group_width = len(columns) * (_CELL + _GAP) - _GAP + _GROUP_GAP
    names = {name: _wrapped(name, height) for name in networks} if len(exponents) > 1 else {}
    lefts = [_LEFT + _CELL + _GROUP_GAP + _lines(names.values()) + i * group_width for i in range(count)]
    headings = [
        _wrapped(f"{heading} ({', '.join(_sizes(maps, index))})", group_width)
        for index, heading in enumerate(groups)
    ]
    titles = [_wrapped(title, _CELL) for title in titles]
    base = _EDGE + _lines(headings) * 1.1
    top = base + _lines(titles) + 0.2 * _LINE
    page = _Page(figure_class, lefts[-1] + group_width - _GROUP_GAP + _RIGHT, top + len(rows) * pitch + _EDGE)

    page.text(_LEFT + _CELL / 2, top, "image", _NORMAL)
    for left, heading in zip(lefts, headings, strict=True):
        page.text(left + (group_width - _GROUP_GAP) / 2, base, heading, _NORMAL + 1)
        for place, title in enumerate(titles):
            page.text(left + place * (_CELL + _GAP) + _CELL / 2, top, title, _NORMAL)

    drawn: Any = None
    for number, (image, only) in enumerate(rows):
        y = top + number * pitch + above
        if only is None or only == next(iter(networks)):
            axes = page.axes(_LEFT, y, _CELL, height)
            axes.imshow(pictures[image], cmap="gray", vmin=0, vmax=1)
            if labels is not None:
                label = _wrapped(labels[image], _LEFT)
                axes.set_ylabel(
                    label, rotation=0, ha="right", va="center", fontsize=_NORMAL, parse_math=False
                )
        for index, left in enumerate(lefts):
            cells = {key: _enlarged(levels[index][image], size) for key, levels in maps.items()}
            largest = max(cell.max() for cell in cells.values())
            for place, column in enumerate(columns):
                name, exponent = (column, exponents[0]) if only is None else (only, column)
                cell = cells[name, exponent]
                axes = page.axes(left + place * (_CELL + _GAP), y, _CELL, height)
                if overlay:
                    axes.imshow(_grey(pictures[image]), cmap="gray", vmin=0, vmax=1)
                drawn = axes.imshow(
                    cell / ((cell.max() if scale == "own" else largest) or 1),
                    cmap=colours,
                    vmin=0,
                    vmax=1,
                    alpha=_OPACITY if overlay else None,
                )
                if place == 0 and index == 0 and only is not None:
                    axes.set_ylabel(names[only], fontsize=_NORMAL, labelpad=2, parse_math=False)
                if name in captions and index == 0 and (place == 0 or only is None):
                    axes.set_title(captions[name][image], fontsize=_SMALL, pad=2, parse_math=False)
                if compare_to not in (None, name):
                    similarity = _similarity(
                        maps[name, exponent][index][image], maps[str(compare_to), exponent][index][image]
                    )
                    axes.set_xlabel(f"{similarity:.2f}", fontsize=_SMALL, labelpad=1)

    bar_height = min((len(rows) - 1) * pitch + height, 3.0)
    bar_axes = page.axes(page.width - _RIGHT + 0.15, top + above, 0.1, bar_height)
    bar = page.figure.colorbar(drawn, cax=bar_axes, ticks=[0, 1])
    bar.ax.set_yticklabels(["0", "max" if scale == "own" else "max of\ngroup"], fontsize=_NORMAL)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    return page.figure


class _Page:
    """A figure on which things are placed in inches from the top left corner."""

    def __init__(self, figure_class: type[Figure], width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = figure_class(figsize=(width, height), dpi=150)

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

    def text(self, middle: float, bottom: float, text: str, points: float) -> None:
        x, y = middle / self.width, 1 - (bottom - 0.2 * _LINE) / self.height
        self.figure.text(x, y, text, ha="center", va="bottom", fontsize=points, parse_math=False)


def _wrapped(text: str, inches: float) -> str:
    """`text` in lines of at most so many inches."""
    return "\n".join(textwrap.fill(line, max(int(inches / _CHARACTER), 1)) for line in text.split("\n"))


def _lines(texts: Iterable[str]) -> float:
    """Inches that the longest of `texts` needs."""
    return _LINE * max((text.count("\n") + 1 for text in texts), default=0)


def _sizes(maps: Mapping[Any, Sequence[Tensor]], index: int) -> list[str]:
    """Different sizes of the maps of a group, such as 8×8."""
    return list(dict.fromkeys("×".join(map(str, levels[index].shape[1:])) for levels in maps.values()))


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("at_fused.visualize draws with matplotlib: pip install matplotlib") from error
    return Figure


def _pictures(images: Tensor) -> Any:
    """(B, 1 or 3, H, W) as an array (B, H, W) or (B, H, W, 3) in 0..1."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be (B, 1 or 3, H, W) with B >= 1, got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    images = images.detach().cpu()
    images = images / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    return images.permute(0, 2, 3, 1).squeeze(-1).numpy()


def _grey(picture: Any) -> Any:
    return picture if picture.ndim == 2 else picture.mean(-1)


def _maps(
    name: str, features: Sequence[Tensor], batch: int, p: float, mapping: str, several: bool
) -> list[Tensor]:
    """Per group the maps (B, h, w) in fp32 on the CPU."""
    maps = []
    for index, feature in enumerate(features):
        if feature.ndim not in (3, 4) or len(feature) != batch or 0 in feature.shape:
            raise ValueError(
                f"{name}, group {index}: expected features (B, C, h, w) or maps (B, h, w) of {batch} images, "
                f"got {tuple(feature.shape)}"
            )
        if feature.ndim == 3 and several:
            raise ValueError(
                f"{name}, group {index}: several p need features, got maps {tuple(feature.shape)}"
            )
        feature = feature.detach()
        attention = attention_map(feature, p, mapping=mapping) if feature.ndim == 4 else feature
        maps.append(attention.float().cpu())
    return maps


def _group_count(networks: Mapping[str, Sequence[Tensor]]) -> int:
    counts = {name: len(groups) for name, groups in networks.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"every network needs the same number of groups, at least one, got {counts}")
    return next(iter(counts.values()))


def _check_texts(
    batch: int,
    names: list[str],
    count: int,
    groups: Sequence[str],
    labels: Sequence[str] | None,
    captions: Mapping[str, Sequence[str]],
    compare_to: str | None,
) -> None:
    if len(groups) != count:
        raise ValueError(f"{len(groups)} group headings for {count} groups")
    if labels is not None and len(labels) != batch:
        raise ValueError(f"{len(labels)} labels for {batch} images")
    if compare_to is not None and compare_to not in names:
        raise ValueError(f"compare_to {compare_to!r} is not one of the networks {names}")
    for name, texts in captions.items():
        if name not in names:
            raise ValueError(f"captions of {name!r}, which is not one of the networks {names}")
        if len(texts) != batch:
            raise ValueError(f"{len(texts)} captions of {name} for {batch} images")


def _enlarged(attention: Tensor, size: Sequence[int]) -> Any:
    """A map (h, w) as an array of the image's size, scaled to a root mean square of 1 (zeros stay zeros).

    That is the l2 norm which the loss divides by, for any number of positions.
    """
    tiny = torch.finfo(attention.dtype).tiny
    attention = attention / attention.max().clamp_min(tiny)  # else the squares might overflow
    attention = attention / attention.square().mean().sqrt().clamp_min(tiny)
    return _resized(attention, size).numpy()


def _similarity(attention: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between two maps, the reference resized to the other's grid as the loss does it."""
    if attention.shape != reference.shape:
        reference = _resized(reference, attention.shape)
    tiny = torch.finfo(torch.float64).tiny  # maps of gradients are small: the default of 1e-8 is not
    return F.cosine_similarity(
        attention.double().flatten(), reference.double().flatten(), dim=0, eps=tiny
    ).item()


def _resized(attention: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(attention[None, None], tuple(size), mode="bilinear", align_corners=False)[0, 0]
