"""The cells of the loss suite under pytest-benchmark: `pytest benchmarks --benchmark-only`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.providers import ours
from benchmarks.workloads import CELLS, Cell


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_forward_backward(cell: Cell, benchmark: BenchmarkFixture) -> None:
    students, teachers = cell.make(torch.device("cpu"))
    benchmark.extra_info["floor_bytes"] = cell.floor_bytes

    def forget_gradients() -> None:
        for student in students:
            student.grad = None

    benchmark.pedantic(
        lambda: ours(students, teachers).backward(), setup=forget_gradients, rounds=20, warmup_rounds=3
    )
    assert all(student.grad is not None and student.grad.isfinite().all() for student in students)
