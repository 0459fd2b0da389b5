"""Images for `python -m at_fused.visualize`: files, folders, or test images of the trainer's data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._architectures import Architecture, repository

BORDER = 1 / 16  # cut from each side: what a crop of 224 out of 256 leaves


@dataclass(frozen=True)
class Images:
    """Images to look at, and how a network gets them.

    `shown` takes a side in pixels and returns (B, 3, H, W) in 0..1; `given` returns a network's input
    (B, 3, H, W), normalised; `files` are all that these were chosen from;
    `targets` (B,) int64 are their classes, where they are known; `left_out` says what was passed over.
    """

    shown: Callable[[int], Tensor]
    given: Callable[[Architecture], Tensor]
    labels: list[str]
    files: Sequence[str | Path] = ()
    targets: Tensor | None = None
    classes: list[str] | None = None
    left_out: str = ""


def read_files(paths: Sequence[str], count: int) -> Images:
    """Image files, and of each folder `count` images at even distances, subfolders included."""
    from PIL import Image, ImageOps  # matplotlib needs it, too

    from .images import LeftOut, find_images, read, told

    left_out = LeftOut()
    all_files: list[Path] = []
    files: list[tuple[Path, str]] = []  # those chosen, with their labels
    for name in paths:
        path = Path(name)
        if path.is_dir():
            try:
                names, passed_over = find_images(path)
            except OSError as error:
                raise ValueError(f"images {error.filename}: {error.strerror}") from None
            if not names:
                others = f" (left out: {told(passed_over)})" if passed_over else ""
                raise ValueError(f"images {path}: no image files in this folder{others}")
            left_out += passed_over
            found = sorted(map(Path, names))
            all_files += found
            few = min(count, len(found))
            chosen = [found[i * len(found) // few] for i in range(few)]
            files += [(f, f.parent.name if f.parent != path else f.stem) for f in chosen]
        else:
            all_files.append(path)
            files.append((path, path.stem))
    images = []
    for path, _ in files:
        try:
            images.append(read(path))
        except FileNotFoundError:
            raise ValueError(f"images {path}: no such file or folder") from None
        except Exception as error:  # each of Pillow's readers raises its own kinds
            raise ValueError(f"images {path}: not an image ({error})") from None

    def shown(size: int) -> Tensor:
        fitted = [
            ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC, BORDER * (image.size != (size, size)))
            for image in images
        ]
        return torch.stack([_tensor(image) for image in fitted])

    def given(architecture: Architecture) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in architecture.statistics)
        return (shown(architecture.size) - mean) / std

    return Images(shown, given, [label for _, label in files], all_files, left_out=told(left_out))


def read_dataset(
    name: str, data_dir: str | None, indices: Sequence[int], file_size: int, size: int | None = None
) -> Images:
    """Test images of one of the trainer's data sets by their place, prepared as the trainer prepares them.

    Files are cropped to `file_size`; a given `size` is that of the images shown and given to networks.
    """
    config_module, data = repository("trainer.config"), repository("trainer.data")
    if config_module is None or data is None:
        raise ValueError("--dataset needs a checkout of the repository (run from its root); use --images")
    keys = {"student": "-", "dataset": name, "data-dir": data_dir, "image-size": file_size}
    dataset = data.load(config_module.make_config(keys), torch.device("cpu"))
    outside = [i for i in indices if not 0 <= i < len(dataset.test)]
    if outside:
        raise ValueError(f"index {outside[0]}: {name} has the test images 0 to {len(dataset.test) - 1}")
    batches = list(dataset.evaluation_batches([slice(i, i + 1) for i in indices]))
    x, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    pictures = (x * dataset.std[:, None, None] + dataset.mean[:, None, None]) / 255
    labels = [dataset.names[target] for target in targets.tolist()]
    files = getattr(dataset.test, "paths", ())
    return Images(
        lambda side: pictures, lambda architecture: x, labels, files, targets, dataset.names, dataset.left_out
    )


def _tensor(image: Any) -> Tensor:
    """(3, H, W) in 0..1 of a PIL image in RGB."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255
