"""Under DistributedDataParallel the term is a mean over the global batch, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
import torch.distributed as dist
from cases import each_backend
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import at_fused

RANKS, GLOBAL_BATCH = 2, 6
BETA = 1000.0


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.group1 = nn.Conv2d(3, 4, 3, padding=1)
        self.group2 = nn.Conv2d(4, 6, 3, stride=2)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.group2(self.group1(x).relu()).relu().mean((2, 3)))


def models() -> tuple[Student, Student]:
    torch.manual_seed(0)
    return Student(), Student().requires_grad_(False)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(GLOBAL_BATCH, 3, 9, 9, generator=generator)
    return images, torch.randint(10, (GLOBAL_BATCH,), generator=generator)


def step(
    student: nn.Module, tapped: Student, teacher: Student, images: Tensor, targets: Tensor, options: dict
) -> Tensor:
    """One step as a user writes it: the original modules are tapped, the wrapped one is called."""
    names = ["group1", "group2"]
    with at_fused.FeatureTaps(tapped, names) as s_taps, at_fused.FeatureTaps(teacher, names) as t_taps:
        logits = student(images)
        with torch.no_grad():
            teacher(images)
        at = at_fused.AttentionLoss(beta=BETA, **options)(s_taps.features, t_taps.features)
    loss = nn.functional.cross_entropy(logits, targets) + at
    loss.backward()
    return loss.detach()


def rank_main(rank: int, folder: str, variants: list[dict]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save([train(rank, options) for options in variants], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def train(rank: int, options: dict) -> dict:
    """In a frame of its own: DDP must be gone before the process group, or one exit in many hangs."""
    student, teacher = models()
    wrapped = DistributedDataParallel(student)
    images, targets = (x.chunk(RANKS)[rank] for x in batch())
    loss = step(wrapped, student, teacher, images, targets, options)
    dist.all_reduce(loss)
    return {"loss": loss / RANKS, "grads": {name: p.grad for name, p in student.named_parameters()}}


@pytest.mark.slow
def test_gradient_is_that_of_the_global_batch(tmp_path: Path) -> None:
    """Every kind of loss in one pair of processes."""
    backends = [name for name in cases.BACKENDS if cases.device_of(name) == "cpu"]
    variants = [
        {**options, "backend": name} for name in backends for options in ({}, {"distance": "norm", "p": 1})
    ]
    cases.in_ranks(RANKS, rank_main, str(tmp_path), variants)
    for rank in range(RANKS):
        for options, got in zip(
            variants, torch.load(tmp_path / f"{rank}.pt", weights_only=True), strict=True
        ):
            student, teacher = models()
            loss = step(student, student, teacher, *batch(), options)
            torch.testing.assert_close(got["loss"], loss, rtol=1e-5, atol=0)
            for name, parameter in student.named_parameters():
                # sums of a few hundred fp32 terms in another order, of both signs
                bound = 1e-5 * parameter.grad.abs().max().item()
                torch.testing.assert_close(got["grads"][name], parameter.grad, rtol=1e-5, atol=bound)
            assert student.group1.weight.grad.abs().max() > 0


@each_backend
@pytest.mark.parametrize("options", [{}, {"distance": "norm"}], ids=["mse", "norm"])
def test_mean_of_the_shards_is_the_global_loss(options: dict, backend: str) -> None:
    """What the data parallel mean computes, for 1, 2 and 4 equal shards."""
    device = cases.device_of(backend)
    s = cases.feature(8, 5, 4, 4, seed=1, device=device)
    t = cases.feature(8, 7, 4, 4, seed=2, device=device).detach()
    whole = at_fused.attention_loss(s, t, backend=backend, **options)
    (expected,) = torch.autograd.grad(whole, s)
    for ranks in (1, 2, 4):
        shards = zip(s.chunk(ranks), t.chunk(ranks), strict=True)
        mean = sum(at_fused.attention_loss(*shard, backend=backend, **options) for shard in shards) / ranks
        torch.testing.assert_close(mean, whole, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.autograd.grad(mean, s)[0], expected, rtol=1e-4, atol=1e-8)
