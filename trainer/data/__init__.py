"""The images of a run: the data sets by name, held in memory or read from files in folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainer.data.cifar import read_cifar10, read_cifar100
from trainer.data.dataset import LabelledImages
from trainer.data.digits import read_digits
from trainer.data.files import ImageFolders, read_cub, read_folders
from trainer.data.in_memory import InMemory

if TYPE_CHECKING:
    from trainer.config import Config

__all__ = ["DATASETS", "LabelledImages", "load"]

# CIFAR-10's mean and deviation are those of the authors' code; the others are ours, of the training images.
DATASETS: dict[str, InMemory | ImageFolders] = {
    "digits": InMemory(read_digits, (77.8,) * 3, (81.1,) * 3, pad=2, flip=False, needs_folder=False),
    "cifar10": InMemory(read_cifar10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7), pad=4, flip=True),
    "cifar100": InMemory(read_cifar100, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4), pad=4, flip=True),
    "imagefolder": ImageFolders(read_folders, resized_crops=True),
    "cub": ImageFolders(read_cub, resized_crops=False),
}


def load(config: Config, device: torch.device) -> LabelledImages:
    """The data set of `config`. Missing or damaged files: ConfigError naming what is expected."""
    return DATASETS[config.dataset].load(config, device)
