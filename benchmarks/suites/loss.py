"""Suite "loss": times of the attention-transfer term alone, on the features of real models."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.loss.providers import Provider
from benchmarks.loss.subjects import Subject, subjects
from benchmarks.loss.workloads import Cell
from benchmarks.measure import counters, timing
from benchmarks.report import Row

# The least that the copy moves, read and written: beyond private caches, beyond a GPU's L2.
COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}


def measure_cell(
    cell: Cell,
    providers: Sequence[Provider],
    device: torch.device,
    rounds: int,
    *,
    modes: Sequence[str] = ("both",),
    timings: Sequence[str] = ("eager",),
) -> list[Row]:
    """One row per provider, mode and timing ("eager", or "graph" for replays of a CUDA graph).

    Backward alone is not captured: its graph would replay the backward of a forward that is gone. Launches
    and memory are counted where the loss is also called from Python.
    """
    found = subjects(cell, providers, device)
    rows: list[Row] = []
    for kind in timings:
        for mode in modes:
            if (kind, mode) != ("graph", "backward"):
                rows += _measure(found, mode, kind, device, rounds)
    for subject in found if "eager" in timings else ():
        counts = {
            "launches": subject.counted(counters.launches),
            "peak_extra_bytes": subject.counted(counters.peak_extra_bytes),
        }
        for row in rows:
            if row["provider"] == subject.provider.name and row["mode"] == "both":
                row |= counts
    return rows


def _measure(
    subjects: Sequence[Subject], mode: str, kind: str, device: torch.device, rounds: int
) -> list[Row]:
    cell = subjects[0].cell
    contenders = []
    for subject in subjects:
        contender = subject.contender(mode)
        if kind == "graph":
            try:
                contender = timing.captured(contender, device)
            except RuntimeError as error:
                print(f"{cell.name}: {contender.name} can't be captured: {error}", file=sys.stderr)
                continue
        contenders.append(contender)
    copied = max(COPY_BYTES[device.type], cell.bytes_moved())
    times = timing.interleave([*contenders, timing.copy(copied, device)], rounds, device)
    for subject in subjects:
        subject.release()
    bandwidth = copied / times["copy"].median
    floor = cell.bytes_moved(mode) / bandwidth

    rows: list[Row] = []
    for subject in subjects:
        provider = subject.provider
        if provider.name not in times:
            continue
        mine = times[provider.name]
        moved = cell.bytes_moved(mode, subject.one_pass)
        rows.append(
            cell.describe()
            | {
                "mode": mode,
                "timing": kind,
                "provider": provider.name,
                "one_pass": subject.one_pass,
                "median_ms": mine.median * 1e3,
                "p20_ms": mine.percentile(20) * 1e3,
                "p80_ms": mine.percentile(80) * 1e3,
                "floor_ms": floor * 1e3,
                "times_floor": mine.median / floor,
                "declared_bytes": moved,
                "gb_per_s": moved / mine.median / 1e9,
                "percent_of_copy": moved / mine.median / bandwidth * 100,
                "copy_gb_per_s": bandwidth / 1e9,
                "error": subject.error,
                "launches": None,
                "launches_expected": provider.expected_launches(mode),
                "peak_extra_bytes": None,
                "rounds": rounds,
            }
        )
    return rows
