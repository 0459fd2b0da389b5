"""The Triton backend through all of Triton, launches included, on the driver of libcuda.c.

`test_triton_launches.py` runs this in a process of its own, which believes that there is a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.device = lambda device: nullcontext()
torch._C._cuda_getCurrentRawStream = lambda device: 0

import cases  # noqa: E402
import kernels  # noqa: E402
from cases import feature  # noqa: E402
from test_triton import every_kind  # noqa: E402

from at_fused import backends  # noqa: E402
from at_fused.backends import _triton_kernels  # noqa: E402

backend: Any = backends.modules["triton"]
Listener = ctypes.CFUNCTYPE(None, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p))
KERNELS = ("maps_kernel", "loss_kernel", "gradients_kernel")


def expected(kernel: str, arguments: tuple[Any, ...]) -> list[tuple[type, Any]]:
    """The kernel's parameters, as C types and values: leaves of the arguments that aren't compiled in."""
    function = getattr(_triton_kernels, kernel)

    def leaves(value: Any, plain: bool) -> Iterator[tuple[type, Any]]:
        if isinstance(value, tuple):
            for item in value:
                yield from leaves(item, plain)
        elif isinstance(value, Tensor):
            yield ctypes.c_uint64, value.data_ptr()
        elif isinstance(value, float):
            yield ctypes.c_float, ctypes.c_float(value).value
        elif value is not None and (plain or value != 1):
            yield (ctypes.c_int32 if value < 2**31 else ctypes.c_int64), value

    return [
        leaf
        for name, value in zip(function.arg_names, arguments, strict=False)
        for leaf in leaves(value, name in function.do_not_specialize)
    ]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, Any]]]:
    """Of each launch what was asked for, and what arrived: kernel, programs, threads and parameters."""
    recorded: list[tuple[Any, Any]] = []
    asked: list[tuple[str, int, list[tuple[type, Any]]]] = []
    launch = backend._launch

    def ask(kernel: str, at: Tensor, programs: int, *arguments: Any, **constants: Any) -> None:
        asked.append((kernel, programs, expected(kernel, arguments)))
        launch(kernel, at, programs, *arguments, **constants)

    @Listener
    def listener(programs: int, threads: int, parameters: Any) -> None:
        kernel, wanted_programs, leaves = asked.pop()
        arrived = [ctypes.cast(parameters[i], ctypes.POINTER(kind))[0] for i, (kind, _) in enumerate(leaves)]
        wanted = (
            kernel,
            wanted_programs,
            32 * backend.options("cuda")["num_warps"],
            [value for _, value in leaves],
        )
        recorded.append((wanted, (kernel, programs, threads, arrived)))

    driver = ctypes.CDLL("libcuda.so.1")
    monkeypatch.setattr(backend, "_launch", ask)
    driver.when_launched(listener)
    yield recorded
    driver.when_launched(None)
    assert not asked, "asked for, and not launched"


@pytest.mark.parametrize("p, mapping, reduce, kinds", [(2, "sum", True, 19), (2.5, "max", False, 3)])
def test_kernels_get_what_the_backend_passes(
    p: float, mapping: str, reduce: bool, kinds: int, launches: list
) -> None:
    students = every_kind()[:kinds]
    teachers = [feature(*x.shape, seed=1, dtype=x.dtype, layout=cases.channels_last) for x in students]
    weights = [0.5 + i for i in range(len(students))]
    found = kernels.loss(backend, students, teachers, weights, p, mapping, reduce=reduce, teacher_slopes=True)
    slopes = [*found.student_slopes, *found.teacher_slopes]
    scale = torch.ones(()) if reduce else torch.ones(2 * len(students))
    kernels.gradients(backend, [*students, *teachers], slopes, scale, p, mapping)
    kernels.gradients(backend, students[:1], slopes[:1], None, p, mapping)
    assert [wanted[0] for wanted, _ in launches] == [*KERNELS, "gradients_kernel"]
    for wanted, arrived in launches:
        assert arrived == wanted


def test_no_size_of_a_batch_is_compiled_anew(launches: list) -> None:
    """Training's last batches and tests make many."""

    def variants() -> list[int]:
        kernels = [getattr(_triton_kernels, name) for name in KERNELS]
        return [sum(len(found[0]) for found in kernel.device_caches.values()) for kernel in kernels]

    counts = []
    for batch in (128, 80, 72, 77, 16, 3, 2, 1):
        students, teachers = (
            [feature(batch, c, n, n) for c, n in ((16, 16), (32, 8), (2 * width, 7))] for width in (32, 16)
        )
        slopes = kernels.loss(backend, students, teachers).student_slopes
        kernels.gradients(backend, students, slopes, torch.ones(()))
        counts.append(variants())
    assert len(launches) == 8 * 3
    assert counts[0] == counts[-2], counts
    assert counts[-1] <= [count + 1 for count in counts[0]], (
        "maps of one sample have no stride between samples"
    )
