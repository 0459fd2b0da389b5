"""The CUDA kernels where only a GPU can show them: with more activations than its L2 cache holds."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import feature
from torch import Tensor

import at_fused

if "cuda" not in at_fused.available_backends() or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.mark.parametrize("layout", [Tensor.contiguous, cases.channels_last], ids=cases.name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name_of)
def test_one_pass_gives_the_bits_of_two(dtype: torch.dtype, layout) -> None:
    """A gradient that came with the loss, kept or computed anew, is the one that backward alone computes."""
    s_feats = [feature(128, 64, 56, 56, seed=1, dtype=dtype, layout=layout, device="cuda")]
    s_feats += [feature(128, 128, 28, 28, seed=2, dtype=dtype, layout=layout, device="cuda")]
    t_feats = [torch.roll(feat.detach(), 1, 0) for feat in s_feats]
    assert torch.ops.at_fused_cuda.one_pass_pays(s_feats, t_feats, 2.0)

    def one_pass(scale: float) -> tuple[Tensor, ...]:
        loss = at_fused.attention_loss(s_feats, t_feats, backend="cuda")
        return torch.autograd.grad(loss, s_feats, torch.tensor(scale, device="cuda"))

    def two_passes(scale: float) -> tuple[Tensor, ...]:
        losses = at_fused.attention_loss(s_feats, t_feats, reduction="none", backend="cuda")
        return torch.autograd.grad(losses, s_feats, torch.full((2,), scale, device="cuda"))

    expected = {scale: two_passes(scale) for scale in (1.0, 1024.0)}
    for scale in (1.0, 1.0, 1024.0, 1.0, 1.0):
        got = one_pass(scale)
        torch.cuda.synchronize()  # the note on the upstream gradient has arrived
        assert all(torch.equal(a, b) for a, b in zip(got, expected[scale], strict=True))
    few = [[feat[:2] for feat in feats] for feats in (s_feats, t_feats)]
    cases.check_loss(
        *[[x.detach().requires_grad_() for x in side] for side in few], backend="cuda", upstream=256.0
    )
