"""The picture: images, and beside or under them the attention maps of several networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention import attention_map
from .drawing import Key, Row, Style, draw
from .layout import Layout, Texts
from .page import figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("own", "group")

_BEYOND = 0.2  # outside 0..1, where a resized image may well go


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
    note: str = "",
) -> Figure:
    """The images, and for each group of features the attention maps of every network.

    With one exponent there is a row per image, and the networks stand side by side (Figures 2 and 6 of the
    paper). With several there is a row per image and network, the exponents side by side (Figure 4).

    ```
    s, t = FeatureTaps(student, names), FeatureTaps(teacher, names)
    with s, t, torch.no_grad():
        student(x), teacher(x)
        networks = {"student": s.features, "teacher": t.features}
        figure = attention_grid(images, networks, compare_to="teacher")
    figure.savefig("maps.png")
    ```

    Args:
        images: (B, 3, H, W) or (B, 1, H, W), uint8 or floating point in 0..1, to look at (not normalised).
        networks: name of each network -> its features (B, C, h, w), or ready maps (B, h, w), one per group.
            Ready maps are non-negative; tokens (B, N, C) get their grid by
            `feat[:, 1:].unflatten(1, (14, 14)).movedim(-1, 1)` (one class token, 14 × 14 patches). Gradients
            at the input or at a layer (`input_gradient`) may stand in for features.
        groups: a heading per group; by default "group 1", "group 2", ...
        labels: a text per image, shown left of it.
        captions: name of a network -> a text per image, such as its prediction, shown above its first map.
        compare_to: name of the network with which the others' maps are compared: the cosine similarity of
            the two maps is written below each (1 where the AT loss of section 3.1 is 0).
        p: exponent of the maps, or several exponents.
        mapping: "sum" or "max", as in `attention_map`.
        scale: "own" draws each map from 0 to its own maximum. "group" divides the maps by their l2 norm, as
            the loss does, and gives those of one image and group one scale: it shows whose are more focused.
        overlay: lay the maps over the image in grey.
        colours: name of a matplotlib colour map.
        note: a text below the grid, such as where the weights come from.

    Maps are enlarged to the image (bilinear). Their absolute size means nothing: the loss normalises it away.

    Returns:
        matplotlib Figure, bound to no window and no global state; save it with `figure.savefig(path)`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: images of another dtype, or a text that is not a string.
        ValueError: shapes or numbers of images, groups, labels or captions that do not fit together, images
            outside 0..1, ready maps with negative values, maps with NaN or infinity, no exponent, several
            exponents of ready maps, or an unknown option.
    """
    figure_class()  # fails before the work where there is no matplotlib
    pictures = _pictures(images)
    batch, height, width = pictures.shape[:3]
    exponents = tuple(p) if isinstance(p, Sequence) else (p,)
    if not exponents:
        raise ValueError("p must be an exponent or several, got none")
    several = len(exponents) > 1
    count = _group_count(networks)
    groups = [f"group {i + 1}" for i in range(count)] if groups is None else groups
    captions = captions or {}
    _check_texts(batch, list(networks), count, groups, labels, captions, compare_to)
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
    maps: dict[Key, list[Tensor]] = {
        (name, exponent): [
            _map(f"{name}, {group}", feature, batch, exponent, mapping, several)
            for group, feature in zip(groups, features, strict=True)
        ]
        for name, features in networks.items()
        for exponent in exponents
    }
    rows = _rows(batch, list(networks), exponents)
    texts = Texts(
        headings=[
            f"{heading} ({', '.join(_details(networks, index, exponents, mapping))})"
            for index, heading in enumerate(groups)
        ],
        titles=[f"p = {exponent:g}" for exponent in exponents] if several else list(networks),
        labels=labels or (),
        names={name: name for name in networks} if several else {},
        captions=captions,
        below="" if compare_to is None else f"cosine to {compare_to}",
        note=note,
    )
    layout = Layout(height / width, len(rows), texts)
    return draw(pictures, rows, maps, layout, Style(compare_to, scale, overlay, colours))


def _rows(batch: int, names: Sequence[str], exponents: Sequence[float]) -> list[Row]:
    """One for each image; with several exponents one for each image and network."""
    if len(exponents) == 1:
        return [Row(image, [(name, exponents[0]) for name in names], True) for image in range(batch)]
    return [
        Row(image, [(name, exponent) for exponent in exponents], shows_image=name == names[0])
        for image in range(batch)
        for name in names
    ]


def _details(
    networks: Mapping[str, Sequence[Tensor]], index: int, exponents: Sequence[float], mapping: str
) -> list[str]:
    """Sizes of the maps of a group, such as 8×8, and how they were made, where that is unusual."""
    features = [groups[index] for groups in networks.values()]
    details = list(dict.fromkeys("×".join(map(str, feature.shape[-2:])) for feature in features))
    if any(feature.ndim == 4 for feature in features):
        if len(exponents) == 1 and exponents[0] != 2:  # several stand above their maps
            details.append(f"p = {exponents[0]:g}")
        if mapping != "sum":
            details.append(mapping)
    return details


def _pictures(images: Tensor) -> Any:
    """(B, 1 or 3, H, W) as an array (B, H, W) or (B, H, W, 3) in 0..1."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be (B, 1 or 3, H, W) with B >= 1, got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        images = images / 255
    else:
        low, high = images.min().item(), images.max().item()
        if not -_BEYOND <= low <= high <= 1 + _BEYOND:
            raise ValueError(
                f"images must lie in 0..1, got {low:.3g} to {high:.3g}: divide levels up to 255 by 255, or "
                "undo the normalisation (images * std + mean)"
            )
        images = images.float().clamp(0, 1)
    return images.permute(0, 2, 3, 1).squeeze(-1).numpy()


