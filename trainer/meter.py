"""What the images of an epoch add up to: sums that stay on the device, and the metrics they amount to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.config import Config
from trainer.methods import METHODS
from trainer.objectives import Losses, cross_entropy
from trainer.state import SUMS

MANY_CLASSES = 11  # from which the top-5 error is reported: of ten, five would say little


class Meter:
    """The sums of a method, in fp64: those of `trainer.state.SUMS`, then what only some methods or data have.

    Args:
        taps: names of the student's features that the method compares.
    """

    def __init__(self, config: Config, classes: int, taps: Sequence[str]) -> None:
        self.top5 = classes >= MANY_CLASSES
        self.taps = [f"at_loss/{tap}" for tap in taps]
        self.size = SUMS + self.top5 + len(self.taps)
        self.has_at, self.has_kd = METHODS[config.method].has_term, METHODS[config.method].distils

    @torch.no_grad()
    def add(self, sums: Tensor, losses: Losses, logits: Tensor, targets: Tensor) -> None:
        """Add a batch to `sums` (size,), without waiting for the device."""
        means = torch.stack([losses.total, losses.ce, losses.at, losses.kd]).double()
        sums[:4] += means * len(targets)
        sums[4] += wrong(logits, targets)
        sums[5] += len(targets)
        if self.top5:
            sums[SUMS] += wrong(logits, targets, 5)
        sums[SUMS + self.top5 :] += losses.taps.double() * len(targets)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over the images, errors in percent; without the keys that the method does not use.

        A sum that an earlier version did not keep is NaN in the epoch that it began, and left out.
        """
        images = sums[5]
        total, ce, at, kd, wrong = (value / images for value in sums[:5])
        more = [value / images for value in sums[SUMS:]]
        found = {"train_loss": total, "ce_loss": ce}
        if self.has_at:
            found |= {"at_loss": at, **dict(zip(self.taps, more[self.top5 :], strict=True))}
        if self.has_kd:
            found |= {"kd_loss": kd}
        found |= {"train_error": 100 * wrong}
        if self.top5:
            found |= {"train_top5_error": 100 * more[0]}
        return {name: value for name, value in found.items() if not math.isnan(value)}


class EvaluationMeter:
    """Sums over the test images, in fp64: images, cross-entropy, wrong answers, and those by the top 5."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.top5 = classes >= MANY_CLASSES
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.sums[0] += len(labels)
        self.sums[1] += cross_entropy(logits, labels) * len(labels)
        self.sums[2] += wrong(logits, labels)
        if self.top5:
            self.sums[3] += wrong(logits, labels, 5)

    def metrics(self, images: float, loss: float, wrong: float, wrong5: float) -> dict[str, float]:
        """`test_loss`, the mean cross-entropy, and in percent `test_error` and, of many classes,
        `test_top5_error`: the label isn't among the first five."""
        found = {"test_loss": loss / images, "test_error": 100 * wrong / images}
        return found | {"test_top5_error": 100 * wrong5 / images} if self.top5 else found


def wrong(logits: Tensor, targets: Tensor, best: int = 1) -> Tensor:
    """How many labels (n,) are not among the `best` logits (n, classes) of their image.

    Of a mixed image, whose targets are probabilities (n, classes), the share counts that is not.
    """
    found = logits.argmax(1, keepdim=True) if best == 1 else logits.topk(best).indices
    if targets.is_floating_point():
        return (1 - targets.gather(1, found).sum(1)).sum()
    return (found != targets[:, None]).all(1).sum()
