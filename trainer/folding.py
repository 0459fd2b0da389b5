"""Folding a frozen teacher's BatchNorm into its convolutions: each saves a pass over memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(model: nn.Module, keep: Collection[str] = ()) -> int:
    """Fold each BatchNorm of `model` that follows a convolution alone into it, in place; return how many.

    The outputs of modules in `keep`, and of those with hooks, such as taps, stay the same to rounding; so do
    those of all others but the convolutions folded, and the names of all. A model that torch.fx cannot trace
    stays whole.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError(
            "only a model in eval mode can be folded: BatchNorm changes with each batch in training"
        )
    kept = {*keep, *(name for name, module in model.named_modules() if _is_hooked(module))}
    folded = 0
    for conv_name, norm_name in _pairs(model):
        # Whatever ends between the two has the convolution's own output: a tapped stem of one layer, say.
        if any(_holds(name, conv_name) != _holds(name, norm_name) for name in kept):
            continue
        convolution, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        _replace(model, conv_name, fuse_conv_bn_eval(convolution, norm))  # type: ignore[type-var, arg-type]
        _replace(model, norm_name, nn.Identity())
        folded += 1
    return folded


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and of the BatchNorms that alone read their outputs, each module called once."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # whatever the model's own code raises on a proxy
        return []
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    pairs = []
    for norm in calls:
        before = norm.args[0] if norm.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        names = str(before.target), str(norm.target)
        kinds = isinstance(modules.get(names[0]), _CONVOLUTIONS), isinstance(modules.get(names[1]), _NORMS)
        once = all(times[name] == 1 for name in names)
        if all(kinds) and once and modules[names[1]].running_var is not None:
            pairs.append(names)
    return pairs


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _holds(outer: str, inner: str) -> bool:
    """Whether the module `inner` is `outer` or a part of it; "" is the model."""
    return not outer or f"{inner}.".startswith(f"{outer}.")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
