"""Full-activation transfer (section 4.1.2, F-ActT), after FitNets' hints (Romero et al., 2014)."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ._checks import described
from .reference import EPS, accumulation_dtype, knows_autocast, sample_norm, without_autocast


class FeatureHints(nn.Module):
    """Squared l2 distance between l2-normalised full activations of student and teacher.

    `sum_j mean_b |r_j(S_j) / |r_j(S_j)| - T_j / |T_j||^2`: norms are over all of a sample's activations
    (C * H * W), the mean is over the batch only, and pairs are summed. The regressor r_j is a 1x1 convolution
    where the channels of pair j differ, nothing where they match. Regressors train with the student: give
    `parameters()` to its optimizer, and keep the module inside what DistributedDataParallel wraps.

    ```
    hints = at_fused.FeatureHints([16, 32, 64], [32, 64, 128])
    optimizer = SGD([*student.parameters(), *hints.parameters()], lr=0.1)
    loss = cross_entropy + beta * hints(s_taps.features, t_taps.features)    # beta decays in the paper
    ```

    Args:
        student_channels: channels of the student's features, one number or one per pair.
        teacher_channels: the teacher's, as many.
        reduction: "sum" over pairs, or "none".

    Shape:
        forward(s_feats, t_feats): one tensor (B, C, H, W) or a sequence of them on each side, fp64, fp32,
        bf16 or fp16, whatever the regressors' dtype -> scalar, or (n_pairs,) with reduction="none", in fp32
        (fp64 if a feature or a regressor is fp64). A regressor computes in its own dtype, or in autocast's.
        An empty batch gives 0.

    Raises:
        TypeError: channels that are not integers, features that are not floating-point tensors.
        ValueError: numbers of channels or features that differ, channels below 1, an unknown reduction; in
            `forward` a pair whose channels, batch sizes or spatial sizes do not fit.
    """

    def __init__(
        self,
        student_channels: int | Sequence[int],
        teacher_channels: int | Sequence[int],
        *,
        reduction: str = "sum",
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
            self._check(index, student, teacher)
            losses.append(_distance(_regressed(self.regressors[index], student), teacher))
        stacked = torch.stack(losses)
        return stacked.sum() if self.reduction == "sum" else stacked

    def _check(self, index: int, student: Tensor, teacher: Tensor) -> None:
        kind: type[Exception] = ValueError
        expected = self.student_channels[index], self.teacher_channels[index]
        if not all(isinstance(feat, Tensor) and feat.is_floating_point() for feat in (student, teacher)):
            kind, problem = TypeError, "be floating-point tensors"
        elif student.ndim != 4 or teacher.ndim != 4:
            problem = "be (B, C, H, W)"
        elif (student.shape[1], teacher.shape[1]) != expected:
            problem = f"have {expected[0]} and {expected[1]} channels"
        elif student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
            problem = "have the same batch and spatial sizes"
        else:
            return
        pair = f"pair {index}: student {described(student)} and teacher {described(teacher)}"
        raise kind(f"{pair} must {problem}")


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
