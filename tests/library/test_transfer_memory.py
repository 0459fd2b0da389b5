"""The peak of a training step's live storages: AttentionTransfer adds no activation-sized tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import at_fused

models = pytest.importorskip("models", reason="a run of the library alone")


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operators make, until they are freed; `peak` is the most at once."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.bytes += self.live[key]
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.bytes -= self.live.pop(key)


def peak_of_a_step(
    make: Callable[[], tuple[nn.Module, nn.Module, list[str]]],
    images: Tensor,
    layout: torch.memory_format,
    transferred: bool,
) -> int:
    student, teacher, names = make()
    student.to(memory_format=layout)
    teacher.to(memory_format=layout).eval().requires_grad_(False)
    images = images.to(memory_format=layout)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    state = [x for net in (student, teacher) for x in (*net.parameters(), *net.buffers())]
    transfer = at_fused.AttentionTransfer(student, teacher, names)
    if not transferred:
        transfer.close()
    with LiveStorages([*state, *grads, images]) as storages:
        with torch.autocast("cpu", torch.bfloat16):
            if transferred:
                with torch.no_grad():
                    teacher(images)
            loss = F.cross_entropy(student(images), torch.zeros(len(images), dtype=torch.int64))
            if transferred:
                loss = loss + transfer()
        loss.backward()
    transfer.close()
    return storages.peak


def wide_resnets() -> tuple[nn.Module, nn.Module, list[str]]:
    student = models.create("wrn-16-1")
    return student, models.create("wrn-16-2"), student.taps["groups"]


def resnets() -> tuple[nn.Module, nn.Module, list[str]]:
    networks = pytest.importorskip("torchvision").models
    groups = ["layer1", "layer2", "layer3", "layer4"]
    return networks.resnet18(num_classes=10), networks.resnet50(num_classes=10), groups


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "make, shape, most",
    [
        # 16 channels at the first tap: its fp32 maps alone are 1/8 of a bf16 feature.
        pytest.param(wide_resnets, (128, 3, 32, 32), 0.03, id="wrn"),
        pytest.param(resnets, (16, 3, 96, 96), 0.01, id="resnet"),
    ],
)
@pytest.mark.skipif(
    at_fused.available_backends() == ("reference",), reason="the reference keeps what autograd does"
)
def test_peak_of_a_step(
    make: Callable, shape: tuple[int, ...], most: float, layout: torch.memory_format
) -> None:
    images = torch.randn(shape)
    alone = peak_of_a_step(make, images, layout, transferred=False)
    assert alone > 4 * images.nbytes, "something is counted"
    more = peak_of_a_step(make, images, layout, transferred=True) / alone - 1
    assert more <= most, f"{alone / 1e6:.1f} MB without, {100 * more:.2f} % more with"
