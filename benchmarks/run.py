"""Side-by-side measurements: `python -m benchmarks.run --device cpu --suite loss --out runs/bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import loss_suite, report
from benchmarks.providers import PROVIDERS
from benchmarks.workloads import select_cells


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=("loss", "step"), required=True)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, help="times that each contender runs (loss 50, step 60)")
    parser.add_argument("--batch", type=int, help="another batch size than the real one")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="tiny batches, few rounds: does it run at all?")
    parser.add_argument("--cells", default="", help="loss: only cells whose name contains this")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = 3 if options.quick else {"loss": 50, "step": 60}[options.suite]
    if options.batch is None and options.quick:
        options.batch = 2
    if options.rounds < 1 or (options.batch is not None and options.batch < 1):
        parser.error("--rounds and --batch must be at least 1")
    return options


def run_loss(options: argparse.Namespace, device: torch.device) -> str:
    cells = select_cells(options.cells, options.batch)
    rows = []
    for cell in cells:
        print(f"{cell.name}: {options.rounds} rounds of {', '.join(options.providers)}", flush=True)
        rows += loss_suite.measure_cell(cell, options.providers, device, options.rounds)
    machine = report.describe_machine(device)
    page = report.markdown(
        "Attention-transfer loss, forward and backward over all pairs", machine, *loss_suite.table(rows)
    )
    stem = f"loss-{device.type}"
    summary = loss_suite.summarize(rows)
    report.write(options.out, stem, page, rows, {"machine": machine, "summary": summary})
    from benchmarks import plots

    plots.times_floor(rows, options.out / f"{stem}.png")
    return page


def run_step(options: argparse.Namespace, device: torch.device) -> str:
    from benchmarks import step_suite

    batch = options.batch or 128
    print(f"step: {options.rounds} rounds at batch {batch}", flush=True)
    rows = step_suite.measure(batch, device, options.rounds)
    machine = report.describe_machine(device)
    title = f"Training step {step_suite.STUDENT} <- {step_suite.TEACHER}, batch {batch}, bf16, channels_last"
    page = report.markdown(title, machine, *step_suite.table(rows))
    report.write(options.out, f"step-{device.type}", page, rows, {"machine": machine})
    return page


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("this machine has no CUDA device that torch can use")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        run = run_loss if options.suite == "loss" else run_step
        print("\n" + run(options, device))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
