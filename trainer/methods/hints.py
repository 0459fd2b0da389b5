"""Full-activation transfer, F-ActT (section 4.1.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor, nn

import at_fused
from trainer.methods.features import ComparesFeatures
from trainer.methods.method import Batch

if TYPE_CHECKING:
    from trainer.config import Config


class Hints(ComparesFeatures):
    """Compares normalised activations, through regressors that train with the student."""

    # The paper gives none: early in a training on CIFAR-10, with 10 the term has a gradient about as large as
    # AT's, 5 to 20 times that of cross-entropy.
    default_beta = 10.0
    default_schedule = "linear"  # as in section 4.1.2

    def __init__(
        self, config: Config, student: nn.Module, teacher: nn.Module | None, example: Tensor
    ) -> None:
        super().__init__(config, student, teacher, example)
        channels = [[shapes[side][0] for shapes in self.shapes] for side in (0, 1)]
        features = [
            [
                example.new_zeros(1, *shapes[side]).movedim(1, dim)
                for shapes, dim in zip(self.shapes, dims, strict=True)
            ]
            for side, dims in enumerate((self.dims, self.t_dims))
        ]
        try:
            regressors = at_fused.FeatureHints(
                *channels, reduction="none", channel_dim=self.dims, t_channel_dim=self.t_dims
            ).to(example.device)
            regressors(*features)
        except (ValueError, TypeError) as error:
            raise self.error(error) from None
        self.trained = {"hints": regressors}
        self.taps = (
            at_fused.FeatureTaps(student, self.names),
            at_fused.FeatureTaps(self.teacher, self.t_names),
        )
        self._losses: Tensor | None = None

    def recording(self, on: bool) -> AbstractContextManager[None]:
        return nullcontext() if on else self._paused()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        students, teachers = self.taps
        with students.paused(), teachers.paused():
            yield

    def term(self, batch: Batch, beta: float) -> Tensor:
        terms = beta * self.trained["hints"](*(taps.features for taps in self.taps))
        if set(self.weights) != {1.0}:
            terms = terms * terms.new_tensor(self.weights)
        for taps in self.taps:
            taps.clear()
        self._losses = terms.detach()
        return terms.sum()

    @property
    def losses(self) -> Mapping[str, Tensor]:
        return {} if self._losses is None else dict(zip(self.names, self._losses.unbind(), strict=True))

    def compared(self, per_image: float) -> list[str]:
        lines = []
        for (pair, student, teacher), weight in zip(self.pairs(), self.weights, strict=True):
            regressor = "none" if student[0] == teacher[0] else f"1x1, {student[0]} to {teacher[0]}"
            lines.append(f"hints {pair}: beta {weight * per_image:.3g} per image, regressor {regressor}")
        return lines
