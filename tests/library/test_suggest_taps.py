"""`suggest_taps` and `python -m at_fused.taps`: what ends each resolution of well-known families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paths import ROOT
from torch import nn

import at_fused
from at_fused.taps.__main__ import main
from at_fused.taps.grid import Grid, find_grid
from at_fused.taps.suggest import levels, pair_up, written

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from models import torchvision_compat  # noqa: F401  (before torchvision)


def torchvisions(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    if name == "resnet":
        return models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    if name == "mobilenet":
        return models.mobilenet_v3_small(width_mult=0.25)
    if name == "swin":
        return models.SwinTransformer([4, 4], 16, depths=[1, 1], num_heads=[1, 1], window_size=[4, 4])
    return models.VisionTransformer(32, 8, 2, 2, 16, 32)


def timms(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    if name == "convnext":
        return timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    if name == "swin":
        sizes = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
        return timm.models.SwinTransformer(img_size=32, patch_size=4, **sizes)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 1}
    return timm.models.VisionTransformer(**sizes, reg_tokens=4 if name == "registers" else 0)


def hugging_faces(name: str) -> nn.Module:
    library = pytest.importorskip("transformers")
    if name == "resnet":
        config = library.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        return library.ResNetForImageClassification(config)
    if name == "swin":
        sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}
        return library.SwinForImageClassification(library.SwinConfig(image_size=32, patch_size=4, **sizes))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = library.ViTConfig(image_size=32, patch_size=8, attn_implementation="eager", **sizes)
    return library.ViTForImageClassification(config)


@pytest.mark.parametrize(
    "make, name, expected",
    [
        (
            torchvisions,
            "resnet",  # "relu" is the stem's, which works in place
            {"relu": (64, 16, 16), "layer1": (64, 8, 8), "layer2": (128, 4, 4), "layer3": (256, 2, 2)},
        ),
        (
            torchvisions,
            "mobilenet",
            {"features.0.2": (8, 16, 16), "features.1": (8, 8, 8), "features.3": (8, 4, 4)}
            | {"features.8": (16, 2, 2)},
        ),
        (torchvisions, "swin", {"features.1": (8, 8, 16), "features": (4, 4, 32)}),
        (torchvisions, "vit", {"encoder.layers[:, 1:]": (16, 16)}),
        (timms, "convnext", {"stages.0": (8, 8, 8), "stages.1": (16, 4, 4), "stages.2": (24, 2, 2)}),
        (timms, "swin", {"layers.0": (8, 8, 16), "layers": (4, 4, 32)}),
        (timms, "vit", {"blocks[:, 1:]": (16, 16)}),
        (timms, "registers", {"blocks[:, 5:]": (16, 16)}),
        (
            hugging_faces,
            "resnet",
            {
                "resnet.embedder.embedder": (8, 16, 16),
                "resnet.encoder.stages.0": (8, 8, 8),
                "resnet.encoder.stages.1": (16, 4, 4),
            },
        ),
        (
            hugging_faces,
            "swin",
            {"swin.encoder.layers.0.blocks.0[0]": (64, 16), "swin.encoder.layers.1.blocks.0[0]": (16, 32)},
        ),
        (hugging_faces, "vit", {"vit.layers.1[:, 1:]": (16, 16)}),
    ],
)  # fmt: skip
def test_known_families(make: Callable[[str], nn.Module], name: str, expected: dict[str, Any]) -> None:
    """The names are those of the stages; they record what is said, and the model stays as it was."""
    torch.manual_seed(0)
    model = make(name).train()
    images = torch.rand(2, 3, 32, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = at_fused.suggest_taps(model, images)
    assert {key: tuple(shape[1:]) for key, shape in found.items()} == expected
    with at_fused.FeatureTaps(model, found) as taps, torch.no_grad():
        model.eval()(images)
        assert [feature.shape for feature in taps.features] == list(found.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_model_keeps_its_modes_and_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    at_fused.suggest_taps(model, torch.rand(1, 3, 8, 8))
    assert [module.training for module in model] == [True, False, True]
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="no spatial features"):
        at_fused.suggest_taps(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    "shape, grid",
    [
        ((2, 64, 7, 7), Grid(1, 7, 7)),
        ((2, 7, 7, 64), Grid(-1, 7, 7)),
        ((2, 7, 7, 8), Grid(-1, 7, 7)),
        ((2, 196, 192), Grid(-1, 14, 14)),
        ((2, 197, 192), Grid(-1, 14, 14, 1)),
        ((2, 201, 192), Grid(-1, 14, 14, 5)),
        ((2, 1000), None),
        ((2, 3, 64, 64, 64), None),
        ((128, 49, 96), None),  # windows
        ((2, 77, 512), None),  # words
    ],
)
def test_grids_of_square_images(shape: tuple[int, ...], grid: Grid | None) -> None:
    assert find_grid(shape, (2, 3, 224, 224)) == grid


def test_grids_of_other_images() -> None:
    assert find_grid((2, 64, 7, 5), (2, 3, 224, 160)) == Grid(1, 7, 5)
    assert find_grid((2, 13, 10, 64), (2, 3, 100, 75)) == Grid(-1, 13, 10)
    assert find_grid((2, 141, 64), (2, 3, 224, 160)) == Grid(-1, 14, 10, 1)
    assert find_grid((2, 8, 64), (2, 3, 64, 96)) == Grid(-1, 2, 3, 2)  # not 2 x 4, which is near
    assert find_grid((2, 345, 64), (2, 3, 60, 90)) == Grid(-1, 15, 23)


def test_pairs_of_equal_size() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1))
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1)))
    found = [levels(model, torch.rand(1, 3, 16, 16)) for model in (student, teacher)]
    assert pair_up(*found) == {"1": "0", "2": "1"}
    assert pair_up(found[0][:1], found[1]) == {"0": "1"}  # none: the last of each
    assert written({"1": "a.b", "c[:, 1:]": "d"}) == '{"1": a.b, "c[:, 1:]": d}'


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wrn-10-1", "torchvision:squeezenet1_1", "--size", "64"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["group2", "Bx32x32x32", "32x32", "1"] in lines
    assert ["classifier.2", "Bx1000x3x3", "3x3", "1"] in lines
    assert lines[-1] == ["taps:", "{group3:", "classifier.2}"]
    mistakes = {
        "wrn-10-1 wrn-10-1 wrn-10-1": "3 networks",
        "torchvision:alexnet --size 16": "torchvision:alexnet: ",
        "timmy:x": "no module timmy",
        "wrn-10-1 --size 0": "--size 0: must be at least 1",
        "": "the following arguments are required: MODEL (examples: --help)",
    }
    for words, message in mistakes.items():
        assert main(words.split()) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("taps: error: ")
        assert message in err
