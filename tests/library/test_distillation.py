"""distillation_loss against its formula: alpha T^2 KL(teacher || student at T) + (1 - alpha) CE."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import truth

import at_fused


def logits(batch: int, classes: int, dtype: torch.dtype = torch.float64, scale: float = 3.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(classes, (batch,), generator=generator)
    return s.to(dtype).requires_grad_(), t.to(dtype), targets


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("batch, classes", [(1, 2), (7, 10), (3, 1000)])
def test_value_and_gradient(temperature: float, alpha: float, batch: int, classes: int) -> None:
    s, t, targets = logits(batch, classes)
    value, grad = truth.distillation(s.detach().numpy(), t.numpy(), targets.numpy(), temperature, alpha)
    loss = at_fused.distillation_loss(s, t, targets, temperature=temperature, alpha=alpha)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(value, rel=1e-12, abs=1e-12)
    loss.backward()
    np.testing.assert_allclose(s.grad.numpy(), grad, rtol=1e-10, atol=1e-14)


def test_defaults_are_the_papers() -> None:
    s, t, targets = logits(5, 10)
    value, _ = truth.distillation(s.detach().numpy(), t.numpy(), targets.numpy(), 4.0, 0.9)
    assert at_fused.distillation_loss(s, t, targets).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_fp32(dtype: torch.dtype) -> None:
    """Logits of +-100 and T = 0.5 overflow exp in fp16; the gradient comes back in the logits' dtype."""
    s, t, targets = logits(6, 10, dtype=dtype, scale=40.0)
    exact = s.detach().double().numpy(), t.double().numpy(), targets.numpy()
    value, grad = truth.distillation(*exact, 0.5, 0.9)
    loss = at_fused.distillation_loss(s, t, targets, temperature=0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=1e-5)
    loss.backward()
    assert s.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    # fp32 keeps a softmax at |z| = 100 to about 100 roundings
    np.testing.assert_allclose(s.grad.double().numpy(), grad, rtol=eps + 1e-4, atol=1e-7)


def test_equal_logits_leave_the_cross_entropy() -> None:
    s, _, targets = logits(5, 10)
    loss = at_fused.distillation_loss(s, s.detach(), targets)
    torch.testing.assert_close(loss, 0.1 * F.cross_entropy(s, targets))


def test_shifted_logits_change_nothing() -> None:
    s, t, targets = logits(5, 10)
    torch.testing.assert_close(
        at_fused.distillation_loss(s + 7.0, t - 3.0, targets), at_fused.distillation_loss(s, t, targets)
    )


def test_certain_teacher_gives_no_nan() -> None:
    """A teacher whose probabilities underflow to 0 contributes 0, not 0 * log 0."""
    s, t, targets = logits(4, 6, dtype=torch.float32)
    t = torch.zeros_like(t)
    t[:, 2] = 1e4
    loss = at_fused.distillation_loss(s, t, targets)
    loss.backward()
    value, _ = truth.distillation(s.detach().double().numpy(), t.double().numpy(), targets.numpy(), 4.0, 0.9)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert s.grad.isfinite().all()


def test_an_empty_batch_gives_zero() -> None:
    s, t, targets = logits(0, 10)
    assert at_fused.distillation_loss(s, t, targets).item() == 0.0


def test_gradcheck() -> None:
    s, t, targets = logits(3, 5)
    loss = lambda s, t: at_fused.distillation_loss(s, t, targets)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (s, t.requires_grad_()))
    assert torch.autograd.gradgradcheck(loss, (s, t))


def test_a_learnt_temperature_and_alpha() -> None:
    s, t, targets = logits(3, 5)
    learnt = [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (2.5, 0.7)]
    loss = lambda *numbers: at_fused.distillation_loss(s.detach(), t, targets, *numbers)  # noqa: E731
    torch.testing.assert_close(loss(*learnt), loss(2.5, 0.7))
    assert torch.autograd.gradcheck(loss, learnt)


def test_probabilities_as_targets_follow_the_logits() -> None:
    s, t, targets = logits(3, 5, dtype=torch.float32)
    soft = F.one_hot(targets, 5).double()
    loss = at_fused.distillation_loss(s, t, soft)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, at_fused.distillation_loss(s, t, targets))
    with pytest.raises(TypeError, match="floating-point"):
        at_fused.distillation_loss(s.long(), t, targets)


def test_a_class_that_the_teacher_rules_out() -> None:
    s, t, targets = logits(4, 5)
    t[:, 2] = -torch.inf
    loss = at_fused.distillation_loss(s, t, targets)
    soft = F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
    torch.testing.assert_close(loss, 0.9 * 16 * soft + 0.1 * F.cross_entropy(s, targets))
    assert torch.autograd.grad(loss, s)[0].isfinite().all()


@pytest.mark.parametrize(
    "targets, kind, words",
    [
        ([1, 2, 3], TypeError, "targets must be int64 classes or probabilities, got list"),
        (torch.zeros(3, dtype=torch.int32), TypeError, "got int32 (3,)"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, "int64 (3, 1) do not fit logits (3, 5)"),
        (torch.full((3,), 5), ValueError, "expected classes from 0 to 4"),
    ],
)
def test_bad_targets(targets: Any, kind: type[Exception], words: str) -> None:
    s, t, _ = logits(3, 5)
    with pytest.raises(kind, match=re.escape(words)):
        at_fused.distillation_loss(s, t, targets)


