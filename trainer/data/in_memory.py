"""Image sets held whole, as uint8, on the training device; batched augmentation there.

Every random number of an epoch is drawn on the CPU, for the whole training set, from (seed, epoch). So the
batches and their augmentation are the same on any device and for any number of ranks, and a resumed run finds
them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.config import Config, ConfigError
from trainer.data.dataset import Batch, LabelledImages, check_limits, normalise
from trainer.data.sampling import generator, stratified


@dataclass(frozen=True)
class Split:
    """Images (N, H, W, 3) uint8, their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, limit: int | None, seed: int) -> Split:
        if limit is None:
            return self
        chosen = stratified(self.labels, limit, seed)
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageSet(LabelledImages):
    """A data set and how it is augmented: `pad` pixels of border for random crops, and random flips."""

    train: Split
    test: Split
    classes: int
    mean: Tensor
    std: Tensor
    pad: int
    flip: bool
    padding: str = "reflect"

    def example(self) -> Tensor:
        return evaluation_batch(self, slice(0, 1))[0]

    def training_batches(self, seed: int, epoch: int, parts: Iterable[slice]) -> Iterator[Batch]:
        plan = plan_epoch(self, seed, epoch)
        return (training_batch(self, plan, part) for part in parts)

    def evaluation_batches(self, parts: Iterable[slice]) -> Iterator[Batch]:
        return (evaluation_batch(self, part) for part in parts)


@dataclass(frozen=True)
class EpochPlan:
    """Order of one epoch's images and the augmentation of each: every field (N,), by place in the order."""

    order: Tensor
    down: Tensor  # crop offset in 0..2*pad
    right: Tensor
    flip: Tensor


def load(config: Config, device: torch.device) -> ImageSet:
    """CIFAR or the digits. Missing or damaged files: ConfigError naming what is expected."""
    train, test, classes, mean, std = _load_digits() if config.dataset == "digits" else _load_cifar(config)
    check_limits(config, len(train), len(test))
    pad, flip = {"digits": (2, False)}.get(config.dataset, (4, True))
    return ImageSet(
        train=train.subset(config.limit_train, config.seed).to(device),
        test=test.subset(config.limit_test, 0).to(device),
        classes=classes,
        mean=torch.tensor(mean, device=device),
        std=torch.tensor(std, device=device),
        pad=pad if config.augment == "crop-flip" else 0,
        flip=flip and config.augment != "none",
        padding=config.crop_padding,
    )


def plan_epoch(dataset: ImageSet, seed: int, epoch: int) -> EpochPlan:
    """Draw the order and the augmentation of one epoch."""
    images = dataset.train.images
    size = len(images)
    draw = generator(seed, epoch)
    order = torch.randperm(size, generator=draw)
    down, right = torch.randint(2 * dataset.pad + 1, (2, size), generator=draw)
    flip = torch.randint(2, (size,), generator=draw).bool() & dataset.flip
    return EpochPlan(*(t.to(images.device) for t in (order, down, right, flip)))


def training_batch(dataset: ImageSet, plan: EpochPlan, part: slice) -> Batch:
    """The augmented images at places `part` of the epoch."""
    chosen = plan.order[part]
    draws = plan.down[part], plan.right[part], plan.flip[part]
    images = augment(dataset.train.images, chosen, *draws, dataset.pad, dataset.padding)
    return normalise(images, dataset.mean, dataset.std), dataset.train.labels[chosen]


def evaluation_batch(dataset: ImageSet, part: slice) -> Batch:
    """The test images `part`."""
    return normalise(dataset.test.images[part], dataset.mean, dataset.std), dataset.test.labels[part]


def augment(
    images: Tensor,
    chosen: Tensor,
    down: Tensor,
    right: Tensor,
    flip: Tensor,
    pad: int,
    padding: str = "reflect",
) -> Tensor:
    """Pad by reflection or zeros, crop back to size at (down, right), mirror where `flip`: one gather.

    `images` (N, H, W, C) uint8, contiguous; `chosen`, `down`, `right`, `flip` (n,). Returns
    (n, H, W, C) uint8.
    """
    height, width = images.shape[1:3]
    rows = down[:, None] + torch.arange(height, device=images.device) - pad
    columns = torch.arange(width, device=images.device)
    columns = right[:, None] + torch.where(flip[:, None], width - 1 - columns, columns) - pad
    inside_rows, inside_columns = _reflect(rows, height), _reflect(columns, width)
    pixels = (chosen[:, None, None] * height + inside_rows[:, :, None]) * width + inside_columns[:, None, :]
    # index_select takes whole pixels: on a CPU a fifth of the time of indexing by three tensors
    flat = images.view(-1, images.shape[3])  # flatten would copy a strided set, whole, for every batch
    crops = flat.index_select(0, pixels.flatten()).view(*pixels.shape, images.shape[3])
    if padding == "zeros":
        border = (inside_rows != rows)[:, :, None] | (inside_columns != columns)[:, None, :]
        crops.masked_fill_(border[..., None], 0)
    return crops


def _reflect(position: Tensor, size: int) -> Tensor:
    """Mirror positions beyond an edge back inside, the edge itself not repeated."""
    return size - 1 - (size - 1 - position.abs()).abs()


def _load_digits() -> tuple[Split, Split, int, list[float], list[float]]:
    """scikit-learn's 1,797 digits: 8x8 grey levels 0..16, bilinearly enlarged to 16x16, in 3 equal channels.

    1,000 images train and 797 test, the same ones always, each class in proportion.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    grey = torch.nn.functional.interpolate(grey, scale_factor=2, mode="bilinear", align_corners=False)
    images = grey.round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), train_size=1000, stratify=digits.target, random_state=0
    )
    return Split(images[train], labels[train]), Split(images[test], labels[test]), 10, [77.8] * 3, [81.1] * 3


def _load_cifar(config: Config) -> tuple[Split, Split, int, list[float], list[float]]:
    """CIFAR-10 or CIFAR-100, as torchvision reads and verifies them, and the pixels' mean and deviation."""
    from models import torchvision_compat  # noqa: F401  (before torchvision)

    # isort: split
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR100 if config.dataset == "cifar100" else CIFAR10
    root = Path(str(config.data_dir))
    if root.name == kind.base_folder:
        root = root.parent
    folder = root / kind.base_folder
    files = ", ".join(name for name, _ in (*kind.train_list, *kind.test_list))
    if not folder.is_dir():
        raise ConfigError(f"data-dir {root}: no folder {kind.base_folder} (expected there: {files})")
    try:
        parts = [kind(str(root), train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision raises RuntimeError, pickle and OSError raise their own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"data-dir {root}: {kind.base_folder} is incomplete or damaged (expected: {files}; {reason})"
        ) from None
    # torchvision transposes its images from channels-first, and leaves it at the strides
    pixels = [torch.from_numpy(part.data).contiguous() for part in parts]
    train, test = (Split(x, torch.tensor(part.targets)) for x, part in zip(pixels, parts, strict=True))
    if config.dataset == "cifar100":
        return train, test, 100, [129.3, 124.1, 112.4], [68.2, 65.4, 70.4]
    return train, test, 10, [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]
