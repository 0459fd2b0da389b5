"""Attention transfer in a plain PyTorch loop: a small CNN learns handwritten digits from a wider one.

python examples/plain_loop.py      (a minute on a CPU; needs scikit-learn, which brings the digits)
"""

import argparse
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import at_fused

GROUPS = ["group1", "group2", "group3"]  # module names, in both networks


def network(width: int) -> nn.Sequential:
    def group(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    layers = [group(1, width, 1), group(width, 2 * width, 2), group(2 * width, 4 * width, 2)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
    return nn.Sequential(OrderedDict(zip([*GROUPS, "head"], [*layers, head], strict=True)))


def train(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def distill(student: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int) -> list[float]:
    """The same loop with a teacher; returns the attention term of every step."""
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    student.train()
    teacher.eval()  # its BatchNorm must not learn
    history = []
    with at_fused.AttentionTransfer(student, teacher, GROUPS, beta=1000) as transfer:
        for _ in range(epochs):
            for images, labels in loader:
                with torch.no_grad():
                    teacher(images)
                cross_entropy = F.cross_entropy(student(images), labels)
                attention = transfer()  # of these two passes
                optimizer.zero_grad()
                (cross_entropy + attention).backward()
                optimizer.step()
                history.append(attention.detach())
    return torch.stack(history).tolist()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args(argv).epochs
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64, shuffle=True)
    teacher, student = network(32), network(4)
    train(teacher, loader, epochs)
    history = distill(student, teacher, loader, epochs)
    print(f"attention term: {history[0]:.2f} at the first step, {history[-1]:.2f} at the last")


if __name__ == "__main__":
    main()
