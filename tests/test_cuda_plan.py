"""When the CUDA backend computes gradients together with the loss: its plan for real shapes, on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import cases
import pytest
import torch
from simt import backend
from torch import Tensor

import at_fused
from at_fused.backends import cuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.usefixtures("h100"),
]

CIFAR = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
RESNET_18 = [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
RESNET_50 = [(4 * channels, *size) for channels, *size in RESNET_18]

both_layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=cases.name_of
)


@pytest.fixture
def h100() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("the device itself is there")
    with backend.installed():
        yield


def features(
    shapes: list[tuple[int, ...]],
    batch: int,
    dtype: torch.dtype = torch.bfloat16,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """Address space, never touched."""
    return [torch.empty((batch, *shape), dtype=dtype, memory_format=layout) for shape in shapes]


@both_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.name_of)
@pytest.mark.parametrize("shapes", [RESNET_18, RESNET_18[2:]])
def test_one_pass_where_the_cache_is_too_small(
    shapes, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    students = features(shapes, 256, dtype, layout)
    for teachers in (students, features([(4 * c, *size) for c, *size in shapes], 256, dtype, layout)):
        for p in (1, 2, 4):
            assert cuda.ahead(students, teachers, p)
        assert not cuda.ahead(students, teachers, 3), "powf takes longer than memory"


@both_layouts
def test_two_passes_elsewhere(layout: torch.memory_format) -> None:
    small = features(CIFAR, 128, layout=layout)
    assert not cuda.ahead(small, small, 2), "fits the cache"
    large = features(RESNET_50, 64, layout=layout)
    assert not cuda.ahead(large, large, 2), "no cluster holds a sample twice per multiprocessor"
    students = features(RESNET_18, 256, layout=layout)
    backend.set_device(major=8, multiprocessors=108, shared_per_multiprocessor=164 << 10, l2=40 << 20)
    assert not cuda.ahead(students, students, 2), "an A100 has no clusters"
    last = features(RESNET_18[3:], 2048, layout=layout)
    assert cuda.ahead(last, last, 2), "and needs none for 50 KB"


def test_the_last_upstream_gradient_decides() -> None:
    students = features(RESNET_18, 256)
    student = torch.ones(1, 1, 2, 2, requires_grad=True)
    for upstream in (2.0, 1.0):
        loss = at_fused.attention_loss(student, torch.ones(1, 1, 2, 2), backend="cuda")
        loss.backward(torch.tensor(upstream))
        assert cuda.ahead(students, students, 2) == (upstream == 1)
