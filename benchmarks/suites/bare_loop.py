"""A training loop as one writes it by hand, without log, files or checks, for suite "trainer".

It has the images, the model, the batch size and the arithmetic of train.py, and none of its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import at_fused
from models import TappedModel, torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

Batches = Iterable[tuple[Tensor, Tensor]]


class InMemory:
    """Shuffled batches of images (N, H, W, 3) uint8: random crops of the reflected image, random flips.

    With `steps`, an epoch ends after so many batches.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch: int, pad: int, flip: bool, steps: int | None = None
    ) -> None:
        self.size, self.batch, self.flip, self.steps = images.shape[1], batch, flip, steps
        self.labels = labels
        planes = images.permute(0, 3, 1, 2)
        self.mean = planes.float().mean((0, 2, 3))[:, None, None]
        self.std = planes.float().std((0, 2, 3))[:, None, None]
        padded = F.pad(planes.float(), (pad,) * 4, mode="reflect").to(torch.uint8)
        self.crops = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)  # (N, 3, y, x, H, W), a view

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.labels.device
        order = torch.randperm(len(self.labels), device=device)
        for chosen in order.split(self.batch)[: self.steps]:
            y, x = torch.randint(self.crops.shape[2], (2, len(chosen)), device=device)
            images = (self.crops[chosen, :, y, x] - self.mean) / self.std
            if self.flip:
                mirrored = torch.rand(len(chosen), 1, 1, 1, device=device) < 0.5
                images = torch.where(mirrored, images.flip(3), images)
            yield images, self.labels[chosen]


class FromFolder:
    """Shuffled batches of the image files at `indices` of a folder of classes, read by worker processes."""

    def __init__(self, root: Path, indices: Sequence[int], batch: int, size: int, workers: int) -> None:
        augment = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        files = Subset(ImageFolder(root, augment), indices)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        self.loader = DataLoader(files, batch, shuffle=True, **options)  # type: ignore[arg-type]
        self.mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
        self.std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            yield (images - self.mean) / self.std, labels


def epoch(student: TappedModel, teacher: TappedModel | None, batches: Batches) -> Callable[[], None]:
    """A function that trains `student` for an epoch, in bf16 and channels-last; with AT from a teacher."""
    device = next(student.parameters()).device
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    attention = at_fused.AttentionLoss()
    student_taps = at_fused.FeatureTaps(student, student.taps["groups"] if teacher else [])
    teacher_taps = at_fused.FeatureTaps(teacher or nn.Module(), teacher.taps["groups"] if teacher else [])

    def run() -> None:
        for images, labels in batches:
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16):
                if teacher:
                    with torch.no_grad():
                        teacher(images)
                loss = F.cross_entropy(student(images).float(), labels)
                if teacher:
                    loss = loss + attention(student_taps.features, teacher_taps.features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run
