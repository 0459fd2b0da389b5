"""Weights of other projects: the logits that their own networks give, and no wrong or partial file taken."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused
import models
from at_fused import _weights
from models.identify import zoo_name
from models.importers import load_state

State = dict[str, Tensor]


def draw(*shape: int, low: float = -0.2, high: float = 0.2) -> Tensor:
    return torch.empty(*shape, dtype=torch.float64).uniform_(low, high)


def norm_params(name: str, channels: int) -> State:
    """Scales and statistics that would expose a BatchNorm in a wrong place."""
    shift, mean = draw(channels), draw(channels)
    scale, var = draw(channels, low=0.5, high=1.5), draw(channels, low=0.5, high=1.5)
    return dict(
        zip(
            [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")],
            [scale, shift, mean, var],
            strict=True,
        )
    )


def norm_relu(x: Tensor, weights: State, name: str) -> Tensor:
    return norm(x, weights, name).clamp(min=0)


def norm(x: Tensor, weights: State, name: str) -> Tensor:
    parts = [weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    mean, var, scale, shift = (part[:, None, None] for part in parts)
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


# --- the authors' WRN: functions over a flat dictionary -----------------------------------------------


def authors_weights(blocks: int, width: float, classes: int = 10) -> State:
    widths = [16, *(int(channels * width) for channels in (16, 32, 64))]
    weights = {"conv0": draw(16, 3, 3, 3)}
    for g in range(3):
        for b in range(blocks):
            name = f"group{g}.block{b}"
            before, after = widths[g] if b == 0 else widths[g + 1], widths[g + 1]
            weights |= norm_params(f"{name}.bn0", before) | norm_params(f"{name}.bn1", after)
            weights[f"{name}.conv0"] = draw(after, before, 3, 3)
            weights[f"{name}.conv1"] = draw(after, after, 3, 3)
            if before != after:
                weights[f"{name}.convdim"] = draw(after, before, 1, 1)
    weights |= norm_params("bn", widths[3])
    return weights | {"fc.weight": draw(classes, widths[3]), "fc.bias": draw(classes)}


def authors_logits(w: State, blocks: int, x: Tensor) -> Tensor:
    x = F.conv2d(x, w["conv0"], padding=1)
    for g in range(3):
        for b in range(blocks):
            name, stride = f"group{g}.block{b}", 2 if g > 0 and b == 0 else 1
            active = norm_relu(x, w, f"{name}.bn0")
            y = F.conv2d(active, w[f"{name}.conv0"], stride=stride, padding=1)
            y = F.conv2d(norm_relu(y, w, f"{name}.bn1"), w[f"{name}.conv1"], padding=1)
            if f"{name}.convdim" in w:
                x = F.conv2d(active, w[f"{name}.convdim"], stride=stride)
            x = x + y
    return F.linear(norm_relu(x, w, "bn").mean((2, 3)), w["fc.weight"], w["fc.bias"])


# --- RepDistiller's and mdistiller's WRN: modules -----------------------------------------------------


def repdistiller_weights(blocks: int, width: int, classes: int = 100) -> State:
    widths = [16, 16 * width, 32 * width, 64 * width]
    weights = {"conv1.weight": draw(16, 3, 3, 3)}
    for g in range(3):
        for b in range(blocks):
            name = f"block{g + 1}.layer.{b}"
            before, after = widths[g] if b == 0 else widths[g + 1], widths[g + 1]
            weights |= norm_params(f"{name}.bn1", before) | norm_params(f"{name}.bn2", after)
            weights[f"{name}.conv1.weight"] = draw(after, before, 3, 3)
            weights[f"{name}.conv2.weight"] = draw(after, after, 3, 3)
            weights[f"{name}.bn1.num_batches_tracked"] = torch.tensor(7)
            if before != after:
                weights[f"{name}.convShortcut.weight"] = draw(after, before, 1, 1)
    weights |= norm_params("bn1", widths[3])
    return weights | {"fc.weight": draw(classes, widths[3]), "fc.bias": draw(classes)}


def repdistiller_forward(w: State, blocks: int, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features of the groups, which are `feats[1:-1]` there, and logits."""
    feats = []
    out = F.conv2d(x, w["conv1.weight"], padding=1)
    for g in range(3):
        for b in range(blocks):
            name, stride = f"block{g + 1}.layer.{b}", 2 if g > 0 and b == 0 else 1
            pre = norm_relu(out, w, f"{name}.bn1")
            y = F.conv2d(pre, w[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(norm_relu(y, w, f"{name}.bn2"), w[f"{name}.conv2.weight"], padding=1)
            equal = f"{name}.convShortcut.weight" not in w
            out = y + (out if equal else F.conv2d(pre, w[f"{name}.convShortcut.weight"], stride=stride))
        feats.append(out)
    return feats, F.linear(norm_relu(out, w, "bn1").mean((2, 3)), w["fc.weight"], w["fc.bias"])


def mmrazor_weights(w: State) -> State:
    """RepDistiller's WRN under mmrazor's names: the same network."""
    names = {r"^block(\d)\.layer": r"layer\1", "convShortcut": "downsample"}
    for old, new in names.items():
        w = {re.sub(old, new, key): value for key, value in w.items()}
    return {("head." if key.startswith("fc.") else "backbone.") + key: value for key, value in w.items()}


# --- RepDistiller's and mdistiller's ResNets for CIFAR ------------------------------------------------


def small_resnet_weights(blocks: int, widths: list[int], classes: int = 100) -> State:
    weights = {"conv1.weight": draw(widths[0], 3, 3, 3)} | norm_params("bn1", widths[0])
    before = widths[0]
    for g, after in enumerate(widths[1:]):
        for b in range(blocks):
            name = f"layer{g + 1}.{b}"
            weights[f"{name}.conv1.weight"] = draw(after, before, 3, 3)
            weights[f"{name}.conv2.weight"] = draw(after, after, 3, 3)
            weights |= norm_params(f"{name}.bn1", after) | norm_params(f"{name}.bn2", after)
            weights[f"{name}.bn1.num_batches_tracked"] = torch.tensor(7)
            if b == 0 and (g > 0 or before != after):
                weights[f"{name}.downsample.0.weight"] = draw(after, before, 1, 1)
                weights |= norm_params(f"{name}.downsample.1", after)
            before = after
    return weights | {"fc.weight": draw(classes, widths[-1]), "fc.bias": draw(classes)}


def small_resnet_forward(w: State, blocks: int, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features of the groups, after the last ReLU, and logits."""
    feats = []
    x = norm_relu(F.conv2d(x, w["conv1.weight"], padding=1), w, "bn1")
    for g in range(3):
        for b in range(blocks):
            name, stride = f"layer{g + 1}.{b}", 2 if g > 0 and b == 0 else 1
            y = norm_relu(F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1), w, f"{name}.bn1")
            y = norm(F.conv2d(y, w[f"{name}.conv2.weight"], padding=1), w, f"{name}.bn2")
            if f"{name}.downsample.0.weight" in w:
                shortcut = F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride)
                x = norm(shortcut, w, f"{name}.downsample.1")
            x = (x + y).clamp(min=0)
        feats.append(x)
    return feats, F.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])


# --- the authors' ResNets for ImageNet ----------------------------------------------------------------


def authors_resnet_weights(blocks: list[int], width: float = 1, classes: int = 5) -> State:
    widths = [int(width * channels) for channels in (64, 128, 256, 512)]
    weights, before = {"conv0": draw(64, 3, 7, 7)} | norm_params("bn0", 64), 64
    for g, after in enumerate(widths):
        for b in range(blocks[g]):
            name = f"group{g}.block{b}"
            weights[f"{name}.conv0"], weights[f"{name}.conv1"] = (
                draw(after, before, 3, 3),
                draw(after, after, 3, 3),
            )
            weights |= norm_params(f"{name}.bn0", after) | norm_params(f"{name}.bn1", after)
            if before != after:
                weights[f"{name}.convdim"] = draw(after, before, 1, 1)
            before = after
    return weights | {"fc.weight": draw(classes, widths[-1]), "fc.bias": draw(classes)}


def authors_resnet_forward(w: State, blocks: list[int], x: Tensor) -> tuple[list[Tensor], Tensor]:
    feats = []
    x = F.max_pool2d(norm_relu(F.conv2d(x, w["conv0"], stride=2, padding=3), w, "bn0"), 3, 2, 1)
    for g, count in enumerate(blocks):
        for b in range(count):
            name, stride = f"group{g}.block{b}", 2 if g > 0 and b == 0 else 1
            y = norm_relu(F.conv2d(x, w[f"{name}.conv0"], stride=stride, padding=1), w, f"{name}.bn0")
            y = norm(F.conv2d(y, w[f"{name}.conv1"], padding=1), w, f"{name}.bn1")
            if f"{name}.convdim" in w:
                x = F.conv2d(x, w[f"{name}.convdim"], stride=stride)  # no BatchNorm
            x = (x + y).clamp(min=0)
        feats.append(x)
    return feats, F.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])


def check(path: Path, content: Any, expected: tuple[list[Tensor], Tensor], images: Tensor) -> None:
    """The model in `path` has their logits, and at its groups their features."""
    model = models.load_pretrained(path).double()
    load_state(model, _weights.find(content))  # in fp64, as the file has it
    with torch.no_grad(), at_fused.FeatureTaps(model, model.taps["groups"]) as taps:
        logits = model(images)
        torch.testing.assert_close([*taps.features, logits], [*expected[0], expected[1]])


STATISTICS = ("running_mean", "running_var")


def statistics_aside(weights: State) -> dict[str, Any]:
    """As the authors' first checkpoints: parameters and statistics apart."""
    stats = {key: value for key, value in weights.items() if key.endswith(STATISTICS)}
    return {
        "params": {key: weights[key] for key in weights.keys() - stats.keys()},
        "stats": stats,
        "epoch": 3,
    }


AUTHORS_FILES = {
    "flat": lambda w: w,
    "params": lambda w: {"params": w, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
    "params and stats": statistics_aside,
    "a student beside its teacher": lambda w: {
        "params": {f"student.{k}": v for k, v in w.items()}
        | {f"teacher.{k}": v for k, v in authors_weights(1, 3).items()}
    },
    "parameters": lambda w: {"params": {k: torch.nn.Parameter(v) for k, v in w.items()}},
}


@pytest.mark.parametrize("wrap", AUTHORS_FILES.values(), ids=AUTHORS_FILES.keys())
@pytest.mark.parametrize("blocks, width", [(2, 1), (1, 2)])
def test_authors_wrn(blocks: int, width: int, wrap: Any, tmp_path: Path) -> None:
    weights = authors_weights(blocks, width)
    torch.save(wrap(weights), tmp_path / "model.pt7")
    model = models.load_pretrained(tmp_path / "model.pt7").double()
    assert not model.training
    load_state(model, _weights.find(wrap(weights)))  # in fp64, as the file has it
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(images), authors_logits(weights, blocks, images))
    assert len(model.taps["blocks"]) == 3 * blocks


REPDISTILLER_FILES = {
    "RepDistiller": lambda w: {"epoch": 240, "model": w, "best_acc": 75.6, "optimizer": {}},
    "RepDistiller, last": lambda w: {"opt": argparse.Namespace(model="wrn_16_2", lr=0.05), "model": w},
    "mdistiller": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}, "epoch": 240},
    "mdistiller's distiller": lambda w: {
        "model": {f"module.student.{k}": v for k, v in w.items()}
        | {f"module.teacher.{k}": v for k, v in repdistiller_weights(1, 3).items()}
    },
}


@pytest.mark.parametrize("wrap", REPDISTILLER_FILES.values(), ids=REPDISTILLER_FILES.keys())
@pytest.mark.parametrize("blocks, width", [(2, 1), (1, 2)])
def test_repdistiller_wrn(blocks: int, width: int, wrap: Any, tmp_path: Path) -> None:
    weights = repdistiller_weights(blocks, width)
    torch.save(wrap(weights), tmp_path / "ckpt.pth")
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = repdistiller_forward(weights, blocks, images)
    check(tmp_path / "ckpt.pth", wrap(weights), expected, images)


SMALL_RESNETS = {
    "resnet8": (1, [16, 16, 32, 64]),
    "resnet20": (3, [16, 16, 32, 64]),
    "resnet8x4": (1, [32, 64, 128, 256]),
}


@pytest.mark.parametrize("wrap", REPDISTILLER_FILES.values(), ids=REPDISTILLER_FILES.keys())
@pytest.mark.parametrize("name", SMALL_RESNETS)
def test_repdistiller_resnet(name: str, wrap: Any, tmp_path: Path) -> None:
    blocks, widths = SMALL_RESNETS[name]
    weights = small_resnet_weights(blocks, widths)
    torch.save(wrap(weights), tmp_path / "ckpt.pth")
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    check(tmp_path / "ckpt.pth", wrap(weights), small_resnet_forward(weights, blocks, images), images)
    assert zoo_name(weights) == name


@pytest.mark.parametrize("blocks, width", [(2, 1), (1, 2)])
def test_mmrazor_wrn(blocks: int, width: int, tmp_path: Path) -> None:
    weights = repdistiller_weights(blocks, width)
    theirs, teacher = mmrazor_weights(weights), mmrazor_weights(repdistiller_weights(1, 3))
    content = {
        "state_dict": {f"architecture.{k}": v for k, v in theirs.items()}
        | {f"teacher.{k}": v for k, v in teacher.items()}
        | {"distiller.connectors.c.weight": draw(2, 2)},
        "meta": {"epoch": 3, "config": HistoryBuffer()},
    }
    torch.save(content, tmp_path / "epoch_3.pth")
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    check(tmp_path / "epoch_3.pth", content, repdistiller_forward(weights, blocks, images), images)


class HistoryBuffer:
    """Of a project that is not installed here."""


def test_openmmlab_resnet(tmp_path: Path) -> None:
    ours = models.create("resnet-18", 5).eval()
    theirs = {("head." if k.startswith("fc.") else "backbone.") + k: v for k, v in ours.state_dict().items()}
    torch.save({"state_dict": theirs}, tmp_path / "resnet18.pth")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(models.load_pretrained(tmp_path / "resnet18.pth")(images), ours(images))
    student = models.create("resnet-18", 7)
    own = student.fc.weight.clone()
    load_state(student, theirs, new_classifier=True)
    assert torch.equal(student.fc.weight, own)
    assert torch.equal(student.conv1.weight, ours.conv1.weight)


@pytest.mark.parametrize("depth, blocks", [(18, [2, 2, 2, 2]), (34, [3, 4, 6, 5])])
def test_authors_resnet(depth: int, blocks: list[int], tmp_path: Path) -> None:
    weights = authors_resnet_weights(blocks)
    content = {
        "params": {f"student.{k}": v for k, v in weights.items()}
        | {"teacher.conv0.weight": draw(64, 3, 7, 7)}
    }
    torch.save(content, tmp_path / "model.pt7")
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    check(tmp_path / "model.pt7", content, authors_resnet_forward(weights, blocks, images), images)
    assert zoo_name(weights) == zoo_name(models.create(f"authors-resnet-{depth}").state_dict())
    assert zoo_name(weights) == f"authors-resnet-{depth}"


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_torchvision_resnet(depth: int, tmp_path: Path) -> None:
    models.create("resnet-18")  # makes torchvision importable next to a CPU-only torch
    import torchvision.models

    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    ours = models.load_pretrained(tmp_path / "resnet.pth")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))
    assert ours.taps["groups"] == ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(
    "name",
    [
        *("wrn-10-2", "wrn-16-1", "resnet-34", "authors-resnet-18", "resnet20", "resnet8x4"),
        *("nin-thin", "nin-thin-nobn-rawpool"),
    ],
)
def test_own_weights_come_back(name: str, tmp_path: Path) -> None:
    model = models.create(name, num_classes=7, in_channels=1).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pt")
    again = models.load_pretrained(tmp_path / "model.pt", name if name.startswith("nin") else None)
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(again(images), model(images))


