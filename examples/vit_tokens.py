"""Attention transfer between vision transformers: DeiT-tiny learns from a pretrained DeiT-small.

Blocks return tokens (B, 1 + N, C): channels last, and a class token, which has no place in the image.

python examples/vit_tokens.py --data imagenet/train     (one folder of images per class)
python examples/vit_tokens.py --tiny                    (random weights and images: a trial run)
"""

import argparse
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from timm.models import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder

import at_fused


def middle_and_last(model: VisionTransformer) -> list[str]:
    """Two blocks' tokens without the class token: a slice is a view, nothing is copied."""
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    return [f"blocks.{depth // 2 - 1}[:, {prefix}:]", f"blocks.{depth - 1}[:, {prefix}:]"]


def distill(student: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int = 1) -> list[float]:
    """Trains `student`; returns the attention term of every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student.to(device).train()
    teacher.to(device).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.05)
    names = middle_and_last(student), middle_and_last(teacher)
    history = []
    with at_fused.AttentionTransfer(student, teacher, *names, beta=1000, channel_dim=-1) as transfer:
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
    size = 64 if arguments.tiny else 224
    student = timm.create_model("deit_tiny_patch16_224", img_size=size)
    teacher = timm.create_model("deit_small_patch16_224", img_size=size, pretrained=not arguments.tiny)
    if arguments.tiny:
        data = TensorDataset(torch.randn(8, 3, size, size), torch.randint(1000, (8,)))
    else:  # normalised as the teacher was trained
        transform = create_transform(**resolve_model_data_config(teacher), is_training=True)
        data = ImageFolder(arguments.data, transform)
    loader = DataLoader(data, batch_size=4 if arguments.tiny else 256, shuffle=True, drop_last=True)
    history = distill(student, teacher, loader, arguments.epochs)
    print(f"attention term: {history[0]:.2f} at the first step, {history[-1]:.2f} at the last")


if __name__ == "__main__":
    main()
