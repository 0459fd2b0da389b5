"""Where a network has feature maps, and what they are: of convolutions, channels last or tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..taps import FeatureTaps


def last_of_each_size(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the modules that are the last to put out each spatial size, from input to output.

    These are the "last pre-downsampling" and the top activations of Figure 4. Passed over are
    normalisations (after a LayerNorm every position has nearly the same squared sum), and what a block works
    on in other sizes than those between its input and output, such as attention's matrices.
    """
    sizes: dict[str, int] = {}  # in the order of the modules' last calls

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            before, after = _positions(args[0], x) if args else 0, _positions(output, x)
            if not after:
                return
            if 0 < before < x[0, 0].numel() and not isinstance(module, nn.Sequential):
                kept = range(after, max(before, after + 1))
                for inner in [n for n in sizes if n.startswith(f"{name}.") and sizes[n] not in kept]:
                    del sizes[inner]
            if "Norm" not in type(module).__name__:
                sizes.pop(name, None)
                sizes[name] = after

        return record

    handles = [m.register_forward_hook(recorder(name)) for name, m in model.named_modules() if name]
    try:
        _run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    levels: list[str] = []
    for name, size in reversed(sizes.items()):
        if not levels or size > sizes[levels[-1]]:
            levels.append(name)
    if not levels:
        raise ValueError("this model puts out no spatial features: name modules with --taps")
    return levels[::-1]


def _positions(output: Any, x: Tensor) -> int:
    """Of a feature map of the images `x`, more than one; 0 for what is none."""
    if not _is_spatial(output) or len(output) != len(x):
        return 0
    positions = _channels_first(output)[0, 0].numel()
    return positions if positions > 1 else 0


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
    try:
        logits = model(x)
    except (RuntimeError, AssertionError, IndexError) as error:
        size = "×".join(map(str, x.shape[-2:]))
        raise ValueError(f"{type(model).__name__} cannot run on images of {size}: {error}") from None
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} does not classify images: it puts out no logits (B, classes)"
        )
    return logits


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
