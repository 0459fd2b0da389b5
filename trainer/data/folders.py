"""Image files on disk: any folder of classes (ImageNet, Scenes) and CUB-200-2011, read by worker processes.

An image's augmentation is drawn from the seed, the epoch and the image's place in it alone: any number of
ranks and workers sees the same batches, and a resumed run finds them again.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from at_fused.visualize import images
from models import torchvision_compat  # noqa: F401  (before torchvision)
from trainer.config import Config
from trainer.data import workers
from trainer.data.dataset import Batch, LabelledImages, Places, check_limits, normalise, too_many
from trainer.data.files import Files, ImageFolders, Splits
from trainer.data.sampling import epoch_order, places, repeated_from
from trainer.errors import RankError

# isort: split
from torchvision.transforms import v2

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, in units of the uint8 pixels

Key = tuple[int, int]  # index of an image, seed of its augmentation
Fault = tuple[int, str]  # index of an image that can't be read, and why


@dataclass(frozen=True)
class Sample:
    image: Tensor | None  # (H, W, 3) uint8
    label: int
    faults: list[Fault]


class ImageFiles(Dataset[Sample]):
    """Decoded, augmented images by (index, seed).

    An image that can't be read is left out (None), or, where batches must keep their size, replaced by the
    next one that can.
    """

    def __init__(self, files: Files, transform: Callable[[Image.Image], Image.Image], replace: bool) -> None:
        self.files, self.transform, self.replace = files, transform, replace

    def __getitem__(self, key: Key) -> Sample:
        first, seed = key
        faults: list[Fault] = []
        for step in range(len(self.files) if self.replace else 1):
            index = (first + step) % len(self.files)
            try:
                image = self._read(index)
            except Exception as error:  # each of Pillow's decoders raises kinds of its own
                reason = str(error).replace(f" {self.files.paths[index]!r}", "") or type(error).__name__
                faults.append((index, reason.splitlines()[0]))
                continue
            return Sample(self._augment(image, seed), int(self.files.labels[index]), faults)
        return Sample(None, -1, faults)

    def _read(self, index: int) -> Image.Image:
        box = None
        if self.files.boxes is not None:
            left, top, right, bottom = map(round, self.files.boxes[index])
            box = left, top, right, bottom
        return images.read(self.files.paths[index], box)

    def _augment(self, image: Image.Image, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.1 ms: CUDA's too
            image = self.transform(image)
        return torch.from_numpy(np.array(image))


class FileSet(LabelledImages):
    """A data set of image files."""

    train: Files
    test: Files

    def __init__(self, config: Config, device: torch.device, splits: Splits, *, resized_crops: bool) -> None:
        self.train, self.test, self.names = splits.train, splits.test, splits.names
        self.left_out = images.told(splits.left_out)
        self.root = str(config.data_dir)
        self.size, self.device = config.image_size, device
        self.mean, self.std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
        self._faults, self._replaced = Faults(config.max_unreadable), set[int]()
        plain, augmented = transforms(config, resized_crops)
        self._train = _Loader(ImageFiles(self.train, augmented, replace=True), config.workers, device)
        self._test = _Loader(ImageFiles(self.test, plain, replace=False), config.workers, device)

    @property
    def replaced(self) -> Collection[int]:
        return self._replaced

    @property
    def unreadable(self) -> list[str]:
        return list(self._faults.seen)

    def identity(self) -> dict[str, Any]:
        """With a digest of all paths in the data folder, and their labels."""
        digest = hashlib.blake2b(digest_size=16)
        for files in (self.train, self.test):
            for path, label in zip(files.paths, files.labels.tolist(), strict=True):
                digest.update(f"{path.removeprefix(self.root)}\0{label}\n".encode(errors="surrogateescape"))
        return super().identity() | {"files": digest.hexdigest()}

    def example(self) -> Tensor:
        """A blank image (1, 3, H, W) of the size that batches have."""
        return torch.zeros(1, 3, self.size, self.size, device=self.device)

    def training_digest(self) -> str:
        """Of paths and labels, as `identity` has it: the files are not read."""
        return str(self.identity()["files"])

    def training_batches(
        self, seed: int, epoch: int, parts: Iterable[Places], cycle: int = 0
    ) -> Iterator[Batch]:
        size, drawn = len(self.train), repeated_from(epoch, cycle)
        order, draw = epoch_order(size, seed, drawn)
        seeds = torch.randint(2**62, (size,), generator=draw)
        if drawn != epoch:
            earlier, order = order, epoch_order(size, seed, epoch)[0]
            seeds = seeds[places(order, earlier)]
        planned = list(zip(order.tolist(), seeds.tolist(), strict=True))
        keys = [planned[p] if isinstance(p, slice) else [planned[i] for i in p] for p in parts]
        return self._batches(self._train, self.train, keys)

    def evaluation_batches(self, parts: Iterable[slice]) -> Iterator[Batch]:
        keys = [[(index, 0) for index in range(part.start, part.stop)] for part in parts]
        return self._batches(self._test, self.test, keys)

    def _batches(self, loader: _Loader, files: Files, keys: list[list[Key]]) -> Iterator[Batch]:
        for pixels, labels, faults in loader.batches(keys):
            self._faults.report(faults, files)
            if files is self.train:
                self._replaced.update(index for index, _ in faults)
            if len(labels):
                pixels, labels = (x.to(self.device, non_blocking=True) for x in (pixels, labels))
                yield normalise(pixels, self.mean, self.std), labels


class Faults:
    """Names each unreadable image once, on stderr, and gives up where there are too many.

    Raises:
        RankError: more than `limit` images, or all of a split, can't be read.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen: dict[str, str] = {}

    def report(self, faults: Sequence[Fault], files: Files) -> None:
        for index, reason in faults:
            path = files.paths[index]
            if path not in self.seen:
                self.seen[path] = reason
                name = " ".join(path.split())  # some have a line break
                print(f"skipped {name}, which can't be read ({reason})", file=sys.stderr, flush=True)
        if len(self.seen) > self.limit:
            raise RankError(too_many(self.seen, self.limit))
        if faults and all(path in self.seen for path in files.paths):
            path, reason = next(iter(self.seen.items()))
            raise RankError(f"no image of a split can be read, such as {path} ({reason})")


