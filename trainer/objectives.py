"""What a student is trained on: cross-entropy, distillation, a transfer term, or their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import at_fused
from models import TappedModel
from trainer.config import Config
from trainer.errors import ConfigError


class Tapped(nn.Module):
    """`model` returning its logits and its features at `names`: one module to wrap in DDP or to compile.

    A student trained by hints has their regressors in `hints`, for DDP and the optimizer to find.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.taps = at_fused.FeatureTaps(model, names)
        self.hints: at_fused.FeatureHints | None = None

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = self.model(images)
        features = self.taps.features
        self.taps.clear()
        return logits, features


@dataclass(frozen=True)
class Losses:
    """Means over a batch, fp32 scalars: `total` is what is minimised, the others are what it consists of.

    `taps` (n,) are the parts of `at` by tap, without a graph; none where the method compares no features.
    """

    total: Tensor
    ce: Tensor
    at: Tensor
    kd: Tensor
    taps: Tensor


class Objective:
    """The loss of a method, for `student` and, where the method has one, `teacher`.

    It is CE for `none`, the distillation loss, which contains (1 - alpha) CE, for `kd` and `at+kd`; plus beta
    times the transfer term: AT for `at` and `at+kd`, F-ActT for `hints`, the losses of section 3.2 for
    `grad-at`, `symmetry` and `min-l2`.

    `Losses.at` is the transfer term with beta in it, `Losses.kd` the whole distillation loss; 0 where unused.
    """

    def __init__(self, config: Config, student: Tapped, teacher: Tapped | None) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.attention = at_fused.AttentionLoss(
            p=config.p,
            beta=config.beta,
            mapping=config.mapping,
            normalize=None if config.normalize == "none" else config.normalize,
            distance=config.distance,
            norm_order=config.norm_order,
            reduction="none",
            backend=config.backend,
        )

    def __call__(
        self, forward: nn.Module, images: Tensor, targets: Tensor, beta: float
    ) -> tuple[Losses, Tensor]:
        """The losses of a batch, and its logits; `forward` is the student as DDP or the compiler wraps it."""
        config = self.config
        gradients = config.uses_gradients and beta > 0
        # Under DDP every parameter must get a gradient in every step: regressors also while beta is 0.
        compares = config.uses_hints or (config.uses_at and beta > 0)
        teacher_logits, teacher_features = None, []
        if self.teacher is not None and (config.uses_kd or compares):
            with torch.no_grad():
                teacher_logits, teacher_features = self.teacher(images)
        if gradients:
            images = images.detach().requires_grad_()
        logits, features = forward(images)

        ce = cross_entropy(logits, targets)
        zero = torch.zeros_like(ce)
        at = kd = zero
        taps = zero.detach().new_zeros(len(self.student.taps.names))
        if compares:
            terms = self.feature_terms(features, teacher_features, beta)
            at, taps = terms.sum(), terms.detach()
        elif gradients:
            at = beta * self.gradient_term(images, targets, logits)
        if config.uses_kd and teacher_logits is not None:
            kd = at_fused.distillation_loss(logits, teacher_logits, targets, config.temperature, config.alpha)
        base = kd if config.uses_kd else ce
        return Losses(base if at is zero else base + at, ce, at, kd, taps), logits

    def feature_terms(self, students: Sequence[Tensor], teachers: Sequence[Tensor], beta: float) -> Tensor:
        """beta times AT or F-ActT, (n,) by pair."""
        if self.student.hints is not None:
            return beta * self.student.hints(students, teachers)
        self.attention.beta = beta  # folded into the kernel, so a schedule costs nothing
        return self.attention(students, teachers)

    def gradient_term(self, images: Tensor, targets: Tensor, logits: Tensor | None) -> Tensor:
        """The loss on the gradients at `images`; `logits` are the student's for them."""
        config, model = self.config, self.student.model
        options: dict[str, Any] = {"layer": config.gradient_layer, "batch_norm": config.gradient_bn}
        if config.gradient_layer is None and config.gradient_bn != "running":
            options["logits"] = logits  # made with the statistics that are asked for: no second pass
        if config.method == "symmetry":
            weight = config.output_weight
            return at_fused.symmetry_loss(model, images, targets, output_weight=weight, **options)
        if self.teacher is not None:
            teacher = self.teacher.model
            return at_fused.gradient_attention_loss(model, teacher, images, targets, **options)
        return at_fused.input_gradient_norm(model, images, targets, **options)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over a batch, in fp32 whatever autocast has made of the logits; fp64 stays."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def tap_names(config: Config, student: TappedModel, teacher: TappedModel) -> tuple[list[str], list[str]]:
    """Names of the features that AT compares, of the student and of the teacher, in pairs."""
    if isinstance(config.taps, str) and config.taps in student.taps.keys() | teacher.taps.keys():
        students, teachers = (model.taps.get(config.taps, []) for model in (student, teacher))
        if len(students) != len(teachers):
            raise ConfigError(
                f"taps {config.taps}: {config.student} has {len(students)} and {config.teacher} "
                f"{len(teachers)}; name the modules, or use groups"
            )
        return students, teachers
    names = [config.taps] if isinstance(config.taps, str) else list(config.taps)
    return names, names


