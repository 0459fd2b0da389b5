"""Full-activation transfer (section 4.1.2, F-ActT), after FitNets' hints (Romero et al., 2014)."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import (
    ChannelDim,
    channels_second,
    described,
    dims_of_both,
    space_mismatch,
    warn_if_tokens_in_a_line,
)
from .reference import EPS, accumulation_dtype, knows_autocast, of_one_rank, sample_norm, without_autocast


class FeatureHints(nn.Module):
    """Squared l2 distance between l2-normalised full activations of student and teacher.

    `sum_j mean_b |r_j(S_j) / |r_j(S_j)| - T_j / |T_j||^2`: norms are over all of a sample's activations
    (C * H * W), the mean is over the batch only, and pairs are summed. The regressor r_j is a 1x1 convolution
    where the channels of pair j differ, nothing where they match. Regressors train with the student: give
    `parameters()` to its optimizer, and keep the module inside what DistributedDataParallel wraps.

    Where the sizes of a pair differ, both features are first averaged to the smaller size of each dimension
    (adaptive average pooling, as RepDistiller and mdistiller do it for features of unequal sizes).

    ```
    hints = at_fused.FeatureHints([16, 32, 64], [32, 64, 128])
    parameters = [*student.parameters(), *hints.parameters()]
    optimizer = SGD(parameters, lr=0.1)
    term = hints(s_taps.features, t_taps.features)
    loss = cross_entropy + beta * term  # beta decays in the paper
    ```

    Args:
        student_channels: channels of the student's features, one number or one per pair.
        teacher_channels: the teacher's, as many.
        reduction: "sum" over pairs, or "none".
        channel_dim: dimension of the channels in every feature, or one per pair; -1 for (B, N, C) tokens and
            (B, H, W, C). Against (B, C, H, W), N tokens are the rows of a grid of H : W.
        t_channel_dim: the same for the teacher's; None: as the student's.

    Shape:
        forward(s_feats, t_feats): one tensor (B, C, H, W), or tokens with a `channel_dim`, or a sequence of
        them on each side, fp64, fp32, bf16 or fp16, whatever the regressors' dtype -> scalar, or (n_pairs,)
        with reduction="none", in fp32 (fp64 if a feature or a regressor is fp64). A regressor computes in its
        own dtype, or in autocast's. An empty batch gives 0.

    Raises:
        TypeError: channels that are not integers, features that are not floating-point tensors.
        ValueError: numbers of channels or features that differ, channels below 1, an unknown reduction; in
            `forward` a pair whose channels or batch sizes do not fit, or whose tokens fill no grid.
    """

    def __init__(
        self,
        student_channels: int | Sequence[int],
        teacher_channels: int | Sequence[int],
        *,
        reduction: str = "sum",
        channel_dim: ChannelDim = 1,
        t_channel_dim: ChannelDim | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "none"):
            raise ValueError(f"reduction must be 'sum' or 'none', got {reduction!r}")
        self.reduction = reduction
        self.student_channels = _channels("student_channels", student_channels)
        self.teacher_channels = _channels("teacher_channels", teacher_channels)
        if len(self.student_channels) != len(self.teacher_channels):
            raise ValueError(
                f"student_channels {self.student_channels} and teacher_channels {self.teacher_channels} "
                "must be of the same number"
            )
        self.dims = dims_of_both(channel_dim, t_channel_dim, len(self.student_channels))
        self.regressors = nn.ModuleList(
            nn.Identity() if s == t else nn.Conv2d(s, t, kernel_size=1)
            for s, t in zip(self.student_channels, self.teacher_channels, strict=True)
        )

    def forward(self, s_feats: Tensor | Sequence[Tensor], t_feats: Tensor | Sequence[Tensor]) -> Tensor:
        students = [s_feats] if isinstance(s_feats, Tensor) else list(s_feats)
        teachers = [t_feats] if isinstance(t_feats, Tensor) else list(t_feats)
        if not len(students) == len(teachers) == len(self.regressors):
            raise ValueError(
                f"got {len(students)} student and {len(teachers)} teacher features for "
                f"{len(self.regressors)} pairs"
            )
        losses = []
        for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            student, teacher = self._on_one_grid(index, student, teacher)
            losses.append(_distance(_regressed(self.regressors[index], student), teacher))
        stacked = torch.stack(losses)
        return stacked.sum() if self.reduction == "sum" else stacked

    def _on_one_grid(self, index: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (B, C, H, W) of the smaller sizes, once they are known to form a pair."""
        pair = f"pair {index}: student {described(student)} and teacher {described(teacher)}"
        if not all(isinstance(feat, Tensor) and feat.is_floating_point() for feat in (student, teacher)):
            raise TypeError(f"{pair} must be floating-point tensors")
        dims = self.dims[0][index], self.dims[1][index]
        if not all(_has_a_grid(feat, dim) for feat, dim in zip((student, teacher), dims, strict=True)):
            raise ValueError(f"{pair} must be (B, C, H, W), or (B, N, C) with channel_dim=-1")
        student, teacher = channels_second(student, dims[0]), channels_second(teacher, dims[1])
        expected = self.student_channels[index], self.teacher_channels[index]
        if (student.shape[1], teacher.shape[1]) != expected:
            raise ValueError(f"{pair} must have {expected[0]} and {expected[1]} channels")
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(f"{pair} must have the same batch size")
        sizes = of_one_rank(student.shape[2:], teacher.shape[2:])
        problem = space_mismatch(student.shape[2:], teacher.shape[2:])
        if problem or sizes is None:
            raise ValueError(f"{pair} {problem}")
        warn_if_tokens_in_a_line(student.shape[2:], teacher.shape[2:], dims, f"pair {index}")
        return _pooled(student, *sizes), _pooled(teacher, *reversed(sizes))


