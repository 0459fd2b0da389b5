"""Which image files a data set has: any folder of classes (ImageNet, Scenes), and CUB-200-2011."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from at_fused.visualize.images import LeftOut, class_folders, find_images, told
from trainer.data.sampling import stratified
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.data.folders import FileSet

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


@dataclass(frozen=True)
class Splits:
    """The training and the test images, the names of their classes, and which files are neither."""

    train: Files
    test: Files
    names: list[str]
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class ImageFolders:
    """A data set of files, as `DATASETS` has it: `read` finds them in data-dir.

    ImageNet trains on `resized_crops`, random in size and proportion, as in the authors' code; CUB on random
    crops of the rescaled box (section 4.2.1).
    """

    read: Callable[[Path], Splits]
    resized_crops: bool
    needs_folder: bool = True

    def load(self, config: Config, device: torch.device) -> FileSet:
        from trainer.data import folders  # torchvision takes seconds to import: only those who ask for it pay

        return folders.load(self, config, device)


def read_folders(root: Path) -> Splits:
    """root/train/CLASS/*.jpg and root/val/CLASS/*.jpg (or test/); any image that Pillow reads."""
    held_out = next((name for name in ("val", "test") if (root / name).is_dir()), "val")
    left_out = LeftOut()
    splits, names = [], []
    for split in ("train", held_out):
        try:
            classes, beside = class_folders(root / split)
            found = [find_images(root / split / name) for name in classes]
        except OSError as error:
            raise _unexpected(root, f"{error.filename}: {error.strerror}") from None
        if not classes:
            raise _unexpected(root, f"{split} holds no folder")
        if empty := [i for i, (paths, _) in enumerate(found) if not paths]:
            first, others = empty[0], f", nor in {len(empty) - 1} more" if len(empty) > 1 else ""
            inside = f" (left out there: {told(found[first][1])})" if found[first][1] else ""
            raise _unexpected(root, f"no image in {split}/{classes[first]}{inside}{others}")
        left_out += sum((passed_over for _, passed_over in found), beside)
        labels = [torch.full((len(paths),), label) for label, (paths, _) in enumerate(found)]
        splits.append(Files([path for paths, _ in found for path in paths], torch.cat(labels)))
        names.append(classes)
    if names[0] != names[1]:
        name, reason = difference(names[0], names[1], held_out)
        raise ConfigError(
            f"data-dir {root}: train and {held_out} differ in their classes, such as {name}: {reason}"
        )
    return Splits(splits[0], splits[1], names[0], left_out)


def _unexpected(root: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"data-dir {root}: expected the folders train and val (or test), with a folder of images for each "
        f"class ({reason})"
    )


def difference(train: Sequence[str], test: Sequence[str], held_out: str) -> tuple[str, str]:
    """The first class that only train or `held_out` has, and which lacks it, or how that one spells it."""
    name, *more = sorted(set(train) ^ set(test))
    lacking, others = (held_out, test) if name in train else ("train", train)
    reason = f"{lacking} has no {name}"
    if twins := [other for other in more if other in others and _folded(other) == _folded(name)]:
        same = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", twins[0])
        way = "which is its other Unicode form" if same else "which is spelt in another way"
        reason = f"{lacking} has no {name!a}, but {twins[0]!a}, {way}"
    return name, reason + (f" ({len(more)} more names differ)" if len(more) > len(twins) else "")


def _folded(name: str) -> str:
    """What names that look alike have in common."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def read_cub(root: Path) -> Splits:
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
    classes = max(labels[number][0] for number in names)
    folders = sorted({Path(line[0]).parent.name for line in names.values()})
    return Splits(
        files[0], files[1], folders if len(folders) == classes else [f"class {i}" for i in range(classes)]
    )


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
