"""Suite "loss": times of the attention-transfer term alone, on the features of real models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks import plots
from benchmarks.loss import tables
from benchmarks.loss.providers import Provider, select_providers
from benchmarks.loss.subjects import Subject, subjects
from benchmarks.loss.workloads import DTYPES, LAYOUTS, MODES, POWERS, WORKLOADS, Cell, select_cells
from benchmarks.measure import counters, timing
from benchmarks.report import Result, Row

ROUNDS = 50
# The least that the copy moves, read and written: beyond private caches, beyond a GPU's L2.
COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the suites loss, memory and scaling."""
    group = parser.add_argument_group("suites loss, memory and scaling; defaults are the device's own")
    add = group.add_argument
    add("--workloads", nargs="+", choices=list(WORKLOADS), help="(cpu: two; cuda: all)")
    add("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    add("--dtypes", nargs="+", choices=list(DTYPES), help="(cpu: fp32 bf16; cuda: bf16)")
    add("--p", nargs="+", type=int, choices=POWERS, default=[2], help="exponents (2)")
    add("--modes", nargs="+", choices=MODES, help="(cpu: both; cuda: all)")
    add("--timings", nargs="+", choices=("eager", "graph"), help="(cpu: eager; cuda: both)")
    add("--cells", default="", help="only cells whose name contains this")
    add("--providers", nargs="+", metavar="NAME", help="only these (a wrong name lists all)")


def measure(options: argparse.Namespace, device: torch.device, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yields the rows of each cell."""
    kinds, providers = timings_of(options, device), select_providers(options.providers, device)
    modes = options.modes or (MODES if device.type == "cuda" else ["both"])
    for cell in lacking(chosen_cells(options, device), rows, providers):
        yield measure_cell(cell, providers, device, options.rounds, modes=modes, timings=kinds)


def result(rows: Sequence[Row], options: argparse.Namespace, device: torch.device) -> Result:
    """Tables of times and of the rest; a picture on a CPU only: benchmarks.gpu draws when the GPU is done."""
    return page(rows, draws=device.type == "cpu")


def page(rows: Sequence[Row], *, draws: bool) -> Result:
    summary = {heading: tables.summarize(group) for heading, group in tables.groups(rows).items()}
    draw = partial(plots.times_floor, tables.main_group(rows)) if draws else None
    return Result(
        "Attention-transfer loss over all pairs", tables.tables(rows), draw, keys={"summary": summary}
    )


def timings_of(options: argparse.Namespace, device: torch.device) -> Sequence[str]:
    """How calls are timed: from Python ("eager"), as replays of a CUDA graph ("graph").

    Raises:
        ValueError: graphs are asked for without CUDA.
    """
    cuda = device.type == "cuda"
    chosen: Sequence[str] = options.timings or (["eager", "graph"] if cuda else ["eager"])
    if "graph" in chosen and not cuda:
        raise ValueError("--timings graph takes a CUDA device")
    return chosen


def chosen_cells(options: argparse.Namespace, device: torch.device) -> list[Cell]:
    """The cells that the options choose."""
    return select_cells(
        options.cells,
        options.batch,
        device_type=device.type,
        workloads=options.workloads,
        layouts=options.layouts,
        dtypes=options.dtypes,
        powers=options.p,
    )


def lacking(cells: Sequence[Cell], rows: Sequence[Row], providers: Sequence[Provider]) -> Iterator[Cell]:
    """Yields the cells that have no row yet, and prints each with the providers that will run on it."""
    there = {(row["cell"], row["batch"]) for row in rows}
    for cell in cells:
        if (cell.name, cell.batch) not in there:
            names = [provider.name for provider in providers if provider.fits(cell)]
            print(f"{cell.name}, batch {cell.batch}: {', '.join(names)}", flush=True)
            yield cell


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
