"""Folding a teacher's BatchNorm: same features and logits to rounding, taps and structure untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import at_fused
import models
from trainer.folding import fold_batch_norms


def teacher(name: str) -> nn.Module:
    """With statistics and scales as after training."""
    torch.manual_seed(0)
    return with_statistics(models.create(name, 10).double())


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def run(model: nn.Module, names: list[str]) -> list[Tensor]:
    size = 64 if "layer4" in dict(model.named_modules()) else 32
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with at_fused.FeatureTaps(model, names) as taps, torch.no_grad():
        return [model(images), *taps.features]


@pytest.mark.parametrize(
    "name, folded",
    # a pre-activation block's second norm; all norms behind convolutions of the others
    [("wrn-16-1", 6), ("resnet-18", 20), ("nin-thin", 9)],
)
def test_outputs_stay(name: str, folded: int) -> None:
    model = teacher(name)
    taps = list(dict.fromkeys([*model.taps["groups"], *model.taps["blocks"]]))
    before = run(model, taps)
    assert fold_batch_norms(model, taps) == folded
    for got, expected in zip(run(model, taps), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_tapped_pair_is_kept() -> None:
    model = teacher("wrn-16-1")
    norm = "group1.0.bn2"
    before = run(model, [norm])
    assert fold_batch_norms(model, [norm]) == 5
    assert isinstance(model.get_submodule(norm), nn.BatchNorm2d)
    for got, expected in zip(run(model, [norm]), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_tap_between_the_two_keeps_them_apart() -> None:
    """Of whatever module it is: the output of this stem is its convolution's, which its BatchNorm follows."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3))
            self.norm = nn.BatchNorm2d(8)
            self.rest = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.norm(self.stem(x)).relu())

    for names in (["stem"], ["norm"], ["rest"]):
        by_hook, by_name = (with_statistics(Stem().double()) for _ in range(2))
        by_name.load_state_dict(by_hook.state_dict())
        before = run(by_hook, names)
        apart = names != ["rest"]
        assert fold_batch_norms(by_name, names) == 2 - apart
        with at_fused.FeatureTaps(by_hook, names):
            assert fold_batch_norms(by_hook) == 2 - apart
        for model in (by_hook, by_name):
            for got, expected in zip(run(model, names), before, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_folded_stays() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    class Shared(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.bn(x)))

    class Dynamic(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    for kind in (Branches, Shared, Dynamic):
        assert fold_batch_norms(kind().eval()) == 0, kind
    with pytest.raises(ValueError, match="eval mode"):
        fold_batch_norms(Branches())
