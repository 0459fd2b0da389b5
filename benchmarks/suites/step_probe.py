"""One process of suite "step": whole training steps, channels_last, which take turns.

python -m benchmarks.suites.step_probe DEVICE DTYPE BATCH ROUNDS THREADS    # prints a line of JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused
import models
from benchmarks.loss.providers import authors
from benchmarks.measure import counters, timing
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

Term = Callable[[], Tensor]


def plain(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """The loss as ten plain lines in fp32."""

    def attention(feature: Tensor) -> Tensor:
        return F.normalize(feature.float().square().sum(1).flatten(1))

    pairs = zip(students, teachers, strict=True)
    return torch.stack([(attention(s) - attention(t)).square().mean() for s, t in pairs]).sum()


def on_features(loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]) -> Callable[..., Term]:
    """The term `BETA * loss` on features that taps keep."""

    def make(student: TappedModel, teacher: TappedModel) -> Term:
        taps = [at_fused.FeatureTaps(model, model.taps["groups"]) for model in (student, teacher)]
        return lambda: BETA * loss(taps[0].features, taps[1].features)

    return make


def at_the_taps(student: TappedModel, teacher: TappedModel) -> Term:
    return at_fused.AttentionTransfer(
        student, teacher, student.taps["groups"], teacher.taps["groups"], beta=BETA
    )


# By name: what makes the attention term; None for a step without one. All but the first run the teacher.
TERMS: dict[str, Callable[[TappedModel, TappedModel], Term] | None] = {
    "student alone": None,
    "without AT": None,
    "authors' form": on_features(authors),
    "plain fp32 formula": on_features(plain),
    "attention_loss": on_features(at_fused.attention_loss),
    "AttentionTransfer": at_the_taps,
}
MODES = ("eager", "compiled")


def training_step(
    name: str, mode: str, batch: int, device: torch.device, dtype: str = "bf16"
) -> Callable[[], None]:
    """A function that trains a student of its own by one step on one fixed random batch.

    It runs under autocast but for fp32.
    Compiled, student, teacher and loss are one graph, which returns the teacher's logits: else it would lose
    what only they need.
    """
    torch.manual_seed(0)
    setting, make = SETTINGS[device.type], TERMS[name]
    student = on_device(models.create(setting.student, setting.classes), device).train()
    teacher = on_device(models.create(setting.teacher, setting.classes), device).eval().requires_grad_(False)
    images = torch.randn(batch, 3, setting.size, setting.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(setting.classes, (batch,), device=device)
    # A small step: the same work, and the weights stay where they are over hundreds of steps.
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    term = make(student, teacher) if make else None

    def forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = None
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            if name != "student alone":
                with torch.no_grad():
                    logits = teacher(images)
            loss = F.cross_entropy(student(images), labels)
            return loss if term is None else loss + term(), logits

    run = torch.compile(forward, fullgraph=True, dynamic=False) if mode == "compiled" else forward

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss, _ = run(images, labels)
        loss.backward()
        optimizer.step()

    return step


def on_device(model: TappedModel, device: torch.device) -> TappedModel:
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def measure(batch: int, device: torch.device, rounds: int, dtype: str = "bf16") -> list[dict[str, Any]]:
    """By mode and name: median milliseconds, the median over rounds of the time over that without AT, and the
    most bytes that a step holds."""
    found = []
    torch._dynamo.config.recompile_limit = 64  # the steps are one function, compiled for each
    for mode in MODES:
        torch._dynamo.reset()
        contenders = [
            timing.Contender(name, training_step(name, mode, batch, device, dtype)) for name in TERMS
        ]
        times = timing.interleave(contenders, rounds, device)
        base = times["without AT"].seconds
        for contender in contenders:
            mine = times[contender.name]
            ratios = [a / b for a, b in zip(mine.seconds, base, strict=True)]
            found.append(
                {
                    "mode": mode,
                    "step": contender.name,
                    "median_ms": mine.median * 1e3,
                    "ratio": timing.percentile(ratios, 50),
                    "peak_bytes": counters.peak_extra_bytes(contender.run, device),
                }
            )
    return found


def in_a_process(batch: int, device: torch.device, rounds: int, dtype: str = "bf16") -> list[dict[str, Any]]:
    """`measure` in a process of its own, whose memory happens to lie elsewhere.

    Raises:
        RuntimeError: it failed; its last line says why.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.suites.step_probe",
        device.type,
        dtype,
        str(batch),
        str(rounds),
        str(torch.get_num_threads()),
    ]
    root = Path(__file__).parents[2]
    child = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"step: {(child.stderr.splitlines() or ['no output'])[-1]}")
    rows: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return rows


if __name__ == "__main__":
    device_name, its_dtype, *numbers = sys.argv[1:]
    its_batch, its_rounds, threads = map(int, numbers)
    torch.set_num_threads(threads)
    print(json.dumps(measure(its_batch, torch.device(device_name), its_rounds, its_dtype)))
