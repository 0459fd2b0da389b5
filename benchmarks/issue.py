"""The share of a GPU's memory bandwidth that the kernels can reach at their instructions per vector: a model.

A scheduler issues one instruction per cycle. The model takes the time of the CUDA kernels as
(memory^4 + issue^4)^(1/4), a maximum that is soft where the two are close, plus 3 µs per kernel to start
and to drain. The shares are upper bounds: the model leaves out waits at barriers, lanes without work, and
whether a form is used at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.loss.workloads import Cell, select_cells
from benchmarks.report import Table

# Machine instructions per 16-byte vector, p = 2, bf16, by nvcc 13; tests/packaging/test_cuda_build.py counts.
INSTRUCTIONS = {
    "channels-last map": {"sm_80": 40.5, "sm_90a": 39.8, "sm_100": 35.8},
    "channels-last map, staged": {"sm_80": 43.5, "sm_90a": 43.0, "sm_100": 39.5},
    "channels-last gradient": {"sm_80": 35.5, "sm_90a": 35.5, "sm_100": 29.5},
    "channels-last gradient, staged": {"sm_80": 32.0, "sm_90a": 32.0, "sm_100": 29.5},
    "channels-first map": {"sm_80": 21.0, "sm_90a": 21.0, "sm_100": 19.8},
    "channels-first map, staged": {"sm_80": 23.0, "sm_90a": 23.0, "sm_100": 21.8},
    "channels-first gradient": {"sm_80": 29.5, "sm_90a": 29.5, "sm_100": 26.5},
    "channels-first gradient, staged": {"sm_80": 28.5, "sm_90a": 28.5, "sm_100": 26.5},
    # At a tap: with each vector of the feature, it also loads one of the gradient that it adds.
    "channels-last gradient, added": {"sm_80": 46.5, "sm_90a": 46.5, "sm_100": 39.5},
    "channels-first gradient, added": {"sm_80": 40.5, "sm_90a": 40.5, "sm_100": 36.5},
}
VECTOR, LANES, SCHEDULERS = 16, 32, 4  # bytes, per warp, per multiprocessor
PER_KERNEL = 3e-6  # seconds


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: str
    multiprocessors: int
    clock: float  # Hz
    copy: float  # bytes per second that a copy reads and writes

    def instructions_per_second(self) -> float:
        """Of all lanes."""
        return self.multiprocessors * SCHEDULERS * LANES * self.clock


# Bandwidths that copies reach, and clocks under such load: published figures, not yet measured by us.
GPUS = (
    Gpu("H100", "sm_90a", 132, 1.90e9, 3.0e12),
    Gpu("H200", "sm_90a", 132, 1.97e9, 4.3e12),
    Gpu("B200", "sm_100", 148, 1.90e9, 7.0e12),
)


def walks(cell: Cell, one_pass: bool) -> dict[str, int]:
    """The bytes of activations that each walk of forward and backward processes."""
    layout = "channels-first" if cell.layout == "nchw" else "channels-last"
    staged = ", staged" if one_pass else ""
    found = {f"{layout} map": cell.teacher_bytes, f"{layout} gradient{staged}": cell.student_bytes}
    found[f"{layout} map{staged}"] = found.get(f"{layout} map{staged}", 0) + cell.student_bytes
    return found


def share(cell: Cell, gpu: Gpu, one_pass: bool) -> float:
    """The share of the copy bandwidth that forward and backward together should reach."""
    memory = cell.bytes_moved(one_pass=one_pass) / gpu.copy
    instructions = sum(
        size / VECTOR * INSTRUCTIONS[walk][gpu.architecture] for walk, size in walks(cell, one_pass).items()
    )
    issue = instructions / gpu.instructions_per_second()
    return memory / ((memory**4 + issue**4) ** 0.25 + 2 * PER_KERNEL)


def table() -> Table:
    """Two passes / one pass in percent of the copy bandwidth, by cell and GPU."""
    headers = ["cell, bf16", *(f"{gpu.name}, two passes / one pass" for gpu in GPUS)]
    lines = [
        [f"{cell.workload}-{cell.layout}"]
        + [
            " / ".join(f"{100 * share(cell, gpu, one_pass):.0f}" for one_pass in (False, True))
            for gpu in GPUS
        ]
        for cell in select_cells(device_type="cuda", dtypes=("bf16",))
        if cell.p == 2
    ]
    return Table(
        "Predicted share of the copy bandwidth, % at the most, from the instructions per vector (cuda)",
        headers,
        lines,
    )
