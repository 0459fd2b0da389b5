"""What a GPU should reach, written before it is measured, and what has been measured so far.

    python -m benchmarks.predictions --out benchmarks/results [--measured DIR]

Without results of a GPU, every figure that needs one reads "not measured".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from at_fused._terminal import lenient_output
from at_fused.visualize.paths import user_path
from benchmarks import issue, report
from benchmarks.loss.providers import LAUNCHES
from benchmarks.loss.tables import extra_percent, host_overhead_us
from benchmarks.loss.workloads import WORKLOADS, Cell, select_cells
from benchmarks.report import Row, Table

NOT_MEASURED = "not measured"
CIFAR = ("cifar",)
IMAGENET = ("imagenet", "imagenet-last2", "imagenet50", "imagenet50-last2")
DTYPES = ("bf16", "fp32")  # fp16 moves what bf16 does


# --- bytes and launches -----------------------------------------------------------------------------


def held_bytes(cell: Cell) -> int:
    """The bytes that must be kept from forward to backward: the student's map slopes in fp32."""
    return 4 * cell.batch * sum(math.prod(shape[1:]) for shape in cell.student)


def cells_table(rows: Sequence[Row]) -> Table:
    """A line per workload and dtype (all layouts move the same bytes), with the floor if a copy was timed."""
    launched = [f"{name}, launches" for name in LAUNCHES]
    headers = ["cell", "batch", "S MB", "T MB", "3S+T MB", "2S+T MB", "maps held MB (% of S+T)", *launched]
    headers += ["3S+T floor µs", "two passes µs", "2S+T floor µs", "one pass µs"]
    bandwidths = [row["copy_gb_per_s"] for row in _forward_backward(rows, "graph")]
    bandwidth = median(bandwidths) * 1e9 if bandwidths else None
    lines = []
    for cell in select_cells(device_type="cuda", layouts=("channels_last",), dtypes=DTYPES):
        s, t = cell.student_bytes, cell.teacher_bytes
        held = held_bytes(cell)
        line = [f"{cell.workload}-{cell.dtype}", str(cell.batch)]
        line += [f"{size / 1e6:.1f}" for size in (s, t, 3 * s + t, 2 * s + t)]
        line.append(f"{held / 1e6:.2f} ({held / (s + t) * 100:.2f})")
        line += [f"≤ {forward} + {backward}" for forward, backward in LAUNCHES.values()]
        for one_pass in (False, True):
            moved = cell.bytes_moved(one_pass=one_pass)
            line.append(f"{moved / bandwidth * 1e6:.1f}" if bandwidth else NOT_MEASURED)
            times = [
                row["median_ms"] * 1e3
                for row in _forward_backward(rows, "graph")
                if (row["workload"], row["dtype"], row["p"]) == (cell.workload, cell.dtype, 2)
                and row["provider"].startswith("ours")
                and row["one_pass"] == one_pass
            ]
            line.append(f"{min(times):.1f}" if times else NOT_MEASURED)
        lines.append(line)
    return Table("Bytes to move, kernels and fills to launch, forward + backward, all pairs", headers, lines)


# --- goals ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    text: str
    limit: float | None  # None: for comparison only
    at_least: bool
    measure: Callable[[Sequence[Row]], float | None]  # from the rows of every suite

    def line(self, rows: Sequence[Row]) -> list[str]:
        value = self.measure(rows)
        measured = NOT_MEASURED if value is None else f"{value:.3g}"
        if self.limit is None:
            return [self.text, "", measured, ""]
        goal = f"{'≥' if self.at_least else '≤'} {self.limit:g}"
        if value is None:
            return [self.text, goal, measured, ""]
        reached = value >= self.limit if self.at_least else value <= self.limit
        return [self.text, goal, measured, "reached" if reached else "missed"]


def _forward_backward(rows: Sequence[Row], timing: str) -> list[Row]:
    return [row for row in rows if row.get("mode") == "both" and row["timing"] == timing]


def _fastest(
    rows: Sequence[Row], workloads: Sequence[str], timing: str, one_pass: bool | None = None
) -> dict[str, Row]:
    """Our fastest row of each bf16, p = 2 cell of the workloads."""
    best: dict[str, Row] = {}
    for row in _forward_backward(rows, timing):
        fits = row["workload"] in workloads and row["dtype"] == "bf16" and row["p"] == 2
        if not fits or not row["provider"].startswith("ours") or one_pass not in (None, row["one_pass"]):
            continue
        if row["cell"] not in best or row["median_ms"] < best[row["cell"]]["median_ms"]:
            best[row["cell"]] = row
    return best


def _least(values: Sequence[float]) -> float | None:
    return min(values, default=None)


