"""A grid of positions on one side, a line of tokens on the other; hints between features of unequal sizes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import truth
from cases import exact, feature
from torch import Tensor, nn

import at_fused


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 5, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh().mean((2, 3))


class Vit(nn.Module):
    """Patches of 4 x 4 pixels and a class token: (B, 1 + N, C)."""

    def __init__(self, channels: int, side: int = 4) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, channels, side, stride=side), nn.Linear(channels, channels)
        self.class_token = nn.Parameter(torch.randn(1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.block(torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1))[:, 0]


def models() -> tuple[Cnn, Vit, Tensor]:
    torch.manual_seed(0)
    return Cnn().double(), Vit(8).double(), torch.randn(2, 3, 16, 24).double()  # grids of 8 x 12 and 4 x 6


def test_tokens_are_the_rows_of_a_grid() -> None:
    """Either side, against the formula written out: interpolated in two dimensions."""
    grid, tokens = feature(2, 3, 8, 12, dtype=torch.float64), feature(2, 24, 5, dtype=torch.float64, seed=1)
    image = exact(tokens).transpose(0, 2, 1).reshape(2, 5, 4, 6)
    for feats, dims, arrays in (
        ((grid, tokens), (1, -1), (exact(grid), image)),
        ((tokens, grid), (-1, 1), (image, exact(grid))),
    ):
        right = truth.attention_loss(*([array] for array in arrays))
        loss = at_fused.attention_loss(*feats, channel_dim=dims[0], t_channel_dim=dims[1])
        assert loss.item() == pytest.approx(right.values[0], rel=1e-12)
        found = [exact(grad) for grad in torch.autograd.grad(loss, feats)]
        for grad, dim, expected in zip(found, dims, (right.s_grads[0], right.t_grads[0]), strict=True):
            if dim == -1:
                grad = grad.transpose(0, 2, 1).reshape(2, 5, 4, 6)
            np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-15)
    mask = torch.rand(2, 24) > 0.3  # at the student's tokens
    masked = at_fused.attention_loss(tokens, grid, channel_dim=-1, t_channel_dim=1, masks=mask)
    gridded = tokens.transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(
        masked, at_fused.attention_loss(gridded, grid, masks=mask.unflatten(1, (4, 6)))
    )
    same = feature(2, 5, 4, 6, dtype=torch.float64, seed=3)
    loss = at_fused.attention_loss(same, tokens, channel_dim=[1], t_channel_dim=[-1], resize="error")
    torch.testing.assert_close(loss, at_fused.attention_loss(same, gridded))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cnn_learns_from_a_vit(compiled: bool) -> None:
    torch.compiler.reset()
    student, teacher, images = models()
    names, dims = {"body": "block[:, 1:]"}, {"channel_dim": 1, "t_channel_dim": -1}
    with at_fused.AttentionTransfer(student, teacher, names, beta=10, **dims) as transfer:

        def step() -> Tensor:
            with torch.no_grad():
                teacher(images)
            return student(images).sum() + transfer()

        run = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else step
        found = torch.autograd.grad(run(), student.body.weight)
        with at_fused.FeatureTaps(teacher, ["block[:, 1:]:grid(4, 6)"]) as taps, torch.no_grad():
            teacher(images)
            (tokens,) = taps.features
        assert tokens.shape == (2, 4, 6, 8)
        right = student.body(images)
        term = 10 * at_fused.attention_loss(right, tokens.movedim(-1, 1), backend="reference")
        right = torch.autograd.grad(right.tanh().mean((2, 3)).sum() + term, student.body.weight)
        torch.testing.assert_close(found, right)


def test_a_student_with_tokens() -> None:
    """ViT <- ViT of another patch size: ":grid" resizes in two dimensions; without it a warning tells."""
    student, teacher = Vit(6, side=4).double(), Vit(8, side=2).double()
    images = torch.randn(2, 3, 16, 16).double()
    options: dict[str, Any] = {"channel_dim": -1, "beta": 1}
    term = {}
    for name in ("block[:, 1:]:grid", "block[:, 1:]"):
        with at_fused.AttentionTransfer(student, teacher, [name], **options) as transfer:
            student(images), teacher(images)
            if name.endswith("grid"):
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    term[name] = transfer()
            else:
                with pytest.warns(UserWarning, match="maps of 16 and 64 tokens are resized along a line"):
                    term[name] = transfer()
    with at_fused.FeatureTaps(student, ["block"]) as s, at_fused.FeatureTaps(teacher, ["block"]) as t:
        student(images), teacher(images)
        grids = s.features[0][:, 1:].unflatten(1, (4, 4)), t.features[0][:, 1:].unflatten(1, (8, 8))
    torch.testing.assert_close(term["block[:, 1:]:grid"], at_fused.attention_loss(*grids, channel_dim=-1))
    (found,) = torch.autograd.grad(term["block[:, 1:]:grid"], student.block.weight)
    right = at_fused.attention_loss(*grids, channel_dim=-1)
    torch.testing.assert_close(found, torch.autograd.grad(right, student.block.weight)[0])


def test_tokens_that_fill_no_grid() -> None:
    grid, options = torch.randn(2, 3, 8, 12), {"channel_dim": 1, "t_channel_dim": -1}
    for tokens, cure in (
        (25, r"leave out those that have no place in the image, feat\[:, 1:\] or, .* \[:, 1:\]"),
        (29, r"feat\[:, 5:\]"),
        (47, r"say which, feat.unflatten\(1, \(h, w\)\) or, behind a tap's name, :grid\(h, w\)"),
    ):
        message = rf"student \(2, 3, 8, 12\) and teacher \(2, {tokens}, 8\) differ .* 8 x 12: .*{cure}"
        with pytest.raises(ValueError, match=message):
            at_fused.attention_loss(grid, torch.randn(2, tokens, 8), **options)
    with pytest.raises(ValueError, match=r"differ in the number of spatial dimensions$"):
        at_fused.attention_loss(grid, torch.randn(2, 3, 2, 8, 12))
    student, teacher, images = models()
    with at_fused.AttentionTransfer(student, teacher, {"body": "block"}, **options) as transfer:
        student(images), teacher(images)
        with pytest.raises(ValueError, match=r"'block' \(2, 25\), differ .* \[:, 1:\]"):
            transfer()
    for name, message in (
        ("block:grid", r"the 17 tokens of \(2, 17, 8\) do not fill a square grid: .*'block\[:, 1:\]:grid'"),
        ("block[:, 1:]:grid(5, 5)", "the 16 tokens of .* do not fill a grid of 5 x 5"),
        ("patches:grid", r"\(2, 8, 4, 4\) are no tokens \(B, N, C\)"),
    ):
        with at_fused.FeatureTaps(teacher, [name]), pytest.raises(ValueError, match=message):
            teacher(images[..., :16])
    with pytest.raises(ValueError, match="no submodule named 'block:gird'"):
        at_fused.FeatureTaps(teacher, ["block:gird"])


# --- hints ------------------------------------------------------------------------------------------


def pooled(feat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Each cell is the mean of the positions that it covers, whole or in part."""
    height, width = feat.shape[2:]
    out = np.zeros((*feat.shape[:2], *size))
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * height // size[0], -(-(i + 1) * height // size[0]))
            columns = slice(j * width // size[1], -(-(j + 1) * width // size[1]))
            out[:, :, i, j] = feat[:, :, rows, columns].mean((2, 3))
    return out


def unit(feat: np.ndarray) -> np.ndarray:
    return feat / np.sqrt((feat**2).sum((1, 2, 3), keepdims=True))


@pytest.mark.parametrize(
    "s_size, t_size, smaller",
    [((8, 8), (4, 4), (4, 4)), ((4, 6), (8, 12), (4, 6)), ((7, 5), (4, 5), (4, 5)), ((3, 8), (6, 4), (3, 4))],
)
def test_hints_are_compared_at_the_smaller_grid(s_size: Any, t_size: Any, smaller: Any) -> None:
    s = feature(2, 3, *s_size, dtype=torch.float64)
    t = feature(2, 3, *t_size, dtype=torch.float64, seed=1).detach()
    hints = at_fused.FeatureHints(3, 3)
    right = ((unit(pooled(exact(s), smaller)) - unit(pooled(exact(t), smaller))) ** 2).sum() / 2
    assert hints(s, t).item() == pytest.approx(right, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: hints(s, t), s, fast_mode=True)


def test_hints_between_tokens_and_maps() -> None:
    torch.manual_seed(0)
    grid, tokens = feature(2, 3, 8, 12, dtype=torch.float64), feature(2, 24, 5, dtype=torch.float64, seed=1)
    hints = at_fused.FeatureHints(3, 5, t_channel_dim=-1).double()
    image = tokens.transpose(1, 2).unflatten(2, (4, 6))
    right = at_fused.FeatureHints(3, 5).double()
    right.load_state_dict(hints.state_dict())
    torch.testing.assert_close(hints(grid, tokens), right(grid, image))
    lines = at_fused.FeatureHints(5, 5, channel_dim=-1)
    torch.testing.assert_close(
        lines(tokens, tokens.flip(0)), at_fused.FeatureHints(5, 5)(image, image.flip(0))
    )
    with pytest.raises(ValueError, match=r"teacher \(2, 25, 5\) differ in .* tokens do not fill a grid"):
        hints(grid, torch.randn(2, 25, 5).double())
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), or \(B, N, C\) with channel_dim=-1"):
        at_fused.FeatureHints(3, 24)(grid, tokens)
