"""Masks and per-sample losses: a padded sample is worth what the cropped one is."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import torch
import truth
from cases import assert_within, each_backend, exact, feature
from torch import Tensor, nn

import at_fused

OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalize": "l1"},
    {"normalize": None},
    {"p": 3, "mapping": "max"},
    {"distance": "norm"},
    {"distance": "norm", "norm_order": 3, "normalize": "l1"},
]


def features(
    dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Two pairs; of the first, the last sample has no position that counts, and the second has no mask."""
    shapes = ((3, 4, 5, 6), (3, 4, 7)), ((3, 2, 5, 6), (3, 5, 7))
    students, teachers = (
        [feature(*shape, seed=10 * side + i, dtype=dtype, device=device) for i, shape in enumerate(own)]
        for side, own in enumerate(shapes)
    )
    mask = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(5)) > 0.4
    mask[2] = False
    return students, teachers, [mask.to(device), None]


def counted(feat: Tensor, mask: Tensor | None, sample: int) -> np.ndarray:
    """A sample's positions that count, as a feature (1, C, positions)."""
    values = exact(feat)[sample : sample + 1]
    return (
        values[:, :, exact(mask)[sample] > 0] if mask is not None else values.reshape(*values.shape[:2], -1)
    )


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=cases.name_of)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_only_what_is_masked_true_counts(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Against the cropped samples: each sample's loss, and both sides' gradients of the mean of all."""
    students, teachers, masks = features(dtype, cases.device_of(backend))
    options = {"weights": [0.5, 2.0], "masks": masks, "backend": backend, **options}
    each = at_fused.attention_loss(students, teachers, **options, reduction="batch")
    loss = at_fused.attention_loss(students, teachers, **options)
    grads = torch.autograd.grad(loss, [*students, *teachers])
    settings = {key: value for key, value in options.items() if key not in ("masks", "backend", "weights")}
    value, size = np.zeros((2, 3)), np.zeros((2, 3))
    grad_values, grad_sizes = ([np.zeros(feat.shape) for feat in (*students, *teachers)] for _ in range(2))
    for sample in range(3):
        for pair, (student, teacher, mask) in enumerate(zip(students, teachers, masks, strict=True)):
            if mask is not None and not mask[sample].any():
                continue
            cropped = [[counted(feat, mask, sample)] for feat in (student, teacher)]
            right = truth.attention_loss(*cropped, weights=options["weights"][pair : pair + 1], **settings)
            value[pair, sample], size[pair, sample] = right.values[0], right.sizes[0]
            where = slice(None) if mask is None else exact(mask)[sample] > 0
            for side, (found, found_size) in enumerate(
                ((right.s_grads, right.s_sizes), (right.t_grads, right.t_sizes))
            ):
                grad_values[2 * side + pair][sample][:, where] = found[0][0] / 3
                grad_sizes[2 * side + pair][sample][:, where] = found_size[0][0] / 3
    assert_within(each, value, size, dtype, "loss of a sample")
    assert_within(loss, np.asarray(value.mean(1).sum()), np.asarray(size.sum()), dtype, "loss")
    for i, grad in enumerate(grads):
        assert_within(grad, grad_values[i], grad_sizes[i], dtype, f"gradient {i}")
    assert not any(torch.count_nonzero(grad[2]) for grad in (grads[0], grads[2]))


@each_backend
def test_each_samples_loss(backend: str) -> None:
    """The rows' means are the losses of the pairs, and a column is the loss of its sample alone."""
    students, teachers, _ = features(torch.float32, cases.device_of(backend))
    for options in ({}, {"distance": "norm", "norm_order": 3}):
        options |= {"weights": [0.5, 2.0], "backend": backend}
        each = at_fused.attention_loss(students, teachers, reduction="batch", **options)
        assert each.shape == (2, 3)
        pairs = at_fused.attention_loss(students, teachers, reduction="none", **options)
        torch.testing.assert_close(each.mean(1), pairs)
        alone = [[feat[1:2] for feat in feats] for feats in (students, teachers)]
        torch.testing.assert_close(each[:, 1], at_fused.attention_loss(*alone, reduction="none", **options))
        wanted = [torch.autograd.grad(loss, students) for loss in (each.mean(1).sum(), pairs.sum())]
        torch.testing.assert_close(*wanted)
    empty = [[feat[:0] for feat in feats] for feats in (students, teachers)]
    assert at_fused.attention_loss(*empty, reduction="batch", backend=backend).shape == (2, 0)


def test_masks_without_false_change_nothing() -> None:
    students, teachers, masks = features()
    full = [torch.ones(3, 5, 6, dtype=torch.bool), None]
    for options in ({}, {"distance": "norm"}):
        right = at_fused.attention_loss(students, teachers, **options)
        torch.testing.assert_close(at_fused.attention_loss(students, teachers, masks=full, **options), right)
    unmasked = at_fused.attention_loss(students, teachers)
    assert torch.equal(at_fused.attention_loss(students, teachers, masks=[None, None]), unmasked)
    single = at_fused.attention_loss(students[0], teachers[0], masks=masks[0])
    module = at_fused.AttentionLoss(beta=3.0, reduction="batch")(students[:1], teachers[:1], masks[:1])
    torch.testing.assert_close(module.mean(1).sum(), 3 * single)
    # Without a lower bound of the norm a map of zeros is NaN, but not one that does not count.
    assert torch.isfinite(at_fused.attention_loss(students, teachers, masks=masks, eps=0))


@each_backend
def test_derivatives_and_a_compiled_graph(backend: str) -> None:
    students, teachers, masks = features(device=cases.device_of(backend))

    def loss(*feats: Tensor) -> Tensor:
        return at_fused.attention_loss(feats[:2], feats[2:], masks=masks, reduction="batch", backend=backend)

    assert torch.autograd.gradcheck(loss, [*students, *teachers], fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, [*students, *teachers], fast_mode=True)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*students, *teachers)
    torch.testing.assert_close(compiled, loss(*students, *teachers))
    right = torch.autograd.grad(loss(*students, *teachers).sum(), students)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), students), right)


