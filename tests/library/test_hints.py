"""FeatureHints (section 4.1.2) against its formula in NumPy, and its regressors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DTYPES, channels_last, exact, feature, name_of
from torch import Tensor, nn

import at_fused


def by_hand(s: np.ndarray, t: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over the batch of |s/|s| - t/|t||^2 over all activations, and its gradient at s."""
    value, grad = 0.0, np.zeros_like(s)
    for b in range(len(s)):
        norm = np.sqrt((s[b] ** 2).sum())
        u, v = s[b] / norm, t[b] / np.sqrt((t[b] ** 2).sum())
        value += ((u - v) ** 2).sum() / len(s)
        grad[b] = 2 * ((u - v) - u * (u * (u - v)).sum()) / norm / len(s)
    return value, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last], ids=name_of)
def test_equal_channels_are_compared_as_they_are(dtype: torch.dtype, layout) -> None:  # type: ignore[no-untyped-def]
    shapes = [(3, 5, 4, 6), (3, 7, 2, 2)]
    students = [feature(*shape, dtype=dtype, layout=layout, seed=i) for i, shape in enumerate(shapes)]
    teachers = [feature(*shape, dtype=dtype, seed=9 + i).detach() for i, shape in enumerate(shapes)]
    hints = at_fused.FeatureHints([5, 7], [5, 7])
    assert not list(hints.parameters())
    loss = hints(students, teachers)
    truth = [by_hand(exact(s), exact(t)) for s, t in zip(students, teachers, strict=True)]
    double = dtype == torch.float64
    assert loss.dtype == (torch.float64 if double else torch.float32)
    assert loss.item() == pytest.approx(sum(value for value, _ in truth), rel=1e-12 if double else 1e-5)
    loss.backward()
    for student, (_, grad) in zip(students, truth, strict=True):
        assert student.grad is not None
        assert student.grad.dtype == dtype
        bound = np.abs(grad).max() * (1e-12 if double else 1e-5) + np.abs(grad) * torch.finfo(dtype).eps
        assert np.all(np.abs(exact(student.grad) - grad) <= bound)


def test_each_pair_alone() -> None:
    students = [feature(3, 5, 4, 6, seed=1), feature(3, 7, 2, 2, seed=2)]
    teachers = [feature(3, 5, 4, 6, seed=3), feature(3, 7, 2, 2, seed=4)]
    found = at_fused.FeatureHints([5, 7], [5, 7], reduction="none")(students, teachers)
    truth = [by_hand(exact(s), exact(t))[0] for s, t in zip(students, teachers, strict=True)]
    assert found.tolist() == pytest.approx(truth, rel=1e-5)
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'none', got 'mean'"):
        at_fused.FeatureHints(5, 5, reduction="mean")


def test_regressors_stand_where_channels_differ() -> None:
    torch.manual_seed(0)
    hints = at_fused.FeatureHints([4, 6, 3], [4, 8, 5]).double()
    assert [type(r) for r in hints.regressors] == [nn.Identity, nn.Conv2d, nn.Conv2d]
    assert sum(p.numel() for p in hints.parameters()) == (6 * 8 + 8) + (3 * 5 + 5)
    s = [feature(2, c, 3, 3, dtype=torch.float64, seed=c) for c in (4, 6, 3)]
    t = [feature(2, c, 3, 3, dtype=torch.float64, seed=20 + c) for c in (4, 8, 5)]
    expected = 0.0
    for student, teacher, regressor in zip(s, t, hints.regressors, strict=True):
        projected = exact(student)
        if isinstance(regressor, nn.Conv2d):
            weight, bias = exact(regressor.weight)[:, :, 0, 0], exact(regressor.bias)
            projected = np.einsum("tc,bchw->bthw", weight, projected) + bias[:, None, None]
        expected += by_hand(projected, exact(teacher))[0]
    loss = hints(s, t)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    for parameter in hints.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert torch.autograd.gradcheck(lambda *s: hints(s, [x.detach() for x in t]), s)
    assert torch.autograd.gradgradcheck(lambda *s: hints(s, [x.detach() for x in t]), s)


def test_single_tensors_and_scale() -> None:
    s, t = feature(3, 4, 5, 5), feature(3, 4, 5, 5, seed=1).detach()
    hints = at_fused.FeatureHints(4, 4)
    torch.testing.assert_close(hints(s, t), hints([s], [t]))
    torch.testing.assert_close(hints(7 * s, 0.1 * t), hints(s, t))
    assert hints(s, 3 * s.detach()).item() < 1e-12
    torch.testing.assert_close(hints(s, -s.detach()), torch.tensor(4.0))
    assert hints(s[:0], t[:0]).item() == 0


def test_extreme_activations_give_no_nan() -> None:
    s, t = feature(2, 4, 3, 3, dtype=torch.float16, scale=1e3), feature(2, 4, 3, 3, seed=1)
    s.data[1] = 0
    loss = at_fused.FeatureHints(4, 4)(s, t.detach())
    loss.backward()
    assert loss.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert s.grad[0].abs().max() > 0
    assert s.grad[1].abs().max() == 0
    large = feature(2, 4, 3, 3, scale=1e30)  # its squares overflow fp32
    assert at_fused.FeatureHints(4, 4)(large, t.detach()).item() == pytest.approx(
        at_fused.FeatureHints(4, 4)(large / 1e30, t.detach()).item(), rel=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=name_of)
