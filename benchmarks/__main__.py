"""Side-by-side measurements: `python -m benchmarks --device cpu --suite loss --out runs/bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from at_fused._terminal import lenient_output
from at_fused.visualize.paths import user_path
from benchmarks import report
from benchmarks.loss import tables as loss_tables
from benchmarks.loss.providers import Provider, select_providers
from benchmarks.loss.workloads import (
    DEFAULT_DTYPES,
    DTYPES,
    LAYOUTS,
    MODES,
    POWERS,
    WORKLOADS,
    Cell,
    select_cells,
    sweep_cells,
)
from benchmarks.report import Row
from benchmarks.suites import loss as loss_suite
from benchmarks.suites import memory as memory_suite

ROUNDS = {"loss": 50, "scaling": 20, "step": 40, "memory": 1, "trainer": 9, "footprint": 1}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=list(SUITES), required=True)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the results")
    parser.add_argument(
        "--rounds", type=int, help="times each contender runs (loss 50, scaling 20, step 40, trainer 9)"
    )
    parser.add_argument("--batch", type=int, help="another batch size than the real one")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="tiny batches, few rounds: does it run at all?")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the cells in --out, measure the others (loss, memory, scaling)",
    )
    loss = parser.add_argument_group("suites loss, memory, scaling and step; defaults are the device's own")
    loss.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), help="(cpu: two; cuda: all)")
    loss.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    loss.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="(cpu: fp32 bf16; cuda, step: bf16)")
    loss.add_argument("--p", nargs="+", type=int, choices=POWERS, default=[2], help="exponents (2)")
    loss.add_argument("--modes", nargs="+", choices=MODES, help="(cpu: both; cuda: all)")
    loss.add_argument("--timings", nargs="+", choices=("eager", "graph"), help="(cpu: eager; cuda: both)")
    loss.add_argument("--cells", default="", help="only cells whose name contains this")
    loss.add_argument("--providers", nargs="+", metavar="NAME", help="only these (a wrong name lists all)")
    data = parser.add_argument_group("suites trainer, and footprint (CPU only)")
    data.add_argument(
        "--cifar", type=user_path, metavar="DIR", help="has cifar-10-batches-py (default: digits)"
    )
    data.add_argument(
        "--folder", type=user_path, metavar="DIR", help="has train and val, of ImageNet-like files"
    )
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = 3 if options.quick else ROUNDS[options.suite]
    if options.batch is None and options.quick:
        options.batch = 2
    if options.rounds < 1 or (options.batch is not None and options.batch < 1):
        parser.error("--rounds and --batch must be at least 1")
    return options


def resolve(options: argparse.Namespace, device: torch.device) -> None:
    """Fills in what depends on the device.

    Raises:
        ValueError: no such device, or CUDA graphs wanted elsewhere than on CUDA.
    """
    cuda = device.type == "cuda"
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is cpu or cuda, not {device.type}")
    if cuda and not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device that torch can use")
    if cuda and options.suite == "footprint":
        raise ValueError("--suite footprint takes --device cpu")
    options.modes = options.modes or (MODES if cuda else ["both"])
    options.timings = options.timings or (["eager", "graph"] if cuda else ["eager"])
    if "graph" in options.timings and not cuda:
        raise ValueError("--timings graph takes a CUDA device")


def cells_of(options: argparse.Namespace, device: torch.device) -> list[Cell]:
    return select_cells(
        options.cells,
        options.batch,
        device_type=device.type,
        workloads=options.workloads,
        layouts=options.layouts,
        dtypes=options.dtypes,
        powers=options.p,
    )


def progress(cell: Cell, providers: Sequence[Provider]) -> None:
    names = [provider.name for provider in providers if provider.fits(cell)]
    print(f"{cell.name}, batch {cell.batch}: {', '.join(names)}", flush=True)


def kept_rows(options: argparse.Namespace, stem: str) -> list[Row]:
    """The rows of an earlier run that --resume goes on with. They are written cell by cell."""
    rows: list[Row] = report.read(options.out, stem).get("rows", []) if options.resume else []
    return rows


def missing(cells: Sequence[Cell], rows: Sequence[Row]) -> list[Cell]:
    there = {(row["cell"], row["batch"]) for row in rows}
    return [cell for cell in cells if (cell.name, cell.batch) not in there]


def run_loss(options: argparse.Namespace, device: torch.device) -> str:
    providers = select_providers(options.providers, device)
    machine = report.describe_machine(device)
    rows = kept_rows(options, f"loss-{device.type}")
    page = write_loss(options.out, device.type, machine, rows) if rows else ""
    for cell in missing(cells_of(options, device), rows):
        progress(cell, providers)
        rows += loss_suite.measure_cell(
            cell, providers, device, options.rounds, modes=options.modes, timings=options.timings
        )
        page = write_loss(options.out, device.type, machine, rows)  # each time: what is measured is kept
    if device.type == "cpu":  # elsewhere it only costs the device's time: benchmarks.gpu draws at the end
        draw_loss(options.out, device.type, rows)
    return page


def write_loss(folder: Path, device_type: str, machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Leaves loss-DEVICE.md, .csv and .json in `folder`; returns the page."""
    page = report.markdown("Attention-transfer loss over all pairs", machine, loss_tables.tables(rows))
    summary = {heading: loss_tables.summarize(group) for heading, group in loss_tables.groups(rows).items()}
    stem = f"loss-{device_type}"
    report.write(folder, stem, page, rows, {"machine": machine, "summary": summary})
    return page


