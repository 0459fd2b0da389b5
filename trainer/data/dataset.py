"""What the training asks of a data set, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from trainer.data.sampling import epoch_order
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config import Config

Batch = tuple[Tensor, Tensor]  # images (n, 3, H, W) fp32, in channels-last memory, and labels (n,) int64
Places = slice | list[int]  # of images in the order of an epoch


class Labelled(Protocol):
    """The training images or the test images."""

    @property
    def labels(self) -> Tensor: ...  # (N,) int64

    def __len__(self) -> int: ...


class LabelledImages(ABC):
    """Training and test images, and how they become batches on the run's device.

    The batches of an epoch depend on its seed and number, and on the cycle of the augmentation, alone: not on
    the device, the number of ranks or of workers, nor on where a run was interrupted.
    """

    train: Labelled
    test: Labelled
    names: list[str]  # of the classes, by label
    left_out = ""  # of the files, by their kinds, in words
    mean: Tensor  # (3,) in units of the uint8 pixels
    std: Tensor

    @property
    def classes(self) -> int:
        return len(self.names)

    @abstractmethod
    def example(self) -> Tensor:
        """An image (1, 3, H, W), as batches have them."""

    def training_order(self, seed: int, epoch: int) -> Tensor:
        """Indices (N,) of the training images in the order of the epoch, on the CPU."""
        return epoch_order(len(self.train), seed, epoch)[0]

    @abstractmethod
    def training_batches(
        self, seed: int, epoch: int, parts: Iterable[Places], cycle: int = 0
    ) -> Iterator[Batch]:
        """The augmented images at `parts` of the epoch's order.

        With a `cycle`, each image is augmented as it was in epoch `epoch % cycle`, wherever it stands now.
        """

    @abstractmethod
    def evaluation_batches(self, parts: Iterable[slice]) -> Iterator[Batch]:
        """The test images `parts`, without augmentation."""

    @property
    def replaced(self) -> Collection[int]:
        """Indices of the training images in whose place this process was given others."""
        return ()

    @property
    def unreadable(self) -> list[str]:
        """Paths of the images that this process could not read so far."""
        return []

    def identity(self) -> dict[str, Any]:
        """What a run's data set must have in common with that of its continuation."""
        return {"train": len(self.train), "test": len(self.test), "classes": self.classes}

    @abstractmethod
    def training_digest(self) -> str:
        """The same for data sets of the same training images."""


def check_limits(config: Config, train: int, test: int) -> None:
    """ConfigError where limit-train or limit-test ask for more images than there are."""
    for key, limit, size in (("train", config.limit_train, train), ("test", config.limit_test, test)):
        if limit is not None and limit > size:
            raise ConfigError(f"limit-{key} {limit} is more than the {size} images of {config.dataset}")


def too_many(unreadable: Collection[str], limit: int) -> str:
    return f"{len(unreadable)} images can't be read, such as {min(unreadable)}; max-unreadable is {limit}"


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(n, H, W, C) uint8 to (n, C, H, W) in channels-last memory: (x - mean) / std per channel."""
    width = images.shape[2]
    rows = images.flatten(2).to(mean.dtype)  # long: loops over only three channels are slow on a CPU
    return rows.sub_(mean.repeat(width)).div_(std.repeat(width)).view(images.shape).permute(0, 3, 1, 2)