def test_features_of_another_dtype_than_the_regressors(dtype: torch.dtype, own: torch.dtype) -> None:
    torch.manual_seed(0)
    hints = at_fused.FeatureHints(4, 6).to(own)
    s, t = feature(2, 4, 3, 3, dtype=dtype), feature(2, 6, 3, 3, seed=1).detach()
    loss = hints(s, t)
    assert loss.dtype == (torch.float64 if torch.float64 in (dtype, own) else torch.float32)
    loss.backward()
    exactly = s.detach().double().requires_grad_()
    hints.double()(exactly, t).backward()
    assert s.grad is not None
    assert s.grad.dtype == dtype
    torch.testing.assert_close(s.grad, exactly.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)  # type: ignore[union-attr]


def test_a_regressor_of_the_callers_is_used() -> None:
    hints = at_fused.FeatureHints(4, 4)
    hints.regressors[0] = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    s, t = feature(2, 4, 3, 3), feature(2, 4, 3, 3, seed=1).detach()
    expected = at_fused.FeatureHints(4, 4)(hints.regressors[0](s), t)
    torch.testing.assert_close(hints(s, t), expected)


def test_compiled_whole_for_any_batch() -> None:
    torch.compiler.reset()
    hints = at_fused.FeatureHints(3, 5)
    compiled = torch.compile(hints, fullgraph=True, backend="aot_eager")
    for batch in (4, 3):
        s, t = torch.randn(batch, 3, 4, 4), torch.randn(batch, 5, 4, 4)
        torch.testing.assert_close(compiled(s, t), hints(s, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=name_of)
def test_under_autocast(dtype: torch.dtype, own: torch.dtype) -> None:
    torch.manual_seed(0)
    hints = at_fused.FeatureHints(4, 6).to(own)
    s, t = feature(2, 4, 3, 3, dtype=dtype), feature(2, 6, 3, 3, seed=1).detach()
    projected: list[torch.dtype] = []
    handle = hints.regressors[0].register_forward_hook(lambda module, args, out: projected.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = hints(s, t)
    handle.remove()
    assert projected == [torch.bfloat16 if own == torch.float32 else own]  # autocast leaves fp64 alone
    assert loss.dtype == (torch.float64 if torch.float64 in (dtype, own) else torch.float32)
    assert loss.item() == pytest.approx(hints(s, t).item(), rel=0.02)
    loss.backward()
    assert s.grad is not None
    assert s.grad.dtype == dtype
    assert s.grad.isfinite().all()


@pytest.mark.parametrize(
    "channels, kind, words",
    [
        (([4, 4], [4]), ValueError, "(4, 4) and teacher_channels (4,)"),
        (([0], [4]), ValueError, "student_channels must be at least 1"),
        (([4], [-1]), ValueError, "teacher_channels must be at least 1"),
        (([], []), ValueError, "empty"),
        (([4.0], [4]), TypeError, "integers"),
        (([True], [4]), TypeError, "integers"),
        ((4.0, 3), TypeError, "student_channels must be an integer or a sequence of them, got 4.0"),
        ((3, None), TypeError, "teacher_channels must be"),
    ],
)
def test_bad_channels(channels: tuple, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as error:
        at_fused.FeatureHints(*channels)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "s, t, kind, words",
    [
        (
            (2, 4, 3, 3),
            (3, 6, 3, 3),
            ValueError,
            "(2, 4, 3, 3) and teacher (3, 6, 3, 3) must have the same batch",
        ),
        ((2, 4, 3, 3), (2, 6, 0, 3), ValueError, "differ in spatial size, and one is empty"),
        ((2, 5, 3, 3), (2, 6, 3, 3), ValueError, "must have 4 and 6 channels"),
        ((2, 4, 3), (2, 6, 3), ValueError, "(2, 4, 3) and teacher (2, 6, 3) must be (B, C, H, W)"),
    ],
)
def test_bad_pairs_are_named(s: tuple, t: tuple, kind: type[Exception], words: str) -> None:
    good = torch.randn(2, 3, 4, 4)
    hints = at_fused.FeatureHints([3, 4], [3, 6])
    with pytest.raises(kind) as error:
        hints([good, torch.randn(s)], [good, torch.randn(t)])
    assert "pair 1: " in str(error.value)
    assert words in str(error.value)


def test_bad_features() -> None:
    good = torch.randn(2, 4, 3, 3)
    hints = at_fused.FeatureHints(4, 4)
    with pytest.raises(ValueError, match="got 2 student and 1 teacher features for 1 pairs"):
        hints([good, good], [good])
    with pytest.raises(TypeError, match=r"pair 0: .*floating-point"):
        hints(good, good.int())
    with pytest.raises(TypeError, match="pair 0: student int"):
        hints([1], [good])


def test_second_derivatives_at_a_dead_sample() -> None:
    hints, (s, t) = at_fused.FeatureHints(3, 3), torch.randn(2, 2, 3, 4, 4)
    s[0] = 0
    s.requires_grad_()
    (first,) = torch.autograd.grad(hints(s, t), s, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), s)
    assert (first[0] == 0).all()
    assert (second[0] == 0).all()
    assert second.isfinite().all()
    assert (second[1] != 0).any()


def test_numpy_integers_are_channels() -> None:
    assert at_fused.FeatureHints([np.int64(4)], np.array([3])).student_channels == (4,)