def draw_loss(folder: Path, device_type: str, rows: Sequence[Row]) -> None:
    """Leaves loss-DEVICE.png in `folder`."""
    from benchmarks import plots

    plots.times_floor(loss_tables.main_group(rows), folder / f"loss-{device_type}.png")


def run_memory(options: argparse.Namespace, device: torch.device) -> str:
    providers = select_providers(options.providers, device)
    machine = report.describe_machine(device)
    stem = f"memory-{device.type}"
    rows = kept_rows(options, stem)
    for cell in missing(cells_of(options, device), rows):
        progress(cell, providers)
        rows += memory_suite.measure_cell(cell, providers, device)
        page = report.markdown("Memory of forward and backward", machine, [memory_suite.table(rows)])
        report.write(options.out, stem, page, rows, {"machine": machine})
    return (options.out / f"{stem}.md").read_text(encoding="utf-8")


def run_scaling(options: argparse.Namespace, device: torch.device) -> str:
    from benchmarks import plots

    layout, dtype = options.layouts[0], (options.dtypes or DEFAULT_DTYPES[device.type])[0]
    timing = options.timings[-1]
    providers = select_providers(options.providers, device)
    machine = report.describe_machine(device)
    title = f"Scaling of forward and backward, one pair (128, 28, 28), {layout}, {dtype}"
    stem = f"scaling-{device.type}"
    rows = kept_rows(options, stem)
    for varied, cells in sweep_cells(device.type, layout, dtype).items():
        for cell in missing(cells[:2] if options.quick else cells, rows):
            progress(cell, providers)
            found = loss_suite.measure_cell(cell, providers, device, options.rounds, timings=[timing])
            rows += [row | {"varied": varied, "channels": cell.student[0][0]} for row in found]
            tables = [
                loss_tables.times_table(f"Varying {name}", swept) for name, swept in _sweeps(rows).items()
            ]
            page = report.markdown(title, machine, tables)
            report.write(options.out, stem, page, rows, {"machine": machine})
    plots.scaling(_sweeps(rows), options.out / f"{stem}.png")
    return (options.out / f"{stem}.md").read_text(encoding="utf-8")


def _sweeps(rows: Sequence[Row]) -> dict[str, list[Row]]:
    names = dict.fromkeys(row["varied"] for row in rows)
    return {name: [row for row in rows if row["varied"] == name] for name in names}


def run_step(options: argparse.Namespace, device: torch.device) -> str:
    from benchmarks.suites import step as step_suite
    from benchmarks.suites import step_probe

    setting = step_probe.SETTINGS[device.type]
    batch, dtype = options.batch or setting.batch, (options.dtypes or ["bf16"])[0]
    if dtype not in ("bf16", "fp32"):
        raise ValueError(f"--suite step takes --dtypes bf16 or fp32, not {dtype}")
    processes = 1 if options.quick else step_suite.PROCESSES
    print(f"step: {processes} processes of {options.rounds} rounds at batch {batch}", flush=True)
    rows = step_suite.measure(batch, device, options.rounds, processes, dtype)
    machine = report.describe_machine(device)
    title = f"Training step {setting.student} ← {setting.teacher}, batch {batch}, {dtype}, channels_last"
    page = report.markdown(title, machine, step_suite.tables(rows))
    report.write(options.out, f"step-{device.type}", page, rows, {"machine": machine})
    return page


def run_trainer(options: argparse.Namespace, device: torch.device) -> str:
    from benchmarks.suites import trainer as trainer_suite

    rows: list[Row] = []
    for case, data_dir in trainer_suite.cases(options.cifar, options.folder, device).items():
        print(case.name, flush=True)
        measured = case.quick() if options.quick else case
        rows.append(trainer_suite.measure(measured, data_dir, options.rounds, device))
    machine = report.describe_machine(device)
    title = "train.py beside a loop written by hand, bf16, channels_last"
    page = report.markdown(title, machine, [trainer_suite.table(rows)])
    report.write(options.out, f"trainer-{device.type}", page, rows, {"machine": machine})
    return page


def run_footprint(options: argparse.Namespace, device: torch.device) -> str:
    from benchmarks.suites import footprint as footprint_suite

    quick = options.quick
    rows = footprint_suite.measure_start_up(options.cifar, [False] if quick else [False, True])
    rows += footprint_suite.measure_memory(options.cifar, (8, 16) if quick else footprint_suite.BATCHES)
    machine = report.describe_machine(device)
    tables = footprint_suite.tables(rows)
    title = f"Start and memory of train.py, {footprint_suite.STUDENT}, bf16, channels_last"
    page = report.markdown(title, machine, tables)
    report.write(options.out, f"footprint-{device.type}", page, rows, {"machine": machine})
    return page


SUITES: dict[str, Callable[[argparse.Namespace, torch.device], str]] = {
    "loss": run_loss,
    "memory": run_memory,
    "scaling": run_scaling,
    "step": run_step,
    "trainer": run_trainer,
    "footprint": run_footprint,
}


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        device = torch.device(options.device)
        resolve(options, device)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        print("\n" + SUITES[options.suite](options, device))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
