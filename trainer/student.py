"""The modules that a run trains."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Student(nn.Module):
    """The student's network, and the modules that its method trains `beside` it, by name.

    One module to wrap in DDP and to give to the optimizer; a pass is one of the network alone.
    """

    def __init__(self, model: nn.Module, beside: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.beside = nn.ModuleDict(dict(beside))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)
