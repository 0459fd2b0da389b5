"""Suite "step": what attention transfer adds to a whole training step in bf16, channels_last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused
import models
from benchmarks import timing
from benchmarks.providers import authors
from benchmarks.report import Row
from models import TappedModel

BETA = 1000.0


@dataclass(frozen=True)
class Setting:
    student: str
    teacher: str
    batch: int
    size: int  # of the square images
    classes: int


SETTINGS = {
    "cpu": Setting("wrn-16-1", "wrn-16-2", batch=128, size=32, classes=10),
    "cuda": Setting("resnet-18", "resnet-34", batch=256, size=224, classes=1000),
}

Term = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def terms() -> dict[str, Term | None]:
    """The steps that are compared, by the attention term each adds; all of them run the teacher."""
    return {
        "without AT": None,
        "AT, ours": at_fused.AttentionLoss(beta=BETA),
        "AT, authors' eager": lambda students, teachers: BETA * authors(students, teachers),
    }


def training_step(term: Term | None, batch: int, device: torch.device) -> Callable[[], None]:
    """A function that trains a student of its own by one step on one fixed random batch."""
    torch.manual_seed(0)
    setting = SETTINGS[device.type]
    student = on_device(models.create(setting.student, setting.classes), device).train()
    teacher = on_device(models.create(setting.teacher, setting.classes), device).eval().requires_grad_(False)
    images = torch.randn(batch, 3, setting.size, setting.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(setting.classes, (batch,), device=device)
    # A small step: the same work, and the weights stay where they are over hundreds of steps.
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    # Hooks stay for the whole training; the step without AT has none.
    student_taps = at_fused.FeatureTaps(student, student.taps["groups"] if term else [])
    teacher_taps = at_fused.FeatureTaps(teacher, teacher.taps["groups"] if term else [])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                teacher(images)
            loss = F.cross_entropy(student(images), labels)
            if term is not None:
                loss = loss + term(student_taps.features, teacher_taps.features)
        loss.backward()
        optimizer.step()

    return step


def on_device(model: TappedModel, device: torch.device) -> TappedModel:
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def measure(batch: int, device: torch.device, rounds: int) -> list[Row]:
    """One row per step. The cost of AT: a step's time over that without AT, round by round; their median."""
    contenders = [
        timing.Contender(name, training_step(term, batch, device)) for name, term in terms().items()
    ]
    times = timing.interleave(contenders, rounds, device)
    plain = times["without AT"].seconds
    rows: list[Row] = []
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine.seconds, plain, strict=True)]
        rows.append(
            {
                "step": name,
                "batch": batch,
                "median_ms": mine.median * 1e3,
                "p20_ms": mine.percentile(20) * 1e3,
                "p80_ms": mine.percentile(80) * 1e3,
                "cost_percent": (timing.percentile(ratios, 50) - 1) * 100,
                "cost_p20_percent": (timing.percentile(ratios, 20) - 1) * 100,
                "cost_p80_percent": (timing.percentile(ratios, 80) - 1) * 100,
                "images_per_second": batch / mine.median,
                "rounds": rounds,
            }
        )
    return rows


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and a line per step."""
    headers = ["step", "median ms (p20 to p80)", "images/s", "cost of AT, % (p20 to p80)"]
    lines = [
        [
            row["step"],
            f"{row['median_ms']:.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})",
            f"{row['images_per_second']:.0f}",
            f"{row['cost_percent']:+.1f} ({row['cost_p20_percent']:+.1f} to {row['cost_p80_percent']:+.1f})",
        ]
        for row in rows
    ]
    return headers, lines
