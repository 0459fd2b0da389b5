"""What a student is trained on: cross-entropy, attention transfer, distillation, or their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import at_fused
from models import TappedModel
from trainer.config import Config, ConfigError


class Tapped(nn.Module):
    """`model` returning its logits and its features at `names`: one module to wrap in DDP or to compile."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.taps = at_fused.FeatureTaps(model, names)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = self.model(images)
        features = self.taps.features
        self.taps.clear()
        return logits, features


@dataclass(frozen=True)
class Losses:
    """Means over a batch, fp32 scalars: `total` is what is minimised, the others are what it consists of."""

    total: Tensor
    ce: Tensor
    at: Tensor
    kd: Tensor


class Objective:
    """The loss of a method: CE for `none`; CE + AT for `at`; the distillation loss, which contains
    (1 - alpha) CE, for `kd`; that + AT for `at+kd`.

    `Losses.at` is the AT term with beta in it, `Losses.kd` the whole distillation loss; 0 where unused.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.attention = at_fused.AttentionLoss(
            p=config.p,
            beta=config.beta,
            mapping=config.mapping,
            normalize=None if config.normalize == "none" else config.normalize,
            distance=config.distance,
            norm_order=config.norm_order,
            backend=config.backend,
        )

    def __call__(
        self,
        logits: Tensor,
        features: Sequence[Tensor],
        teacher_logits: Tensor | None,
        teacher_features: Sequence[Tensor],
        targets: Tensor,
        beta: float,
    ) -> Losses:
        config = self.config
        ce = F.cross_entropy(logits.float(), targets)
        zero = torch.zeros_like(ce)
        at = kd = zero
        if config.uses_at and beta > 0:
            self.attention.beta = beta  # folded into the kernel, so a schedule costs nothing
            at = self.attention(features, teacher_features)
        if config.uses_kd and teacher_logits is not None:
            kd = at_fused.distillation_loss(logits, teacher_logits, targets, config.temperature, config.alpha)
        base = kd if config.uses_kd else ce
        return Losses(base if at is zero else base + at, ce, at, kd)


def tap_names(config: Config, student: TappedModel, teacher: TappedModel) -> tuple[list[str], list[str]]:
    """Names of the features that AT compares, of the student and of the teacher, in pairs."""
    if isinstance(config.taps, str) and config.taps in student.taps:
        students, teachers = student.taps[config.taps], teacher.taps[config.taps]
        if len(students) != len(teachers):
            raise ConfigError(
                f"taps {config.taps}: {config.student} has {len(students)} and {config.teacher} "
                f"{len(teachers)}; name the modules, or use groups"
            )
        return students, teachers
    names = [config.taps] if isinstance(config.taps, str) else list(config.taps)
    return names, names


@torch.no_grad()
def describe_pairs(
    config: Config, student: Tapped, teacher: Tapped, image: Tensor, names: tuple[list[str], list[str]]
) -> list[str]:
    """One line per pair of features, found with one `image` (1, 3, H, W): shapes and beta per map element.

    The paper's beta "divided by number of elements in attention map and batch size" (section 4.1.1) is what
    the mean over both amounts to. A pair that cannot be compared raises ConfigError.
    """
    pairs = [module.eval()(image)[1] for module in (student, teacher)]
    objective = Objective(config)
    try:
        objective.attention(*pairs)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"taps {names[0]}: {error}") from None
    lines = []
    for s_name, t_name, s, t in zip(*names, *pairs, strict=True):
        elements = s.shape[2:].numel()
        shapes = "x".join(map(str, s.shape[1:])), "x".join(map(str, t.shape[1:]))
        effective = (
            f"{config.beta / (elements * config.batch_size):.3g} per element"
            if config.distance == "mse"
            else f"{config.beta / config.batch_size:.3g} per image"
        )
        lines.append(f"AT {s_name} {shapes[0]} <- {t_name} {shapes[1]}: beta {effective}")
    return lines
