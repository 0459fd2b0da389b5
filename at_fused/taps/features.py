"""Collecting intermediate features from any `nn.Module` by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._hooks import ModelTaps, is_complete
from .._selectors import Selector
from .._tapping import Tapping


class FeatureTaps(Tapping):
    """Records named features of a model during each forward pass.

    ```
    with FeatureTaps(model, ["layer3", "layer4"]) as taps:
        logits = model(images)
        loss = at_fused.attention_loss(taps.features, teacher_taps.features)
    ```

    Args:
        model: any module; the names are those of `model.named_modules()`. For a model under
            DistributedDataParallel or torch.compile, tap the original module it wraps.
        names: features to record, in the order in which `features` lists them. A module's name stands for
            its output; what is within a tuple, list, dict or dataclass is selected by indices
            ("fpn['0']", "block[0]"), a part of a tensor by slices ("blocks.11[:, 1:]"), and what the module
            receives by ":input" ("block:input", its first argument; "block:input[1]", "block:input['x']").
            Behind all of this, ":grid" (a square) or ":grid(7, 10)" makes (B, 7, 10, C) of tokens (B, 70, C).

    `features` holds those of the model's latest forward pass, never of an earlier one. A module called
    several times in one pass keeps its last output. Nothing is copied: where a later module works in place on
    a recorded output (`nn.ReLU(inplace=True)`), reading it gives what that module left, and a UserWarning.
    Hooks live from construction until the `with` block ends, or until `close()`. They are those of this model
    alone: a copy of it (such as an average of its weights) is not tapped. Taps that are copied together with
    their model tap the copy.

    Raises:
        ValueError: a name that is not a submodule (close matches are listed), or a repeated one.
        TypeError: a name that is not a string; (from the forward pass) a name that does not lead to a
            tensor.
        RuntimeError: `features` read before the latest pass has reached every tapped module, after the end,
            where a tapped module was replaced, or where a feature was made without the gradient that its pass
            needs (reentrant checkpointing, a `no_grad` within the model).
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._take = _Take()
        self._taps = ModelTaps(model, names, self._take)
        self.names = self._taps.names
        self._warned: set[tuple[str, str]] = set()

    @property
    def features(self) -> list[Tensor]:
        """The features of the latest pass, in the order of `names`."""
        taps = self._taps
        if taps.closed:
            raise RuntimeError("these taps are closed: read features before the end of the with block")
        if problem := taps.missing():
            raise RuntimeError(problem)
        if not torch.compiler.is_compiling():
            for name in self.names:
                self._check(taps, name)
        return [taps.pass_.records[name].value.feature for name in self.names]

    def _check(self, taps: ModelTaps, name: str) -> None:
        taken: _Feature = taps.pass_.records[name].value
        lost = taken.feature.is_floating_point() and not taken.feature.requires_grad
        if lost and (problem := taps.lost_gradient(name)):
            raise RuntimeError(problem)
        modified = taken.modified()
        self._take.compared.add(name)
        if modified:
            self._warn(
                name,
                f"the output of {name!r} was modified in place after it was recorded (by a ReLU, say): "
                "the feature holds the modified values; tap the later module, or make it out-of-place",
            )
        if problem := taps.hooked_later(name):
            self._warn(name, problem)

    def _warn(self, name: str, text: str) -> None:
        if (name, text) not in self._warned:
            self._warned.add((name, text))
            warnings.warn(text, stacklevel=4)

    @property
    def _models(self) -> tuple[ModelTaps, ...]:
        return (self._taps,)

    def __repr__(self) -> str:
        state = "closed" if self._taps.closed else type(self._taps.model()).__name__
        return f"FeatureTaps({state}, {list(self.names)})"

    def __reduce__(self) -> Any:
        """A copy, or a pickle, taps the copy of the model that comes with it."""
        return _copied, (None if self._taps.closed else self._taps.model(), self.names)


def _copied(model: nn.Module | None, names: tuple[str, ...]) -> FeatureTaps:
    return FeatureTaps(model if is_complete(model) else None, names)  # type: ignore[arg-type]


class _Feature(NamedTuple):
    """A feature, and how to find out whether it was modified afterwards."""

    feature: Tensor
    version: int | None
    sample: Tensor | None

    def modified(self) -> bool:
        versions = {self.version, _version(self.feature)} - {None}  # what is unknown is no change
        if self.sample is not None:
            return not torch.allclose(self.sample, self.feature[:1], rtol=0, atol=0, equal_nan=True)
        return len(versions) > 1


class _Take:
    """Records a feature as it is."""

    def __init__(self) -> None:
        self.compared: set[str] = set()  # names, once is enough: looking at the values waits for the device

    def __call__(self, feature: Tensor, selector: Selector, value: Any) -> tuple[_Feature, None]:
        sample = None
        uncounted = not torch.compiler.is_compiling() and feature.is_inference()  # no changes are counted
        if uncounted and feature.ndim and selector.name not in self.compared:
            sample = feature[:1].clone()
        return _Feature(feature, _version(feature), sample), None


def _version(output: Tensor) -> int | None:
    """The number of changes in place so far, where PyTorch counts them and the compiler can tell."""
    return None if torch.compiler.is_compiling() or output.is_inference() else output._version
