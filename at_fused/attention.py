"""The public functions: they check their arguments, then choose between the fused loss and composed maps."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _ops, backends, reference

Features = Tensor | Sequence[Tensor]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MAPPINGS = ("sum", "max")
_NORMALIZE = (None, "l2", "l1")
_DISTANCES = ("mse", "norm")
_REDUCTIONS = ("sum", "none")
_RESIZE = ("bilinear", "nearest", "error")
_BACKENDS = ("auto", *backends.NAMES)


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
    _check_exponent(p)
    _check_options(
        mapping=(mapping, _MAPPINGS), normalize=(normalize, _NORMALIZE), backend=(backend, _BACKENDS)
    )
    error = _feature_error(feat, channel_dim)
    if error:
        kind, text = error
        raise kind(f"feat {_shape(feat)} {text}")
    feat = _channels_second(feat, channel_dim)
    backend = backends.select(backend, (feat,), p, mapping)
    (attention,) = _maps((feat,), p, mapping, backend)
    return reference.normalize_map(attention, normalize, eps=1e-12)


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
    channel_dim: int = 1,
    eps: float = 1e-12,
    backend: str = "auto",
) -> Tensor:
    """Activation-based attention-transfer loss between student and teacher (section 3.1, Eq. 2).

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
        reduction: "sum" over pairs, or "none".
        resize: what to do when a pair's spatial sizes differ: interpolate the teacher's *map* to the
            student's grid ("bilinear", without align_corners, or "nearest"), or raise ("error").
        channel_dim: dimension of the channels in every feature; -1 for (B, N, C) tokens.
        eps: lower bound of the norms, applied in fp32; with 0 a map of zeros gives NaN.
        backend: "auto", or one of `available_backends()`.

    Returns:
        Scalar, or (n_pairs,) with reduction="none"; fp32 (fp64 if a feature is fp64). Gradients flow to
        every feature that requires them, in its dtype and memory format. An empty batch gives 0.

    Raises:
        TypeError: a feature that is not a floating-point tensor, or an option of a wrong type.
        ValueError: numbers of features, batch sizes, devices, or (resize="error") spatial sizes that
            differ, p < 1, an empty list, an unknown option, or a backend that can't serve.
    """
    _check_exponent(p)
    _check_options(
        mapping=(mapping, _MAPPINGS),
        normalize=(normalize, _NORMALIZE),
        distance=(distance, _DISTANCES),
        reduction=(reduction, _REDUCTIONS),
        resize=(resize, _RESIZE),
        backend=(backend, _BACKENDS),
    )
    _check_number("norm_order", norm_order, at_least=1, finite=False)
    _check_number("eps", eps, at_least=0)
    students, teachers = _check_pairs(s_feats, t_feats, channel_dim, resize)
    factors = _check_weights(weights, len(students))
    reduce = reduction == "sum"
    comparable = all(
        s.shape[2:] == t.shape[2:] and (s.dtype == torch.float64) == (t.dtype == torch.float64)
        for s, t in zip(students, teachers, strict=True)
    )

    feats = (*students, *teachers)
    backend = backends.select(backend, feats, p, mapping)
    if backend != "reference" and normalize == "l2" and distance == "mse" and comparable:
        loss, *_ = _ops.attention_loss(
            students, teachers, factors, float(p), mapping, float(eps), reduce, False, False, False, backend
        )
        return loss

    # What is not hot is composed in PyTorch from the fused maps, which are small.
    maps = _maps(feats, p, mapping, backend)
    losses = [
        reference.loss_from_maps(
            student,
            teacher,
            normalize=normalize,
            distance=distance,
            norm_order=norm_order,
            resize=resize,
            eps=eps,
        )
        for student, teacher in zip(maps[: len(students)], maps[len(students) :], strict=True)
    ]
    return reference.combine(losses, factors, reduce)


class AttentionLoss(nn.Module):
    """`beta * attention_loss(...)` as a module, with beta folded into the kernels.

    The options that are not listed here are those of `attention_loss`.

    Args:
        p: exponent of the maps.
        beta: factor of the whole loss; 1000 with distance="mse" is the authors' setting. A plain
            attribute: assign to it to schedule it.

    Shape:
        forward(s_feats, t_feats) -> scalar, or (n_pairs,) with reduction="none".
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
        channel_dim: int = 1,
        eps: float = 1e-12,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_real("beta", beta)
        self.p = p
        self.beta = beta
        self.weights = None if weights is None else tuple(weights)
        self.options: dict[str, Any] = {
            "mapping": mapping,
            "normalize": normalize,
            "distance": distance,
            "norm_order": norm_order,
            "reduction": reduction,
            "resize": resize,
            "channel_dim": channel_dim,
            "eps": eps,
            "backend": backend,
        }
        # A wrong option is reported where it was written, not at the first step.
        _check_options(backend=(backend, _BACKENDS))
        probes = [torch.zeros(0, 1, 1, device="cpu")] * (1 if weights is None else len(weights))
        attention_loss(
            probes, probes, p, weights=weights, **{**self.options, "channel_dim": 1, "backend": "auto"}
        )

    def forward(self, s_feats: Features, t_feats: Features) -> Tensor:
        if torch.compiler.is_compiling():  # in the weights, each new beta would be compiled anew
            return self.beta * attention_loss(s_feats, t_feats, self.p, weights=self.weights, **self.options)
        _check_real("beta", self.beta)
        count = len(s_feats) if isinstance(s_feats, Sequence) else 1
        weights = [self.beta * weight for weight in self.weights or (1.0,) * count]
        return attention_loss(s_feats, t_feats, self.p, weights=weights, **self.options)

    def extra_repr(self) -> str:
        changed = {"p": self.p, "beta": self.beta, "weights": self.weights, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())


