"""Suite "loss": forward and backward of the attention-transfer term alone, on the features of real models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.providers import PROVIDERS, Loss
from benchmarks.report import Row, geometric_mean
from benchmarks.workloads import Cell

COPY_BYTES = 128 * 2**20  # the least that a copy moves: a buffer of 64 MiB, beyond private caches


def measure(cells: Sequence[Cell], providers: Sequence[str], device: torch.device, rounds: int) -> list[Row]:
    """One row per cell and provider."""
    return [row for cell in cells for row in measure_cell(cell, providers, device, rounds)]


def measure_cell(cell: Cell, providers: Sequence[str], device: torch.device, rounds: int) -> list[Row]:
    students, teachers = cell.make(device)

    def forward_backward(loss: Loss) -> Callable[[], None]:
        return lambda: loss(students, teachers).backward()

    def forget_gradients() -> None:
        for student in students:
            student.grad = None  # as in training: every step gets fresh gradients

    losses = {name: PROVIDERS[name]() for name in providers}
    check_agreement(losses, students, teachers, cell)
    copied = max(COPY_BYTES, cell.floor_bytes)
    contenders = [
        timing.Contender(name, forward_backward(loss), forget_gradients) for name, loss in losses.items()
    ]
    times = timing.interleave([*contenders, timing.copy(copied, device)], rounds, device)

    bandwidth = copied / times["copy"].median
    floor = cell.floor_bytes / bandwidth
    return [
        {
            "cell": cell.name,
            "workload": cell.workload,
            "batch": cell.batch,
            "layout": cell.layout,
            "dtype": cell.dtype,
            "provider": name,
            "median_ms": times[name].median * 1e3,
            "p20_ms": times[name].percentile(20) * 1e3,
            "p80_ms": times[name].percentile(80) * 1e3,
            "floor_ms": floor * 1e3,
            "times_floor": times[name].median / floor,
            "student_bytes": cell.student_bytes,
            "teacher_bytes": cell.teacher_bytes,
            "copy_gb_per_s": bandwidth / 1e9,
            "rounds": rounds,
        }
        for name in losses
    ]


def check_agreement(
    losses: dict[str, Loss], students: list[Tensor], teachers: list[Tensor], cell: Cell
) -> None:
    """Holds every provider's loss and gradients against the authors' form in fp64.

    Raises:
        RuntimeError: a provider is further off than its dtype explains.
    """
    # bf16 eager keeps maps of 8 significant bits and takes their difference: several percent are its own.
    tolerance = {"fp32": 1e-4, "bf16": 0.15}[cell.dtype]
    exact = [student.detach().double().requires_grad_() for student in students]
    truth = PROVIDERS["authors"]()(exact, [teacher.double() for teacher in teachers])
    truth.backward()
    for name, loss in losses.items():
        value = loss(students, teachers)
        value.backward()
        off = [_relative(value.detach(), truth.detach())]
        for student, reference in zip(students, exact, strict=True):
            if student.grad is None or reference.grad is None:
                raise RuntimeError(f"{cell.name}: {name} gives no gradient")
            off.append(_relative(student.grad, reference.grad))
            student.grad = None
        if not max(off) <= tolerance:  # NaN fails, too
            raise RuntimeError(
                f"{cell.name}: {name} is off by {max(off):.2g} of the value, allowed {tolerance:g}"
            )


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def summarize(rows: Sequence[Row], baseline: str = "ours") -> dict[str, dict[str, float]]:
    """Per provider, over all cells: its time in multiples of the floor and of `baseline`'s (geometric means),
    and the least and greatest multiple of `baseline`'s."""
    ours = {row["cell"]: row for row in rows if row["provider"] == baseline}
    summary: dict[str, dict[str, float]] = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == provider]
        entry = {"times_floor": geometric_mean([row["times_floor"] for row in mine])}
        if ours:
            speedups = [row["median_ms"] / ours[row["cell"]]["median_ms"] for row in mine]
            entry[f"times_{baseline}"] = geometric_mean(speedups)
            entry[f"least_times_{baseline}"] = min(speedups)
            entry[f"most_times_{baseline}"] = max(speedups)
        summary[provider] = entry
    return summary


def table(rows: Sequence[Row], baseline: str = "ours") -> tuple[list[str], list[list[str]]]:
    """Headers, and a line per cell: each provider's time and multiple of the floor; geometric means below."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    others = [name for name in providers if name != baseline] if baseline in providers else []
    headers = ["cell", "floor ms", *(f"{name} ms (×floor)" for name in providers)]
    headers += [f"{name} / {baseline}" for name in others]
    lines = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        here = {row["provider"]: row for row in rows if row["cell"] == cell}
        line = [cell, f"{here[providers[0]]['floor_ms']:.2f}"]
        line += [f"{here[name]['median_ms']:.2f} ({here[name]['times_floor']:.2f})" for name in providers]
        line += [f"{here[name]['median_ms'] / here[baseline]['median_ms']:.2f}" for name in others]
        lines.append(line)
    summary = summarize(rows, baseline)
    means = [f"({summary[name]['times_floor']:.2f})" for name in providers]
    lines.append(
        ["geometric mean", "", *means, *(f"{summary[name][f'times_{baseline}']:.2f}" for name in others)]
    )
    return headers, lines
