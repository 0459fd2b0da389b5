"""Suite "step": what attention transfer adds to a whole training step, channels_last."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.report import Row, Table
from benchmarks.suites import step_probe

# Between two processes the same step differs by ±6 %: where its memory happens to lie.
PROCESSES = 4


def measure(
    batch: int, device: torch.device, rounds: int, processes: int = PROCESSES, dtype: str = "bf16"
) -> list[Row]:
    """One row per mode and step: medians over processes of each one's median, and their range.

    The cost is that over the step without AT of the same mode, round by round within a process.
    """
    found = [step_probe.in_a_process(batch, device, rounds, dtype) for _ in range(processes)]
    return [summary(measured, batch, rounds) for measured in zip(*found, strict=True)]


def summary(measured: Sequence[dict[str, Any]], batch: int, rounds: int) -> Row:
    """What the processes measured of one step, as a row."""
    times = [one["median_ms"] for one in measured]
    costs = [(one["ratio"] - 1) * 100 for one in measured]
    median = statistics.median(times)
    return {
        "mode": measured[0]["mode"],
        "step": measured[0]["step"],
        "batch": batch,
        "median_ms": median,
        "least_ms": min(times),
        "most_ms": max(times),
        "cost_percent": statistics.median(costs),
        "least_cost_percent": min(costs),
        "most_cost_percent": max(costs),
        "images_per_second": batch / median * 1e3,
        "peak_bytes": statistics.median(one["peak_bytes"] for one in measured),
        "rounds": rounds,
        "processes": len(measured),
    }


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table per mode, a line per step."""
    return [
        Table(mode.capitalize(), *_table([row for row in rows if row["mode"] == mode]))
        for mode in step_probe.MODES
    ]


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    headers = [
        "step",
        "median ms (range)",
        "images/s",
        "over the step without AT, % (range)",
        "peak MB",
        "over the student's, %",
    ]
    alone = next(row["peak_bytes"] for row in rows if row["step"] == "student alone")
    lines = [
        [
            row["step"],
            f"{row['median_ms']:.1f} ({row['least_ms']:.1f} to {row['most_ms']:.1f})",
            f"{row['images_per_second']:.0f}",
            f"{row['cost_percent']:+.1f} "
            f"({row['least_cost_percent']:+.1f} to {row['most_cost_percent']:+.1f})",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{(row['peak_bytes'] / alone - 1) * 100:+.1f}",
        ]
        for row in rows
    ]
    return headers, lines
