"""A teacher that runs once: its attention maps are kept, and the student learns from them without it.

python examples/offline_teacher.py      (half a minute on a CPU; needs scikit-learn, which brings the digits)
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import at_fused

sys.path.insert(0, str(Path(__file__).parent))
from plain_loop import GROUPS, network, train  # type: ignore[import-not-found]


@torch.no_grad()
def maps_of(teacher: nn.Module, images: Tensor) -> list[Tensor]:
    """The teacher's normalised maps of all images, in 16 bits: one tensor (N, H, W) per group."""
    teacher.eval()
    found = []
    with at_fused.FeatureTaps(teacher, GROUPS) as taps:
        for some in images.split(256):
            teacher(some)
            found.append([at_fused.attention_map(x, normalize="l2").half() for x in taps.features])
    return [torch.cat(maps) for maps in zip(*found, strict=True)]


def distill(student: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int) -> list[float]:
    """The images are the same in every epoch: so are their maps. Returns the attention term of every step."""
    images, labels = loader.dataset.tensors  # type: ignore[attr-defined]
    kept = TensorDataset(images, labels, *maps_of(teacher, images))
    loader = DataLoader(kept, loader.batch_size, shuffle=True)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    student.train()
    history = []
    with at_fused.AttentionTransfer(student, None, GROUPS, beta=1000) as transfer:
        for _ in range(epochs):
            for some, targets, *maps in loader:
                cross_entropy = F.cross_entropy(student(some), targets)
                attention = transfer(maps)
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
