"""Pictures of attention maps, as Figures 2, 4 and 6 of the paper show them. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL, _GAP, _LEFT, _TOP = 1.0, 0.16, 0.95, 0.62  # inches: a picture, the space between groups, the margins


def attention_grid(
    images: Tensor,
    networks: Mapping[str, Sequence[Tensor]],
    *,
    groups: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    compare_to: str | None = None,
    p: float = 2,
    mapping: str = "sum",
    colours: str = "viridis",
) -> Figure:
    """A row per image: the image, then for each group the attention map of every network, side by side.

    ```
    with FeatureTaps(student, names) as s, FeatureTaps(teacher, names) as t, torch.no_grad():
        student(x), teacher(x)
        figure = attention_grid(images, {"student": s.features, "teacher": t.features}, compare_to="teacher")
    figure.savefig("maps.png")
    ```

    Maps are enlarged to the image (bilinear) and drawn from 0 to their own maximum: their absolute scale
    means nothing, the loss normalises it away.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W), uint8 or floating point in 0..1, to look at (not normalised).
        networks: name of each network -> its features (B, C, h, w), or ready maps (B, h, w), one per group.
        groups: a heading per group; by default "group 1", "group 2", ...
        labels: a text per image, shown left of it.
        compare_to: name of the network with which the others' maps are compared: the cosine similarity of
            the two maps is written below each (1 where the AT loss of section 3.1 is 0).
        p: exponent of the maps.
        mapping: "sum" or "max", as in `attention_map`.
        colours: name of a matplotlib colour map.

    Returns:
        matplotlib Figure, bound to no window and no global state; save it with `figure.savefig(path)`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: shapes or numbers of images, groups or labels that do not fit together.
    """
    figure_class, gridspec_class = _matplotlib()
    pictures = _pictures(images)
    maps = {name: _maps(name, features, len(images), p, mapping) for name, features in networks.items()}
    count = _group_count(maps)
    groups = [f"group {i + 1}" for i in range(count)] if groups is None else list(groups)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} group headings for {count} groups")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    if compare_to is not None and compare_to not in maps:
        raise ValueError(f"compare_to {compare_to!r} is not one of the networks {list(maps)}")

    # Columns: the image, then per group a gap and the networks' maps; a gap and the colour scale.
    widths = [1.0, *([_GAP / _CELL] + [1.0] * len(maps)) * count, _GAP / _CELL, 0.12]
    row_height = _CELL * (1.0 if compare_to is None else 1.22) * pictures.shape[1] / pictures.shape[2]
    right, bottom = 0.55, 0.12 if compare_to is None else 0.25
    width, height = sum(widths) * _CELL + _LEFT + right, len(images) * row_height + _TOP + bottom
    figure = figure_class(figsize=(width, height), dpi=150)
    grid = gridspec_class(
        len(images), len(widths), figure,
        width_ratios=widths, wspace=0.06, hspace=0.25 if compare_to else 0.06,
        left=_LEFT / width, right=1 - right / width, top=1 - _TOP / height, bottom=bottom / height,
    )  # fmt: skip

    drawn: Any = None
    for row, picture in enumerate(pictures):
        axes = _blank(figure.add_subplot(grid[row, 0]))
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        if labels is not None:
            axes.set_ylabel(labels[row], rotation=0, ha="right", va="center", fontsize=8)
        if row == 0:
            axes.set_title("image", fontsize=8)
        for group, heading in enumerate(groups):
            for column, (name, networks_maps) in enumerate(maps.items()):
                attention = networks_maps[group][row]
                axes = _blank(figure.add_subplot(grid[row, 2 + group * (len(maps) + 1) + column]))
                drawn = axes.imshow(_enlarge(attention, pictures.shape[1:3]), cmap=colours, vmin=0, vmax=1)
                if row == 0:
                    axes.set_title(name, fontsize=8)
                if compare_to not in (None, name):
                    similarity = _similarity(attention, maps[str(compare_to)][group][row])
                    axes.set_xlabel(f"{similarity:.2f}", fontsize=7, labelpad=2)
                if row == 0 and column == 0:
                    centre = _LEFT + _CELL * (sum(widths[: 2 + group * (len(maps) + 1)]) + len(maps) / 2)
                    size = "×".join(str(n) for n in attention.shape)
                    figure.text(
                        centre / width, 1 - 0.16 / height, f"{heading} ({size})", ha="center", va="center"
                    )
    scale = figure.colorbar(drawn, cax=figure.add_subplot(grid[:, -1]), ticks=[0, 1])
    scale.ax.set_yticklabels(["0", "max"], fontsize=8)
    return figure


def _matplotlib() -> tuple[type[Figure], Any]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.gridspec import GridSpec
    except ImportError as error:
        raise ImportError("at_fused.visualize draws with matplotlib: pip install matplotlib") from error
    return Figure, GridSpec


def _pictures(images: Tensor) -> Any:
    """(B, 1 or 3, H, W) as an array (B, H, W) or (B, H, W, 3) in 0..1."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be (B, 1 or 3, H, W) with B >= 1, got {tuple(images.shape)}")
    images = images.detach().cpu()
    images = images / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    return images.permute(0, 2, 3, 1).squeeze(-1).numpy()


def _maps(name: str, features: Sequence[Tensor], batch: int, p: float, mapping: str) -> list[Tensor]:
    """Per group the maps (B, h, w) in fp32 on the CPU."""
    maps = []
    for index, feature in enumerate(features):
        if feature.ndim not in (3, 4) or len(feature) != batch or 0 in feature.shape:
            raise ValueError(
                f"{name}, group {index}: expected features (B, C, h, w) or maps (B, h, w) of {batch} images, "
                f"got {tuple(feature.shape)}"
            )
        feature = feature.detach()
        attention = attention_map(feature, p, mapping=mapping) if feature.ndim == 4 else feature
        maps.append(attention.float().cpu())
    return maps


def _group_count(maps: Mapping[str, Sequence[Tensor]]) -> int:
    counts = {name: len(groups) for name, groups in maps.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"every network needs the same number of groups, at least one, got {counts}")
    return next(iter(counts.values()))


def _enlarge(attention: Tensor, size: Sequence[int]) -> Any:
    """A map (h, w) as an array of the image's size with maximum 1 (a map of zeros stays zero)."""
    large = F.interpolate(attention[None, None], tuple(size), mode="bilinear", align_corners=False)[0, 0]
    return (large / large.max().clamp_min(torch.finfo(large.dtype).tiny)).numpy()


def _similarity(attention: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between two maps, the reference resized to the other's grid as the loss does it."""
    if attention.shape != reference.shape:
        size = tuple(attention.shape)
        reference = F.interpolate(reference[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    return F.cosine_similarity(attention.flatten(), reference.flatten(), dim=0).item()


def _blank(axes: Axes) -> Axes:
    """No ticks and no frame, but (unlike `axis("off")`) still labels."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes
