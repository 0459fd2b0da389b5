"""docs/migrate.md, numerically: what other code computes, written out, and the call of ours that equals it.

Everything is in fp64 and compared, value and student's gradient, within the roundings of `truth.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import truth
from cases import assert_within, exact, feature
from torch import Tensor

import at_fused
import models

Features = list[Tensor]


# --- theirs: each published formula, in our words -------------------------------------------------


def authors(s_feats: Features, t_feats: Features, p: int = 2) -> Tensor:
    """szagoruyko/attention-transfer; RepDistiller and mdistiller with any p: mean map, l2, mean square."""

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.pow(p).mean(1).flatten(1))

    return sum((unit(s) - unit(t)).pow(2).mean() for s, t in zip(s_feats, t_feats, strict=True))


def pooling(s_feats: Features, t_feats: Features) -> Tensor:
    """RepDistiller and mdistiller where sizes differ: the larger *activations* are average-pooled."""
    pairs = [smaller_size(s, t) for s, t in zip(s_feats, t_feats, strict=True)]
    return authors([s for s, _ in pairs], [t for _, t in pairs])


def smaller_size(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    height = min(s.shape[2], t.shape[2])
    return F.adaptive_avg_pool2d(s, height), F.adaptive_avg_pool2d(t, height)


def torchdistill_paper(s_feats: Features, t_feats: Features) -> Tensor:
    """torchdistill's ATLoss(mode="paper"): the sum of the differences' norms, over the batch size."""

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).sum(1).flatten(1))

    total = sum((unit(s) - unit(t)).norm(dim=1).sum() for s, t in zip(s_feats, t_feats, strict=True))
    return total / len(s_feats[0])


def distillation_zoo(s_feats: Features, t_feats: Features, p: int, eps: float = 1e-6) -> Tensor:
    """Knowledge-Distillation-Zoo: |A|^p; eps is added to the norm, where ours bounds it below."""

    def unit(x: Tensor) -> Tensor:
        attention = x.abs().pow(p).sum(1)
        return attention / (attention.norm(dim=(1, 2), keepdim=True) + eps)

    return sum(F.mse_loss(unit(s), unit(t)) for s, t in zip(s_feats, t_feats, strict=True))


def divergence(s_logits: Tensor, t_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student at T), an addend per image and class: (B, n_classes)."""
    log_student = F.log_softmax(s_logits / temperature, dim=1)
    teacher = F.softmax(t_logits / temperature, dim=1)
    return F.kl_div(log_student, teacher, reduction="none") * temperature**2


# --- comparison -----------------------------------------------------------------------------------


def pairs(signed: bool = True, t_size: int = 6, batch: int = 4) -> tuple[Features, Features]:
    """Two pairs whose students are leaves; raw taps are signed, those after a ReLU are not."""
    shapes = [(batch, 3, 6, 6), (batch, 8, 6, 6), (batch, 5, t_size, t_size), (batch, 16, t_size, t_size)]
    feats = [feature(*shape, dtype=torch.float64, seed=seed) for seed, shape in enumerate(shapes)]
    if not signed:
        feats = [x.detach().abs().requires_grad_() for x in feats]
    return feats[:2], [x.detach() for x in feats[2:]]


def assert_equal(ours: Tensor, theirs: Tensor, s_feats: Features, t_feats: Features, scale: float, **options):
    """Both within the error that fp64 allows the loss `scale * attention_loss(..., **options)`."""
    exact_loss = truth.attention_loss([exact(x) for x in s_feats], [exact(x) for x in t_feats], **options)
    size = abs(scale) * exact_loss.sizes.sum()
    assert_within(ours, exact(theirs), size, torch.float64, "loss")
    grads = [torch.autograd.grad(loss, s_feats, retain_graph=True) for loss in (ours, theirs)]
    for i, (mine, other) in enumerate(zip(*grads, strict=True)):
        size = abs(scale) * exact_loss.s_sizes[i]
        assert_within(mine, exact(other), size, torch.float64, f"grad of student {i}")


def differs(ours: Tensor, theirs: Tensor) -> bool:
    return abs(ours.item() - theirs.item()) > 1e-3 * abs(theirs.item())


# --- the attention term ---------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_authors(signed: bool) -> None:
    s_feats, t_feats = pairs(signed)
    theirs = 1000 * authors(s_feats, t_feats)
    assert_equal(at_fused.AttentionLoss(beta=1000)(s_feats, t_feats), theirs, s_feats, t_feats, 1000)
    assert_equal(1000 * at_fused.attention_loss(s_feats, t_feats), theirs, s_feats, t_feats, 1000)


@pytest.mark.parametrize("gpus", [2, 4])
def test_authors_beta_grew_with_the_gpus(gpus: int) -> None:
    s_feats, t_feats = pairs()
    shards = zip(*(torch.stack(x.chunk(gpus)) for x in (*s_feats, *t_feats)), strict=True)
    theirs = sum(authors(list(shard[:2]), list(shard[2:])) for shard in shards)  # their `v.sum()` of replicas
    ours = at_fused.AttentionLoss(beta=1000 * gpus)(s_feats, t_feats)
    assert_equal(ours, 1000 * theirs, s_feats, t_feats, 1000 * gpus)


@pytest.mark.parametrize("p", [2, 4])
def test_repdistiller_and_mdistiller(p: int) -> None:
    s_feats, t_feats = pairs()
    ours = at_fused.attention_loss(s_feats, t_feats, p)
    assert_equal(ours, authors(s_feats, t_feats, p), s_feats, t_feats, 1, p=p)


@pytest.mark.parametrize("p", [1, 3])
def test_without_the_absolute_value_odd_p_is_another_loss(p: int) -> None:
    s_feats, t_feats = pairs(signed=False)
    ours = at_fused.attention_loss(s_feats, t_feats, p)
    assert_equal(ours, authors(s_feats, t_feats, p), s_feats, t_feats, 1, p=p)
    s_feats, t_feats = pairs(signed=True)
    assert differs(at_fused.attention_loss(s_feats, t_feats, p), authors(s_feats, t_feats, p))