def _has_a_grid(feat: Tensor, channel_dim: int) -> bool:
    """Whether `feat` is (B, C, H, W) or tokens (B, N, C), with its channels at `channel_dim`."""
    if not -feat.ndim <= channel_dim < feat.ndim:
        return False
    return (feat.ndim == 4 and channel_dim % 4 != 0) or (feat.ndim == 3 and channel_dim % 3 == 2)


def _pooled(feat: Tensor, own: Sequence[int], other: Sequence[int]) -> Tensor:
    """`feat` (B, C, *spatial) as (B, C, H, W), averaged where its `own` grid is larger than the `other`."""
    if feat.ndim == 3:
        feat = feat.unflatten(2, tuple(own) if len(own) == 2 else (own[0], 1))
    smaller = [*map(min, own, other), 1][:2]
    height, width = feat.shape[2:]
    if [height, width] == smaller:
        return feat
    if height % smaller[0] == width % smaller[1] == 0:  # the same, and without atomics on CUDA
        return F.avg_pool2d(feat, (height // smaller[0], width // smaller[1]))
    return F.adaptive_avg_pool2d(feat, (smaller[0], smaller[1]))


def _regressed(regressor: nn.Module, student: Tensor) -> Tensor:
    if not isinstance(regressor, nn.Conv2d):
        return regressor(student)
    device, own = student.device.type, regressor.weight.dtype
    autocast = knows_autocast(device) and torch.is_autocast_enabled(device)
    if autocast and torch.float64 not in (student.dtype, own):  # autocast leaves fp64 alone
        return regressor(student)  # and casts the rest itself, without a copy in between
    projected = regressor(student.to(own))
    return projected.to(torch.promote_types(projected.dtype, student.dtype))


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the batch of the squared l2 distance of two normalised (B, C, H, W)."""
    with without_autocast(student.device.type):
        return (_unit(student) - _unit(teacher)).square().sum() / max(len(student), 1)


def _unit(feat: Tensor) -> Tensor:
    """Each sample divided by its l2 norm; one that is 0 stays 0, and gets no gradient."""
    flat = feat.to(accumulation_dtype(feat.dtype)).flatten(1)
    norm = sample_norm(flat)
    return flat / norm.masked_fill(norm < EPS, torch.inf)


def _channels(name: str, value: object) -> tuple[int, ...]:
    channels = (value,) if isinstance(value, numbers.Integral) else value
    if isinstance(channels, str) or not isinstance(channels, Iterable):
        raise TypeError(f"{name} must be an integer or a sequence of them, got {value!r}")
    channels = tuple(channels)
    for number in channels:
        if isinstance(number, bool) or not isinstance(number, numbers.Integral):
            raise TypeError(f"{name} must be integers, got {value!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    if not channels:
        raise ValueError(f"{name} is empty: at least one pair is needed")
    return tuple(map(int, channels))