def _map(what: str, feature: Tensor, batch: int, p: float, mapping: str, several: bool) -> Tensor:
    """The maps (B, h, w) in fp32 on the CPU."""
    if feature.ndim not in (3, 4) or len(feature) != batch or 0 in feature.shape:
        raise ValueError(
            f"{what}: expected features (B, C, h, w) or maps (B, h, w) of {batch} images, "
            f"got {tuple(feature.shape)}"
        )
    feature = feature.detach()
    ready = feature.ndim == 3
    if ready and (feature < 0).any():
        raise ValueError(
            f"{what}: ready maps are non-negative, got {tuple(feature.shape)} with a minimum of "
            f"{feature.min().item():.3g}; tokens (B, N, C) get their grid by "
            "feat[:, 1:].unflatten(1, (14, 14)).movedim(-1, 1)"
        )
    if ready and several:
        raise ValueError(f"{what}: several p need features, got maps {tuple(feature.shape)}")
    attention = (feature if ready else attention_map(feature, p, mapping=mapping)).float().cpu()
    if not attention.isfinite().all():
        why = "weights that diverged" + ("" if ready else f", or p = {p:g} overflows")
        raise ValueError(f"{what}: the map holds NaN or infinity ({why})")
    return attention


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
    _check_strings("groups", groups)
    _check_strings("the names of networks", names)
    if labels is not None:
        _check_strings("labels", labels)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} group headings for {count} groups")
    if labels is not None and len(labels) != batch:
        raise ValueError(f"{len(labels)} labels for {batch} images")
    if compare_to is not None and compare_to not in names:
        raise ValueError(f"compare_to {compare_to!r} is not one of the networks {names}")
    for name, texts in captions.items():
        if name not in names:
            raise ValueError(f"captions of {name!r}, which is not one of the networks {names}")
        _check_strings(f"captions of {name}", texts)
        if len(texts) != batch:
            raise ValueError(f"{len(texts)} captions of {name} for {batch} images")


def _check_strings(what: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise TypeError(f"{what} must be several strings, got the single string {texts!r}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{what} must be strings, got {type(text).__name__}")
