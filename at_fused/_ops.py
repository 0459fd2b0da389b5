"""The operators' derivatives, and the maps and losses that the public functions take from here.

One autograd.Function per operator, registered on the Autograd key: under half the overhead of
torch.library.register_autograd. Functions take their tensors flat, since apply() does not look into lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, reference
from ._derivatives import recomputed_gradients, requires_grad, save_for_backward, saved_tensors_of
from ._outputs import Outputs, empty_gradients, empty_loss, empty_maps
from ._schemas import (
    attention_loss,
    attention_maps,
    attention_maps_backward,
    below_autograd,
    dispatched,
    fill_loss,
    library,
)


class _Maps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: float, mapping: str, backend: str, *feats: Tensor) -> tuple[Tensor, ...]:
        ctx.options = (p, mapping, backend)
        save_for_backward(ctx, *feats)
        ctx.set_materialize_grads(False)
        return tuple(below_autograd(attention_maps, list(feats), p, mapping, backend))

    @staticmethod
    def backward(ctx: Any, *grad_maps: Tensor | None) -> tuple[Tensor | None, ...]:
        feats = saved_tensors_of(ctx)
        wanted = [i for i, grad in enumerate(grad_maps) if grad is not None and ctx.needs_input_grad[3 + i]]
        grads: list[Tensor | None] = [None] * len(feats)
        if wanted:
            wanted_feats, wanted_maps = [feats[i] for i in wanted], [grad_maps[i] for i in wanted]
            computed = _gradients(wanted_feats, wanted_maps, *ctx.options)
            for i, grad in zip(wanted, computed, strict=True):
                grads[i] = grad
        return None, None, None, *grads


class _MapsBackward(torch.autograd.Function):
    """`tensors` are the features, the gradients at their maps and, if there are any, the addends."""

    @staticmethod
    def forward(
        ctx: Any, p: float, mapping: str, backend: str, count: int, scale: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.options, ctx.count = (p, mapping), count
        ctx.save_for_backward(scale, *tensors[: 2 * count])
        feats, grad_maps, addends = (list(tensors[i * count : (i + 1) * count]) for i in range(3))
        arguments = (feats, grad_maps, scale, p, mapping, backend, addends)
        return tuple(below_autograd(attention_maps_backward, *arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, *tensors = ctx.saved_tensors
        count = ctx.count
        needed = ctx.needs_input_grad[4 : 5 + 2 * count]
        of_addends = [
            grad if need else None
            for grad, need in zip(grads, ctx.needs_input_grad[5 + 2 * count :], strict=False)
        ]

        def recompute(scale: Tensor | None, *tensors: Tensor) -> list[Tensor]:
            scales = [None] * count if scale is None else scale.expand(count).unbind()
            return [
                reference.attention_map_backward(feat, grad if s is None else grad * s, *ctx.options)
                for feat, grad, s in zip(tensors[:count], tensors[count:], scales, strict=True)
            ]

        recomputed = recomputed_gradients(recompute, (scale, *tensors), needed, grads)
        return None, None, None, None, *recomputed, *of_addends


class _Tapped(torch.autograd.Function):
    """A feature and its raw map, such that one node receives the gradients of both and hands on their sum."""

    @staticmethod
    def forward(
        ctx: Any, p: float, mapping: str, backend: str, channel_dim: int, feat: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.options, ctx.channel_dim = (p, mapping, backend), channel_dim
        ctx.save_for_backward(feat)
        ctx.set_materialize_grads(False)
        (attention,) = below_autograd(attention_maps, [feat.movedim(channel_dim, 1)], p, mapping, backend)
        # Not a view to autograd, so that what follows may work in place where nothing needs the feature.
        return feat.detach(), attention

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_map: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_map is None:
            return None, None, None, None, grad
        (feat,), dim = ctx.saved_tensors, ctx.channel_dim
        feat = feat.movedim(dim, 1)
        addend = None if grad is None else grad.movedim(dim, 1)
        if addend is None or not _can_be_added(addend, feat):
            (at_feat,) = _gradients([feat], [grad_map], *ctx.options)
            at_feat = at_feat if addend is None else at_feat + addend
        else:
            (at_feat,) = _call(attention_maps_backward, [feat], [grad_map], None, *ctx.options, [addend])
        return None, None, None, None, at_feat.movedim(1, dim)


def _can_be_added(addend: Tensor, feat: Tensor) -> bool:
    """Whether a kernel can add `addend` to the gradient at `feat`: it lies in memory as that will."""
    return (
        addend.dtype == feat.dtype
        and addend.stride() == reference.strides_of(feat)
        and backends.is_plain(addend)
    )


def raw_maps(feats: list[Tensor], p: float, mapping: str, backend: str) -> list[Tensor]:
    """Raw maps (B, *spatial) of features (B, C, *spatial), by the named backend or the reference."""
    if backend == "reference":
        return [reference.attention_map(feat, p, mapping) for feat in feats]
    maps: list[Tensor] = _call(attention_maps, feats, p, mapping, backend)
    return maps


def feature_and_map(
    feat: Tensor, p: float, mapping: str, backend: str, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """The feature to go on with, and its raw map (B, *spatial): the two gradients are added in one pass."""
    tapped: tuple[Tensor, Tensor] = _Tapped.apply(p, mapping, backend, channel_dim, feat)
    return tapped


def is_fused(normalize: str | None, distance: str, reduction: str, masks: object) -> bool:
    """Whether `fused_loss` is what these options ask for, of pairs of equal sizes and precision."""
    return normalize == "l2" and distance == "mse" and reduction != "batch" and masks is None


def fused_loss(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: list[float],
    p: float,
    mapping: str,
    eps: float,
    reduce: bool,
    backend: str,
) -> Tensor:
    """The l2-normalised mean-squared loss, weighted, of features (B, C, *spatial): () or (n_pairs,)."""
    loss: Tensor = _call(attention_loss, students, teachers, weights, p, mapping, eps, reduce, backend)
    return loss


class _LossOptions(NamedTuple):
    weights: list[float]
    p: float
    mapping: str
    eps: float
    reduce: bool
    backend: str


class _Loss(torch.autograd.Function):
    """`feats` are the students' features, then the teachers'."""

    @staticmethod
    def forward(ctx: Any, options: _LossOptions, *feats: Tensor) -> Tensor:
        weights, p, mapping, eps, reduce, backend = options
        count = len(weights)
        students, teachers = list(feats[:count]), list(feats[count:])
        student_needs, teacher_needs = ctx.needs_input_grad[1 : 1 + count], ctx.needs_input_grad[1 + count :]
        early = (
            reduce
            and all(student_needs)
            and not any(teacher_needs)
            and backends.gives_early_gradients(backend)
            and all(type(feat) is Tensor for feat in feats)  # tracing can't look at the upstream gradient
            and backends.named(backend).early_gradients_pay(students, teachers, p)
        )
        outputs = Outputs(
            loss=empty_loss(students, teachers, reduce),
            student_slopes=empty_maps(students) if any(student_needs) else [],
            teacher_slopes=empty_maps(teachers) if any(teacher_needs) else [],
            grads=empty_gradients(students) if early else [],
        )
        below_autograd(fill_loss, students, teachers, weights, p, mapping, eps, backend, *outputs)
        ctx.options, ctx.early_gradients = options, outputs.grads or None
        ctx.student_slopes = len(outputs.student_slopes)
        save_for_backward(ctx, *feats, *outputs.student_slopes, *outputs.teacher_slopes)
        ctx.set_materialize_grads(False)
        return outputs.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, p, mapping, eps, reduce, backend = ctx.options
        count = len(weights)
        needed = ctx.needs_input_grad[1:]
        if grad is None:
            return None, *[None] * (2 * count)
        saved = saved_tensors_of(ctx)
        feats, slopes = saved[: 2 * count], saved[2 * count :]

        if torch.is_grad_enabled() or not backends.is_plain(grad):
            # create_graph=True: the slopes' own derivatives are needed too. Or is_grads_batched=True.

            def recompute(*feats: Tensor) -> list[Tensor]:
                students, teachers = feats[:count], feats[count:]
                reduction = "sum" if reduce else "none"
                return [
                    reference.attention_loss(
                        students, teachers, weights, p, mapping, eps=eps, reduction=reduction
                    )
                ]

            return None, *recomputed_gradients(recompute, feats, needed, (grad,))

        if reduce and type(grad) is Tensor and backends.gives_early_gradients(backend):
            # Handed out once, and without a second reference, so that autograd need not copy them.
            early, ctx.early_gradients = ctx.early_gradients, None
            students, student_slopes = feats[:count], slopes[: ctx.student_slopes]
            early = backends.named(backend).at_upstream_gradient(early, students, student_slopes, grad, p)
            if early is not None:
                return None, *early, *[None] * count

        wanted = [i for i in range(2 * count) if needed[i]]
        first_slope = 0 if ctx.student_slopes else count
        wanted_feats, wanted_slopes = [feats[i] for i in wanted], [slopes[i - first_slope] for i in wanted]
        scale = grad if reduce else _pick(grad, [i % count for i in wanted])
        arguments = (wanted_feats, wanted_slopes, scale, p, mapping, backend)
        computed = below_autograd(attention_maps_backward, *arguments)
        grads: list[Tensor | None] = [None] * (2 * count)
        for i, feat_grad in zip(wanted, computed, strict=True):
            grads[i] = feat_grad
        return None, *grads


def _gradients(
    feats: list[Tensor], grad_maps: list[Any], p: float, mapping: str, backend: str
) -> list[Tensor]:
    """The operator, or the reference for gradients that no kernel can see into (`is_grads_batched`)."""
    if all(backends.is_plain(grad) for grad in grad_maps):
        return _call(attention_maps_backward, feats, grad_maps, None, p, mapping, backend)
    return [
        reference.attention_map_backward(feat, grad, p, mapping)
        for feat, grad in zip(feats, grad_maps, strict=True)
    ]


def _pick(values: Tensor, indices: list[int]) -> Tensor:
    """`values[indices]` without sending the indices to the device."""
    if indices == list(range(len(values))):
        return values
    parts = values.unbind()
    return torch.stack([parts[i] for i in indices])


def _maps_autograd(feats: list[Tensor], p: float, mapping: str, backend: str) -> list[Tensor]:
    if requires_grad(feats):
        return list(_Maps.apply(p, mapping, backend, *feats))
    return below_autograd(attention_maps, feats, p, mapping, backend)


def _maps_backward_autograd(
    feats: list[Tensor],
    grad_maps: list[Tensor],
    scale: Tensor | None,
    p: float,
    mapping: str,
    backend: str,
    addends: list[Tensor] | None = None,
) -> list[Tensor]:
    addends = addends or []
    if requires_grad(feats, grad_maps, addends, () if scale is None else (scale,)):
        tensors = (scale, *feats, *grad_maps, *addends)
        return list(_MapsBackward.apply(p, mapping, backend, len(feats), *tensors))
    return below_autograd(attention_maps_backward, feats, grad_maps, scale, p, mapping, backend, addends)


def _loss_autograd(students: list[Tensor], teachers: list[Tensor], *options: Any) -> Tensor:
    if requires_grad(students, teachers):
        return _Loss.apply(_LossOptions(*options), *students, *teachers)
    return below_autograd(attention_loss, students, teachers, *options)


_differentiable: dict[Any, Callable[..., Any]] = {
    attention_maps: _maps_autograd,
    attention_maps_backward: _maps_backward_autograd,
    attention_loss: _loss_autograd,
}
for _operator, _function in _differentiable.items():
    library.impl(_operator, _function, "Autograd")


def _call(operator: Any, *arguments: Any) -> Any:
    """The operator's result, differentiable."""
    return (operator if dispatched() else _differentiable[operator])(*arguments)
