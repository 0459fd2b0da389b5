"""Suite "step": what attention transfer adds to a whole training step, channels_last."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.report import Result, Row, Table
from benchmarks.suites import step_probe

ROUNDS = 40
# Between two processes the same step differs by ±6 %, because its memory has other addresses.
PROCESSES = 4


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs=1, metavar="DTYPE", default=["bf16"], help="bf16 (default) or fp32")


def measure(options: argparse.Namespace, device: torch.device, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yields the rows of all steps together.

    Raises:
        ValueError: of another dtype than bf16 and fp32.
    """
    (dtype,) = options.dtypes
    if dtype not in ("bf16", "fp32"):
        raise ValueError(f"--suite step takes --dtypes bf16 or fp32, not {dtype}")
    if not rows:
        batch = options.batch or step_probe.SETTINGS[device.type].batch
        processes = 1 if options.quick else PROCESSES
        print(f"step: {processes} processes of {options.rounds} rounds at batch {batch}", flush=True)
        yield measure_steps(batch, device, options.rounds, processes, dtype)


def result(rows: Sequence[Row], options: argparse.Namespace, device: torch.device) -> Result:
    """A table per mode."""
    setting = step_probe.SETTINGS[device.type]
    pair = f"{setting.student} ← {setting.teacher}, batch {rows[0]['batch']}"
    tables = [
        Table(mode.capitalize(), HEADERS, _lines([row for row in rows if row["mode"] == mode]))
        for mode in step_probe.MODES
    ]
    return Result(f"Training step {pair}, {options.dtypes[0]}, channels_last", tables)


def measure_steps(
    batch: int, device: torch.device, rounds: int, processes: int, dtype: str = "bf16"
) -> list[Row]:
    """One row per mode and step: medians over processes of each one's median, and their range.

    The cost is that over the step without AT of the same mode, round by round within a process.
    """
    found = [step_probe.in_a_process(batch, device, rounds, dtype) for _ in range(processes)]
    return [_summary(measured, batch, rounds) for measured in zip(*found, strict=True)]


def _summary(measured: Sequence[dict[str, Any]], batch: int, rounds: int) -> Row:
    """A row of what the processes measured of one step."""
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


HEADERS = [
    "step",
    "median ms (range)",
    "images/s",
    "over the step without AT, % (range)",
    "peak MB",
    "over the student's, %",
]


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    """Under HEADERS, a line per step."""
    alone = next(row["peak_bytes"] for row in rows if row["step"] == "student alone")
    return [
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
