"""The hooks behind `FeatureTaps` and `AttentionTransfer`: what a model made in its latest forward pass.

A pass begins with the model's own call and forgets the one before, so that a module which a pass skips, or
does not reach, leaves nothing behind. Where only parts of a model are called (`checkpoint_sequential`,
`forward_features`), a tapped module that is called again begins a pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import backends
from ._selectors import Selector, parse, replaced, select
from ._tracing import constant, guard_on_hooks

# From a feature: what is recorded of it, and what the model goes on with (None: the feature itself).
Take = Callable[[Tensor, Selector, Any], tuple[Any, Tensor | None]]


class Record(NamedTuple):
    """One feature of a pass."""

    value: Any  # what was taken
    feature_grad: bool  # whether the feature required a gradient when it was made
    graded: bool  # whether gradients were recorded then
    in_function: bool  # whether it was made within an autograd.Function, as by reentrant checkpointing
    input_grad: bool  # whether what the module received required a gradient


class Pass:
    """What was recorded since the latest pass began."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.running = False  # between the beginning and the end of the model's own call
        self.trains = False  # the model's output required a gradient
        self.paused = False  # what runs now is no pass
        # Whether a tapped module that is called from outside of the model's own call leaves no record.
        self.own_calls_only = False


class ModelTaps:
    """Hooks on named features of `model`; `take` says what to record of each.

    Hooks live until `close()`, keep the model out of reach of no garbage collector, and belong to this model
    alone: in a copy of it they do nothing.

    Raises:
        ValueError, TypeError: names that are unknown, repeated or no strings.
    """

    def __init__(self, model: nn.Module | None, names: Iterable[str], take: Take) -> None:
        self.pass_ = Pass()
        self._handles: list[RemovableHandle] = []
        if model is None:  # a copy of taps whose model did not come with them: closed
            self.names, self.selectors, self.hooked = tuple(names), [], {}
            return
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence of module names, got the single string {names!r}")
        modules = dict(model.named_modules(remove_duplicate=False))
        self.selectors = [parse(name, modules) for name in names]
        self.names = tuple(selector.name for selector in self.selectors)
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"module names are repeated: {list(self.names)}")
        guard_on_hooks()
        self.model = weakref.ref(model)
        self.hooked = {s.name: weakref.ref(modules[s.module]) for s in self.selectors}
        self._handles.append(model.register_forward_pre_hook(_Begin(model, self.pass_), prepend=True))
        for selector in self.selectors:
            module = modules[selector.module]
            _tapped.add(module)
            if selector.of_input:
                input_hook = _InputTap(module, selector, self.pass_, take)
                self._handles.append(module.register_forward_pre_hook(input_hook, with_kwargs=True))
            else:
                output_hook = _OutputTap(module, selector, self.pass_, take)
                self._handles.append(module.register_forward_hook(output_hook))
        # Also where the forward pass raises: what calls parts of the model then is no part of that pass.
        self._handles.append(model.register_forward_hook(_End(model, self.pass_), always_call=True))

    @property
    def closed(self) -> bool:
        return not self._handles

    def clear(self) -> None:
        self.pass_.records.clear()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def missing(self) -> str | None:
        """Why the latest pass has not recorded every feature, in a sentence; None if it has."""
        absent = [name for name in self.names if name not in self.pass_.records]
        if not torch.compiler.is_compiling() and (swapped := self._swapped()):
            return (
                f"the tapped modules {swapped} are no longer part of this model (replaced, as by "
                "convert_sync_batchnorm or quantization, or wrapped, as by torch.compile(module) or "
                "checkpoint_wrapper): tap the model after it has been changed"
            )
        if not absent:
            return None
        return (
            f"this model's latest forward pass has not reached the tapped modules {absent}: there was no "
            "pass, it skipped or did not get to them, its features have been used, or the pass was one of "
            "a copy, which has no taps"
        )

    def _swapped(self) -> list[str]:
        model = self.model()
        if model is None:
            return []
        return [s.name for s in self.selectors if _submodule(model, s.module) is not self.hooked[s.name]()]

    def _selector(self, name: str) -> Selector:
        return next(selector for selector in self.selectors if selector.name == name)

    def hooked_later(self, name: str) -> str | None:
        """The warning for a hook that is called after the tap and may have changed the feature; else None."""
        module = self.hooked[name]()
        if module is None:
            return None
        of_input = self._selector(name).of_input
        hooks = [*(module._forward_pre_hooks if of_input else module._forward_hooks).values()]
        taps = [i for i, hook in enumerate(hooks) if isinstance(hook, _Tap)]
        if not taps or all(isinstance(hook, _Hook) for hook in hooks[taps[-1] :]):
            return None
        return (
            f"a forward hook was registered on {name!r} after its tap: the model may have gone on with other "
            "values than those recorded"
        )

    def lost_gradient(self, name: str, *, student: bool = False) -> str | None:
        """Why a feature that should have a gradient has none, and what to do; None if all is well.

        A feature of frozen parameters alone needs none, nor does one of a pass without gradients unless the
        model is known to be the `student`.
        """
        record = self.pass_.records[name]
        if record.feature_grad or self._frozen(name, record):
            return None
        if record.in_function:
            return (
                f"the feature of {name!r} was made without gradient in a reentrant checkpoint (or another "
                "autograd.Function), into which autograd does not see: use "
                "checkpoint(..., use_reentrant=False), or freeze the parameters before it if they are not "
                "to be trained"
            )
        if self.pass_.trains or student:
            where = "its module detaches it" if record.graded else "made under no_grad"
            return (
                f"the feature of {name!r} has no gradient, and parameters before it are trained ({where}, in "
                "a pass that trains): leave no_grad and detach out of the student's forward pass, or freeze "
                "these parameters (checkpointing needs use_reentrant=False)"
            )
        return None

    def _frozen(self, name: str, record: Record) -> bool:
        """Whether a feature needs no gradient: no parameter that it can depend on requires one.

        It depends on the modules registered before it; or on a frozen part of the model alone, such as the
        teacher in a module that owns both, whose input requires no gradient.
        """
        model, tapped = self.model(), self.hooked[name]()
        if model is None or tapped is None:
            return True
        module_name = self._selector(name).module
        if not (record.in_function or record.input_grad):
            module = module_name
            while module:
                part = model.get_submodule(module)
                if _is_frozen(part) and next(part.parameters(), None) is not None:
                    return True
                module = module.rpartition(".")[0]
        for module_before in model.modules():
            if module_before is tapped:
                break
            if any(parameter.requires_grad for parameter in module_before.parameters(recurse=False)):
                return False
        if next(tapped.parameters(), None) is None and not (record.graded and not record.in_function):
            # An activation may be registered before the layers that it follows.
            tapped = model.get_submodule(module_name.rpartition(".")[0])
        return _is_frozen(tapped)


