"""What is compared: implementations of the authors' loss, the sum over pairs of mean((u_S - u_T)^2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def authors(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """The form published with the paper, in eager PyTorch."""

    def attention(feature: Tensor) -> Tensor:
        return F.normalize(feature.pow(2).mean(1).flatten(1))

    return _sum_of_distances(attention, students, teachers)


def vecdot(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """The best eager form known to us: no squared copy of the activations."""

    def attention(feature: Tensor) -> Tensor:
        return F.normalize(torch.linalg.vecdot(feature, feature, dim=1).flatten(1))

    return _sum_of_distances(attention, students, teachers)


def ours(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    return at_fused.attention_loss(students, teachers)


def compiled() -> Loss:
    """The authors' form under torch.compile, for one set of shapes (nothing is kept from earlier ones)."""
    torch._dynamo.reset()
    return torch.compile(authors, dynamic=False, fullgraph=True)


# name: how to get it; called once per cell
PROVIDERS: dict[str, Callable[[], Loss]] = {
    "authors": lambda: authors,
    "vecdot": lambda: vecdot,
    "compile": compiled,
    "ours": lambda: ours,
}


def _sum_of_distances(
    attention: Callable[[Tensor], Tensor], students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> Tensor:
    distances = [
        (attention(student) - attention(teacher)).pow(2).mean()
        for student, teacher in zip(students, teachers, strict=True)
    ]
    return torch.stack(distances).sum()
