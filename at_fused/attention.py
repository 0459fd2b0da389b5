"""The public functions: they check their arguments, then choose between the fused loss and composed maps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _ops, backends, reference
from ._checks import (
    ChannelDim,
    Features,
    Masks,
    channels_second,
    check_batches,
    check_masks,
    check_options,
    check_pairs,
    check_real,
    check_weights,
    described,
    feature_error,
    warn_if_channels_last,
)
from ._known import Known, kinds


def attention_map(
    feat: Tensor,
    p: float = 2,
    *,
    mapping: str = "sum",
    normalize: str | None = None,
    channel_dim: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Spatial attention map of a feature (section 3.1, Eq. 1).

    Args:
        feat: activations (B, C, *spatial), or with the channels at `channel_dim`; fp64, fp32, bf16 or
            fp16, any strides; never copied.
        p: exponent of the absolute values, a real number >= 1.
        mapping: "sum" for F_sum^p = sum_c |A_c|^p, "max" for F_max^p = max_c |A_c|^p.
        normalize: None, or "l2" / "l1" to divide each sample's map by its norm over all positions.
        channel_dim: dimension of the channels; -1 for (B, N, C) tokens.
        backend: "auto", or one of `available_backends()`.

    Returns:
        (B, *spatial) in fp32 (fp64 for fp64 features), differentiable twice.

    Raises:
        TypeError: `feat` is not a floating-point tensor, or `p` not a number.
        ValueError: p < 1, an unknown option, no spatial dimension, or a backend that can't serve.
    """
    check_options(p, mapping=mapping, normalize=normalize, backend=backend)
    error = feature_error(feat, channel_dim)
    if error:
        kind, text = error
        raise kind(f"feat {described(feat)} {text}")
    warn_if_channels_last(feat, channel_dim, "attention_map")
    feat = channels_second(feat, channel_dim)
    backend = backends.select(backend, (feat,), p, mapping)
    (attention,) = _ops.raw_maps([feat], float(p), mapping, backend)
    return reference.normalize_map(attention, normalize, reference.EPS)


def attention_loss(
    s_feats: Features,
    t_feats: Features,
    p: float = 2,
    *,
    mapping: str = "sum",
    normalize: str | None = "l2",
    distance: str = "mse",
    norm_order: float = 2,
    weights: Sequence[float] | None = None,
    reduction: str = "sum",
    resize: str = "bilinear",
    channel_dim: ChannelDim = 1,
    t_channel_dim: ChannelDim | None = None,
    eps: float = reference.EPS,
    masks: Masks | None = None,
    backend: str = "auto",
) -> Tensor:
    """Activation-based attention-transfer loss between student and teacher (section 3.1, Eq. 2).

    With each sample's map `Q = sum_c |A_c|^p`, `u = Q / max(|Q|_2, eps)`, and the weight `w_j` of pair j:

        loss = sum over pairs of w_j * mean over batch and positions of (u_student - u_teacher)^2

    ```
    loss = cross_entropy + 1000 * at_fused.attention_loss(student_feats, teacher_feats)
    ```

    Args:
        s_feats: the student's features, one tensor (B, C, *spatial) or a sequence of them; fp64, fp32,
            bf16 or fp16, any strides, never copied. Ranks, dtypes and sizes may differ between pairs.
        t_feats: the teacher's features, as many; their channels may differ from the student's.
        p: exponent of the absolute values, a real number >= 1.
        mapping: "sum" (F_sum^p) or "max" (F_max^p).
        normalize: "l2", "l1", or None, over each sample's positions.
        distance: "mse", the mean over batch and positions of the squared difference (the authors' code:
            beta = 1000), or "norm", the mean over the batch of the difference's q-norm (Eq. 2: beta / 2).
        norm_order: q >= 1 of distance="norm"; not the exponent p.
        weights: one factor per pair; None means 1 for each.
        reduction: "sum" over pairs, "none", or "batch": each sample's loss in each pair.
        resize: what to do when a pair's spatial sizes differ: interpolate the teacher's *map* to the
            student's grid ("bilinear", without align_corners, or "nearest"), or raise ("error"). Against a
            map (H, W), N tokens are the rows of a grid of H : W.
        channel_dim: dimension of the channels in every feature, or one per pair; -1 for (B, N, C) tokens.
        t_channel_dim: the same for the teacher's; None: as the student's.
        eps: lower bound of the norms (1e-12 by default), applied in fp32; with 0 a map of zeros gives NaN.
        masks: which positions count: per pair a bool tensor (B, *spatial) of the student's sizes, or None
            for all. Both maps become Q * mask before they are normalised, "mse" is the mean over the
            positions of each sample that count, and a sample without any contributes 0: a padded sample
            has the loss, and the gradient, of the cropped one. The teacher's map is resized before. Values
            that do not count must be finite, too: the gradient at NaN or infinity is 0 times that, NaN.
        backend: "auto", or one of `available_backends()`.

    Returns:
        Scalar, (n_pairs,) with reduction="none", or (n_pairs, B) with "batch", whose mean over the batch
        and sum over pairs are that of "sum"; fp32 (fp64 if a feature is fp64). Gradients flow to every
        feature that requires them, in its dtype and memory format. An empty batch gives 0.

    Raises:
        TypeError: a feature that is not a floating-point tensor, a mask that is not a bool one, or an
            option of a wrong type.
        ValueError: numbers of features, batch sizes, devices, sizes of a mask, or (resize="error") spatial
            sizes that differ, tokens that fill no grid, p < 1, an empty list, an unknown option, or a
            backend that can't serve.
    """
    options = (
        p,
        mapping,
        normalize,
        distance,
        norm_order,
        reduction,
        resize,
        channel_dim,
        t_channel_dim,
        eps,
    )
    call = None if masks is not None else _call(s_feats, t_feats, (*options, backend))
    if call and (known := _fused_calls.get(call)):
        students, teachers = _listed(s_feats), _listed(t_feats)
        factors = _factors(weights, len(students))
        return _ops.fused_loss(
            students, teachers, factors, float(p), mapping, float(eps), reduction == "sum", known
        )

    check_options(
        p,
        norm_order,
        eps,
        mapping=mapping,
        normalize=normalize,
        distance=distance,
        reduction=reduction,
        resize=resize,
        backend=backend,
    )
    students, teachers = check_pairs(s_feats, t_feats, resize, channel_dim, t_channel_dim)

    def name(index: int) -> str:
        return f"pair {index}: student {described(students[index])}"

    if masks is not None:
        if isinstance(masks, Tensor) and isinstance(s_feats, Tensor):
            masks = [masks]
        shapes = [(student.shape[0], *student.shape[2:]) for student in students]
        masks = check_masks(masks, name, shapes, students[0].device)
    if reduction == "batch":
        check_batches(name, [student.shape[0] for student in students])
    factors = _factors(weights, len(students))
    comparable = all(
        s.shape[2:] == t.shape[2:] and (s.dtype == torch.float64) == (t.dtype == torch.float64)
        for s, t in zip(students, teachers, strict=True)
    )

    feats = [*students, *teachers]
    backend = backends.select(backend, feats, p, mapping)
    if backend != "reference" and comparable and _ops.is_fused(normalize, distance, reduction, masks):
        if call and channel_dim == 1 and t_channel_dim in (None, 1):  # the features as they were given
            _fused_calls.keep(call, backend)
        return _ops.fused_loss(
            students, teachers, factors, float(p), mapping, float(eps), reduction == "sum", backend
        )

    # What is not hot is composed in PyTorch from the fused maps, which are small.
    maps = _ops.raw_maps(feats, float(p), mapping, backend)
    return reference.loss_from_maps(
        maps[: len(students)],
        maps[len(students) :],
        factors,
        reduction=reduction,
        masks=masks,
        normalize=normalize,
        distance=distance,
        norm_order=norm_order,
        resize=resize,
        eps=eps,
    )