class _Loader:
    """A DataLoader whose workers outlive the epoch, fed with a new list of batches each time."""

    def __init__(self, dataset: ImageFiles, processes: int, device: torch.device) -> None:
        self._keys: list[list[Key]] = []
        self._loader: DataLoader[Sample] = DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=processes,
            persistent_workers=processes > 0,
            pin_memory=device.type == "cuda",
            collate_fn=_collate,
            worker_init_fn=workers.leave_signals_to_main,
            generator=torch.Generator(),  # else each pass draws from the generator that the run resumes by
        )

    def batches(self, keys: list[list[Key]]) -> Iterator[tuple[Tensor, Tensor, list[Fault]]]:
        self._keys[:] = keys
        batches = iter(self._loader)
        return workers.connected(batches) if self._loader.num_workers else batches


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[Fault]]:
    readable = [sample for sample in samples if sample.image is not None]
    pixels = torch.stack([sample.image for sample in readable]) if readable else torch.empty(0)  # type: ignore[misc]
    labels = torch.tensor([sample.label for sample in readable], dtype=torch.int64)
    return (
        workers.hand_over(pixels),
        workers.hand_over(labels),
        [fault for sample in samples for fault in sample.faults],
    )


def transforms(config: Config, resized_crops: bool) -> tuple[Callable, Callable]:
    """What is done to test images and to training images, from image to image.

    Evaluation is a single centre crop. Sizes keep the proportion of 224 to 256.
    """
    size = config.image_size
    scaled = v2.Resize(round(size * 256 / 224))
    plain = [scaled, v2.CenterCrop(size)]
    crop = [v2.RandomResizedCrop(size)] if resized_crops else [scaled, v2.RandomCrop(size)]
    augmented = {
        "crop-flip": [*crop, v2.RandomHorizontalFlip()],
        "flip": [*plain, v2.RandomHorizontalFlip()],
        "none": plain,
    }[config.augment]
    return v2.Compose(plain), v2.Compose(augmented)


def load(data_set: ImageFolders, config: Config, device: torch.device) -> FileSet:
    splits = data_set.read(Path(str(config.data_dir)))
    check_limits(config, len(splits.train), len(splits.test))
    train = splits.train.subset(config.limit_train, config.seed)
    test = splits.test.subset(config.limit_test, 0)
    splits = replace(splits, train=train, test=test)
    return FileSet(config, device, splits, resized_crops=data_set.resized_crops)
