"""What the methods share that compare the networks' features at their taps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from at_fused.taps.grid import find_grid
from trainer import taps
from trainer.errors import ConfigError
from trainer.methods.method import Method

if TYPE_CHECKING:
    from trainer.config import Config


class ComparesFeatures(Method):
    """`names` and `t_names` are of the features compared, `dims` and `t_dims` where their channels are."""

    needs_teacher = True
    has_term = True
    compares_features = True

    teacher: nn.Module

    def __init__(
        self, config: Config, student: nn.Module, teacher: nn.Module | None, example: Tensor
    ) -> None:
        super().__init__(config, student, teacher, example)
        found = taps.compared(config, student, self.teacher, example)
        self.names, self.t_names, self.weights = found.names, found.t_names, found.weights
        students = _features("student", student, self.names, config, example)
        teachers = _features("teacher", self.teacher, self.t_names, config, example)
        self.dims, self.t_dims = [], []
        for name, t_name, s, t, dim, t_dim in zip(
            self.names, self.t_names, students, teachers, found.dims, found.t_dims, strict=True
        ):
            if t_dim is None and s.ndim == t.ndim == 3:  # neither shape tells for sure
                t_dim = dim
            self.dims.append(_channel_dim("student", name, s, dim, None, example))
            self.t_dims.append(_channel_dim("teacher", t_name, t, t_dim, dim, example))
        self.shapes = [
            (_channels_first(s.shape[1:], s_dim), _channels_first(t.shape[1:], t_dim))
            for s, t, s_dim, t_dim in zip(students, teachers, self.dims, self.t_dims, strict=True)
        ]

    def error(self, reason: Exception) -> ConfigError:
        """That the features at the taps can't be compared."""
        return ConfigError(f"taps {list(self.names)}: {reason}")

    def pairs(self) -> list[tuple[str, torch.Size, torch.Size]]:
        """Of each pair, both names and shapes as text, and the shapes (C, *spatial)."""
        found = []
        for s_name, t_name, (s, t) in zip(self.names, self.t_names, self.shapes, strict=True):
            found.append((f"{s_name} {_text(s)} <- {t_name} {_text(t)}", s, t))
        return found


def _features(
    key: str, model: nn.Module, names: Sequence[str], config: Config, image: Tensor
) -> list[Tensor]:
    try:
        return taps.features(model, names, image)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"taps {taps.text(config.taps)}, of {key} {getattr(config, key)}: {error}"
        ) from None


def _channel_dim(
    key: str, name: str, feature: Tensor, given: int | None, otherwise: int | None, image: Tensor
) -> int:
    """That given, else found: the last of tokens and of (B, h, w, C), as images of this size have them.

    Raises:
        ConfigError: a feature of three dimensions whose second does not count tokens of the images.
    """
    if given is not None:
        return given
    if grid := find_grid(feature.shape, image.shape):
        return grid.channel_dim
    if otherwise is None and feature.ndim == 3:
        shape = f"(B, {', '.join(map(str, feature.shape[1:]))})"
        option = "channel-dim" if key == "student" else "teacher-channel-dim"
        raise ConfigError(
            f"taps: {name} of {key} is {shape}, and {feature.shape[1]} tokens fill no grid like the images': "
            f"write pairs {{student: NAME, teacher: NAME, {option}: DIM}}, where DIM is -1 for "
            "(B, tokens, channels) and 1 for (B, channels, positions)"
        )
    return 1 if otherwise is None else otherwise


def _channels_first(shape: torch.Size, dim: int) -> torch.Size:
    """Of the shape of a feature without its batch dimension."""
    sizes = list(shape)
    channels = sizes.pop(dim - 1 if dim > 0 else dim) if -len(sizes) <= dim <= len(sizes) and dim else 0
    return torch.Size([channels, *sizes])


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
