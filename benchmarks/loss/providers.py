"""What is compared: implementations of the authors' loss, the sum over pairs of mean((u_S - u_T)^2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused
from at_fused import backends
from benchmarks.loss.workloads import Cell
from benchmarks.measure import timing

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

# The most kernels and fills that forward and backward send to a GPU, all pairs together, by backend. Of two
# forward, one is small: CUDA zeroes a counter in a graph, Triton sums the samples' distances.
LAUNCHES = {"cuda": (2, 1), "triton": (2, 1)}


# --- plain PyTorch ----------------------------------------------------------------------------------


def authors(students: Sequence[Tensor], teachers: Sequence[Tensor], p: int = 2) -> Tensor:
    """The form published with the paper, in eager PyTorch; |A|^p where they have p = 2."""

    def attention(feature: Tensor) -> Tensor:
        powered = feature.abs() if p == 1 else feature.pow(p)
        return F.normalize(powered.mean(1).flatten(1))

    return _sum_of_distances(attention, students, teachers)


def vecdot(students: Sequence[Tensor], teachers: Sequence[Tensor], p: int = 2) -> Tensor:
    """The best eager form that we know: it stores no power of the activations but the square, for p = 4."""

    def attention(feature: Tensor) -> Tensor:
        if p == 1:
            return F.normalize(torch.linalg.vector_norm(feature, 1, dim=1).flatten(1))
        root = feature if p == 2 else feature.square()
        return F.normalize(torch.linalg.vecdot(root, root, dim=1).flatten(1))

    return _sum_of_distances(attention, students, teachers)


def under_autocast(students: Sequence[Tensor], teachers: Sequence[Tensor], p: int = 2) -> Tensor:
    """The authors' form as mixed-precision training runs it; on CUDA `pow` casts activations to fp32."""
    with torch.autocast(students[0].device.type, students[0].dtype):
        return authors(students, teachers, p)


def _sum_of_distances(
    attention: Callable[[Tensor], Tensor], students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> Tensor:
    distances = [
        (attention(student) - attention(teacher)).pow(2).mean()
        for student, teacher in zip(students, teachers, strict=True)
    ]
    return torch.stack(distances).sum()


# --- contenders -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """An implementation, and how it is called.

    `ours-NAME` sees an upstream gradient of 1, as with beta in the weights (`AttentionLoss`): a backend that
    can computes the gradients together with the loss, in one pass. `ours-NAME-two-pass` sees 2, as with
    `beta * attention_loss(...)`: forward, then backward.
    """

    name: str
    loss: Callable[..., Tensor]  # (students, teachers, p)
    backend: str | None = None  # of at_fused
    factor: float = 1.0  # of the upstream gradient
    compiled: bool = False

    def make(self, cell: Cell) -> Loss:
        """The loss of this cell; compiled for its shapes only."""
        if self.compiled:
            return torch.compile(partial(self.loss, p=cell.p), dynamic=False, fullgraph=True)
        return partial(self.loss, p=cell.p)

    def upstream(self, cell: Cell) -> float:
        return self.factor * cell.loss_scale

    def one_pass(self, cell: Cell, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> bool:
        """Whether the backend computes the gradients with the loss where it expects this upstream."""
        if self.backend is None or not backends.gives_early_gradients(self.backend):
            return False
        pays = backends.named(self.backend).early_gradients_pay
        pays(students, teachers, float(cell.p))  # from now on the operator notes the upstream gradient
        self.prepare(cell, students[0].device)
        return bool(pays(students, teachers, float(cell.p)))

    def fits(self, cell: Cell) -> bool:
        """Whether it has something of its own to show in this cell."""
        if self.loss is under_autocast:
            return cell.dtype != "fp32"
        return self.factor == 1 or cell.loss_scale == 1  # a scaled loss takes two passes anyway

    def expected_launches(self, mode: str) -> int | None:
        """The most kernels that a call may launch; None where nothing is promised."""
        if self.backend not in LAUNCHES:
            return None
        forward, backward = LAUNCHES[self.backend]
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def prepare(self, cell: Cell, device: torch.device) -> None:
        """Make the operator expect this upstream gradient: it expects the one of the last step."""
        if self.backend is None:
            return
        student = torch.ones(1, 1, 2, 2, device=device, requires_grad=True)
        loss = at_fused.attention_loss(student, student.detach(), backend=self.backend)
        loss.backward(torch.full_like(loss, self.upstream(cell)))
        timing.synchronizer(device)()  # on a GPU a kernel writes the note


def providers(device: torch.device) -> dict[str, Provider]:
    """Everything that runs on `device`, by name: ours last, the best backend first."""
    found = [
        Provider("authors", authors),
        *([Provider("authors-autocast", under_autocast)] if device.type == "cuda" else []),
        Provider("vecdot", vecdot),
        Provider("compile", authors, compiled=True),
        Provider("compile-vecdot", vecdot, compiled=True),
    ]
    probe = torch.ones(1, 1, 2, 2, device=device)
    for name in at_fused.available_backends():
        if name == "reference" or backends.modules[name].unsupported([probe], 2.0, "sum"):
            continue
        loss = partial(_ours, backend=name)
        found.append(Provider(f"ours-{name}", loss, backend=name))
        if backends.gives_early_gradients(name):
            found.append(Provider(f"ours-{name}-two-pass", loss, backend=name, factor=2.0))
    return {provider.name: provider for provider in found}


def select_providers(names: Sequence[str] | None, device: torch.device) -> list[Provider]:
    """The named providers, "ours" for all of ours; without names, every one.

    Raises:
        ValueError: a name that does not run on `device`.
    """
    known = providers(device)
    chosen: dict[str, Provider] = {}
    for name in names or known:
        matches = {key: p for key, p in known.items() if name == key or (name == "ours" and p.backend)}
        if not matches:
            raise ValueError(f"no provider {name!r} on {device.type}; there are: {', '.join(known)}")
        chosen |= matches
    return list(chosen.values())


def _ours(students: Sequence[Tensor], teachers: Sequence[Tensor], p: int, *, backend: str) -> Tensor:
    return at_fused.attention_loss(students, teachers, p, backend=backend)