def test_prefixes_of_wrappers_are_dropped(tmp_path: Path) -> None:
    model = models.create("wrn-10-1").eval()
    for value in model.parameters():  # nothing that a new model would have of itself
        value.data = draw(*value.shape).float()
    state = dict(model.state_dict())
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."):
        torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pt")
        assert_equal(models.load_pretrained(tmp_path / "w.pt").state_dict(), state)
    model.group1[0] = torch.compile(model.group1[0])  # a part of it
    assert any("_orig_mod" in key for key in model.state_dict())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert_equal(models.load_pretrained(tmp_path / "w.pt").state_dict(), state)


def assert_equal(state: State, expected: State) -> None:
    assert state.keys() == expected.keys()
    different = [key for key in state if not torch.equal(state[key], expected[key])]
    assert not different


@pytest.mark.parametrize("outer", ["model", "state_dict"])
@pytest.mark.parametrize("inner", ["model", "state_dict", "params"])
def test_weights_are_found_in_nested_checkpoints(outer: str, inner: str) -> None:
    state = models.create("wrn-10-1").state_dict()
    assert _weights.find({"epoch": 3, outer: {"epoch": 3, inner: dict(state)}}).keys() == state.keys()


# --- refusals -----------------------------------------------------------------------------------------


def refusal(content: Any, folder: Path, name: str | None = None) -> str:
    torch.save(content, folder / "file.pt")
    with pytest.raises(ValueError) as error:
        models.load_pretrained(folder / "file.pt", name)
    assert "file.pt" in str(error.value)
    return str(error.value)