def test_bad_numbers() -> None:
    s, t, targets = logits(3, 5)
    for options in ({"temperature": "4"}, {"alpha": None}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be a real number"):
            at_fused.distillation_loss(s, t, targets, **options)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_ignored_labels(alpha: float, ignore_index: int) -> None:
    """Cross-entropy is the mean over the labelled ones; the teacher speaks of all."""
    s, t, targets = logits(6, 5)
    targets[[1, 4, 5]] = ignore_index
    given = {} if ignore_index == -100 else {"ignore_index": ignore_index}
    loss = at_fused.distillation_loss(s, t, targets, alpha=alpha, **given)
    labelled = targets != ignore_index
    one_hot = F.one_hot(targets[labelled], 5)
    hard = -(one_hot * F.log_softmax(s[labelled], 1)).sum(1).mean()
    soft = 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
    torch.testing.assert_close(loss, alpha * soft + (1 - alpha) * hard, rtol=1e-13, atol=0)
    if alpha == 0:
        theirs = F.cross_entropy(s, targets, ignore_index=ignore_index)
        torch.testing.assert_close(loss, theirs, rtol=1e-13, atol=0)
        mine, other = (torch.autograd.grad(x, s)[0] for x in (loss, theirs))
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-16)


def test_no_labels_at_all() -> None:
    """Without targets, and where all are ignored, the teacher alone teaches: no NaN of an empty mean."""
    s, t, targets = logits(4, 5)
    soft = 0.9 * 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
    for nothing in (None, torch.full_like(targets, -100)):
        loss = at_fused.distillation_loss(s, t, nothing)
        torch.testing.assert_close(loss, soft, rtol=1e-13, atol=0)
        assert torch.autograd.grad(loss, s)[0].isfinite().all()
    torch.testing.assert_close(at_fused.distillation_loss(s, t), soft, rtol=1e-13, atol=0)


def flattened(dense: torch.Tensor) -> torch.Tensor:
    """(B, K, *positions) as (B * positions, K)."""
    return dense.movedim(1, -1).reshape(-1, dense.shape[1])


@pytest.mark.parametrize("positions", [(7,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dense_logits_are_pixels_in_a_batch(positions: tuple[int, ...], channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, *positions, 5) if channels_last else (2, 5, *positions)
    s, t = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if channels_last:
        s, t = s.movedim(-1, 1), t.movedim(-1, 1)
    targets = torch.randint(5, (2, *positions), generator=generator)
    value, grad = truth.distillation(
        flattened(s).numpy(), flattened(t).numpy(), targets.flatten().numpy(), 4.0, 0.9
    )
    s.requires_grad_()
    loss = at_fused.distillation_loss(s, t, targets)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(flattened(s.grad).numpy(), grad, rtol=1e-10, atol=1e-14)
    one_hot = F.one_hot(targets, 5).movedim(-1, 1).double()
    torch.testing.assert_close(at_fused.distillation_loss(s, t, one_hot), loss)
    targets[:, :2] = -100
    dense, flat = (
        at_fused.distillation_loss(f(s), f(t), y, alpha=0.3)
        for f, y in ((lambda x: x, targets), (flattened, targets.flatten()))
    )
    torch.testing.assert_close(dense, flat, rtol=1e-12, atol=0)


def test_masks_of_labels_in_bytes() -> None:
    """Segmentation's masks are often uint8, with 255 where there is no label; in one, 156 is not -100."""
    s, t, _ = logits(3, 200)
    labels = torch.tensor([7, 255, 156], dtype=torch.uint8)
    loss = at_fused.distillation_loss(s, t, labels, alpha=0, ignore_index=255)
    torch.testing.assert_close(loss, F.cross_entropy(s, labels.long(), ignore_index=255))
    torch.testing.assert_close(
        at_fused.distillation_loss(s[::2], t[::2], labels[::2], alpha=0),
        F.cross_entropy(s[::2], labels[::2].long()),
    )


def test_dense_targets_that_do_not_fit() -> None:
    s, t = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 4)
    words = "int64 (2, 4, 3) do not fit logits (2, 5, 3, 4): expected int64 (2, 3, 4) or probabilities"
    with pytest.raises(ValueError, match=re.escape(words)):
        at_fused.distillation_loss(s, t, torch.zeros(2, 4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected classes from 0 to 4, or ignore_index -100"):
        at_fused.distillation_loss(s, t, torch.full((2, 3, 4), 255))
    with pytest.raises(ValueError, match=r"\(5,\) and teacher logits \(5,\) must both be \(B, n_classes\)"):
        at_fused.distillation_loss(s[0, :, 0, 0], t[0, :, 0, 0])


def test_what_is_labelled_keeps_its_bits() -> None:
    """The mean over labelled positions changes nothing where all are: recipes train what they trained."""
    s, t, targets = logits(7, 10, dtype=torch.float32)
    s_soft, t_soft = F.log_softmax(s / 4.0, 1), F.log_softmax(t / 4.0, 1)
    soft = (t_soft.exp() * (t_soft - s_soft)).sum()
    hard = F.cross_entropy(s, targets, reduction="sum")
    assert torch.equal(
        at_fused.distillation_loss(s, t, targets), (0.9 * 4.0**2 * soft + (1 - 0.9) * hard) / 7
    )