class _Hook:
    """A hook on one module, and on no copy of it."""

    def __init__(self, module: nn.Module, pass_: Pass) -> None:
        self.module, self.pass_ = weakref.ref(module), pass_

    def __deepcopy__(self, memo: Any) -> _NoHook:
        return _NoHook()

    def __reduce__(self) -> Any:
        return _NOTHING

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # which torch.jit.script asks of every hook
            raise AttributeError("a tapped model can't be scripted: close its taps before torch.jit.script")
        raise AttributeError(name)


class _NoHook:
    """What a tap is in a copy of its model."""

    def __call__(self, *args: Any) -> None:
        pass

    def __reduce__(self) -> Any:
        return _NOTHING


# A callable of the standard library that takes anything and returns None: a model that was pickled with taps
# on it loads where at_fused is not installed.
_NOTHING = getattr, (contextlib.nullcontext(), "__exit__")


class _Begin(_Hook):
    """Before the model's own call."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if module is not self.module() or self.pass_.paused or _recomputing():
            return
        self.pass_.records.clear()
        self.pass_.running, self.pass_.trains = True, False
        _order_hooks()


class _End(_Hook):
    """After the model's own call."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self.module() and not (self.pass_.paused or _recomputing()):
            self.pass_.running = False
            self.pass_.trains = _requires_grad(output)


class _Tap(_Hook):
    def __init__(self, module: nn.Module, selector: Selector, pass_: Pass, take: Take) -> None:
        super().__init__(module, pass_)
        self.selector, self.take = selector, take

    def tap(self, value: Any, args: Any) -> Any:
        """The value that the model continues with; None leaves it unchanged."""
        pass_, selector = self.pass_, self.selector
        if torch.jit.is_tracing() or (pass_.own_calls_only and not pass_.running):
            return None
        feature = select(value, selector)
        if isinstance(feature, torch.fx.Proxy):  # what is traced is a copy, and not tapped
            return None
        taken, passed_on = self.take(feature, selector, value)
        if not _recomputing():
            if not pass_.running and selector.name in pass_.records:
                pass_.records.clear()
            compiling = torch.compiler.is_compiling()
            graded = torch.is_grad_enabled()
            in_function = not (compiling or graded or torch.is_inference_mode_enabled()) and not (
                torch._C._is_fwd_grad_enabled()  # off in the forward of every autograd.Function
            )
            input_grad = not compiling and _requires_grad(args)
            # Within vmap and forward mode, a tensor does not know of gradients outside.
            feature_grad = feature.requires_grad or not backends.is_plain(feature)
            record = Record(taken, feature_grad, graded, in_function, input_grad)
            pass_.records[selector.name] = record
        return None if passed_on is None else replaced(value, selector.path, passed_on)


class _OutputTap(_Tap):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if module is not self.module() or self.pass_.paused:  # the former: a replica of DataParallel, say
            return None
        return self.tap(output, args)


class _InputTap(_Tap):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not self.module() or self.pass_.paused:
            return None
        path = self.selector.path
        if path and isinstance(path[0], str):
            changed = self.tap(kwargs, args)
            return None if changed is None else (args, changed)
        if path or not args:
            changed = self.tap(args, args)
            return None if changed is None else (changed, kwargs)
        changed = self.tap(args[0], args)
        return None if changed is None else ((changed, *args[1:]), kwargs)


def is_complete(model: nn.Module | None) -> bool:
    """Whether there is a model with its modules: a copy that owns its taps may still lack them."""
    return model is not None and "_modules" in model.__dict__


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _recomputing() -> bool:
    """Whether a backward pass is running: what checkpointing calls again then is no new pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _requires_grad(output: Any) -> bool:
    if isinstance(output, Tensor):
        return output.requires_grad
    if isinstance(output, dict):
        output = list(output.values())
    return isinstance(output, (tuple, list)) and any(_requires_grad(item) for item in output)


_tapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@constant
def _order_hooks() -> None:
    """Before a pass, or its tracing: moves taps behind later hooks, which may change the feature."""
    for module in [*_tapped]:
        for hooks in (cast(Any, module._forward_pre_hooks), cast(Any, module._forward_hooks)):
            if len(hooks) > 1 and not isinstance(hooks[next(reversed(hooks))], _Hook):
                for key in [key for key, hook in hooks.items() if isinstance(hook, (_Tap, _End))]:
                    hooks.move_to_end(key)
