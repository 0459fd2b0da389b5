"""What a method says of itself, and what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config import Config


@dataclass(frozen=True)
class Batch:
    """The images of a step, and what the networks have made of them."""

    images: Tensor  # (n, 3, H, W), requiring a gradient where the method takes gradients
    targets: Tensor  # (n,) int64, or probabilities (n, classes) where images are mixed
    logits: Tensor  # (n, classes), the student's
    teacher_logits: Tensor | None  # where the method has the teacher run on every batch
    teacher_maps: Sequence[Tensor] | None = None  # where they were taken before, and kept


@dataclass(frozen=True)
class Taught:
    """What a teacher has made of n images, and a student learns from: all that can be kept of its passes."""

    logits: Tensor | None  # (n, classes), where the method distils
    maps: Sequence[Tensor] | None = None  # (n, *spatial), normalised, one per pair that the method compares


class Method:
    """How a student learns. This one: from the labels alone, by cross-entropy.

    The class says what the method needs, what it cannot be combined with, and what beta is where it is unset;
    an instance has the networks. To cross-entropy, or the distillation loss in place of it, it may add a term
    weighted by beta.

    Args:
        student, teacher: the networks, on the run's device; the teacher, where the method needs one, frozen.
        example: an image (1, 3, H, W), on which the method finds what it compares.

    Raises:
        ConfigError: what the method is to compare cannot be compared.
    """

    needs_teacher: ClassVar[bool] = False
    distils: ClassVar[bool] = False  # by the teacher's logits
    has_term: ClassVar[bool] = False
    compares_features: ClassVar[bool] = False  # in its term, those at `taps`: both networks run
    takes_gradients: ClassVar[bool] = False  # in its term, with respect to the images
    teacher_can_be_kept: ClassVar[bool] = False  # what `teach` returns is all it needs of the teacher
    default_beta: ClassVar[float] = 1000.0
    default_schedule: ClassVar[str] = "constant"
    forbids: ClassVar[Mapping[str, str]] = {}  # reasons, by "KEY" that may not be on or "KEY VALUE"

    names: Sequence[str] = ()  # of the student's features that are compared

    def __init__(
        self, config: Config, student: nn.Module, teacher: nn.Module | None, example: Tensor
    ) -> None:
        if self.needs_teacher and teacher is None:
            raise ConfigError(f"method {config.method} needs a teacher")
        self.config, self.student, self.teacher = config, student, teacher
        self.trained: dict[str, nn.Module] = {}  # modules that train beside the student, by name

    def uses_term(self, beta: float) -> bool:
        """Whether a step with this beta has the term.

        Under DDP every parameter must get a gradient in every step: modules beside the student also from 0.
        """
        return self.has_term and (beta > 0 or bool(self.trained))

    def recording(self, on: bool) -> AbstractContextManager[None]:
        """Around passes of the networks and their backward: whether they are recorded for the term."""
        return nullcontext()

    def teach(self, images: Tensor) -> Taught:
        """What the method needs of the teacher on these images, where it is kept."""
        raise NotImplementedError

    def distillation(self, batch: Batch) -> Tensor | None:
        """The loss by the teacher's logits, a scalar; None: cross-entropy counts."""
        return None

    def term(self, batch: Batch, beta: float) -> Tensor:
        """The transfer term of the networks' latest passes, beta included: a scalar."""
        raise NotImplementedError

    @property
    def losses(self) -> Mapping[str, Tensor]:
        """The parts of the last term by `names`, detached."""
        return {}

    def describe(self, batch: int) -> list[str]:
        """What the term compares, and with what weight in a batch of so many images: lines.

        The paper's beta "divided by number of elements in attention map and batch size" (section 4.1.1) is
        what the mean over both amounts to.
        """
        if not self.has_term:
            return []
        config = self.config
        late = f" from epoch {config.at_start_epoch}" if config.at_start_epoch else ""
        return [f"beta {config.beta:g}, {config.beta_schedule}{late}", *self.compared(config.beta / batch)]

    def compared(self, per_image: float) -> list[str]:
        """The lines of `describe` after beta's, which is `per_image` for each image."""
        return []