def add_hints(student: Tapped, teacher: Tapped, image: Tensor) -> None:
    """Give `student` the regressors for its features and the teacher's, whose channels `image` shows."""
    students, teachers = _features(student, teacher, image)
    channels = [[feature.shape[1] for feature in side] for side in (students, teachers)]
    try:
        student.hints = at_fused.FeatureHints(*channels, reduction="none").to(image.device)
    except ValueError as error:
        raise ConfigError(f"taps {list(student.taps.names)}: {error}") from None


def describe(objective: Objective, image: Tensor, batch: int) -> list[str]:
    """What the transfer term compares, found with one `image` (1, 3, H, W), and with what weight in a `batch`
    of so many: lines.

    The paper's beta "divided by number of elements in attention map and batch size" (section 4.1.1) is what
    the mean over both amounts to. What cannot be compared raises ConfigError.
    """
    config, student, teacher = objective.config, objective.student, objective.teacher
    if not config.uses_beta:
        return []
    late = f" from epoch {config.at_start_epoch}" if config.at_start_epoch else ""
    lines = [f"beta {config.beta:g}, {config.beta_schedule}{late}"]
    per_image = config.beta / batch
    if config.uses_gradients:
        where = f"output of {config.gradient_layer}" if config.gradient_layer else "input"
        student.eval()
        try:
            objective.gradient_term(image, torch.zeros(1, dtype=torch.int64, device=image.device), None)
        except (ValueError, TypeError) as error:
            layer = f", gradient-layer {config.gradient_layer}" if config.gradient_layer else ""
            raise ConfigError(f"method {config.method}{layer}: {error}") from None
        return [*lines, f"{config.method} at the {where}: beta/2 {per_image / 2:.3g} per image"]
    if teacher is None:
        raise ConfigError(f"method {config.method} needs a teacher")
    pairs = _features(student, teacher, image)
    try:
        objective.feature_terms(*pairs, config.beta)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"taps {list(student.taps.names)}: {error}") from None
    for s_name, t_name, s, t in zip(student.taps.names, teacher.taps.names, *pairs, strict=True):
        shapes = "x".join(map(str, s.shape[1:])), "x".join(map(str, t.shape[1:]))
        pair = f"{s_name} {shapes[0]} <- {t_name} {shapes[1]}"
        elements = s.shape[2:].numel()
        if config.uses_hints:
            regressor = "none" if s.shape[1] == t.shape[1] else f"1x1, {s.shape[1]} to {t.shape[1]}"
            lines.append(f"hints {pair}: beta {per_image:.3g} per image, regressor {regressor}")
        elif config.distance == "mse":
            lines.append(f"AT {pair}: beta {per_image / elements:.3g} per element")
        else:
            lines.append(f"AT {pair}: beta {per_image:.3g} per image")
    return lines


@torch.no_grad()
def _features(student: Tapped, teacher: Tapped, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return student.eval()(image)[1], teacher.eval()(image)[1]