def _greatest(values: Sequence[float]) -> float | None:
    return max(values, default=None)


def _bandwidth(one_pass: bool) -> Callable[[Sequence[Row]], float | None]:
    return lambda rows: _least(
        [row["percent_of_copy"] for row in _fastest(rows, IMAGENET, "graph", one_pass).values()]
    )


def _speedup(workloads: Sequence[str], timing: str, other: str) -> Callable[[Sequence[Row]], float | None]:
    def measure(rows: Sequence[Row]) -> float | None:
        ours = _fastest(rows, workloads, timing)
        return _least(
            [
                row["median_ms"] / ours[row["cell"]]["median_ms"]
                for row in _forward_backward(rows, timing)
                if row["provider"] == other and row["cell"] in ours
            ]
        )

    return measure


def _peak_extra(rows: Sequence[Row]) -> float | None:
    return _greatest([extra_percent(row) for row in _fastest(rows, IMAGENET, "eager").values()])


def _peak_extra_of_authors(rows: Sequence[Row]) -> float | None:
    ours = _fastest(rows, IMAGENET, "eager")
    return _greatest(
        [
            extra_percent(row)
            for row in _forward_backward(rows, "eager")
            if row["provider"] == "authors" and row["cell"] in ours
        ]
    )


def _device_time(rows: Sequence[Row]) -> float | None:
    return _greatest([row["median_ms"] * 1e3 for row in _fastest(rows, CIFAR, "graph").values()])


def _host_overhead(rows: Sequence[Row]) -> float | None:
    found = [host_overhead_us(row, rows) for row in _fastest(rows, CIFAR, "eager").values()]
    return _greatest([value for value in found if value is not None])


def _step_cost(rows: Sequence[Row]) -> float | None:
    return _greatest([row["cost_percent"] for row in rows if row.get("step") == "AttentionTransfer"])


GOALS = (
    Goal("ImageNet pairs, two passes: % of the copy bandwidth over 3S+T", 85, True, _bandwidth(False)),
    Goal("ImageNet pairs, one pass: % of the copy bandwidth over 2S+T", 80, True, _bandwidth(True)),
    Goal(
        "ImageNet pairs: times faster than the authors' form under autocast (CUDA graphs)",
        10,
        True,
        _speedup(IMAGENET, "graph", "authors-autocast"),
    ),
    Goal(
        "ImageNet pairs: times faster than torch.compile (CUDA graphs)",
        2,
        True,
        _speedup(IMAGENET, "graph", "compile"),
    ),
    Goal("ImageNet pairs: peak extra memory, % of the activations", 1, False, _peak_extra),
    Goal("the same of the authors' form", None, False, _peak_extra_of_authors),
    Goal("CIFAR: times faster than the authors' form", 10, True, _speedup(CIFAR, "eager", "authors")),
    Goal("CIFAR: device time, µs", 25, False, _device_time),
    Goal("CIFAR: host overhead, µs", 150, False, _host_overhead),
    Goal("ResNet-18 ← ResNet-34, batch 256, channels_last: AT in % of a training step", 1, False, _step_cost),
)


def goals_table(rows: Sequence[Row]) -> Table:
    """Each goal beside the worst of its cells, all bf16, p = 2, forward + backward, in both layouts."""
    headers = ["bf16, forward + backward, the worst of both layouts", "goal", "measured", ""]
    return Table("Goals", headers, [goal.line(rows) for goal in GOALS])


# --- page -------------------------------------------------------------------------------------------


def page(rows: Sequence[Row], machine: dict[str, Any] | None) -> str:
    titles = Table(
        "Workloads", ["name", "features"], [[name, workload.title] for name, workload in WORKLOADS.items()]
    )
    tables = [cells_table(rows), issue.table(), goals_table(rows), titles]
    return report.markdown("GPU: predictions and goals", machine, tables)


def load(folder: Path) -> tuple[list[Row], dict[str, Any] | None]:
    """All rows of the results for CUDA in `folder`, and the machine of the last.

    Raises:
        ValueError: there are none.
    """
    rows: list[Row] = []
    machine = None
    for path in sorted(folder.glob("*-cuda.json")):
        content = json.loads(path.read_text())
        rows += content["rows"]
        machine = content["machine"]
    if not rows:
        raise ValueError(f"{folder} holds no *-cuda.json")
    return rows, machine


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__)
    parser.add_argument("--out", type=user_path, required=True, help="folder for gpu-predictions.md")
    parser.add_argument("--measured", type=user_path, help="folder with results of a GPU")
    options = parser.parse_args(argv)
    try:
        rows, machine = load(options.measured) if options.measured else ([], None)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu-predictions.md").write_text(page(rows, machine), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"predictions: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
