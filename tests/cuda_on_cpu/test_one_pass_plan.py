"""When the CUDA backend computes gradients together with the loss: its plan for real shapes, on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import cases
import pytest
import torch
from torch import Tensor

import at_fused
from at_fused.backends import cuda
from cuda_on_cpu import backend

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
            assert cuda.early_gradients_pay(students, teachers, p)
        assert not cuda.early_gradients_pay(students, teachers, 3), "powf takes longer than memory"


@both_layouts
def test_two_passes_elsewhere(layout: torch.memory_format) -> None:
    small = features(CIFAR, 128, layout=layout)
    assert not cuda.early_gradients_pay(small, small, 2), "fits the cache"
    large = features(RESNET_50, 64, layout=layout)
    assert not cuda.early_gradients_pay(large, large, 2), "no cluster holds a sample twice per multiprocessor"
    students = features(RESNET_18, 256, layout=layout)
    backend.set_device(
        cluster_launch=False, multiprocessors=108, shared_per_multiprocessor=164 << 10, l2=40 << 20
    )
    assert not cuda.early_gradients_pay(students, students, 2), "an A100 has no clusters"
    last = features(RESNET_18[3:], 2048, layout=layout)
    assert cuda.early_gradients_pay(last, last, 2), "and needs none for 50 KB"


def test_the_last_upstream_gradient_decides() -> None:
    students = features(RESNET_18, 256)
    student = torch.ones(1, 1, 2, 2, requires_grad=True)
    backend.set_device(l2=0)  # where it fits the cache nobody would ask
    for upstream in (2.0, 1.0):
        loss = at_fused.attention_loss(student, torch.ones(1, 1, 2, 2), backend="cuda")
        loss.backward(torch.tensor(upstream))
        assert cuda.early_gradients_pay(students, students, 2) == (upstream == 1)


def test_no_note_before_one_pass_can_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_note_is_wanted", False)
    student = torch.ones(1, 1, 2, 2, requires_grad=True)
    at_fused.attention_loss(student, torch.ones(1, 1, 2, 2), backend="cuda").backward(torch.tensor(2.0))
    assert cuda._last_was_one == 1, "not looked at"


# --- blocks that share a sample ---------------------------------------------------------------------------


def few_large_samples() -> tuple[Tensor, float]:
    """A case whose samples are shared where that is possible, and its loss."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 64, 16, 32), torch.randn(2, 64, 16, 32)
    maps = [torch.nn.functional.normalize(x.double().square().sum(1).flatten(1)) for x in (student, teacher)]
    loss = at_fused.attention_loss(student, teacher, backend="cuda")
    return loss, (maps[0] - maps[1]).square().mean()


@pytest.mark.parametrize(
    "device, team",
    [
        ({}, 8),
        ({"blocks_per_cluster": 1}, 1),  # a slice of a GPU (MIG, MPS) with no room for a cluster
        ({"cluster_launch": False}, 1),  # an A100
        ({"ptx_version": 80, "binary_version": 90}, 1),  # Hopper, by code the driver made of PTX for 8.0
        ({"ptx_version": 80, "binary_version": 80}, 1),
        ({"ptx_version": 90, "binary_version": 100}, 8),  # PTX for 9.0 on Blackwell
    ],
)
def test_clusters_only_where_the_code_that_runs_has_them(device: dict[str, int], team: int) -> None:
    backend.set_device(**device)
    loss, expected = few_large_samples()
    assert backend.last_cluster() == team
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("room", [2, 4])
def test_clusters_as_large_as_there_is_room_for(room: int) -> None:
    students = features(RESNET_18[:1], 1)
    backend.set_device(blocks_per_cluster=room, shared_per_multiprocessor=64 << 10, l2=0)
    at_fused.attention_loss([s.zero_() for s in students], students, backend="cuda", eps=1.0)
    assert backend.last_cluster() == room


# --- what a call costs besides its kernels ----------------------------------------------------------------


def test_kernels_are_readied_once() -> None:
    few_large_samples()
    before = backend.calls("cudaFuncSetAttribute")
    few_large_samples()
    assert backend.calls("cudaFuncSetAttribute") == before
    backend.set_device()  # another one
    few_large_samples()
    assert backend.calls("cudaFuncSetAttribute") == before + 2, "both forms of the loss, of one power"


def test_no_memset_but_in_a_graph() -> None:
    """Launches of a stream pass a counter on; a graph, which may run beside its stream, has its own."""
    before = backend.calls("cudaMemsetAsync")
    expected, _ = few_large_samples()
    pairs = [torch.ones(1, 1, 2, 2)] * 40  # of several launches
    at_fused.attention_loss(pairs, pairs, backend="cuda")
    assert backend.calls("cudaMemsetAsync") == before
    backend.set_device(capturing=True)
    assert torch.equal(few_large_samples()[0], expected)
    assert backend.calls("cudaMemsetAsync") == before + 1


def test_backward_that_has_nothing_to_do_is_small() -> None:
    """The gradients came with the loss: two blocks per multiprocessor look whether they are right."""
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 64, 8, 8, requires_grad=True), torch.randn(64, 64, 8, 8)
    backend.set_device(multiprocessors=3, l2=0)
    grads = []
    for scale in (1.0, 3.0):  # right, and made so by the same blocks
        cuda._last_was_one.fill_(1)
        loss = at_fused.attention_loss(student, teacher, backend="cuda")
        grads.append(torch.autograd.grad(loss * scale, student)[0])
        assert backend.last_grid() == 6
    backend.set_device(multiprocessors=3)
    loss = at_fused.attention_loss(student, teacher, backend="cuda")
    assert torch.equal(torch.autograd.grad(loss * 3, student)[0], grads[1])
    assert backend.last_grid() > 6
    assert torch.equal(
        torch.autograd.grad(at_fused.attention_loss(student, teacher, backend="cuda"), student)[0], grads[0]
    )
