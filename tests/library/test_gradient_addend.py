"""What a backend adds to a gradient as it computes it: one rounding of the exact sum, in every layout."""

from __future__ import annotations

from collections.abc import Callable

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

import at_fused

operator = torch.ops.at_fused.attention_maps_backward.default
each_fused = pytest.mark.parametrize("backend", cases.FUSED)
SHAPES = [(2, 5, 3, 4), (2, 16, 7, 7), (1, 33, 9), (3, 1, 2, 2)]


def exact_gradient(feat: Tensor, grad_map: Tensor, p: float, mapping: str) -> np.ndarray:
    """dQ p |A|^(p-1) sign(A), in fp64; for the maximum only at the first strongest channel."""
    a, dq = cases.exact(feat), cases.exact(grad_map)[:, None]
    grad = dq * p * np.abs(a) ** (p - 1) * np.sign(a)
    if mapping == "max":
        first = np.arange(a.shape[1]).reshape(1, -1, *[1] * (a.ndim - 2)) == np.abs(a).argmax(1)[:, None]
        grad = np.where(first, grad, 0)
    return grad


def skip_if_unsupported(backend: str, feats: list[Tensor], p: float, mapping: str) -> None:
    if reason := at_fused.backends.modules[backend].unsupported(feats, p, mapping):
        pytest.skip(f"{backend}: {reason}")


@each_fused
@pytest.mark.parametrize("dtype, layout", cases.with_dtypes(cases.DENSE), ids=cases.name_of)
@pytest.mark.parametrize("p, mapping", [(2, "sum"), (1, "sum"), (2.5, "sum"), (2, "max")])
def test_sum_of_both_gradients(
    p: float, mapping: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], backend: str
) -> None:
    device = cases.device_of(backend)
    feats, maps, addends = [], [], []
    for seed, shape in enumerate(SHAPES):
        feat = cases.feature(*shape, dtype=dtype, layout=layout, seed=seed, device=device).detach()
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        shape_of_map = (shape[0], *shape[2:])
        feats.append(feat)
        maps.append(cases.feature(*shape_of_map, dtype=accumulated, seed=10 + seed, device=device).detach())
        addends.append(
            torch.empty_like(feat).copy_(cases.feature(*shape, seed=20 + seed, device=device).detach())
        )
    skip_if_unsupported(backend, feats, p, mapping)
    before = [addend.clone() for addend in addends]
    grads = operator(feats, maps, None, p, mapping, backend, addends)
    for i, (feat, grad_map, addend, grad) in enumerate(zip(feats, maps, before, grads, strict=True)):
        exact = exact_gradient(feat, grad_map, p, mapping)
        size = np.abs(exact) + np.abs(cases.exact(addend))
        cases.assert_within(grad, exact + cases.exact(addend), size, dtype, f"feature {i}")
        assert grad.dtype == feat.dtype
        assert grad.stride() == torch.empty_like(feat).stride()
        assert torch.equal(addends[i], addend), "the addend is left as it was"


@each_fused
def test_derivatives_of_the_sum(backend: str) -> None:
    device = cases.device_of(backend)
    feat, addend = (cases.feature(2, 3, 4, seed=s, dtype=torch.float64, device=device) for s in (0, 1))
    grad_map = cases.feature(2, 4, seed=2, dtype=torch.float64, device=device)
    skip_if_unsupported(backend, [feat], 3, "sum")

    def call(feat: Tensor, grad_map: Tensor, addend: Tensor) -> Tensor:
        return operator([feat], [grad_map], None, 3.0, "sum", backend, [addend])[0]

    assert torch.autograd.gradcheck(call, (feat, grad_map, addend))
    torch.library.opcheck(operator, ([feat], [grad_map], None, 3.0, "sum", backend, [addend]))


@pytest.mark.skipif("cpu" not in cases.FUSED, reason="needs the CPU library")
def test_an_addend_of_other_strides_is_refused() -> None:
    feat = torch.rand(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="an addend must have its gradient's type, shape and strides"):
        torch.ops.at_fused_cpu.attention_maps_backward(
            [feat],
            [torch.rand(2, 4, 5)],
            None,
            [cases.channels_last(feat)],
            [torch.empty_like(feat)],
            2.0,
            False,
        )
