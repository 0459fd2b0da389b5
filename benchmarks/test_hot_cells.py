"""The default cells of the loss suite under pytest-benchmark: `pytest benchmarks --benchmark-only`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.loss.providers import Provider, providers
from benchmarks.loss.subjects import Subject
from benchmarks.loss.workloads import Cell, select_cells
from benchmarks.measure import timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = [provider for provider in providers(DEVICE).values() if provider.backend]


@pytest.mark.parametrize("provider", OURS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("cell", select_cells(device_type=DEVICE.type), ids=lambda cell: cell.name)
def test_forward_backward(cell: Cell, provider: Provider, benchmark: BenchmarkFixture) -> None:
    subject = Subject(provider, cell, *cell.make(DEVICE))
    synchronize = timing.synchronizer(DEVICE)
    benchmark.extra_info["declared_bytes"] = cell.bytes_moved(one_pass=subject.one_pass)

    def run() -> None:
        subject.both()
        synchronize()

    benchmark.pedantic(run, setup=subject.prepare, rounds=20, warmup_rounds=3)
    assert all(student.grad is not None and student.grad.isfinite().all() for student in subject.students)