@pytest.mark.parametrize("t_size", [3, 12])
def test_other_sizes_are_pooled_before_the_map(t_size: int) -> None:
    s_feats, t_feats = pairs(t_size=t_size)
    theirs = pooling(s_feats, t_feats)
    assert differs(at_fused.attention_loss(s_feats, t_feats), theirs)
    pooled = [smaller_size(s, t) for s, t in zip(s_feats, t_feats, strict=True)]
    ours = at_fused.attention_loss([s for s, _ in pooled], [t for _, t in pooled])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for mine, other in zip(*(torch.autograd.grad(x, s_feats) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-15)


def test_torchdistill() -> None:
    s_feats, t_feats = pairs()
    weights = [0.5, 3.0]
    code = sum(w * authors([s], [t]) for w, s, t in zip(weights, s_feats, t_feats, strict=True))
    ours = at_fused.attention_loss(s_feats, t_feats, weights=weights)
    assert_equal(ours, code, s_feats, t_feats, 1, weights=weights)
    paper = torchdistill_paper(s_feats, t_feats)
    ours = at_fused.attention_loss(s_feats, t_feats, distance="norm")
    assert_equal(ours, paper, s_feats, t_feats, 1, distance="norm")


def test_mmrazor() -> None:
    s_feats, t_feats = pairs()
    weights = [25000.0, 100.0]
    code = sum(w * authors([s], [t]) for w, s, t in zip(weights, s_feats, t_feats, strict=True))
    ours = at_fused.attention_loss(s_feats, t_feats, weights=weights)
    assert_equal(ours, code, s_feats, t_feats, 1, weights=weights)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_knowledge_distillation_zoo(p: int) -> None:
    s_feats, t_feats = pairs()
    ours = at_fused.attention_loss(s_feats, t_feats, p)
    assert_equal(ours, distillation_zoo(s_feats, t_feats, p, eps=0.0), s_feats, t_feats, 1, p=p)
    # Their eps only matters where a map's norm is as small as it.
    torch.testing.assert_close(distillation_zoo(s_feats, t_feats, p), ours, rtol=1e-5, atol=0)


def test_equation_2_as_printed() -> None:
    s_feats, t_feats = pairs()

    def unit(x: Tensor) -> Tensor:
        q = x.abs().square().sum(1).flatten(1)
        return q / q.square().sum(1, keepdim=True).sqrt()

    beta = 7.0
    distances = [(unit(s) - unit(t)).square().sum(1).sqrt() for s, t in zip(s_feats, t_feats, strict=True)]
    theirs = beta / 2 * torch.stack(distances).sum(0).mean()
    ours = at_fused.AttentionLoss(beta=beta / 2, distance="norm")(s_feats, t_feats)
    assert_equal(ours, theirs, s_feats, t_feats, beta / 2, distance="norm")


def test_beta_per_element() -> None:
    """Section 4.1.1's 1e3 / (positions x batch), times the plain sum of squares, is beta = 1e3 times ours."""
    s_feats, t_feats = pairs()
    s_feats, t_feats = s_feats[:1], t_feats[:1]
    unit = [F.normalize(x.square().sum(1).flatten(1)) for x in (s_feats[0], t_feats[0])]
    theirs = 1e3 / unit[0].numel() * (unit[0] - unit[1]).square().sum()
    assert_equal(at_fused.AttentionLoss(beta=1e3)(s_feats, t_feats), theirs, s_feats, t_feats, 1e3)


# --- knowledge distillation -----------------------------------------------------------------------


def authors_kd(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    return alpha * divergence(s, t, 4).sum(1).mean() + (1 - alpha) * F.cross_entropy(s, y)


def authors_kd_at_first(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Their first commits: the KL as a mean over the classes, too, times 2."""
    return 2 * alpha * divergence(s, t, 4).mean() + (1 - alpha) * F.cross_entropy(s, y)


def ours_as_at_first(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    soft, hard = 2 * alpha / s.shape[1], 1 - alpha
    return (soft + hard) * at_fused.distillation_loss(s, t, y, alpha=soft / (soft + hard))


def repdistiller_kd(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    """-r 1 -a alpha: gamma CE + alpha KL, weights that need not add up to 1."""
    return F.cross_entropy(s, y) + alpha * divergence(s, t, 4).sum(1).mean()


def ours_as_repdistiller(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    return (1 + alpha) * at_fused.distillation_loss(s, t, y, alpha=alpha / (1 + alpha))


def torchdistill_kd(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    """KDLoss(alpha): alpha is the weight of the labels."""
    return alpha * F.cross_entropy(s, y) + (1 - alpha) * divergence(s, t, 4).sum(1).mean()


def ours_as_torchdistill(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    return at_fused.distillation_loss(s, t, y, alpha=1 - alpha)


def mmrazor_kd(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    """KLDivergence(tau=1, loss_weight=alpha), batchmean, beside the head's cross-entropy."""
    return F.cross_entropy(s, y) + alpha * divergence(s, t, 1).sum(1).mean()


def ours_as_mmrazor(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    return (1 + alpha) * at_fused.distillation_loss(s, t, y, temperature=1, alpha=alpha / (1 + alpha))


def ours_as_authors(s: Tensor, t: Tensor, y: Tensor, alpha: float) -> Tensor:
    return at_fused.distillation_loss(s, t, y, alpha=alpha)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (authors_kd, ours_as_authors),
        (authors_kd_at_first, ours_as_at_first),
        (repdistiller_kd, ours_as_repdistiller),
        (torchdistill_kd, ours_as_torchdistill),
        (mmrazor_kd, ours_as_mmrazor),
    ],
)
@pytest.mark.parametrize("alpha", [0.9, 0.3])
def test_distillation(theirs: Callable[..., Tensor], ours: Callable[..., Tensor], alpha: float) -> None:
    student, teacher = (feature(8, 10, 1, dtype=torch.float64, seed=seed).flatten(1) for seed in (0, 1))
    targets = torch.arange(8)
    mine, other = (loss(student, teacher.detach(), targets, alpha) for loss in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-13, atol=0)
    mine, other = (torch.autograd.grad(loss, student)[0] for loss in (mine, other))
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-15)


# --- training -------------------------------------------------------------------------------------


def test_mdistillers_second_call_of_a_batch_norm() -> None:
    """Two updates a step with the same batch are one with momentum 1 - 0.9^2, and normalise alike."""
    twice, once = torch.nn.BatchNorm2d(3).double(), torch.nn.BatchNorm2d(3, momentum=0.19).double()
    for step in range(3):
        x = feature(4, 3, 5, 5, dtype=torch.float64, seed=step)
        twice(x)
        torch.testing.assert_close(once(x), twice(x), rtol=1e-13, atol=0)
    torch.testing.assert_close(once.running_mean, twice.running_mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(once.running_var, twice.running_var, rtol=1e-13, atol=0)


def test_torchdistills_wrn_is_another_network() -> None:
    """Of the same weights, a shortcut from a block's input gives other values than one from the activated."""
    block = models.create("wrn-10-2").double().eval().group2[0]
    x = feature(2, 32, 6, 6, dtype=torch.float64, seed=0)
    raw = block(x) - block.shortcut(F.relu(block.bn1(x))) + block.shortcut(x)
    assert not torch.allclose(raw, block(x), rtol=0.1)
