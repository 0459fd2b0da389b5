"""Suite "memory": what forward and backward of the loss hold at their peak, beyond inputs and gradients."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from benchmarks.loss.providers import Provider, select_providers
from benchmarks.loss.subjects import subjects
from benchmarks.loss.tables import extra_percent
from benchmarks.loss.workloads import Cell
from benchmarks.measure import counters
from benchmarks.report import Result, Row, Table
from benchmarks.suites import loss
from benchmarks.suites.loss import arguments as arguments

ROUNDS = 1


def measure(options: argparse.Namespace, device: torch.device, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yields the rows of each cell."""
    providers = select_providers(options.providers, device)
    for cell in loss.lacking(loss.chosen_cells(options, device), rows, providers):
        yield measure_cell(cell, providers, device)


def result(rows: Sequence[Row], options: argparse.Namespace, device: torch.device) -> Result:
    return Result("Memory of forward and backward", [table(rows)])


def measure_cell(cell: Cell, providers: Sequence[Provider], device: torch.device) -> list[Row]:
    """One row per provider."""
    return [
        cell.describe()
        | {
            "provider": subject.provider.name,
            "one_pass": subject.one_pass,
            "peak_extra_bytes": subject.counted(counters.peak_extra_bytes),
        }
        for subject in subjects(cell, providers, device)
    ]


def table(rows: Sequence[Row]) -> Table:
    """A line per cell: each provider's peak and its part of the activations."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    headers = ["cell", "activations MB", *(f"{name} MB (%)" for name in names)]
    lines = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        here = {row["provider"]: row for row in rows if row["cell"] == cell}
        first = next(iter(here.values()))
        line = [cell, f"{(first['student_bytes'] + first['teacher_bytes']) / 1e6:.1f}"]
        for name in names:
            row = here.get(name)
            line.append(f"{row['peak_extra_bytes'] / 1e6:.3g} ({extra_percent(row):.2f})" if row else "-")
        lines.append(line)
    return Table("Peak memory beyond inputs and gradients", headers, lines)
