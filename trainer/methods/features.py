"""What the methods share that compare the networks' features at their taps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import at_fused
from trainer.choices import flag_text
from trainer.errors import ConfigError
from trainer.methods.method import Method

if TYPE_CHECKING:
    from models import TappedModel
    from trainer.config import Config


class ComparesFeatures(Method):
    """`names` and `t_names` are of the features compared, `students` and `teachers` these of the example."""

    needs_teacher = True
    has_term = True
    compares_features = True

    teacher: nn.Module

    def __init__(
        self, config: Config, student: nn.Module, teacher: nn.Module | None, example: Tensor
    ) -> None:
        super().__init__(config, student, teacher, example)
        self.names, self.t_names = tap_names(config, student, self.teacher)  # type: ignore[arg-type]
        students = _features("student", student, self.names, config, example)
        teachers = _features("teacher", self.teacher, self.t_names, config, example)
        self.shapes = [(s.shape[1:], t.shape[1:]) for s, t in zip(students, teachers, strict=True)]

    def error(self, reason: Exception) -> ConfigError:
        """That the features at the taps can't be compared."""
        return ConfigError(f"taps {list(self.names)}: {reason}")

    def pairs(self) -> list[tuple[str, torch.Size, torch.Size]]:
        """Of each pair, both names and shapes as text, and the shapes (C, *spatial)."""
        found = []
        for s_name, t_name, (s, t) in zip(self.names, self.t_names, self.shapes, strict=True):
            found.append((f"{s_name} {_text(s)} <- {t_name} {_text(t)}", s, t))
        return found


def tap_names(config: Config, student: TappedModel, teacher: TappedModel) -> tuple[list[str], list[str]]:
    """Names of the features that are compared, of the student and of the teacher, in pairs."""
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


@torch.no_grad()
def _features(
    key: str, model: nn.Module, names: Sequence[str], config: Config, image: Tensor
) -> list[Tensor]:
    try:
        with at_fused.FeatureTaps(model, names) as taps:
            model.eval()(image)
            return taps.features
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"taps {flag_text(config.taps)}, of {key} {getattr(config, key)}: {error}"
        ) from None


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
