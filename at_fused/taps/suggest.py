"""Which modules end each resolution of a network."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .grid import Grid, find_grid


class Level(NamedTuple):
    """The last feature of a resolution: the module that returns it, where in its output, and its layout."""

    module: str
    item: str  # such as "[0]" or "['last_hidden_state']" where the module returns no tensor; else ""
    shape: torch.Size
    grid: Grid

    @property
    def name(self) -> str:
        """As `FeatureTaps` takes it; without the tokens before those of the image."""
        return f"{self.module}{self.item}" + (f"[:, {self.grid.before}:]" if self.grid.before else "")


def suggest_taps(model: nn.Module, images: Tensor) -> dict[str, torch.Size]:
    """The last module of each resolution of `model`, from input to output, with the shape of its feature.

    Compare these unless you have a reason for others: the paper takes the last layer of each group (section
    3.1). The keys are names that `FeatureTaps` and `AttentionTransfer` take. Where a module returns several
    tensors, a name selects one ("encoder[0]"); of tokens it selects the image's ("blocks.11[:, 1:]").

    ```
    taps = list(at_fused.suggest_taps(model, torch.randn(1, 3, 224, 224)))
    t_taps = ["layer3", "layer4"]
    transfer = at_fused.AttentionTransfer(model, teacher, taps[-2:], t_taps)
    ```

    Args:
        model: any module that takes `images`. It runs once, in eval mode, without gradients; its state stays.
        images: (B, channels, H, W), as the model takes them.

    Returns:
        name -> shape of the feature: (B, C, h, w), or with the channels last (`channel_dim=-1`) (B, h, w, C)
            or, for tokens, (B, N, C).

    Raises:
        ValueError: no output of a module has the images' positions.
    """
    return {level.name: level.shape for level in levels(model, images)}


@torch.no_grad()
def levels(model: nn.Module, images: Tensor) -> list[Level]:
    """The last feature of each resolution, from input to output.

    Normalisations are passed over: after a LayerNorm every position has nearly the same squared sum. So is
    what a block works on in sizes other than those between its input and output, as attention's matrices.
    """
    found = _Found(images)
    handles = [
        module.register_forward_hook(found.recorder(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        with _evaluating(model), torch.inference_mode(False):  # whose tensors count their changes
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    top: list[Level] = []
    for level in reversed(found.levels.values()):
        if not top or level.grid.positions > top[-1].grid.positions:
            top.append(level)
    if not top:
        raise ValueError("this model puts out no spatial features of the images: name its modules")
    return top[::-1]


class _Found:
    """The features of a pass, by module, in the order of the modules' last calls."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.levels: dict[str, Level] = {}
        self._made: dict[str, tuple[weakref.ref[Tensor], int]] = {}  # with its number of changes in place
        self._normalised: list[weakref.ref[Tensor]] = []

    def recorder(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._record(name, module, [*args, *kwargs.values()], output)

        return record

    def _record(self, name: str, module: nn.Module, inputs: list[Any], output: Any) -> None:
        kind = type(module).__name__
        index, feature, grid = self._feature(output)
        if feature is None or grid is None:
            return
        before = self._grid(inputs[0]) if inputs else None
        inside = before is not None and 1 < before.positions < self.images[0, 0].numel()
        if before is not None and inside and not _is_container(module):
            self._drop_within(name, range(grid.positions, max(before.positions, grid.positions + 1)))
        if grid.positions == 1:
            return
        passed_on = next(module.parameters(), None) is None and any(map(self._is_normalised, inputs))
        if passed_on or kind.endswith(("LayerNorm", "RMSNorm", "LayerNorm2d")):
            self._normalised.append(weakref.ref(feature))
        made = [
            n for n, (ref, version) in self._made.items() if ref() is feature and version == feature._version
        ]
        inner = index and any(n.startswith(f"{name}.") for n in made)
        unchanged = made and any(value is feature for value in inputs)  # by a dropout, say
        if "Norm" in kind or inner or unchanged or self._is_normalised(feature):
            return
        self.levels.pop(name, None)
        shape = feature.shape if not grid.before else feature[:, grid.before :].shape
        self.levels[name] = Level(name, index, shape, grid)
        self._made[name] = weakref.ref(feature), feature._version

    def _is_normalised(self, value: Any) -> bool:
        return any(made() is value for made in self._normalised)

    def _drop_within(self, name: str, kept: range) -> None:
        for inner in [n for n in self.levels if n.startswith(f"{name}.")]:
            if self.levels[inner].grid.positions not in kept:
                del self.levels[inner]

    def _feature(self, output: Any) -> tuple[str, Tensor | None, Grid | None]:
        """The first feature in what a module returns, and where it is."""
        items: Any = [("", output)]
        if isinstance(output, Mapping):  # also what Hugging Face's models return
            items = [(f"[{key!r}]", value) for key, value in output.items()]
        elif dataclasses.is_dataclass(output) and not isinstance(output, type):
            items = [(f"[{f.name!r}]", getattr(output, f.name)) for f in dataclasses.fields(output)]
        elif isinstance(output, (tuple, list)):
            items = [(f"[{index}]", value) for index, value in enumerate(output)]
        for index, value in items:
            if grid := self._grid(value):
                return index, value, grid
        return "", None, None

    def _grid(self, value: Any) -> Grid | None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        return find_grid(value.shape, self.images.shape)


def _is_container(module: nn.Module) -> bool:
    """Whether it runs stages or blocks one after the other, each of which may be tapped."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for found in lists for block in found]
    return isinstance(module, nn.Sequential) or bool(blocks and all(any(b.children()) for b in blocks))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def pair_up(students: list[Level], teachers: list[Level]) -> dict[str, str]:
    """The student's names: the teacher's, of the levels that both have at the same number of positions.

    Where they share none, the last of each.
    """
    at = {level.grid.positions: level.name for level in teachers}
    shared = {s.name: at[s.grid.positions] for s in students if s.grid.positions in at}
    return shared or {students[-1].name: teachers[-1].name}


def written(pairs: dict[str, str]) -> str:
    """Pairs as a recipe's or the command line's `taps` takes them."""
    return f"{{{', '.join(f'{_quoted(s)}: {_quoted(t)}' for s, t in pairs.items())}}}"


def _quoted(name: str) -> str:
    """As YAML takes it between braces."""
    return name if re.fullmatch(r"[\w.]*[A-Za-z_][\w.]*", name) else f'"{name}"'
