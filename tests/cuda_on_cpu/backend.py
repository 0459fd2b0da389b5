"""The "cuda" backend on CPU tensors: its Python, operators, plans and kernels, all but device and compiler.

As a pytest plugin it joins the backends that the suite tests: `-p cuda_on_cpu.backend`, with tests/ and
tests/helpers/ on PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import partial
import torch
from torch import Tensor

from at_fused import backends
from at_fused.backends import cuda

from .build import build


class OnDevice:
    """A CPU tensor that says it is a CUDA device's."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def set_device(
    *,
    multiprocessors: int = 132,
    shared_per_multiprocessor: int = 228 << 10,
    l2: int = 50 << 20,
    cluster_launch: bool = True,
    blocks_per_cluster: int = 8,
    ptx_version: int = 90,
    binary_version: int = 90,
    capturing: bool = False,
    runs: bool = True,
) -> None:
    """By default an H100. Sizes in bytes; a call whose activations exceed `l2` may take the one-pass form.

    `ptx_version` and `binary_version` are of the code that runs; `capturing`: its streams are, into graphs;
    not `runs`: launches do nothing, and what a call takes is the host's part.
    """
    torch.ops.simt.device(
        multiprocessors,
        shared_per_multiprocessor,
        l2,
        cluster_launch,
        blocks_per_cluster,
        ptx_version,
        binary_version,
        capturing,
        runs,
    )
    cuda._l2_bytes = lambda index: l2  # type: ignore[assignment]


def set_order(seed: int) -> None:
    """In which blocks and threads run: 0 by index, else a random one."""
    torch.ops.simt.seed(seed)


def last_cluster() -> int:
    """Blocks per cluster of the last launch."""
    return torch.ops.simt.last_cluster()


def last_grid() -> int:
    """Blocks of the last launch."""
    return torch.ops.simt.last_grid()


def calls(function: str) -> int:
    """How often the CUDA runtime's `function` was called."""
    return torch.ops.simt.calls(function)


@contextmanager
def installed() -> Iterator[None]:
    unsupported = cuda.unsupported

    def unsupported_on_device(feats: Sequence[Tensor], p: float, mapping: str) -> str | None:
        return unsupported([OnDevice(feat) for feat in feats], p, mapping)  # type: ignore[misc]

    torch.ops.load_library(build("simt_cuda"))
    with (
        mock.patch.dict(backends._unavailable, cuda=None),
        mock.patch.object(backends, "_available", ("cuda", *backends.available_backends())),
        mock.patch.object(cuda, "unsupported", unsupported_on_device),
        mock.patch.object(cuda, "_last_was_one", torch.ones(1, dtype=torch.int32)),  # not pinned
        mock.patch.object(cuda, "_l2_bytes"),
    ):
        set_device()
        set_order(0)
        yield


# --- plugin -----------------------------------------------------------------------------------------

session = ExitStack()


def pytest_configure() -> None:
    """Before the suite's modules ask for the backends."""
    session.enter_context(installed())
    set_order(1)
    partial.install()


def pytest_unconfigure() -> None:
    session.close()


pytest_runtest_call = partial.pytest_runtest_call
