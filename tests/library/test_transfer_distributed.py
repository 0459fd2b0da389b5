"""AttentionTransfer on two ranks: under DDP and FSDP2 the gradient is that of one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_ddp_loss import BETA, RANKS, Student, batch, models
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import at_fused

NAMES = ["group1", "group2"]
WAYS = [
    "ddp",
    "ddp, checkpointed",
    "ddp, accumulated",
    "ddp, compiled student",
    "ddp, compiled step",
    "fsdp, tapped before",
    "fsdp, tapped after",
]


def step(
    run: Any, teacher: nn.Module, transfer: at_fused.AttentionTransfer, images: Tensor, targets: Tensor
) -> Tensor:
    with torch.no_grad():
        teacher(images)
    return F.cross_entropy(run(images), targets) + transfer()


def shard(student: Student) -> None:
    for module in (student.group1, student.group2, student.head, student):
        fully_shard(module)


def train(rank: int, way: str) -> dict[str, Tensor]:
    """One step's loss and gradients; in a frame of its own, as in test_ddp_loss."""
    torch.compiler.reset()
    student, teacher = models()
    images, targets = (x.chunk(RANKS)[rank] for x in batch())
    if way == "fsdp, tapped after":
        shard(student)
    with at_fused.AttentionTransfer(student, teacher, NAMES, beta=BETA) as transfer:
        run: Any = student
        if "checkpointed" in way:
            inner = student.group2.forward
            student.group2.forward = lambda x: checkpoint(inner, x, use_reentrant=False)  # type: ignore
        if way == "fsdp, tapped before":
            shard(student)
        if way.startswith("ddp"):
            run = DistributedDataParallel(student)
        if "compiled student" in way:
            run = torch.compile(run, backend="aot_eager")
        one_step = torch.compile(step, backend="aot_eager") if "compiled step" in way else step
        parts = 1
        if "accumulated" in way:
            parts = len(images)
            with run.no_sync():
                for part in zip(images[:-1, None], targets[:-1, None], strict=True):
                    (one_step(run, teacher, transfer, *part) / parts).backward()
            images, targets = images[-1:], targets[-1:]
        loss = one_step(run, teacher, transfer, images, targets)
        (loss / parts).backward()
    grads = {name: p.grad for name, p in student.named_parameters()}
    return {n: g.full_tensor() if "fsdp" in way else g for n, g in grads.items() if g is not None}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save({way: train(rank, way) for way in WAYS}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradient_is_that_of_one_process(tmp_path: Path) -> None:
    """Every way in one pair of processes."""
    cases.in_ranks(RANKS, rank_main, str(tmp_path))
    student, teacher = models()
    with at_fused.AttentionTransfer(student, teacher, NAMES, beta=BETA) as transfer:
        step(student, teacher, transfer, *batch()).backward()
    alone = copy.deepcopy(student)
    alone.zero_grad()
    F.cross_entropy(alone(batch()[0]), batch()[1]).backward()
    assert not torch.allclose(alone.group1.weight.grad, student.group1.weight.grad, rtol=0.1)
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for way in WAYS:
            for name, parameter in student.named_parameters():
                # sums of a few hundred fp32 terms in another order, of both signs
                bound = 1e-5 * parameter.grad.abs().max().item()
                torch.testing.assert_close(
                    found[way][name],
                    parameter.grad,
                    rtol=1e-5,
                    atol=bound,
                    msg=lambda text, where=(rank, way, name): f"{where}: {text}",
                )
