"""Suite "scaling": times of the loss of one pair over batch size and over channels."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks import plots
from benchmarks.loss.providers import select_providers
from benchmarks.loss.tables import times_table
from benchmarks.loss.workloads import DEFAULT_DTYPES, sweep_cells
from benchmarks.report import Result, Row
from benchmarks.suites import loss
from benchmarks.suites.loss import arguments as arguments

ROUNDS = 20


def measure(options: argparse.Namespace, device: torch.device, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yields the rows of each cell of both sweeps."""
    kinds, providers = loss.timings_of(options, device), select_providers(options.providers, device)
    for varied, cells in sweep_cells(device.type, *_form(options, device)).items():
        for cell in loss.lacking(cells[:2] if options.quick else cells, rows, providers):
            found = loss.measure_cell(cell, providers, device, options.rounds, timings=kinds[-1:])
            yield [row | {"varied": varied, "channels": cell.student[0][0]} for row in found]


def result(rows: Sequence[Row], options: argparse.Namespace, device: torch.device) -> Result:
    """A table and a panel of the picture for each sweep."""
    sweeps = plots.sweeps(rows)
    layout, dtype = _form(options, device)
    title = f"Scaling of forward and backward, one pair (128, 28, 28), {layout}, {dtype}"
    tables = [times_table(f"Varying {varied}", swept) for varied, swept in sweeps.items()]
    return Result(title, tables, partial(plots.scaling, sweeps))


def _form(options: argparse.Namespace, device: torch.device) -> tuple[str, str]:
    """Layout and dtype."""
    return options.layouts[0], (options.dtypes or DEFAULT_DTYPES[device.type])[0]
