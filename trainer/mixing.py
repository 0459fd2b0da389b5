"""MixUp and CutMix of a step's images, the same for any number of ranks and after any interruption."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import Config
from trainer.data.dataset import Places
from trainer.data.sampling import generator
from trainer.distributed import Ranks


class Mixing:
    """torchvision's MixUp or CutMix, by a draw for each global batch where both are on.

    They mix each image with the one before it in the batch, the first with the last. A rank reads, ahead of
    its share of the batch, the image that its first one is mixed with.
    """

    def __init__(self, config: Config, classes: int, ranks: Ranks) -> None:
        self.seed, self.classes, self.ranks = config.seed, classes, ranks
        self.transforms = []
        if config.mixup or config.cutmix:
            from models import torchvision_compat  # noqa: F401  (before torchvision, which is slow to import)

            # isort: split
            from torchvision.transforms import v2

            kinds = (v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)
            self.transforms = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]

    def places(self, batch: slice) -> Places:
        """Which images of an epoch this rank reads for a global batch of it."""
        share = self.ranks.share(batch.start, batch.stop)
        if not self.transforms or self.ranks.world == 1:
            return share
        before = (share.start if share.start > batch.start else batch.stop) - 1
        return [before, *range(share.start, share.stop)]

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the epoch's `step`-th batch, of the images at `places`.

        Its images, and its targets: labels (n,) int64, or probabilities (n, classes) where images are mixed.
        """
        if not self.transforms:
            return images, labels
        targets = F.one_hot(labels, self.classes).to(images.dtype)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
            torch.default_generator.manual_seed(generator("mixing", self.seed, epoch, step).initial_seed())
            mix = self.transforms[int(torch.randint(len(self.transforms), ()))]
            images, targets = mix(images, targets)
        own = slice(1 if self.ranks.world > 1 else 0, None)
        return images[own], targets[own]
