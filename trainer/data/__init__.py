"""The images of a run: CIFAR and digits, held in memory, or files in folders."""

from __future__ import annotations

import torch

from trainer.config import Config
from trainer.data.dataset import LabelledImages

__all__ = ["LabelledImages", "load"]


def load(config: Config, device: torch.device) -> LabelledImages:
    """The data set of `config`. Missing or damaged files: ConfigError naming what is expected."""
    if config.dataset in ("imagefolder", "cub"):
        from trainer.data import folders  # torchvision takes seconds to import: only those who ask for it pay

        return folders.load(config, device)
    from trainer.data import in_memory

    return in_memory.load(config, device)
