"""Where a network has feature maps, and what they are: of convolutions, channels last or tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..taps import FeatureTaps
from ..taps.suggest import levels


def last_of_each_size(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the modules that are the last to put out each spatial size, from input to output.

    These are the "last pre-downsampling" and the top activations of Figure 4.
    """
    with _explained(model, x):
        return [f"{level.module}{level.item}" for level in levels(model, x)]


def forward(model: nn.Module, x: Tensor, taps: list[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, classes) and the features (B, C, h, w) of the tapped modules."""
    with FeatureTaps(model, taps) as recorded:
        logits = _run(model, x)
        pairs = zip(taps, recorded.features, strict=True)
        return logits, [feature_map(f"{name} puts out", feature) for name, feature in pairs]


def feature_map(what: str, output: Tensor) -> Tensor:
    """(B, C, h, w) of a module's output or of a gradient at it."""
    if not _is_spatial(output):
        raise ValueError(f"{what} {tuple(output.shape)}, which has no image's positions")
    return _channels_first(output)


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with _explained(model, x):
        logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} does not classify images: it puts out no logits (B, classes)"
        )
    return logits


@contextlib.contextmanager
def _explained(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Errors of a pass say which images the network was given."""
    try:
        yield
    except (RuntimeError, AssertionError, IndexError) as error:
        size = "×".join(map(str, x.shape[-2:]))
        raise ValueError(f"{type(model).__name__} cannot run on images of {size}: {error}") from None


def _is_spatial(output: Any) -> bool:
    """(B, C, h, w), (B, h, w, C) of a square grid, or tokens (B, N, C) that end with a square grid."""
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim not in (3, 4):
        return False
    if output.ndim == 3:
        return output.shape[1] >= 4
    return output.shape[2] == output.shape[3] or output.shape[1] == output.shape[2]


def _channels_first(output: Tensor) -> Tensor:
    """(B, C, h, w) of the above; of tokens those before the grid (class and register tokens) are left out."""
    if output.ndim == 3:
        side = int(output.shape[1] ** 0.5)
        return output[:, -side * side :].unflatten(1, (side, side)).movedim(-1, 1)
    return output if output.shape[2] == output.shape[3] else output.movedim(-1, 1)
