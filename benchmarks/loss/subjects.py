"""What a suite runs: each provider's loss on the features of a cell, checked against fp64 first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.loss.providers import Loss, Provider, authors
from benchmarks.loss.workloads import DTYPES, Cell
from benchmarks.measure import timing


class Subject:
    """One provider's loss on one cell: what is run, and what is done before, untimed."""

    def __init__(
        self,
        provider: Provider,
        cell: Cell,
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        loss: Loss | None = None,
    ) -> None:
        self.provider, self.cell = provider, cell
        self.students, self.teachers = students, teachers
        self.loss = provider.make(cell) if loss is None else loss
        self.value: Tensor | None = None
        self.error = float("nan")  # of the loss and the gradients against fp64: see `check_agreement`
        self.one_pass = provider.one_pass(cell, students, teachers)
        # Made before the timing: in training it comes from the sum with the other losses.
        with torch.no_grad():
            value = self.loss(students, teachers)
            greatest = 2.0**15 if value.dtype == torch.float16 else math.inf  # twice that is infinite
            self.scale = min(provider.upstream(cell), greatest)
            self.upstream = torch.full_like(value, self.scale)

    def release(self) -> None:
        """Free the last graph and gradients, as training does after every step."""
        self.value = None
        for student in self.students:
            student.grad = None

    def prepare(self) -> None:
        self.release()
        self.provider.prepare(self.cell, self.upstream.device)

    def prepare_backward(self) -> None:
        self.prepare()
        self.forward()

    def forward(self) -> None:
        self.value = self.loss(self.students, self.teachers)

    def backward(self) -> None:
        assert self.value is not None, "backward follows forward"
        self.value.backward(self.upstream)
        self.value = None

    def both(self) -> None:
        self.forward()
        self.backward()

    def contender(self, mode: str) -> timing.Contender:
        prepare = self.prepare_backward if mode == "backward" else self.prepare
        return timing.Contender(self.provider.name, getattr(self, mode), prepare)

    def counted(self, count: Callable[..., int | None]) -> int | None:
        """`count` of forward and backward, both warm."""
        for _ in range(2):
            self.prepare()
            self.both()
        self.prepare()
        result = count(self.both, self.upstream.device)
        self.release()
        return result


def subjects(cell: Cell, providers: Sequence[Provider], device: torch.device) -> list[Subject]:
    """The providers that run on the cell, on the same features, their values checked."""
    if any(provider.compiled for provider in providers):
        torch._dynamo.reset()  # other cells' shapes would count against the limit of recompilations
    students, teachers = cell.make(device)
    found = [Subject(provider, cell, students, teachers) for provider in providers if provider.fits(cell)]
    check_agreement(found)
    return found


def check_agreement(subjects: Sequence[Subject]) -> None:
    """Compare the loss and gradients of each with the authors' form in fp64.

    Raises:
        RuntimeError: one differs by more than its dtype explains.
    """
    cell, students, teachers = subjects[0].cell, subjects[0].students, subjects[0].teachers
    exact = [student.detach().double().requires_grad_() for student in students]
    truth = authors(exact, [teacher.double() for teacher in teachers], cell.p)
    gradients = torch.autograd.grad(truth, exact)
    for subject in subjects:
        name = subject.provider.name
        subject.prepare()
        subject.forward()
        assert subject.value is not None
        off = [_relative(subject.value.detach(), truth.detach())]
        subject.backward()
        for student, gradient in zip(students, gradients, strict=True):
            if student.grad is None:
                raise RuntimeError(f"{cell.name}: {name} gives no gradient")
            off.append(_relative(student.grad.double() / subject.scale, gradient))
            student.grad = None
        subject.error = max(off, key=lambda error: (math.isnan(error), error))
        allowed = tolerance(subject.provider, cell)
        if not subject.error <= allowed:  # NaN fails, too
            raise RuntimeError(
                f"{cell.name}: {name} is off by {subject.error:.2g} of the value, allowed {allowed:.2g}"
            )


def tolerance(provider: Provider, cell: Cell) -> float:
    """The error that the loss and each gradient may have, relative to their norm."""
    if provider.backend:  # sums over the channels in fp32, then one rounding to the gradient's dtype
        channels = max(shape[0] for shape in (*cell.student, *cell.teacher))
        return channels * torch.finfo(torch.float32).eps + torch.finfo(DTYPES[cell.dtype]).eps / 2
    # Half-precision eager keeps maps of 8 or 11 significant bits and takes their difference, and its fp16
    # gradients pass through subnormals: several percent are its own.
    return {"fp32": 1e-4, "bf16": 0.15, "fp16": 0.3}[cell.dtype]


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())
