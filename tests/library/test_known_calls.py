"""A call like an earlier one is not checked anew; one that differs in anything is."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import feature

import at_fused
from at_fused import _known, attention, backends

each_fused = pytest.mark.parametrize("backend", cases.FUSED)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_fused_calls", _known.Known())
    monkeypatch.setattr(backends, "_selected", _known.Known())


def pair(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    device = cases.device_of(backend)
    return feature(2, 3, 4, 5, device=device).detach(), feature(2, 6, 4, 5, seed=1, device=device).detach()


@each_fused
def test_a_second_call_asks_no_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = pair(backend)
    first = at_fused.attention_loss(s, t, backend=backend)
    monkeypatch.setattr(backends, "_select", None)
    monkeypatch.setattr(attention, "check_pairs", None)
    assert torch.equal(at_fused.attention_loss([s], (t,), backend=backend), first)
    assert torch.equal(at_fused.attention_loss(s + 0, t, weights=[2], backend=backend), 2 * first)
    with pytest.raises(TypeError):  # another shape
        at_fused.attention_loss(s[:1], t[:1], backend=backend)


@each_fused
@pytest.mark.parametrize(
    "change, error, match",
    [
        (lambda s, t: (s[:1], t), ValueError, "differ in batch size"),
        (lambda s, t: (s.long(), t), TypeError, "must be fp64, fp32, bf16 or fp16"),
        (lambda s, t: (s.to_sparse(), t), TypeError, "must be a dense tensor"),
        (lambda s, t: (s.numpy(force=True), t), TypeError, "ndarray"),
        (lambda s, t: (s, [t, t]), TypeError, "two tensors or two sequences"),
        (lambda s, t: ([s], [t, t]), ValueError, "same number of features"),
        (lambda s, t: ([], []), ValueError, "empty"),
    ],
    ids=cases.name_of,
)
def test_other_features_are_checked(change, error: type[Exception], match: str, backend: str) -> None:
    s, t = pair(backend)
    at_fused.attention_loss(s, t, backend=backend)
    with pytest.raises(error, match=match):
        at_fused.attention_loss(*change(s, t), backend=backend)


@each_fused
@pytest.mark.parametrize(
    "options, error",
    [
        ({"p": True}, TypeError),
        ({"norm_order": True}, TypeError),
        ({"eps": False}, TypeError),
        ({"channel_dim": True}, TypeError),
        ({"channel_dim": 1.0}, TypeError),
        ({"weights": [True]}, TypeError),
        ({"weights": [1, 2]}, ValueError),
        ({"mapping": "mean"}, ValueError),
        ({"reduction": "mean"}, ValueError),
    ],
    ids=cases.name_of,
)
def test_other_options_are_checked(options: dict, error: type[Exception], backend: str) -> None:
    """True equals 1, which is known."""
    s, t = pair(backend)
    known = {"p": 1, "norm_order": 1, "eps": 0, "channel_dim": 1, "backend": backend}
    at_fused.attention_loss(s, t, **known)
    with pytest.raises(error):
        at_fused.attention_loss(s, t, **known | options)


@each_fused
def test_features_that_are_viewed_are_not_taken_as_they_come(backend: str) -> None:
    """Those with the channels elsewhere."""
    s, t = (x.movedim(1, -1) for x in pair(backend))
    losses = [at_fused.attention_loss(s, t, channel_dim=-1, backend=backend) for _ in range(2)]
    assert torch.equal(*losses)
    torch.testing.assert_close(losses[0], at_fused.attention_loss(*pair(backend), backend="reference"))


@pytest.mark.skipif("cpu" not in cases.FUSED, reason="needs the CPU library")
def test_transformed_features_are_served_by_the_reference() -> None:
    s, t = pair("cpu")
    expected = torch.autograd.grad(at_fused.attention_loss(s.requires_grad_(), t), s)[0]
    s = s.detach()
    torch.testing.assert_close(torch.func.grad(at_fused.attention_loss)(s, t), expected)
    _, slope = torch.func.jvp(lambda x: at_fused.attention_loss(x, t), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(slope, expected.sum())


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_known, "_MOST", 3)
    for size in range(1, 6):
        s = torch.ones(size, 2, 3, 3)
        assert at_fused.attention_loss(s, s) == 0
        assert len(backends._selected) <= 3
    assert len(backends._selected) == 2


def test_lists_have_no_answer() -> None:
    known: _known.Known[int] = _known.Known()
    known.keep(([],), 1)  # type: ignore[arg-type]
    assert known.get(([],)) is None
    assert len(known) == 0
