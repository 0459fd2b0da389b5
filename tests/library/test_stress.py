"""The library over time and across processes: many calls, many threads, fork and spawn.

`make soak` asks for more of everything through AT_FUSED_SOAK, the factor by which counts grow.
"""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import pytest
import torch
from cases import each_backend, feature
from torch import Tensor

import at_fused

pytestmark = pytest.mark.slow


def value_and_gradients(backend: str, seed: int = 0) -> list[Tensor]:
    """Loss and student gradients of two pairs, big enough to be shared by threads, on the CPU."""
    device = cases.device_of(backend)
    students = [feature(8, c, n, n, seed=seed, device=device) for c, n in ((24, 14), (40, 7))]
    teachers = [feature(8, c, n, n, seed=seed + 9, device=device).detach() for c, n in ((16, 14), (80, 7))]
    loss = at_fused.attention_loss(students, teachers, backend=backend)
    return [x.detach().cpu() for x in (loss, *torch.autograd.grad(loss, students))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_backend
def test_threads_that_share_the_library(backend: str) -> None:
    """Every thread gets the bits of a quiet process, whatever upstream gradients the others have."""
    expected = [value_and_gradients(backend, seed) for seed in range(4)]

    def work(turn: int) -> bool:
        if turn % 3 == 0:  # turns the early gradient off for the next call of anybody
            x, y = feature(2, 3, 4, 4).detach().requires_grad_(), feature(2, 3, 4, 4).detach()
            (at_fused.attention_loss(x, y, backend="auto") * 2).backward()
        return same(value_and_gradients(backend, turn % 4), expected[turn % 4])

    turns = 24 if backend == "triton" else 200
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(turns * cases.SOAK)))


def _child(backend: str, threads: int, path: Path) -> None:
    torch.set_num_threads(threads)
    torch.save(value_and_gradients(backend), path)


@each_backend
@pytest.mark.parametrize("method, threads", [("fork", 1), ("spawn", 2)])
def test_child_processes(method: str, threads: int, backend: str, tmp_path: Path) -> None:
    """A forked child (with one thread, as in a DataLoader) and a spawned one get the parent's bits."""
    if method == "fork" and torch.cuda.is_available():
        pytest.skip("where there is CUDA, autograd's threads do not survive a fork")
    torch.set_num_threads(2)  # the parent has a pool of threads, which a fork does not copy
    expected = value_and_gradients(backend)
    path = tmp_path / "child.pt"
    child = multiprocessing.get_context(method).Process(target=_child, args=(backend, threads, path))
    child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        pytest.fail(f"a child made by {method} hangs")
    assert child.exitcode == 0
    assert same(torch.load(path), expected)


@each_backend
def test_memory_does_not_grow(backend: str) -> None:
    """10,000 calls, forward and backward, with either way to the gradient, leave nothing behind."""
    if cases.device_of(backend) == "cpu" and backend == "triton":
        pytest.skip("the interpreter is not what users run")
    device = cases.device_of(backend)
    student, teacher = feature(2, 4, 6, 5, device=device), feature(2, 6, 6, 5, device=device).detach()

    def calls(count: int) -> None:
        for i in range(count):
            loss = at_fused.attention_loss(student, teacher, backend=backend)
            torch.autograd.grad(loss * (1 + i % 2), student)

    def used() -> float:
        """MiB: resident, or on the device."""
        if device == "cuda":
            return torch.cuda.memory_allocated() / 2**20
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    calls(2_000)
    before = used()
    calls(10_000 * cases.SOAK)
    assert used() - before < 1.0, "MiB: even 128 bytes a call would show"
