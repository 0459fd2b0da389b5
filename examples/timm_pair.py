"""Attention transfer between two timm models of different families: MobileNetV3 learns from ResNet-50.

python examples/timm_pair.py --data imagenet/train     (one folder of images per class)
python examples/timm_pair.py --tiny                    (random weights and images: a trial run)
"""

import argparse
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder

import at_fused


def last_stages(model: Any, count: int = 2) -> list[str]:
    """Names of a timm model's last stages; equal strides give maps of equal size, whatever the channels."""
    return [stage["module"] for stage in model.feature_info[-count:]]


def distill(student: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int = 1) -> list[float]:
    """Trains `student`; returns the attention term of every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student.to(device).train()
    teacher.to(device).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.05)
    names = last_stages(student), last_stages(teacher)
    history = []
    with at_fused.AttentionTransfer(student, teacher, *names, beta=1000) as transfer:
        for _ in range(epochs):
            for images, labels in loader:
                images, labels = images.to(device), labels.to(device)
                with torch.no_grad():
                    teacher(images)
                cross_entropy = F.cross_entropy(student(images), labels)
                attention = transfer()
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
    student = timm.create_model("mobilenetv3_small_100", num_classes=1000)
    teacher = timm.create_model("resnet50", num_classes=1000, pretrained=not arguments.tiny)
    data: Dataset
    if arguments.tiny:
        data = TensorDataset(torch.randn(8, 3, 64, 64), torch.randint(1000, (8,)))
    else:  # both see the same images: normalised as the teacher was trained
        transform = create_transform(**resolve_model_data_config(teacher), is_training=True)
        data = ImageFolder(arguments.data, transform)
    loader = DataLoader(data, batch_size=4 if arguments.tiny else 256, shuffle=True, drop_last=True)
    history = distill(student, teacher, loader, arguments.epochs)
    print(f"attention term: {history[0]:.2f} at the first step, {history[-1]:.2f} at the last")


if __name__ == "__main__":
    main()