def test_what_is_wrong_with_a_mask() -> None:
    students, teachers, masks = features()
    pair = r"pair 0: student \(3, 4, 5, 6\): the mask "
    for error, message, wrong in (
        (TypeError, r"masks must be a sequence, .* got \(3, 5, 6\)", masks[0]),
        (ValueError, "masks must have one per pair: got 1 for 2 pairs", masks[:1]),
        (
            TypeError,
            pair + r"int64 .* must be a bool tensor \(3, 5, 6\)",
            [masks[0].long(), None],
        ),
        (ValueError, pair + r"bool \(3, 6, 5\) must have the shape .*map, \(3, 5, 6\)", [masks[0].mT, None]),
        (ValueError, pair + "bool .* is on meta, the student on cpu", [masks[0].to("meta"), None]),
    ):
        with pytest.raises(error, match=message):
            at_fused.attention_loss(students, teachers, masks=wrong)
    with pytest.raises(
        ValueError, match=r'pair 1: student \(2, 4, 7\): reduction="batch" needs one batch size'
    ):
        at_fused.attention_loss(
            [students[0], students[1][:2]], [teachers[0], teachers[1][:2]], reduction="batch"
        )


@pytest.mark.parametrize("reduction", ["sum", "none", "batch"])
def test_a_transfer_takes_masks_at_each_call(reduction: str) -> None:
    torch.manual_seed(0)
    make = lambda channels: nn.Sequential(nn.Conv2d(3, channels, 3), nn.Tanh(), nn.Conv2d(channels, 4, 3))  # noqa: E731
    student, teacher = make(4).double(), make(6).double()
    images, names, weights = torch.randn(3, 3, 8, 8).double(), ["0", "2"], [2.0, 3.0]
    masks = [torch.rand(3, 6, 6) > 0.3, None]
    with at_fused.FeatureTaps(student, names) as s_taps, at_fused.FeatureTaps(teacher, names) as t_taps:
        student(images), teacher(images)
        feats = s_taps.features, [feat.detach() for feat in t_taps.features]
    settings: dict[str, Any] = {"weights": weights, "reduction": reduction}
    right = 10 * at_fused.attention_loss(*feats, masks=masks, backend="reference", **settings)
    with at_fused.AttentionTransfer(student, teacher, names, beta=10, **settings) as transfer:
        for given in (masks, None):
            with torch.no_grad():
                teacher(images)
            student(images)
            found = transfer(masks=given)
            if given is None:
                right = 10 * at_fused.attention_loss(*feats, backend="reference", **settings)
            torch.testing.assert_close(found, right)
            if reduction == "sum":
                torch.testing.assert_close(sum(transfer.losses.values()), right.detach())
            elif reduction == "batch":
                torch.testing.assert_close(torch.stack([*transfer.losses.values()]), right.detach().mean(1))
            wanted = [
                torch.autograd.grad(loss.sum(), student[0].weight, retain_graph=True)
                for loss in (found, right)
            ]
            torch.testing.assert_close(*wanted)
        student(images), teacher(images)
        with pytest.raises(ValueError, match=r"'2' \(3, 4, 4\): the mask bool \(3, 6, 6\) must have"):
            transfer(masks=[None, masks[0]])
