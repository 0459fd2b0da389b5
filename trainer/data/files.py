"""Which image files a data set has: any folder of classes (ImageNet, Scenes), and CUB-200-2011."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import torchvision_compat  # noqa: F401  (before torchvision)
from trainer.config import ConfigError
from trainer.data.sampling import stratified

# isort: split
from torchvision.datasets import ImageFolder

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Files:
    """Paths of images, their labels (N,) int64, and the boxes to cut out of them, where there are any."""

    paths: list[str]
    labels: Tensor
    boxes: list[Box] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, limit: int | None, seed: int) -> Files:
        if limit is None:
            return self
        chosen = stratified(self.labels, limit, seed)
        boxes = None if self.boxes is None else [self.boxes[i] for i in chosen]
        return Files([self.paths[i] for i in chosen], self.labels[chosen], boxes)


def read_folders(root: Path) -> tuple[Files, Files, int]:
    """root/train/CLASS/*.jpg and root/val/CLASS/*.jpg (or test/)."""
    held_out = next((name for name in ("val", "test") if (root / name).is_dir()), "val")
    splits = []
    for name in ("train", held_out):
        try:
            splits.append(ImageFolder(root / name))
        except OSError as error:
            reason = str(error).split(" Supported extensions")[0]
            raise ConfigError(
                f"data-dir {root}: expected the folders train and val (or test), with a folder of images for "
                f"each class ({reason})"
            ) from None
    train, test = splits
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(f"data-dir {root}: train and {held_out} differ in their classes, such as {odd[0]}")
    files = [Files([path for path, _ in split.samples], torch.tensor(split.targets)) for split in splits]
    return files[0], files[1], len(train.classes)


def read_cub(root: Path) -> tuple[Files, Files, int]:
    """CUB-200-2011's own text files: a line per image, its number first."""
    root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    names = _read_table(root / "images.txt", str)
    labels = _read_table(root / "image_class_labels.txt", int)
    trains = _read_table(root / "train_test_split.txt", int)
    boxes = _read_table(root / "bounding_boxes.txt", float)
    for number in names:
        columns = (names, 1), (labels, 1), (trains, 1), (boxes, 4)
        if any(len(table.get(number, ())) != width for table, width in columns):
            raise ConfigError(f"data-dir {root}: image {number} has no name, label, split or bounding box")
        if labels[number][0] < 1:
            raise ConfigError(
                f"data-dir {root}: image {number}: labels begin with 1, got {labels[number][0]}"
            )
    files = []
    for train in (1, 0):
        numbers = [number for number in names if trains[number] == [train]]
        if not numbers:
            raise ConfigError(f"data-dir {root}: train_test_split.txt marks no image with {train}")
        files.append(
            Files(
                [str(root / "images" / names[number][0]) for number in numbers],
                torch.tensor([labels[number][0] - 1 for number in numbers]),
                [_box(*boxes[number]) for number in numbers],
            )
        )
    return files[0], files[1], max(labels[number][0] for number in names)


def _box(left: float, top: float, width: float, height: float) -> Box:
    return left, top, left + width, top + height


def _read_table(path: Path, kind: Callable) -> dict[int, list]:
    """The values of each line after its number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"data-dir {path.parent}: {path.name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"data-dir {path.parent}: {path.name} is not UTF-8") from None
    table = {}
    for place, line in enumerate(lines, 1):
        try:
            number, *values = line.split()
            table[int(number)] = [kind(value) for value in values]
        except ValueError:
            raise ConfigError(f"{path}, line {place}: cannot be understood: {line[:60]!r}") from None
    return table
