"""Attention transfer between two torchvision models: ResNet-18 learns from a pretrained ResNet-34.

python examples/torchvision_pair.py --data imagenet/train     (one folder of images per class)
python examples/torchvision_pair.py --tiny                    (random weights and images: a trial run)
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import at_fused

GROUPS = ["layer3", "layer4"]  # the paper's choice for ImageNet: the last two groups


def distill(student: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int = 1) -> list[float]:
    """Trains `student`; returns the attention term of every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student.to(device).train()
    teacher.to(device).eval().requires_grad_(False)  # else autocast keeps bf16 copies of its weights
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    history = []
    with at_fused.AttentionTransfer(student, teacher, GROUPS, beta=1000) as transfer:
        for _ in range(epochs):
            for images, labels in loader:
                images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
                with torch.autocast(device, torch.bfloat16):
                    with torch.no_grad():
                        teacher(images)
                    cross_entropy = F.cross_entropy(student(images), labels)
                    attention = transfer()  # fp32, of maps that were summed in fp32
                optimizer.zero_grad()
                (cross_entropy + attention).backward()
                optimizer.step()
                history.append(attention.detach())
    return torch.stack(history).tolist()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="imagenet/train")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    data: Dataset
    if arguments.tiny:
        data = TensorDataset(torch.randn(8, 3, 64, 64), torch.randint(1000, (8,)))
        teacher = models.resnet34()
    else:
        scale = [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
        augment = [v2.ToImage(), v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
        data = ImageFolder(arguments.data, v2.Compose([*augment, *scale]))
        teacher = models.resnet34(weights="DEFAULT")
    loader = DataLoader(data, batch_size=4 if arguments.tiny else 256, shuffle=True, drop_last=True)
    student = models.resnet18()
    history = distill(student, teacher, loader, arguments.epochs)
    print(f"attention term: {history[0]:.2f} at the first step, {history[-1]:.2f} at the last")


if __name__ == "__main__":
    main()
