"""Suite "footprint": how long train.py takes to start, and how much memory an image needs."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import linear_regression

import torch

import models
from at_fused.visualize.paths import user_path
from benchmarks.report import Result, Row, Table
from benchmarks.suites.trainer_probe import PHASES, peak_bytes, start_up

ROUNDS = 1
BATCHES = (128, 256, 512)
STUDENT, TEACHER = "wrn-16-1", "wrn-16-2"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cifar", type=user_path, metavar="DIR", help="has cifar-10-batches-py (default: digits)"
    )


def measure(options: argparse.Namespace, device: torch.device, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yields the rows of both parts together.

    Raises:
        ValueError: the device is not a CPU.
    """
    if device.type != "cpu":
        raise ValueError("--suite footprint takes --device cpu")
    if not rows:
        compiled, batches = ([False], (8, 16)) if options.quick else ([False, True], BATCHES)
        yield measure_start_up(options.cifar, compiled) + measure_memory(options.cifar, batches)


def result(rows: Sequence[Row], options: argparse.Namespace, device: torch.device) -> Result:
    return Result(f"Start and memory of train.py, {STUDENT}, bf16, channels_last", tables(rows))


def flags(data_dir: Path | None, scratch: Path, *, teacher: bool) -> list[str]:
    """train.py's, on CIFAR-10 in `data_dir` or else digits; `scratch` gets the teacher's random weights."""
    found = ["--dataset", "cifar10", "--data-dir", str(data_dir)] if data_dir else ["--dataset", "digits"]
    found += ["--student", STUDENT, "--amp", "bf16", "--channels-last", "--device", "cpu"]
    found += ["--output-dir", str(scratch / "run"), "--threads", str(torch.get_num_threads())]
    if teacher:
        weights = scratch / "teacher.pt"
        torch.save(models.create(TEACHER, 10).state_dict(), weights)
        found += ["--method", "at", "--teacher", TEACHER, "--teacher-checkpoint", str(weights)]
    return found


def measure_start_up(data_dir: Path | None, compiled: Sequence[bool] = (False, True)) -> list[Row]:
    """A row for the student alone and one for AT, each without torch.compile and with it, its cache empty."""
    rows: list[Row] = []
    for compile_ in compiled:
        for teacher in (False, True):
            with tempfile.TemporaryDirectory() as scratch:
                command = flags(data_dir, Path(scratch), teacher=teacher) + ["--compile"] * compile_
                cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "cache")}
                seconds = start_up(command, cache)
            name = ("with AT" if teacher else "student alone") + (", compiled" if compile_ else "")
            rows.append({"part": "start-up", "run": name, **seconds})
    return rows


def measure_memory(data_dir: Path | None, batches: Sequence[int] = BATCHES) -> list[Row]:
    """A row for the student alone, with AT, with AT in the authors' form: the slope of the peak RSS."""
    rows: list[Row] = []
    for name, teacher, eager in (
        ("student alone", False, False),
        ("with AT, ours", True, False),
        ("with AT, authors' eager", True, True),
    ):
        peaks = []
        for batch in batches:
            with tempfile.TemporaryDirectory() as scratch:
                command = flags(data_dir, Path(scratch), teacher=teacher)
                # The teacher's test must not be what takes the most.
                command += ["--batch-size", str(batch), "--limit-test", "10", "--lr", "0.001"]
                peaks.append(peak_bytes(command, eager))
        slope, constant = linear_regression(batches, peaks)
        row: Row = {"part": "memory", "run": name, "bytes_per_image": slope, "constant_bytes": constant}
        rows.append(row | {f"peak_bytes_{batch}": peak for batch, peak in zip(batches, peaks, strict=True)})
    return rows


def tables(rows: Sequence[Row]) -> list[Table]:
    """A line per run of each part."""
    starts = [row for row in rows if row["part"] == "start-up"]
    memory = [row for row in rows if row["part"] == "memory"]
    phases = [*PHASES, "total"]
    lines = [[row["run"], *(f"{row[phase]:.1f}" for phase in phases)] for row in starts]
    found = [
        Table("Seconds from the start of the process to the end of the first step", ["run", *phases], lines)
    ]
    alone = memory[0]["bytes_per_image"]
    lines = [
        [
            row["run"],
            f"{row['bytes_per_image'] / 1e6:.2f}",
            f"{(row['bytes_per_image'] - alone) / 1e6:+.2f}",
            f"{row['constant_bytes'] / 1e6:.0f}",
        ]
        for row in memory
    ]
    headers = ["run", "MB per image", "more than alone", "constant, MB"]
    return [*found, Table("Peak memory of the process, by images per step", headers, lines)]
