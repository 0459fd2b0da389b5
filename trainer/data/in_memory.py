"""Image sets held whole, as uint8, on the training device; batched augmentation there.

Every random number of an epoch is drawn on the CPU, for the whole training set, from (seed, epoch). So the
batches and their augmentation are the same on any device and for any number of ranks, and a resumed run finds
them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trainer.data.dataset import Batch, LabelledImages, Places, check_limits, normalise
from trainer.data.sampling import epoch_order, places, repeated_from, stratified

if TYPE_CHECKING:
    from trainer.config import Config


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


class Splits(NamedTuple):
    """The training and the test images, and the names of their classes."""

    train: Split
    test: Split
    names: list[str]


@dataclass(frozen=True)
class ImageSet(LabelledImages):
    """A data set and how it is augmented: `pad` pixels of border for random crops, and random flips."""

    train: Split
    test: Split
    names: list[str]
    mean: Tensor
    std: Tensor
    pad: int
    flip: bool
    padding: str = "reflect"

    def example(self) -> Tensor:
        return evaluation_batch(self, slice(0, 1))[0]

    def training_digest(self) -> str:
        return hashlib.blake2b(self.train.images.cpu().numpy().data, digest_size=16).hexdigest()

    def training_batches(
        self, seed: int, epoch: int, parts: Iterable[Places], cycle: int = 0
    ) -> Iterator[Batch]:
        plan = plan_epoch(self, seed, epoch, cycle)
        return (training_batch(self, plan, part) for part in parts)

    def evaluation_batches(self, parts: Iterable[slice]) -> Iterator[Batch]:
        return (evaluation_batch(self, part) for part in parts)


@dataclass(frozen=True)
class InMemory:
    """A data set of this kind, as `DATASETS` has it: `read` finds it in data-dir, the rest is as in ImageSet.

    `mean` and `std` are those of its training pixels, 0 to 255.
    """

    read: Callable[[Path | None], Splits]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    needs_folder: bool = True

    def load(self, config: Config, device: torch.device) -> ImageSet:
        train, test, names = self.read(config.data_dir)
        check_limits(config, len(train), len(test))
        return ImageSet(
            train=train.subset(config.limit_train, config.seed).to(device),
            test=test.subset(config.limit_test, 0).to(device),
            names=names,
            mean=torch.tensor(self.mean, device=device),
            std=torch.tensor(self.std, device=device),
            pad=self.pad if config.augment == "crop-flip" else 0,
            flip=self.flip and config.augment != "none",
            padding=config.crop_padding,
        )


@dataclass(frozen=True)
class EpochPlan:
    """Order of one epoch's images and the augmentation of each: every field (N,), by place in the order."""

    order: Tensor
    down: Tensor  # crop offset in 0..2*pad
    right: Tensor
    flip: Tensor


def plan_epoch(dataset: ImageSet, seed: int, epoch: int, cycle: int = 0) -> EpochPlan:
    """Draw the order and the augmentation of one epoch; the latter again every `cycle` epochs, if not 0."""
    images = dataset.train.images
    size, drawn = len(images), repeated_from(epoch, cycle)
    order, draw = epoch_order(size, seed, drawn)
    down, right = torch.randint(2 * dataset.pad + 1, (2, size), generator=draw)
    flip = torch.randint(2, (size,), generator=draw).bool() & dataset.flip
    if drawn != epoch:
        earlier, order = order, epoch_order(size, seed, epoch)[0]
        then = places(order, earlier)
        down, right, flip = down[then], right[then], flip[then]
    return EpochPlan(*(t.to(images.device) for t in (order, down, right, flip)))


def training_batch(dataset: ImageSet, plan: EpochPlan, part: Places) -> Batch:
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