def _maps(feats: Sequence[Tensor], p: float, mapping: str, backend: str) -> list[Tensor]:
    if backend == "reference":
        return [reference.attention_map(feat, p, mapping) for feat in feats]
    maps: list[Tensor] = _ops.attention_maps(list(feats), float(p), mapping, backend)
    return maps


# --- argument checks --------------------------------------------------------------------------------


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")


def _check_number(name: str, value: float, *, at_least: float, finite: bool = True) -> None:
    _check_real(name, value)
    if not value >= at_least or (finite and value == math.inf):
        raise ValueError(f"{name} must be {'a finite number ' if finite else ''}>= {at_least}, got {value}")


def _check_exponent(p: float) -> None:
    _check_number("p", p, at_least=1)


def _check_options(**options: tuple[object, tuple[object, ...]]) -> None:
    for name, (value, allowed) in options.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be one of {allowed}, got {type(value).__name__}")
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _feature_error(feat: object, channel_dim: int) -> tuple[type[Exception], str] | None:
    """What keeps `feat` from being a feature with its channels at `channel_dim`: the error and its text."""
    if not isinstance(feat, Tensor):
        return TypeError, f"must be a tensor, got {type(feat).__name__}"
    if feat.dtype not in _DTYPES:
        return TypeError, f"must be fp64, fp32, bf16 or fp16, got {feat.dtype}"
    if feat.layout != torch.strided:
        return TypeError, f"must be a dense tensor, got layout {feat.layout}"
    if feat.ndim < 3:
        return ValueError, "must have batch, channel and spatial dimensions"
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        return TypeError, f"channel_dim must be an integer, got {type(channel_dim).__name__}"
    if not -feat.ndim <= channel_dim < feat.ndim or channel_dim % feat.ndim == 0:
        return ValueError, f"has no channel_dim {channel_dim} beside its batch dimension"
    if feat.shape[channel_dim] == 0:
        return ValueError, "has no channels"
    return None


def _channels_second(feat: Tensor, channel_dim: int) -> Tensor:
    """A view of `feat` as (B, C, *spatial)."""
    return feat if channel_dim == 1 else feat.movedim(channel_dim, 1)


def _check_pairs(
    s_feats: Features, t_feats: Features, channel_dim: int, resize: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides as lists of (B, C, *spatial) views, once every pair is known to match."""
    if isinstance(s_feats, Tensor) and isinstance(t_feats, Tensor):
        s_feats, t_feats = [s_feats], [t_feats]
    for side, feats in (("s_feats", s_feats), ("t_feats", t_feats)):
        if isinstance(feats, Tensor) or not isinstance(feats, Sequence):
            raise TypeError(
                f"s_feats and t_feats must be two tensors or two sequences: {side} is {_shape(feats)}"
            )
    if len(s_feats) != len(t_feats):
        shapes = [[_shape(feat) for feat in feats] for feats in (s_feats, t_feats)]
        raise ValueError(
            f"student and teacher must have as many features: got {len(s_feats)} {shapes[0]} "
            f"and {len(t_feats)} {shapes[1]}"
        )
    if not len(s_feats):
        raise ValueError("s_feats and t_feats are empty: at least one pair is needed")
    students: list[Tensor] = []
    teachers: list[Tensor] = []
    for index, (s_feat, t_feat) in enumerate(zip(s_feats, t_feats, strict=True)):
        for side, feat in (("student", s_feat), ("teacher", t_feat)):
            error = _feature_error(feat, channel_dim)
            if error:
                kind, text = error
                raise kind(f"pair {index}: {_pair(s_feat, t_feat)}: the {side} {text}")
        student, teacher = _channels_second(s_feat, channel_dim), _channels_second(t_feat, channel_dim)
        problem = _mismatch(student, teacher, resize)
        if problem is None and students and student.device != students[0].device:
            problem = f"are on {student.device}, pair 0 on {students[0].device}"
        if problem:
            raise ValueError(f"pair {index}: {_pair(s_feat, t_feat)} {problem}")
        students.append(student)
        teachers.append(teacher)
    return students, teachers


def _pair(student: object, teacher: object) -> str:
    return f"student {_shape(student)} and teacher {_shape(teacher)}"


def _shape(feat: object) -> str:
    return str(tuple(feat.shape)) if isinstance(feat, Tensor) else type(feat).__name__


def _mismatch(student: Tensor, teacher: Tensor, resize: str) -> str | None:
    """What keeps two (B, C, *spatial) features from forming a pair."""
    if student.device != teacher.device:
        return f"are on different devices, {student.device} and {teacher.device}"
    if student.shape[0] != teacher.shape[0]:
        return "differ in batch size"
    if student.ndim != teacher.ndim:
        return "differ in the number of spatial dimensions"
    if student.shape[2:] != teacher.shape[2:]:
        if resize == "error":
            return 'differ in spatial size (resize="error")'
        if 0 in student.shape[2:] or 0 in teacher.shape[2:]:
            return "differ in spatial size, and one is empty"
        if student.ndim > 5:
            return "differ in spatial size, and maps of more than 3 dimensions can't be resized"
    return None


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if isinstance(weights, (str, Tensor)) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence of numbers, got {type(weights).__name__}")
    for index, weight in enumerate(weights):
        _check_real(f"weights[{index}]", weight)
    if len(weights) != count:
        raise ValueError(f"weights must have one number per pair: got {len(weights)} for {count} pairs")
    return [float(weight) for weight in weights]
