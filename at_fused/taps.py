"""Collecting intermediate features from any `nn.Module` by module name."""

from __future__ import annotations

import difflib
import warnings
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class FeatureTaps:
    """Records the outputs of named submodules during each forward pass.

    ```
    with FeatureTaps(model, ["layer3", "layer4"]) as taps:
        logits = model(images)
        loss = at_fused.attention_loss(taps.features, teacher_taps.features)
    ```

    Args:
        model: any module; the names are those of `model.named_modules()`. For a model under
            DistributedDataParallel or torch.compile, tap the original module it wraps.
        names: submodules to record, in the order in which `features` lists them.

    A module called several times in one forward pass keeps its last output. Nothing is copied: where a later
    module works in place on a recorded output (`nn.ReLU(inplace=True)`), reading it gives what that module
    left, and a UserWarning. Hooks live from construction until the `with` block ends, or until `close()`.
    They are those of this model alone: a copy of it (such as an average of its weights) is not tapped.

    Raises:
        ValueError: a name that is not a submodule (close matches are listed), or a repeated one.
        TypeError: a name that is not a string; (from the forward pass) a tapped module that does not return
            a tensor.
        RuntimeError: `features` read before every tapped module has run, or after the end.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence of module names, got the single string {names!r}")
        self.names = tuple(names)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self.names:
            if not isinstance(name, str):
                raise TypeError(f"names must be strings, got {name!r}")
            if name not in modules:
                raise ValueError(unknown_name(name, list(modules)))
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"module names are repeated: {list(self.names)}")
        self._outputs: dict[str, tuple[Tensor, int | None]] = {}  # and their versions when recorded
        self._warned: set[str] = set()
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(_Recorder(modules[name], name, self._outputs))
            for name in self.names
        ]

    @property
    def features(self) -> list[Tensor]:
        """The latest outputs, in the order of `names`."""
        missing = [name for name in self.names if name not in self._outputs]
        if missing:
            if not self._handles:
                raise RuntimeError("these taps are closed: read features before the end of the with block")
            raise RuntimeError(
                f"no forward pass has reached the tapped modules {missing} of this model (a copy has no "
                "taps; under torch.compile a model must be tapped before its first call)"
            )
        for name in self.names:
            output, recorded = self._outputs[name]
            versions = {recorded, _version(output)} - {None}  # what can't be told is no change
            if len(versions) > 1 and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"the output of {name!r} was modified in place after it was recorded (by a ReLU, say): "
                    "the feature holds the modified values; tap the later module, or make it out-of-place",
                    stacklevel=2,
                )
        return [self._outputs[name][0] for name in self.names]

    def clear(self) -> None:
        """Forgets the recorded features, so that they do not outlive the step."""
        self._outputs.clear()

    def close(self) -> None:
        """Removes the hooks and forgets the features."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __enter__(self) -> FeatureTaps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Recorder:
    """The hook on one tapped module. Copied or pickled with it, it becomes one that does nothing."""

    def __init__(self, module: nn.Module, name: str, outputs: dict[str, tuple[Tensor, int | None]]) -> None:
        self.module, self.name, self.outputs = weakref.ref(module), name, outputs

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self.module():  # a replica of DataParallel, say
            return
        if not isinstance(output, Tensor):
            raise TypeError(f"tapped module {self.name!r} returned {type(output).__name__}, not a tensor")
        self.outputs[self.name] = output, _version(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoRecorder, ()


class _NoRecorder:
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pass


def _version(output: Tensor) -> int | None:
    """The number of changes in place so far, where PyTorch counts them and the compiler can tell."""
    return None if torch.compiler.is_compiling() or output.is_inference() else output._version


def unknown_name(name: str, known: list[str]) -> str:
    """What to say of a `name` that is not among the `known` modules."""
    known = [candidate for candidate in known if candidate]
    if close := close_names(name, known):
        return f"no submodule named {name!r}; close names: {', '.join(close)}"
    few = [*known[:10], "…"] if len(known) > 10 else known
    return f"no submodule named {name!r}; its modules: {', '.join(few) or 'none'}"


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """Those of the `known` names that may be meant by `name`, the closest first."""
    return difflib.get_close_matches(name, list(dict.fromkeys(known)), n=4)