def test_partial_files_are_refused_by_their_own_keys(tmp_path: Path) -> None:
    weights = authors_weights(2, 1)
    del weights["group1.block1.bn1.running_var"], weights["group0.block0.conv0"]
    weights["group1.block0.convdim2"] = draw(1)
    text = refusal(weights, tmp_path, "wrn-16-1")
    assert "the authors' WRN" in text
    assert "2 missing: group0.block0.conv0, group1.block1.bn1.running_var" in text
    assert "1 unexpected: group1.block0.convdim2" in text
    theirs = repdistiller_weights(1, 1)
    del theirs["block3.layer.0.convShortcut.weight"], theirs["fc.bias"]
    assert "2 missing: block3.layer.0.convShortcut.weight, fc.bias" in refusal(theirs, tmp_path)
    without_statistics = statistics_aside(authors_weights(1, 1))
    del without_statistics["stats"]
    assert "14 missing: bn.running_mean, bn.running_var, group0.block0.bn0.running_mean" in refusal(
        without_statistics, tmp_path
    )


@pytest.mark.parametrize(
    "name, key",
    [
        ("wrn-16-2", "group1.0.conv1.weight"),
        ("resnet-50", "layer1.0.conv3.weight"),
    ],
)
def test_the_one_missing_key_is_told(name: str, key: str, tmp_path: Path) -> None:
    state = models.create(name).state_dict()
    del state[key]
    assert refusal(state, tmp_path).endswith(f"read as a model of the zoo: 1 missing: {key}")