def _factors(weights: Sequence[float] | None, count: int) -> list[float]:
    return [1.0] * count if weights is None else check_weights(weights, count)


def _listed(feats: Features) -> list[Tensor]:
    return [feats] if isinstance(feats, Tensor) else list(feats)


_fused_calls: Known[str] = Known()  # checked calls that the fused loss serves: their backends


def _call(s_feats: Features, t_feats: Features, options: tuple[Any, ...]) -> Hashable | None:
    """All that the checks of a call and its backend depend on, or None where that can't be told."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    types = tuple(map(type, options))  # True is not taken for 1
    try:
        feats = kinds(_listed(s_feats)), kinds(_listed(t_feats))
    except (AttributeError, TypeError, RuntimeError):  # no features, as the checks will say
        return None
    return backends.available_backends(), *feats, options, types


class AttentionLoss(nn.Module):
    """`beta * attention_loss(...)` as a module, with beta folded into the kernels.

    The options that are not listed here are those of `attention_loss`.

    Args:
        p: exponent of the maps.
        beta: factor of the whole loss; 1000 with distance="mse" is the authors' setting. A plain
            attribute: assign to it to schedule it.

    Shape:
        forward(s_feats, t_feats, masks=None) -> scalar, (n_pairs,) with reduction="none", or (n_pairs, B)
        with "batch".
    """

    def __init__(
        self,
        p: float = 2,
        *,
        beta: float = 1000.0,
        mapping: str = "sum",
        normalize: str | None = "l2",
        distance: str = "mse",
        norm_order: float = 2,
        weights: Sequence[float] | None = None,
        reduction: str = "sum",
        resize: str = "bilinear",
        channel_dim: ChannelDim = 1,
        t_channel_dim: ChannelDim | None = None,
        eps: float = reference.EPS,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_real("beta", beta)
        self.p = p
        self.beta = beta
        self.weights = None if weights is None else tuple(check_weights(weights))
        self.options: dict[str, Any] = {
            "mapping": mapping,
            "normalize": normalize,
            "distance": distance,
            "norm_order": norm_order,
            "reduction": reduction,
            "resize": resize,
            "channel_dim": channel_dim,
            "t_channel_dim": t_channel_dim,
            "eps": eps,
            "backend": backend,
        }
        # A wrong option is reported where it was written, not at the first step.
        check_options(p, **{key: value for key, value in self.options.items() if "channel_dim" not in key})

    def forward(self, s_feats: Features, t_feats: Features, masks: Masks | None = None) -> Tensor:
        options = {"masks": masks, **self.options}
        if torch.compiler.is_compiling():  # a beta within the weights would recompile each time it changes
            return self.beta * attention_loss(s_feats, t_feats, self.p, weights=self.weights, **options)
        check_real("beta", self.beta)
        count = len(s_feats) if isinstance(s_feats, Sequence) else 1
        weights = [self.beta * weight for weight in self.weights or (1.0,) * count]
        return attention_loss(s_feats, t_feats, self.p, weights=weights, **options)

    def extra_repr(self) -> str:
        options = {"p": self.p, "beta": self.beta, "weights": self.weights, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
