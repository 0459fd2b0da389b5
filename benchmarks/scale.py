"""What a long run costs on N GPUs: a model, whose inputs are measured or assumed by the reader.

    python -m benchmarks.scale [--step-ms 100 --batch 256] [--gpus 1 8 64] [--gb-per-s 50] [--hidden 0.5]

Without the time of a step, assumed speeds are shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from at_fused._terminal import lenient_output
from benchmarks import report
from benchmarks.loss.workloads import select_cells
from benchmarks.report import Table

IMAGES = 1_281_167  # ImageNet's training images
EPOCHS = 90
GPUS = (1, 8, 64)
ASSUMED = (1000.0, 2000.0, 4000.0)  # images/s of one GPU, the whole step
GB_PER_S = 50.0  # of the slowest link of the ring: eight 400 Gb/s adapters for eight GPUs
STUDENT, TEACHER, SIZE = "resnet-18", "resnet-34", 224


@dataclass(frozen=True)
class Step:
    """A training step on one GPU, measured or assumed."""

    seconds: float
    batch: int  # images on each GPU

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds


def gradient_bytes(student: str = STUDENT) -> int:
    """Of the fp32 gradients that the ranks sum at each step: the student's; the teacher has none."""
    return 4 * sum(parameter.numel() for parameter in models.create(student, 1000).parameters())


def all_reduce_seconds(size: int, gpus: int, bytes_per_second: float) -> float:
    """Ring all-reduce of `size` bytes: each rank sends 2 (N - 1) / N of them. Latency is left out."""
    return 2 * (gpus - 1) / gpus * size / bytes_per_second


def run_seconds(
    step: Step,
    gpus: int,
    size: int,
    bytes_per_second: float = GB_PER_S * 1e9,
    hidden: float = 0.0,
    images: int = IMAGES,
    epochs: int = EPOCHS,
) -> float:
    """T = steps x (step + exposed all-reduce); an epoch has images / (N x batch) steps, rounded up.

    `hidden` is the share of the step's time behind which DDP can send gradients while backward still runs:
    that much of the all-reduce costs nothing.
    """
    exposed = max(0.0, all_reduce_seconds(size, gpus, bytes_per_second) - hidden * step.seconds)
    steps = epochs * -(-images // (gpus * step.batch))
    return steps * (step.seconds + exposed)


def forward_gflops(name: str) -> float:
    """Of one image of 224 pixels; a multiplication and an addition count 2."""
    model = models.create(name, 1000).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, SIZE, SIZE, device="meta"))
    return counter.get_total_flops() / 1e9


# --- tables -----------------------------------------------------------------------------------------


def work_table() -> Table:
    """What one image, and one step of 256, must compute and move whatever the machine."""
    student, teacher = forward_gflops(STUDENT), forward_gflops(TEACHER)
    (cell,) = select_cells(
        device_type="cuda", workloads=["imagenet"], layouts=("channels_last",), dtypes=("bf16",)
    )
    alone, total = 3 * student, 3 * student + teacher
    lines = [
        ["student, forward and backward (3 x forward)", f"{alone:.2f} GFLOP per image"],
        [
            "teacher, forward",
            f"{teacher:.2f} GFLOP per image, {teacher / alone * 100:.0f} % of the student's",
        ],
        [
            "both",
            f"{total:.2f} GFLOP per image, {total * IMAGES * EPOCHS / 1e9:.2f} EFLOP in {EPOCHS} epochs",
        ],
        [
            f"AT's reads and writes, {cell.batch} images in bf16, 3S+T (one pass: 2S+T)",
            f"{cell.bytes_moved() / 1e6:.0f} MB ({cell.bytes_moved(one_pass=True) / 1e6:.0f} MB) per step",
        ],
        ["gradients that the ranks sum, fp32", f"{gradient_bytes() / 1e6:.1f} MB per step"],
    ]
    return Table(f"{STUDENT} from {TEACHER} at {SIZE} pixels", ["work", "amount"], lines)


def duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{seconds / 60:.1f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:,.1f} days"


def run_table(
    steps: Sequence[tuple[str, Step]],
    gpus: Sequence[int] = GPUS,
    gb_per_s: float = GB_PER_S,
    hidden: float = 0.0,
    shared: bool = False,
) -> Table:
    """A line per step of one GPU; per number of GPUs, how long the run takes, and the efficiency.

    Every GPU has the step's images; or, where the batch is `shared`, its part of them, at the same speed.
    """
    size = gradient_bytes()
    headers = ["images/s of one GPU", "step", *_gpus(gpus)]
    lines = []
    for origin, step in steps:
        line = [f"{step.images_per_second:,.0f}, {origin}", f"{step.seconds * 1e3:,.1f} ms for {step.batch}"]
        alone = run_seconds(step, 1, size)
        for n in gpus:
            mine = Step(step.seconds / n, step.batch // n) if shared else step
            taken = run_seconds(mine, n, size, gb_per_s * 1e9, hidden)
            line.append(duration(taken) if n == 1 else f"{duration(taken)} ({alone / taken / n * 100:.0f} %)")
        lines.append(line)
    batch = "of all GPUs" if shared else "of each GPU"
    return Table(f"{EPOCHS} epochs, links of {gb_per_s:g} GB/s, batch {batch}", headers, lines)


def all_reduce_table(gpus: Sequence[int] = GPUS, speeds: Sequence[float] = (GB_PER_S, 10.0)) -> Table:
    """Milliseconds of one all-reduce over links of each bandwidth."""
    size = gradient_bytes()
    lines = [
        [f"{speed:g} GB/s", *(f"{all_reduce_seconds(size, n, speed * 1e9) * 1e3:.2f} ms" for n in gpus)]
        for speed in speeds
    ]
    return Table("All-reduce of the gradients", ["links", *_gpus(gpus)], lines)


def tables_of_the_page(results: Path) -> list[Table]:
    """Those of docs/scale.md; `results` is what the suite "trainer" has measured on a CPU."""
    assumed = [("assumed", Step(256 / speed, 256)) for speed in ASSUMED]
    rows = json.loads(results.read_text())["rows"]
    (row,) = (row for row in rows if "ResNet-34" in row["case"])
    measured = ("measured", Step(row["batch"] / row["images_per_second"], row["batch"]))
    return [
        work_table(),
        all_reduce_table(),
        run_table(assumed),
        run_table(assumed, shared=True),
        run_table([measured]),
    ]


def _gpus(numbers: Sequence[int]) -> list[str]:
    return [f"{n} GPU{'s' * (n > 1)}" for n in numbers]


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--step-ms", type=float, help="your step's time on one GPU (default: assumed speeds)")
    parser.add_argument("--batch", type=int, default=256, help="images per GPU and step (256)")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="numbers of GPUs (1 8 64)")
    parser.add_argument("--gb-per-s", type=float, default=GB_PER_S, help="bandwidth of the ring's links (50)")
    parser.add_argument("--hidden", type=float, default=0.0, help="share of the step that hides it (0)")
    options = parser.parse_args(argv)
    positive = [options.batch, options.gb_per_s, *options.gpus, options.step_ms or 1]
    if min(positive) <= 0 or not 0 <= options.hidden <= 1 or options.step_ms == 0:
        print("scale: times, sizes and numbers must be above 0, --hidden from 0 to 1", file=sys.stderr)
        return 2
    steps = (
        [("measured", Step(options.step_ms / 1e3, options.batch))]
        if options.step_ms is not None
        else [("assumed", Step(options.batch / speed, options.batch)) for speed in ASSUMED]
    )
    network = (options.gpus, options.gb_per_s, options.hidden)
    tables = [work_table(), all_reduce_table(options.gpus, [options.gb_per_s]), run_table(steps, *network)]
    if options.batch >= max(options.gpus):
        tables.append(run_table(steps, *network, shared=True))
    print(report.markdown("A long run on many GPUs", None, tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