def test_scalars_and_sparse_tensors_are_refused(tmp_path: Path) -> None:
    state, key = models.create("wrn-10-1").state_dict(), "group1.0.conv1.weight"
    assert f"1 shapes: {key} is (), not (16, 16, 3, 3)" in refusal(state | {key: torch.zeros(())}, tmp_path)
    assert f"1 sparse: {key}" in refusal(state | {key: state[key].to_sparse()}, tmp_path)


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    text = refusal(authors_weights(1, 1), tmp_path, "wrn-40-1")
    assert "missing: " in text
    assert " more" in text
    assert len(text) < 1500


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    weights = authors_weights(1, 1)
    weights["group2.block0.conv1"] = draw(64, 64, 5, 5)
    text = refusal(weights, tmp_path)
    assert "1 shapes: group2.block0.conv1 is (64, 64, 5, 5), not (64, 64, 3, 3)" in text


@pytest.mark.parametrize(
    "content, words",
    [
        ([1, 2], "no model weights"),
        ({}, "no model weights"),
        ({"model": {}}, "no model weights"),
        ({"epoch": 3}, "no model weights"),
        ({"conv9.weight": torch.zeros(1)}, "no known model, such as: conv9.weight"),
        (lambda: models.create("nin-thin").state_dict(), "name it"),
        (
            lambda: authors_weights(1, 1) | {"conv0": torch.zeros(3), "fc.weight": torch.zeros(())},
            "2 shapes: conv0 is (3,), not (16, 3, 3, 3), fc.weight is (), not (10, 64)",
        ),
    ],
)
def test_files_of_something_else_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    assert words in refusal(content() if callable(content) else content, tmp_path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        models.load_pretrained(tmp_path / "none.pt")
    torch.save(refusal, tmp_path / "code.pt")  # a function: must not be loaded
    (tmp_path / "text.pt").write_text("not weights")
    torch.save(models.create("wrn-10-1").state_dict(), tmp_path / "flipped.pt")
    content = bytearray((tmp_path / "flipped.pt").read_bytes())
    content[len(content) // 2] ^= 1  # within a weight: nothing else would tell
    (tmp_path / "flipped.pt").write_bytes(content)
    for name in ("code.pt", "text.pt", "flipped.pt"):
        with pytest.raises(ValueError, match=f"{name} is damaged, truncated or not a checkpoint"):
            models.load_pretrained(tmp_path / name)


# --- other architectures are named, not misread -----------------------------------------------------------


def torchvision_state(name: str) -> State:
    models.create("resnet-18")  # makes torchvision importable next to a CPU-only torch
    import torchvision.models

    return getattr(torchvision.models, name)(num_classes=5).state_dict()


def exported(weights: State) -> State:
    """As the authors' exported teachers: convolutions with biases, no BatchNorm."""
    kept = {key: value for key, value in weights.items() if ".bn" not in key}
    return {re.sub(r"(conv\d)$", r"\1.weight", key): value for key, value in kept.items()}


def torchdistill_weights() -> State:
    names = {r"^block(\d)\.layer": r"layer\1", "convShortcut": "shortcut.0"}
    weights = repdistiller_weights(2, 2)
    for old, new in names.items():
        weights = {re.sub(old, new, key): value for key, value in weights.items()}
    return weights


FOREIGN = {
    "a wide torchvision ResNet": (
        lambda: torchvision_state("wide_resnet50_2"),
        "resnet-50",
        "holds a ResNet of 3, 4, 6, 3 bottlenecks whose layer1.0.conv2.weight is (128, 128, 3, 3)",
    ),
    "a ResNeXt": (
        lambda: torchvision_state("resnext50_32x4d"),
        "resnet-50",
        "holds a ResNet of 3, 4, 6, 3 bottlenecks whose layer1.0.conv2.weight is (128, 4, 3, 3)",
    ),
    "another depth": (
        lambda: torchvision_state("resnet152"),
        "resnet-101",
        "holds a ResNet of 3, 8, 36, 3 bottlenecks",
    ),
    "a WRN of fractional width": (
        lambda: authors_weights(2, 1.5),
        "wrn-16-1",
        "holds a wide ResNet with groups of 24, 48, 96 channels; the zoo's have 16, 32, 64 times a whole",
    ),
    "an ImageNet ResNet of the authors, of half the width": (
        lambda: authors_resnet_weights([2, 2, 2, 2], 0.5),
        "resnet-18",
        "holds the authors' ImageNet ResNet with groups of 2, 2, 2, 2 blocks and 32, 64, 128, 256 channels",
    ),
    "an exported teacher of the authors": (
        lambda: exported(authors_resnet_weights([2, 2, 2, 2])),
        "wrn-16-1",
        "holds the authors' exported ResNet, with BatchNorm folded into its convolutions",
    ),
    "torchdistill's WRN": (
        torchdistill_weights,
        "wrn-16-2",
        "holds torchdistill's wide ResNet, whose shortcuts",
    ),
    "a ResNet for CIFAR of another width": (
        lambda: small_resnet_weights(1, [16, 32, 64, 128]),
        "resnet8",
        "holds a ResNet of 1, 1, 1 blocks and 32, 64, 128 channels; the zoo's resnet8 has 16, 32, 64",
    ),
}


@pytest.mark.parametrize("weights, name, words", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_architectures_are_named(weights: Any, name: str, words: str, tmp_path: Path) -> None:
    """Where the architecture is found from the file, and where the user has named a similar one."""
    state = weights()
    assert f"file.pt: {words}" in refusal(state, tmp_path)
    text = refusal(state, tmp_path, name)
    assert f"it {words}" in text
    assert "read as " in text
    assert "\n" not in text


def test_the_file_of_another_model_of_the_zoo_is_named(tmp_path: Path) -> None:
    assert "file.pt: it holds wrn-10-2; read as" in refusal(authors_weights(1, 2), tmp_path, "wrn-10-1")
    assert "it holds authors-resnet-18; read as" in refusal(
        authors_resnet_weights([2] * 4), tmp_path, "wrn-16-1"
    )
    resnet = models.create("resnet-18").state_dict()
    assert "it holds resnet-18; read as" in refusal(resnet, tmp_path, "resnet20")
    text = refusal(authors_resnet_weights([2] * 4), tmp_path, "resnet-18")
    assert "it holds authors-resnet-18; read as a model of the zoo: " in text
    assert "missing: bn1.bias, bn1.running_mean, bn1.running_var and " in text
    assert "unexpected: bn0.bias, bn0.running_mean, bn0.running_var and " in text


def test_unknown_keys_and_what_is_known(tmp_path: Path) -> None:
    text = refusal({"encoder.weight": torch.zeros(2, 2), "encoder.bias": torch.zeros(2)}, tmp_path)
    assert (
        "its 2 keys are of no known model, such as: encoder.bias, encoder.weight; known are those of wrn-D-K"
        in text
    )
