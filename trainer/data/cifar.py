"""CIFAR-10 and CIFAR-100, as torchvision reads and verifies them."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.data.in_memory import Split, Splits
from trainer.errors import ConfigError


def read_cifar10(root: Path | None) -> Splits:
    return _read("CIFAR10", root)


def read_cifar100(root: Path | None) -> Splits:
    return _read("CIFAR100", root)


def _read(name: str, data_dir: Path | None) -> Splits:
    """torchvision's data set of that name. Missing or damaged files: ConfigError naming what is expected."""
    from models import torchvision_compat  # noqa: F401  (before torchvision, which takes seconds to import)

    # isort: split
    from torchvision import datasets

    kind, root = getattr(datasets, name), Path(str(data_dir))
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
    return Splits(train, test, list(parts[0].classes))
