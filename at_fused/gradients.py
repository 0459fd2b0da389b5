"""Gradient-based attention (section 3.2): losses on J, the gradient of the cross-entropy at the input.

J is per sample: it comes from the *sum* of the samples' cross-entropies, so the batch size does not enter it.
The losses differentiate J once more (double backward), so the model must not be under `torch.compile`.

What BatchNorm does in the pass that gives J the paper leaves open (section 4.1.3), so it can be chosen:

- `batch_norm="batch"` (default): normalise as the model's mode says, with the batch's statistics while
  training, but leave the running ones alone: the pass that trains the classifier has updated them already.
- `batch_norm="running"`: a pass of its own with the running statistics fixed; only then is J_i, in training
  too, free of the other samples, and the loss the same for any number of data-parallel ranks.
- `batch_norm="update"`: an ordinary forward pass, which updates the running statistics once more.

The choice holds in the forward pass: under activation checkpointing, which runs parts of it again in
backward, only "update" can be used while BatchNorm trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_targets, described
from ._selectors import unknown_name
from .distillation import summed_cross_entropy
from .reference import accumulation_dtype, without_autocast

_BATCH_NORM = ("batch", "running", "update")


def input_gradient(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    create_graph: bool = False,
    layer: str | None = None,
    batch_norm: str = "batch",
) -> Tensor:
    """J (Eq. 3): the gradient of each sample's cross-entropy with respect to `x`, or to a layer's output.

    Works under `torch.no_grad` and for models whose parameters are frozen; touches no `.grad`.

    Args:
        model: maps `x` to logits (B, n_classes).
        x: floating point, (B, ...), such as images (B, C, H, W).
        targets: class indices (B,) int64, or class probabilities (B, n_classes). A sample of index -100, the
            `ignore_index` of cross-entropy, has no loss: its J is 0.
        create_graph: keep the graph, so that J can be differentiated again.
        layer: name of a submodule (as in `model.named_modules()`): the gradient at its output instead.
        batch_norm: "batch", "running" or "update": what BatchNorm does in this pass; see the module's text.

    Returns:
        J in the shape and dtype of `x`, or of the layer's output; outside autocast's control.

    Raises:
        TypeError: `x` is not a floating-point tensor, or targets or the layer's output have a wrong type.
        ValueError: batch sizes or shapes that do not fit, an unknown layer or option; on the CPU (a GPU would
            have to be waited for) a class index that is out of range.
    """
    return _gradient(model, x, targets, create_graph, layer, batch_norm)[0]


def gradient_attention_loss(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    layer: str | None = None,
    teacher_layer: str | None = None,
    batch_norm: str = "batch",
    logits: Tensor | None = None,
) -> Tensor:
    """Gradient-based attention transfer `1/2 mean_b |J_S - J_T|^2` (Eq. 4), to be weighted by beta.

    Its gradient flows to the student's parameters (Eq. 5); J_T is a constant. What is not listed here is as
    in `input_gradient`, errors included.

    Args:
        teacher_layer: the teacher's layer, where it is not called `layer`.
        logits: the student's at `x`, from a pass with `x.requires_grad`: saves another pass.

    Returns:
        Scalar in fp32 (fp64 for fp64 gradients). An empty batch gives 0.

    Raises:
        ValueError: also where the two gradients (at a layer) have different shapes.
    """
    j_s, _ = _gradient(student, x, targets, True, layer, batch_norm, logits)
    j_t, _ = _gradient(teacher, x.detach(), targets, False, teacher_layer or layer, batch_norm)
    if j_s.shape != j_t.shape:
        raise ValueError(
            f"the gradients of student {tuple(j_s.shape)} and teacher {tuple(j_t.shape)} differ in shape"
        )
    return _half_mean_square(j_s, j_t)


def symmetry_loss(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    output_weight: float = 0.0,
    layer: str | None = None,
    batch_norm: str = "batch",
    logits: Tensor | None = None,
) -> Tensor:
    """Horizontal-flip invariance of J (Eq. 6), and of the outputs f, as the text below Eq. 5 adds.

    `1/2 mean_b |J(x) - flip(J(flip x))|^2 + output_weight * mean_b |f(x) - f(flip x)|^2`, where flip turns
    the last dimension around. What is not listed here is as in `input_gradient`, errors included.

    Args:
        output_weight: weight of the term on the logits; the paper gives none.
        logits: `f(x)`, from a pass with `x.requires_grad`: saves another pass.

    Returns:
        Scalar in fp32 (fp64 for fp64 gradients). An empty batch gives 0.
    """
    j, out = _gradient(model, x, targets, True, layer, batch_norm, logits)
    j_flipped, out_flipped = _gradient(model, x.flip(-1), targets, True, layer, batch_norm)
    loss = _half_mean_square(j, j_flipped.flip(-1))
    return loss + 2 * output_weight * _half_mean_square(out, out_flipped) if output_weight else loss


def input_gradient_norm(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    layer: str | None = None,
    batch_norm: str = "batch",
    logits: Tensor | None = None,
) -> Tensor:
    """Double backpropagation (Drucker & LeCun, 1992): `1/2 mean_b |J|^2`, the paper's min-l2.

    Arguments, result and errors as `symmetry_loss`.
    """
    j, _ = _gradient(model, x, targets, True, layer, batch_norm, logits)
    return _half_mean_square(j)


def _gradient(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    create_graph: bool,
    layer: str | None,
    batch_norm: str,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """J and the logits; given `logits`, without a forward pass."""
    _check(model, x, targets, batch_norm)
    with torch.enable_grad():
        at = x
        if logits is None:
            logits, at = _forward(model, x, layer, batch_norm)
        elif layer is not None or not x.requires_grad:
            raise ValueError("logits can't be given with a layer, or without an x that requires grad")
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(
                f"the model must map x {tuple(x.shape)} to logits (B, n_classes), got "
                f"{described(logits, dtype=True)}"
            )
        # Outside autocast: backward follows the dtypes that forward has chosen.
        with without_autocast(x.device.type):
            loss = summed_cross_entropy(logits.to(accumulation_dtype(logits.dtype)), targets)
            (j,) = torch.autograd.grad(loss, at, create_graph=create_graph)
    return j, logits


def _forward(model: nn.Module, x: Tensor, layer: str | None, batch_norm: str) -> tuple[Tensor, Tensor]:
    """The logits, and the tensor at which their loss is to be differentiated."""
    if layer is None and not x.requires_grad:
        x = x.detach().requires_grad_()
    with _batch_norm_mode(model, batch_norm), _tap(model, layer) as tapped:
        logits = model(x)
    if layer is not None and not tapped:
        raise ValueError(f"no forward pass has reached layer {layer!r}")
    return logits, tapped[-1] if tapped else x


@contextmanager
def _batch_norm_mode(model: nn.Module, mode: str) -> Iterator[None]:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            if mode == "running":
                norm.training = False
            elif mode == "batch":
                norm.track_running_stats = False  # while training: neither read nor written
        yield
    finally:
        for norm, (training, tracks) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracks


@contextmanager
def _tap(model: nn.Module, layer: str | None) -> Iterator[list[Tensor]]:
    """Collects the outputs of `layer`, made to require grad where nothing below them does."""
    tapped: list[Tensor] = []
    if layer is None:
        yield tapped
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer not in modules:
        raise ValueError(unknown_name(layer, list(modules)))

    def record(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(
                f"layer {layer!r} returned {described(output, dtype=True)}, not a floating-point tensor"
            )
        tapped.append(output if output.requires_grad else output.detach().requires_grad_())
        return tapped[-1].clone()  # what follows may work in place

    handle = modules[layer].register_forward_hook(record)
    try:
        yield tapped
    finally:
        handle.remove()


def _half_mean_square(a: Tensor, b: Tensor | None = None) -> Tensor:
    """`1/2 mean_b |a - b|^2`, with 0 for no `b` and for an empty batch."""
    with without_autocast(a.device.type):
        wide = accumulation_dtype(a.dtype)
        difference = a.to(wide) if b is None else a.to(wide) - b.to(wide)
        return difference.square().sum() / (2 * max(len(a), 1))


def _check(model: object, x: object, targets: Tensor, batch_norm: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.ndim:
        raise TypeError(f"x must be a floating-point tensor (B, ...), got {described(x, dtype=True)}")
    check_targets(targets)
    if targets.shape[:1] != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} and targets {tuple(targets.shape)} differ in batch size")
    if batch_norm not in _BATCH_NORM:
        raise ValueError(f"batch_norm must be one of {_BATCH_NORM}, got {batch_norm!r}")
